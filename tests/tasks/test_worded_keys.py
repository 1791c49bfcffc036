"""Keys given in many wordings, anywhere and more than once."""

import itertools
import random
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from training_recipes import small_recipe
from transformers import PreTrainedTokenizerFast

from transformerfam.errors import RecipeError
from transformerfam.tasks.named_keys import draw_keys
from transformerfam.tasks.wordings import KEY, WordingBank
from transformerfam.training.data.sequences import SequenceBuilder

STAGES = [{"filler_tokens": [0, 40]}]
WORDED = {
    "task": "worded-keys",
    "named_keys": [2, 4],
    "retold_keys": [1, 1],
    "keys_asked": [1, 3],
    "keys_apart": [0, 60],
    "key_digits": [3, 8],
    "mentions": [1, 3],
    "other_numbers": 0.5,
    "prefix_tokens": [0, 90],
}


def byte_tokenizer():
    """Return a tokenizer that knows every text, byte by byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


TOKENIZER = byte_tokenizer()


@pytest.fixture
def books(tmp_path):
    (tmp_path / "one.txt").write_text("It was a fine day, and nobody was at home.\n\n" * 30, encoding="utf-8")
    return str(tmp_path)


def builder(books, **sections):
    data = WORDED | {"books": books} | sections.pop("data", {})
    return SequenceBuilder(
        small_recipe(data=data, schedule={"steps": 9, "batch_size": 6, "curriculum": STAGES}, **sections), TOKENIZER
    )


def named_builder(data):
    schedule = {"steps": 9, "batch_size": 6, "curriculum": STAGES}
    return SequenceBuilder(small_recipe(data={"named_keys": [2, 4], **data}, schedule=schedule), TOKENIZER)


def answers(batch, row):
    """Return the tokens that a row has to say, question by question, as text."""
    marks = batch.is_key_BT[row].int()
    starts = [i for i in range(len(marks)) if marks[i] and (i == 0 or not marks[i - 1])]
    found = []
    for start in starts:
        stop = next((i for i in range(start, len(marks)) if not marks[i]), len(marks))
        found.append(TOKENIZER.decode(batch.labels_BT[row, start:stop]))
    return found


def tellings(told):
    """Return the names and keys of a text in their order, found by the bank's own sentences."""
    bank = WordingBank.load()
    nouns = "|".join(sorted(map(re.escape, bank.nouns), key=len, reverse=True))
    owners = "|".join(sorted(map(re.escape, bank.owners), key=len, reverse=True))
    found = {}
    for template in (*bank.intros, *bank.changes):
        pattern = re.escape(template)
        for field, what in (("name", rf"(?:{nouns})(?: (?:{owners}))?"), ("key", r"\d{3,8}")):
            escaped = re.escape("{" + field + "}")
            pattern = pattern.replace(escaped, f"(?P<{field}>{what})", 1).replace(escaped, f"(?P={field})")
        for match in re.finditer(pattern, told):
            found[match.start()] = match["name"], match["key"]
    return [found[place] for place in sorted(found)]


def test_every_answer_is_the_key_that_its_text_told_last(books):
    """Would catch a key that is queried and was not given, or an outdated one that counts."""
    sequences, num_outdated, num_several, num_mentioned = builder(books), 0, 0, 0
    for step in range(12):
        batch = sequences.batch(step, 0)
        for row in range(6):
            told = tellings(TOKENIZER.decode(batch.input_ids_BT[row, : batch.num_told_B[row]]))
            newest = dict(told)
            said = answers(batch, row)
            asked = TOKENIZER.decode(batch.input_ids_BT[row, batch.num_told_B[row] :])
            for answer in said:
                name = next(name for name, key in newest.items() if f" {key}" == answer)
                assert name in asked
            num_several += len(said) > 1
            num_outdated += len(set(told)) > len(newest)
            num_mentioned += len(told) > len(set(told))
    assert num_outdated == 72
    assert min(num_several, num_mentioned) > 30


@pytest.mark.parametrize("kind", ["scenes", "passages"])
def test_keys_in_words_of_their_own_are_told_and_asked_for(tmp_path, kind):
    """Would catch a key that is queried and was not given, words of another key, and an outdated one that counts."""
    words = ("".join(letters) for letters in itertools.product("abcdefghijkl", repeat=4))
    (tmp_path / "one.txt").write_text(" ".join(words), encoding="utf-8")
    sequences, bank = builder(str(tmp_path), data={kind: 1.0}), WordingBank.load()
    questions = {tuple(scene[1:]) for scene in bank.scenes}
    for step in range(6):
        batch = sequences.batch(step, 0)
        for row in range(6):
            told = TOKENIZER.decode(batch.input_ids_BT[row, : batch.num_told_B[row]])
            asked = TOKENIZER.decode(batch.input_ids_BT[row, batch.num_told_B[row] :])
            for answer in answers(batch, row):
                before, words = asked.split(answer)[0], asked.split(answer)[0].split()
                if kind == "scenes":
                    (scene,) = {pair for pair in questions if before.endswith("".join(pair).split(f" {KEY}")[0])}
                    intro = next(intro for intro, *pair in bank.scenes if tuple(pair) == scene)
                    keys = re.findall(re.escape(intro).replace(re.escape(KEY), r"(\d+)"), told)
                else:  # the last three words in front of the question are those in front of the key
                    keys = re.findall(re.escape(" ".join(words[-3:])) + r"[ :(=]+(\d+)", told)
                assert f" {keys[-1]}" == answer


