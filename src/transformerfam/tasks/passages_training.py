"""Training on passages: what was read, questions on it when it is long gone, and other things to ask a memory for."""

import random
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.tasks.answers import NO_TEXT, Item, QuestionFile
from transformerfam.tasks.answers_evaluation import TEMPLATE
from transformerfam.tasks.batch import Held, Written
from transformerfam.tasks.filler import FillerStream
from transformerfam.tasks.question import Question
from transformerfam.tasks.ranges import Limits, LimitsFrom1, NotNegative, Share, Texts
from transformerfam.tasks.section import require
from transformerfam.tasks.text import encode, files_of, read_text
from transformerfam.tasks.writing import Asked, Drawn, TaskSection, Writer, asked_later, even_rows, with_filler

KINDS = ("answered", "unanswerable", "repeated", "pairs", "plain", "instructed")
"""What a row may be, each with its share in the section."""
PAIR, PAIR_QUESTION = "{name} is {value}.\n", "What is {name}?"
REPEAT = 'Repeat what came after "{words}"'

Pair = tuple[str, str]
"""A question and its answer."""


class PassagesSection(TaskSection):
    """Passages with questions, hidden in books, whose answers are predicted when the passage is out of sight."""

    fixed_keys: ClassVar[tuple[str, ...]] = (*TaskSection.fixed_keys, "questions", "texts", "passage_tokens")
    file_keys: ClassVar[tuple[str, ...]] = ("questions", "texts", "instructions")

    task: Literal["passages"] = "passages"
    """Passages and questions on them, repeated text, and lists of pairs, far apart."""
    questions: Texts
    """Files of questions in the form of `fam evaluate answers`, each with its text."""
    texts: Texts
    """UTF-8 `.txt` files, and folders for all of them in these and their folders: what passages are hidden in."""
    answered: NotNegative = 1.0
    """Weight of rows with a passage and questions on it. Each kind's share is its weight among all six."""
    unanswerable: NotNegative = 0.0
    """Weight of rows whose question is on another passage, and is to be answered by `no_answer`."""
    repeated: NotNegative = 0.0
    """Weight of rows that repeat what followed some words of a text that they have read."""
    pairs: NotNegative = 0.0
    """Weight of rows with a list of names and values, both drawn words, and questions for some of them."""
    plain: NotNegative = 0.0
    """Weight of rows of text alone, so that nothing is unlearned."""
    instructed: NotNegative = 0.0
    """Weight of rows that answer a task of `instructions`, which has nothing to do with the text, so that nothing is
    unlearned."""
    instructions: Texts = ()
    """Files of tasks in the form of `fam evaluate answers`, without a text: `question` is the task."""
    chat_share: Share = 0.0
    """Share of the rows with questions that ask them as turns of the tokenizer's chat template, and whose answers end
    with its last token; the others ask in plain words. Tasks of `instructions` are always turns where there is one."""
    no_answer: str = "The text does not say."
    """The answer to what the text does not have."""
    passage_prefix: Limits = (0, 0)
    """Least and most tokens of text before the passage; every row draws one number."""
    passage_tokens: LimitsFrom1 = (1, 400)
    """Least and most tokens of a passage; longer and shorter ones are left out."""
    questions_asked: LimitsFrom1 = (1, 1)
    """Least and most questions of a row, on one passage or list, in any order."""
    repeated_words: LimitsFrom1 = (8, 24)
    """Least and most words that are repeated."""
    listed_pairs: LimitsFrom1 = (2, 8)
    """Least and most pairs of a list."""

    @model_validator(mode="after")
    def _require_kinds(self) -> Self:
        require(any(self.weights), "every weight of data's kinds of rows is 0, required is one above 0")
        for key in ("questions", "texts", *(("instructions",) if self.instructed else ())):
            require(len(getattr(self, key)) > 0, f"data.{key} is empty, required is at least one file")
        require(bool(self.no_answer.strip()), "data.no_answer is empty, required is a sentence")
        return self

    @property
    def weights(self) -> list[float]:
        """The weights of `KINDS`."""
        return [getattr(self, kind) for kind in KINDS]


