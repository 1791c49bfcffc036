"""Questions answered from what was read: each text is read once, and every question on it asked of a copy."""

import itertools
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformerfam.decoder.memory import memory_of
from transformerfam.decoder.state import ReadingState
from transformerfam.errors import TransformerFamError
from transformerfam.tasks.answer_scores import require_scorers, score_answer
from transformerfam.tasks.answers import Item, QuestionFile
from transformerfam.tasks.controls import SWAPPED, control_of
from transformerfam.tasks.filler import FillerStream, load_filler
from transformerfam.tasks.likelihood import likeliest
from transformerfam.tasks.provenance import provenance, questions_of, weights_of
from transformerfam.tasks.ragged import greedy_tokens, side_by_side
from transformerfam.tasks.retrieval import bm25_index, retrieve
from transformerfam.tasks.text import encode_rest, encode_start, end_ids, start_ids
from transformerfam.tasks.unknown_words import require_filler, require_known, say_unknown, unknown_share

TASK = "answers"
QUESTION_ALONE, FULL_CONTEXT, BM25 = "question_alone", "full_context", "bm25"
"""Asked without the text; with all of it in sight; with those of its passages that match the question best, as many as
fit the window."""
WITHOUT_MEMORY = (QUESTION_ALONE, FULL_CONTEXT, BM25, "bswa")
TEMPLATE = "\n\nQuestion: {question}\nAnswer:"
READ_TOKENS = 4096
"""Of every row at once, from a text that is in memory."""

Finished = tuple[str, str, int]
"""System, item and tokens of filler of a question that was asked."""