def test_scenes_are_told_apart_by_their_words():
    """Would catch two scenes with one question, and one in the words of a wording that is held out."""
    held_out = {"boarding", "traveller", "mare", "groom", "steward", "slate", "strongbox", "astronomers", "designation"}
    scenes = WordingBank.load().scenes
    assert len({tuple(pair) for _, *pair in scenes}) == len(scenes) == len({intro for intro, *_ in scenes})
    for intro, question, answer in scenes:
        assert intro.count(KEY) == answer.count(KEY) == 1 > question.count(KEY)
        assert not set(re.findall(r"\w+", f"{intro} {question} {answer}".lower())) & held_out


def test_rows_have_one_length_and_places_all_over_the_text(books):
    """Would catch keys at one place of a block alone."""
    sequences, places = builder(books, data={"named_keys": [1, 1], "retold_keys": [0, 0], "mentions": [1, 1]}), []
    for step in range(40):
        batch = sequences.batch(step, 0)
        assert batch.is_told_B.all()
        places += batch.num_told_B.tolist()
    assert len({place % 16 for place in places}) == 16


def test_what_a_memory_holds_is_asked_for_later_and_told_to_the_teacher(books):
    """Would catch a row that queries a key of another row, or a teacher that is not given it."""
    sequences = builder(books, state_passing={"probability": 1.0, "rows": "all", "ask_later": 1.0})
    first = sequences.batch(3, 0)
    later = sequences.batch(4, 0, list(first.held))
    assert not later.is_told_B.any()
    for row in range(6):
        assert answers(later, row) == answers(first, row)
        before = TOKENIZER.decode(later.input_ids_BT[row, : later.question_start])
        assert not any(answer.strip() in before for answer in answers(first, row))


def test_book_rows_ask_nothing(books):
    """Would catch text alone that is weighed as an answer."""
    batch = builder(books, data={"book": 1.0}).batch(0, 0)
    assert not batch.is_key_BT.any()
    assert batch.held == (None,) * 6
    assert batch.weights_BT.sum() == pytest.approx(0.1)


def test_bank_tells_and_asks_by_the_name():
    """Would catch an entry of the bank without its key or name, which teaches nothing."""
    bank, draw = WordingBank.load(), random.Random(0)
    for intro in (*bank.intros, *bank.changes):
        assert intro.count(KEY) >= 1 <= intro.count("{name}")
    for question, answer in bank.questions:
        assert answer.count(KEY) == 1
        assert answer.split(KEY)[0].endswith(" ")
        assert "{name}" in question + answer
    assert all("{number}" in sentence for sentence in bank.distractors)
    for _ in range(200):
        names = [name.name for name in bank.draw_names(draw, 8)]
        assert len(set(names)) == 8
        assert not any(a != b and b.startswith(a) for a in names for b in names)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"task": "worded-keys"}, "missing key data.named_keys in the recipe; add it"),
        (
            {"worded": True, "named_keys": [1, 2]},
            'data.worded of the recipe was removed: set data.task = "worded-keys"',
        ),
        (
            {"task": "named-keys", "named_keys": [1, 2], "mentions": [1, 2]},
            "data.mentions is a key of task 'worded-keys', and",
        ),
        (WORDED | {"mentions": [0, 2]}, r"data.mentions is \[0, 2\]"),
        (WORDED | {"other_numbers": 1.5}, "data.other_numbers is 1.5, required is 0 to 1"),
        (WORDED | {"scenes": 0.6, "passages": 0.5}, "data.scenes is 0.6 and data.passages 0.5, required are shares"),
        (WORDED | {"passages": -0.1}, "data.scenes is 0.0 and data.passages -0.1, required are shares"),
        ({"task": "passkey", "scenes": 0.5}, "data.scenes is a key of task 'worded-keys', and the task is 'passkey'"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(data, message):
    """Would catch a training that gives its keys in another way than its recipe says."""
    with pytest.raises(RecipeError, match=message):
        small_recipe(data=data)


def test_batch_depends_on_seed_and_step_alone(books):
    """Would catch a resumed run that sees other data."""
    first, second = (builder(books).batch(2, 0) for _ in range(2))
    assert torch.equal(first.input_ids_BT, second.input_ids_BT)


@pytest.mark.parametrize("worded", [True, False])
def test_share_of_keys_of_few_digits_is_heard_for_named_keys_too(books, worded):
    """Would catch `data.few_digits` that does nothing where keys have names."""
    draw = random.Random(0)
    keys = draw_keys(draw, 400, 7, 0.5)
    assert len(set(keys)) == 400
    assert 180 < sum(len(set(str(key))) <= 3 for key in keys) < 240
    data = {"few_digits": 1.0, "key_digits": [7, 7]}
    sequences = builder(books, data=data) if worded else named_builder(data)
    for row in range(6):
        for said in answers(sequences.batch(3, 0), row):
            assert len(set(re.search(r"\d{7}", said)[0])) <= 3