class PassagesWriter(Writer[PassagesSection]):
    """Hide passages in text, with questions long after them; see `Writer`."""

    def __init__(self, section: PassagesSection, tokenizer: Any, seed: int, ask_later: float) -> None:
        """Read questions and texts; arguments and errors are those of `Writer`."""
        super().__init__(section, tokenizer, seed, ask_later)
        passages = [items for items in _items(section.questions, "questions") if items[0].source != NO_TEXT]
        self.passages = [self._fitting(items) for items in passages]
        self.passages = [items for items in self.passages if items]
        if not self.passages:
            least, most = section.passage_tokens
            raise RecipeError(
                f"data.questions have no passage of {least} to {most} tokens with an answer; change data.passage_tokens"
            )
        if section.unanswerable and len(self.passages) == 1:
            raise RecipeError("data.questions have one passage, data.unanswerable requires two; set it to 0")
        self.has_turns = bool(getattr(tokenizer, "chat_template", None))
        if section.chat_share and not self.has_turns:
            raise RecipeError("data.chat_share is given, and the tokenizer has no chat template; set it to 0")
        if self.has_turns and (section.chat_share or section.instructed) and tokenizer.eos_token_id is None:
            raise RecipeError(
                "the tokenizer has a chat template and no eos_token, which ends a turn; set data.chat_share and "
                "data.instructed to 0"
            )
        tasks = [item for items in _items(section.instructions, "instructions") for item in items if item.answers]
        if section.instructed and not tasks:
            raise RecipeError("data.instructions have no task with an answer; name other files")
        self.tasks = tasks
        self.filler = _load_texts(tokenizer, section.texts)
        self.read = [self.filler]
        self.wording_ids = [token for items in self.passages for token in self._passage_ids(items[0])]
        self.end_ids = self._encode("\n")

    @cached_property
    def words(self) -> list[str]:
        """Words that are one token each, of which names and values are made.

        Raises:
            RecipeError: the tokenizer has too few of them.
        """
        words = list(dict.fromkeys(filter(None, map(self._word, range(len(self.tokenizer))))))
        required = 4 * self.section.listed_pairs[1]
        if len(words) < required:
            raise RecipeError(
                f"the tokenizer has {len(words)} words of one token, data.pairs requires {required} for a list; lower "
                "data.listed_pairs"
            )
        return words

    def rows(
        self, draw: random.Random, step: int, num_filler: int, section: PassagesSection, carried: Sequence[Held | None]
    ) -> Written:
        """Write the rows of a step, with so much text between passage and question; see `Writer.rows`."""
        draw = random.Random(f"{self.seed}/{step}/passages")
        later, drawn = random.Random(f"{self.seed}/{step}/later"), []
        kinds: dict[str, Callable[[random.Random, PassagesSection], tuple[list[int], list[Pair]]]] = {
            "answered": self._answered,
            "unanswerable": self._unanswerable,
            "repeated": self._repeated,
            "pairs": self._pairs,
            "instructed": self._instructed,
        }
        for held in carried:
            start = draw.randrange(1 << 30)
            kind = draw.choices(KINDS, section.weights)[0]
            if kind == "plain":
                plain = Drawn(partial(with_filler, [], self.filler, start), 0, Asked([], []), None, is_told=False)
                drawn.append(plain)
            elif later.random() < self.ask_later and held is not None:
                drawn.append(asked_later(held, self.filler, start, self.end_ids))
            else:
                passage_ids, pairs = kinds[kind](draw, section)
                in_turns = self.has_turns if kind == "instructed" else draw.random() < section.chat_share
                questions = [self._question(question, answer, in_turns) for question, answer in pairs]
                ids = self.filler.slice(start, draw.randint(*section.passage_prefix)).tolist() + passage_ids
                fill = partial(with_filler, ids, self.filler, start + len(ids))
                drawn.append(Drawn(fill, len(ids), Asked(questions, self.end_ids), None))
        return even_rows(drawn, num_filler)

    def _answered(self, draw: random.Random, section: PassagesSection) -> tuple[list[int], list[Pair]]:
        items = draw.choice(self.passages)
        asked = draw.sample(items, min(len(items), draw.randint(*section.questions_asked)))
        return self._passage_ids(items[0]), [(one.question, draw.choice(one.answers)) for one in asked]

    def _unanswerable(self, draw: random.Random, section: PassagesSection) -> tuple[list[int], list[Pair]]:
        passage, other = draw.sample(self.passages, 2)
        return self._passage_ids(passage[0]), [(draw.choice(other).question, section.no_answer)]

    def _repeated(self, draw: random.Random, section: PassagesSection) -> tuple[list[int], list[Pair]]:
        num_words, cue_words = draw.randint(*section.repeated_words), 6
        for _ in range(100):
            text = self.tokenizer.decode(self.filler.slice(draw.randrange(1 << 30), section.passage_tokens[1]).tolist())
            words = text.split()[1:-1]  # without those that the cut may have torn
            if len(words) >= num_words + cue_words:
                break
        else:
            raise RecipeError(
                f"texts of {section.passage_tokens[1]} tokens have no {num_words + cue_words} words; lower "
                "data.repeated_words, or raise data.passage_tokens"
            )
        at = draw.randrange(len(words) - num_words - cue_words + 1)
        cue = " ".join(words[at : at + cue_words])
        answer = " ".join(words[at + cue_words : at + cue_words + num_words])
        return self._encode("\n\n" + " ".join(words) + "\n\n"), [(REPEAT.replace("{words}", cue), answer)]

    def _pairs(self, draw: random.Random, section: PassagesSection) -> tuple[list[int], list[Pair]]:
        count = draw.randint(*section.listed_pairs)
        drawn = draw.sample(self.words, 4 * count)
        names = [" ".join(drawn[2 * n : 2 * n + 2]) for n in range(count)]
        values = [" ".join(drawn[2 * n : 2 * n + 2]) for n in range(count, 2 * count)]
        listed = "".join(PAIR.format(name=name, value=value) for name, value in zip(names, values, strict=True))
        chosen = draw.sample(range(count), min(count, draw.randint(*section.questions_asked)))
        asked = [(PAIR_QUESTION.format(name=names[n]), values[n]) for n in chosen]
        return self._encode("\n\n" + listed + "\n"), asked

    def _instructed(self, draw: random.Random, section: PassagesSection) -> tuple[list[int], list[Pair]]:
        task = draw.choice(self.tasks)
        return [], [(task.question, draw.choice(task.answers))]

    def _question(self, question: str, answer: str, in_turns: bool) -> Question:
        """Return a question and its answer, in a turn of a chat or in the plain words of `fam evaluate answers`."""
        if not in_turns:
            return Question.of(self._encode(TEMPLATE.replace("{question}", question)), self._encode(f" {answer}"))
        asked = [{"role": "user", "content": question}]
        turn = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        return Question.of(self._encode(turn), [*self._encode(answer), self.tokenizer.eos_token_id])

    def _passage_ids(self, item: Item) -> list[int]:
        return self._encode("\n\n" + item.whole_text().strip() + "\n\n")

    def _fitting(self, items: list[Item]) -> list[Item]:
        """Return the items of a passage that have answers, none where the passage is too long or too short."""
        items = [item for item in items if item.answers]
        least, most = self.section.passage_tokens
        return items if items and least <= len(self._passage_ids(items[0])) <= most else []

    def _word(self, token: int) -> str:
        """Return a token's word, empty where it is no whole word of letters."""
        word: str = self.tokenizer.decode([token]).strip().lower()
        is_word = word.isascii() and word.isalpha() and 3 <= len(word) <= 8
        ids = self._encode(f" {word}") if is_word else []
        return word if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id else ""

    def _encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)


def _items(files: Sequence[str], key: str) -> list[list[Item]]:
    """Return the items of every text of some files, those without one together.

    Raises:
        RecipeError: a file cannot be read, or is of another form.
    """
    found: list[list[Item]] = []
    for name in files:
        try:
            file = QuestionFile(name)
            found += [file.items(places) for places in file.texts()]
        except TransformerFamError as error:
            raise RecipeError(f"data.{key}: {error}") from error
    return found


def _load_texts(tokenizer: Any, names: Sequence[str]) -> FillerStream:
    """Tokenise texts, paragraph by paragraph: long ones at once make tokenizers slow.

    Raises:
        RecipeError: a file cannot be read, or none has a word.
    """
    key, tokens = "data.texts", []
    for path in files_of(names, key):
        try:
            text = read_text(path)
        except TransformerFamError as error:
            raise RecipeError(f"{key}: {error}") from error
        for paragraph in text.split("\n\n"):
            tokens += encode(tokenizer, paragraph + "\n\n") if paragraph.strip() else []
    if not tokens:
        raise RecipeError(f"{key} are {list(names)}, which have no word; name others")
    return FillerStream(tokens, ", ".join(names))