@dataclass(kw_only=True)
class AnswersEvaluation:
    """Options of `fam evaluate answers`.

    Raises:
        TransformerFamError: an option is out of its range, or the template has no place for the question.
    """

    questions: QuestionFile
    systems: Sequence[str] = ("fam",)
    """The model's own system, `question_alone`, `bm25`, and controls of the system."""
    filler: str = "persuasion"
    """What the texts are hidden in."""
    filler_lengths: Sequence[int] = (0,)
    """Tokens of filler around every text, which has its own place in it."""
    max_new_tokens: int = 32
    """Of items that have no number themselves."""
    template: str = TEMPLATE
    """What a question looks like, and what comes before the answer, of items that have no prompt."""
    chat: bool = False
    """Ask as a user does, in the tokenizer's chat template, instead."""
    allow_unknown: bool = False
    batch_size: int = 4
    """Texts that are read side by side."""
    seed: int = 0
    model_name: str = "unnamed"
    finished: Collection[Finished] = ()
    progress: Callable[[float], None] | None = None
    """Called with the questions done, of `num_questions`; a part of one while a text is read."""

    def __post_init__(self) -> None:
        for name, value, least in (("batch_size", self.batch_size, 1), ("max_new_tokens", self.max_new_tokens, 1)):
            if value < least:
                raise TransformerFamError(f"{name} is {value}, required is at least {least}")
        if not self.filler_lengths or min(self.filler_lengths) < 0:
            raise TransformerFamError(f"filler_lengths is {list(self.filler_lengths)}, required are numbers from 0")
        if "{question}" not in self.template:
            raise TransformerFamError(f"the template is {self.template!r}, required is {{question}} in it")
        for name in self.systems:
            control = control_of(name)
            if control is not None and control[0] in WITHOUT_MEMORY:
                raise TransformerFamError(
                    f"system {name!r} changes a memory, and {control[0]} has none; take a control of another system"
                )
        if len(self.questions.texts()) < 2 and self._swaps:
            raise TransformerFamError(
                f"{self.questions.path} asks about one text, and a swapped memory is that of another; give two texts"
            )

    @property
    def _swaps(self) -> bool:
        return any(name.endswith(SWAPPED) for name in self.systems)

    @property
    def num_questions(self) -> int:
        """How often something is asked."""
        return len(set(self.filler_lengths)) * len(self.questions) * len(self.systems)

    def rows(self, model: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
        """Read, ask, and yield one row a question and system.

        Args:
            model: a model with a memory.
            tokenizer: its tokenizer.

        Raises:
            TransformerFamError: a text cannot be read, or the tokenizer knows too little of it.
            MissingPackageError: a package that scores or retrieves is not installed.
        """
        filler = self.require_tokens(tokenizer)
        batches = self._batches()
        done = 0
        for length in sorted(set(self.filler_lengths)):
            for places in batches:
                items = [self.questions.items(of_text) for of_text in places]
                names = [item.name for of_text in items for item in of_text]
                todo = [
                    (system, name)
                    for system in self.systems
                    for name in names
                    if (system, name, length) not in self.finished
                ]
                done += len(names) * len(self.systems) - len(todo)
                if todo:
                    for row in self._batch(model, tokenizer, items, filler, length, set(todo), done):
                        done += 1
                        yield row
                if self.progress is not None:
                    self.progress(done)

    def require_tokens(self, tokenizer: Any) -> FillerStream | None:
        """Check that packages and tokenizer have what the evaluation needs, and return the filler.

        Raises:
            TransformerFamError: the tokenizer has no chat template, or knows too little of the filler.
            MissingPackageError: a package that scores or retrieves is not installed.
        """
        require_scorers(self.questions.scorers)
        if BM25 in self.systems:
            bm25_index()
        if self.chat and not tokenizer.chat_template:
            raise TransformerFamError("the tokenizer has no chat template; ask without --chat")
        filler = self.load_filler(tokenizer)
        if filler is not None and not self.allow_unknown:
            require_filler(tokenizer, filler)
        return filler

    def load_filler(self, tokenizer: Any) -> FillerStream | None:
        """Return what the texts are hidden in; None where no length asks for any."""
        return load_filler(tokenizer, self.filler) if max(self.filler_lengths) else None

    def _batches(self) -> list[list[list[tuple[int, int]]]]:
        """Part the texts into batches; where memories are swapped, each with the text that it swaps with.

        Those are the first and the second, the third and the fourth, whatever the size of a batch; a last one that is
        left takes the memory of the one before it.
        """
        texts = self.questions.texts()
        size = self.batch_size + self.batch_size % 2 if self._swaps else self.batch_size
        starts = list(range(0, len(texts), size))
        if self._swaps and len(texts) - starts[-1] == 1:
            starts.pop()
        return [texts[begin:end] for begin, end in itertools.pairwise([*starts, len(texts)])]

    def _batch(
        self,
        model: Any,
        tokenizer: Any,
        items: list[list[Item]],
        filler: FillerStream | None,
        length: int,
        todo: set[tuple[str, str]],
        done: int,
    ) -> Iterator[dict[str, Any]]:
        texts = [self._encoded(tokenizer, of_text[0]) for of_text in items]
        hidden = [self._hidden(text, of_text[0], filler, length) for text, of_text in zip(texts, items, strict=True)]
        states: dict[str, ReadingState] = {}
        for system in dict.fromkeys(system for system, _ in todo):
            if system in (QUESTION_ALONE, BM25):
                continue
            if not states:
                states[""] = self._read(model, [self._begun(tokenizer, ids) for ids, _ in hidden], done)
            states[system] = self._changed(system, states[""])
        for row, of_text in enumerate(items):
            ids, depth = hidden[row]
            for item in of_text:
                for system in self.systems:
                    if (system, item.name) not in todo:
                        continue
                    if system in states:
                        state = states[system].select([row])
                    else:
                        state = self._fresh(model, tokenizer, ids if system == BM25 else None, item)
                    num_bytes = state.num_bytes
                    fields = self._asked(model, tokenizer, item, state)
                    yield {
                        "task": TASK,
                        "system": system,
                        "model": self.model_name,
                        "seed": self.seed,
                        "file": self.questions.path.name,
                        "item": item.name,
                        "group": item.group,
                        "filler": "" if filler is None or not length else filler.name,
                        "filler_tokens": length,
                        "depth": item.depth if depth is None else depth,
                        "context_tokens": len(ids),
                        "state_bytes": num_bytes,
                        "kv_bytes": len(ids) * kv_bytes_per_token(model),
                        "question": item.question,
                        "wanted": list(item.answers),
                        **fields,
                        **self.fields_of_questions(None if filler is None else filler.digest, length),
                        **weights_of(model),
                        **provenance(),
                    }

    def _changed(self, system: str, state: ReadingState) -> ReadingState:
        """Return what a system is asked of: the reading, or that with another memory."""
        control = control_of(system)
        if control is None:
            return state
        if not system.endswith(SWAPPED):
            return control[1](state.fork())
        last = state.batch_size - 1
        pairs = [(row, row ^ 1 if row ^ 1 <= last else row - 1) for row in range(last + 1)]
        # Each row takes the memory of the one before it: its partner.
        swapped = control[1](state.select([row for pair in pairs for row in reversed(pair)]))
        return swapped.select([2 * row + 1 for row in range(last + 1)])

    def fields_of_questions(self, filler_digest: str | None, length: int) -> dict[str, str]:
        """Return the field `questions` of rows, which distinguishes them from others of their names."""
        asked = "chat" if self.chat else self.template
        digest = filler_digest if length else None
        return questions_of(self.questions.digest.hexdigest(), asked, self.max_new_tokens, digest)

    @staticmethod
    def _begun(tokenizer: Any, ids: Tensor) -> Tensor:
        """Return a text with the tokens that the tokenizer begins texts with; nothing where there is no text."""
        return torch.cat((torch.tensor(start_ids(tokenizer), dtype=torch.long), ids)) if len(ids) else ids

    def _encoded(self, tokenizer: Any, item: Item) -> Tensor:
        ids = encode_rest(tokenizer, item.whole_text())
        if ids and not self.allow_unknown:
            share = unknown_share(tokenizer, ids)
            require_known(share, f"the text of {item.name}", "allow unknown words (--allow-unknown)")
        return torch.tensor(ids, dtype=torch.long)

    def _hidden(
        self, text: Tensor, item: Item, filler: FillerStream | None, length: int
    ) -> tuple[Tensor, float | None]:
        """Return a text in filler, and the share of the filler that comes before it."""
        if filler is None or length == 0:
            return text, None
        draw = random.Random(f"{self.seed}/{length}/{item.source}/answers")
        before, start = draw.randint(0, length), draw.randrange(len(filler))
        parts = (filler.slice(start, before), text, filler.slice(start + before, length - before))
        return torch.cat(parts), round(before / length, 4)

    def _read(self, model: Any, texts: list[Tensor], done: int) -> ReadingState:
        """Read the texts of a batch side by side."""
        report, ends = self.progress, [len(ids) for ids in texts]
        if not max(ends):
            begun: ReadingState = model.init_state(len(texts))
            return begun

        def move(num_tokens: int, _: Any, state: ReadingState) -> None:
            assert report is not None
            report(done + min(0.99, num_tokens / max(ends)))

        slices = [lambda begin, end, ids=ids: ids[begin:end] for ids in texts]
        pieces = side_by_side(slices, [0] * len(texts), ends, READ_TOKENS)
        state: ReadingState = model.read(pieces, progress=False if report is None else move)
        return state

    def _fresh(self, model: Any, tokenizer: Any, ids: Tensor | None, item: Item) -> ReadingState:
        """Return a state that has read nothing, or what was retrieved for a question."""
        state: ReadingState = model.init_state()
        if ids is None:
            return state
        config = memory_of(model).config
        window = config.block_size * (1 + getattr(config, "num_memory_segments", 0))
        endings = [len(encode_rest(tokenizer, f" {choice}")) for choice in item.choices]
        num_question = len(self._question_ids(tokenizer, item, False))
        longest = max(endings, default=item.max_new_tokens or self.max_new_tokens)
        left = window - num_question - longest
        if left < 1 and len(ids):
            raise TransformerFamError(
                f"the window of {window} tokens has no room for passages with the question of {item.name} "
                f"({num_question} tokens) and its answer (up to {longest}); ask for shorter answers "
                "(--max-new-tokens), or leave bm25 out"
            )
        read = self._begun(tokenizer, retrieve(tokenizer, ids, item.question, left))
        if len(read):
            model.read(read[None], state, progress=False)
        return state

    def _question_ids(self, tokenizer: Any, item: Item, begins: bool) -> list[int]:
        """Return the tokens of a question; the one that begins a text has the special tokens of that."""
        text = item.prompt or self.template.replace("{question}", item.question)
        if self.chat:
            messages = [{"role": "user", "content": item.prompt.strip() or item.question}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return encode_start(tokenizer, text.lstrip()) if begins else encode_rest(tokenizer, text)

    @torch.no_grad()
    def _asked(self, model: Any, tokenizer: Any, item: Item, state: ReadingState) -> dict[str, Any]:
        """Ask a question; the state advances."""
        question = self._question_ids(tokenizer, item, begins=state.num_tokens_read == 0)
        say_unknown(tokenizer, encode_rest(tokenizer, " ".join((item.question, *item.choices))), "a question")
        if item.choices:
            chosen = item.choices[likeliest(model, tokenizer, question, item.choices, state)]
            right = chosen in item.answers
            return {"answer": chosen, "num_choices": len(item.choices), "correct": right}
        ends = end_ids(tokenizer, model.generation_config.eos_token_id)
        most = item.max_new_tokens or self.max_new_tokens
        said = greedy_tokens(model, torch.tensor([question]), state, most, end_ids=ends)
        answer = str(tokenizer.decode(said[0], skip_special_tokens=True)).strip()
        if item.first_line and (item.prompt or not self.chat):
            answer = answer.partition("\n")[0].strip()
        return {"answer": answer, **score_answer(answer, item.answers, item.scorer)}


def kv_bytes_per_token(model: Any) -> int:
    """Return the bytes that a token takes in the key/value cache of the model without a memory."""
    entries = sum(
        sum(heads * width for heads, width in (layout.key_shape, layout.value_shape))
        for layout in memory_of(model).layouts
    )
    return entries * int(next(model.parameters()).element_size())


def finished_questions(rows: Sequence[dict[str, Any]], evaluation: AnswersEvaluation, tokenizer: Any) -> set[Finished]:
    """Return the questions of an evaluation that rows answer already."""
    filler, lengths = evaluation.load_filler(tokenizer), evaluation.filler_lengths
    digest = None if filler is None else filler.digest
    own = {length: evaluation.fields_of_questions(digest, length)["questions"] for length in lengths}
    return {
        (row["system"], row["item"], row["filler_tokens"])
        for row in rows
        if row["task"] == TASK
        and (row["model"], row["seed"]) == (evaluation.model_name, evaluation.seed)
        and row["questions"] == own.get(row["filler_tokens"])
    }
