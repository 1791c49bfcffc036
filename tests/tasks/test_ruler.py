"""RULER's tasks: the published words, a length that is never exceeded, and answers that follow from the text."""

import ast
import importlib
import importlib.util
import itertools
import random
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ruler_parts import NUM_ARTICLES, NUM_QUESTIONS, hotpotqa, squad, write_parts

from transformerfam.errors import CorruptFileError, MissingPackageError, TransformerFamError
from transformerfam.sources.questions import HELD_OUT
from transformerfam.sources.ruler import of_hotpotqa, of_squad
from transformerfam.sources.source import is_held_out
from transformerfam.tasks.answer_scores import score_answer
from transformerfam.tasks.haystack import Haystack, sentence_starts
from transformerfam.tasks.made_questions import Lengths, MadeQuestion, make_questions
from transformerfam.tasks.ruler import lists, niah, qa, ruler_tasks
from transformerfam.tasks.ruler.parts import Parts
from transformerfam.training.tiny import build_tiny_tokenizer

UNITS = {"niah_single_1": 35, "niah_multikey_2": 60, "niah_multikey_3": 120, "vt": 40, "qa_1": 80, "qa_2": 80}
"""Tokens of what a text is made of, where that is longer than a word."""
NAMES = (*niah.NEEDLES, "vt", "cwe", "fwe", "qa_1", "qa_2")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return Parts(write_parts(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def lengths() -> Lengths:
    return Lengths(build_tiny_tokenizer())


def made(parts: Parts, lengths: Lengths, name: str, num_tokens: int, num_items: int = 4) -> list[MadeQuestion]:
    return list(make_questions(ruler_tasks(parts)[name], lengths, num_tokens, num_items, 0))


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    """Import the published generators alone, with stand-ins for the slow packages that they load data with."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        pytest.skip("lm-eval is not installed")
    folder = Path(found.submodule_search_locations[0]) / "tasks" / "ruler"
    words = SimpleNamespace(_categories={kind: ["word"] for kind in ("noun", "adjective", "verb")})
    words._categories |= {f"{kind}s": ["word"] for kind in words._categories}
    stand_ins = {
        "lm_eval": {},
        "lm_eval.tasks": {},
        "lm_eval.tasks.ruler": {"__path__": [str(folder)]},
        "datasets": {"Dataset": None, "Split": None},
        "wonderwords": {"RandomWord": lambda: words},
        "nltk": {"sent_tokenize": None, "data": SimpleNamespace(find=lambda name: name)},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, values in stand_ins.items():
            module = ModuleType(name)
            module.__dict__.update(values)
            patch.setitem(sys.modules, name, module)
        names = ("common_utils", "cwe_utils", "fwe_utils", "prepare_niah", "qa_utils", "vt_utils")
        modules = {name: importlib.import_module(f"lm_eval.tasks.ruler.{name}") for name in names}
        for name in names:
            sys.modules.pop(f"lm_eval.tasks.ruler.{name}")
    return modules | {"niah_utils": (folder / "niah_utils.py").read_text()}


@pytest.mark.parametrize("name", NAMES)
def test_length_is_kept_and_nearly_reached(parts: Parts, lengths: Lengths, name: str) -> None:
    """Catches a text that the model cannot take, one that leaves room for more, and items that differ by chance."""
    for num_tokens in (1500, 2000):
        items = made(parts, lengths, name, num_tokens, 3)
        found = [lengths.of(item) for item in items]
        assert max(found) <= num_tokens
        assert min(found) > num_tokens - UNITS.get(name, 12)
        assert num_tokens == 2000 or items == made(parts, lengths, name, num_tokens, 3)
        assert len({item.text for item in items}) == len(items)
        assert len({item.id for item in items}) == len(items)
        assert {item.group for item in items} == {f"{name}, {num_tokens:,} tokens"}
    other = list(make_questions(ruler_tasks(parts)[name], lengths, 2000, 3, seed=1))
    assert [item.text for item in other] != [item.text for item in items]


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_in_the_text_and_scored_by_the_published_rule(
    parts: Parts, lengths: Lengths, name: str, published: dict[str, Any]
) -> None:
    """Catches an answer that was left out, and a score that is not the one people quote."""
    rules = published["common_utils"]
    for item in made(parts, lengths, name, 1500):
        assert all(answer in item.text for answer in item.answers)
        for said in ("", " ".join(item.answers).upper(), f"It is {item.answers[0]}."):
            found = score_answer(said, item.answers, item.scorer)["score"]
            if item.scorer == "all":
                assert found == pytest.approx(rules.string_match_all([said], [item.answers]), abs=1e-6)
            else:  # one answer at a time: lm-eval's rule is their mean, where RULER's own is the best
                best = max(rules.string_match_part([said], [[answer]]) for answer in item.answers)
                assert found == best


def test_needles_are_those_that_the_question_is_answered_by(parts: Parts, lengths: Lengths) -> None:
    """Catches a key twice with two values, too few needles, and a question for another key."""
    for name, task in niah.NEEDLES.items():
        for item in made(parts, lengths, name, 1500):
            pattern = rf"One of the special magic {task.values} for (\S+) is: (\S+)\."
            found = re.findall(pattern, item.text)
            keys = Counter(key for key, _ in found)
            assert set(keys.values()) == {task.num_values}
            assert len({value for _, value in found}) == len(found)
            assert len(found) >= task.num_keys * task.num_values
            assert task.haystack == "needle" or len(found) == task.num_keys * task.num_values
            (query,) = re.findall(r" for (.*) mentioned in the provided text\?", item.prompt)
            asked = re.split(r", and |, ", query)
            assert len(asked) == task.num_queries
            assert sorted(item.answers) == sorted(value for key, value in found if key in asked)
            assert (item.depth is not None) == (len(item.answers) == 1)
    places = [item.depth for item in made(parts, lengths, "niah_single_2", 1500, 12)]
    assert min(places) < 0.3 < 0.7 < max(places)


@pytest.mark.parametrize("name", niah.NEEDLES)
def test_needle_texts_are_the_published_ones(
    name: str, published: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches another wording, other places of needles, and a plural where one value is wanted."""
    judge, task = published["prepare_niah"], niah.NEEDLES[name]
    num_keys, size = task.num_keys, 120
    keys = [f"key-{number}" for number in range(num_keys)]
    values = [f"{number}7" for number in range(num_keys * task.num_values)]
    drawn = [part for key, of_key in zip(keys, _shared(values, num_keys), strict=True) for part in (key, *of_key)]
    noise = [(f"noise-{number}", f"{number}3") for number in range(size)]
    drawn += [part for pair in noise for part in pair] if task.haystack == "needle" else []
    depths = [90, 3, 51, 26][: len(values)]
    samples = [depths if task.haystack == "essay" else [*range(5, 5 + len(values))], [*range(task.num_queries)]]
    monkeypatch.setattr(judge, "generate_random", lambda kind: drawn.pop(0))
    text = " ".join(f"Word {number} is here. Is it?" for number in range(40))
    haystack = Haystack(text, "essays", is_shuffled=False)
    passage = haystack.passage(size, None)  # type: ignore[arg-type]
    monkeypatch.setattr(judge, "cached_sent_tokenize", _sentences)
    haystacks = {"essay": text.split(), "repeat": judge.get_haystack("repeat"), "needle": judge.NEEDLE}
    kinds = {"type_needle_k": task.keys, "type_needle_v": task.values, "type_haystack": task.haystack}
    numbers = {"num_needle_k": num_keys, "num_needle_v": task.num_values, "num_needle_q": task.num_queries}
    template = _template_of_needles(published["niah_utils"])
    with monkeypatch.context() as patch:
        patch.setattr(random, "sample", lambda *_: samples.pop(0))
        patch.setattr(random, "Random", Unshuffled)
        whole, answers, query = judge.generate_input_output(
            size, haystacks[task.haystack], template=template, **kinds, **numbers
        )
    pairs = [(key, value) for key, of_key in zip(keys, _shared(values, num_keys), strict=True) for value in of_key]
    needles = [niah.NEEDLE.format(kind=task.values, key=key, value=value) for key, value in pairs]
    if task.haystack == "essay":
        num_sentences = len(passage.sentence_starts(size))
        context = passage.with_hidden(size, sorted(int(num_sentences * depth / 100) for depth in depths), needles)
    else:
        lines = [niah.NEEDLE.format(kind=task.values, key=key, value=value) for key, value in noise]
        lines = [haystacks["repeat"]] * size if task.haystack == "repeat" else lines
        context = niah.among_lines(lines, needles, range(5, 5 + len(values)))
    item = niah.worded(task, context, keys[: task.num_queries], answers)
    kind = task.values[:-1] if len(answers) == 1 else task.values
    verb = "is" if len(answers) == 1 else "are"
    prefix = f" The special magic {kind} for {query} mentioned in the provided text {verb}"
    assert item.text + item.prompt == whole + prefix


def _shared(values: list[str], num_keys: int) -> list[list[str]]:
    number = len(values) // num_keys
    return [values[start : start + number] for start in range(0, len(values), number)]


def _sentences(text: str) -> list[str]:
    words = text.split()
    starts = [*sentence_starts(words), len(words)]
    return [" ".join(words[begin:end]) for begin, end in itertools.pairwise(starts)]


def _template_of_needles(source: str) -> str:
    """Return the template of a module that loads data when it is imported."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "TEMPLATE":
            return str(ast.literal_eval(node.value))
    raise AssertionError("no template")


class Unshuffled:
    """A source of chance that leaves what it is given in order."""

    def __init__(self, seed: Any = None) -> None: ...

    def shuffle(self, items: Any) -> None: ...


def test_variables_are_traced_in_the_published_words(
    parts: Parts, lengths: Lengths, published: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches another wording, an example that names what is asked, and a chain that is broken."""
    judge, places = published["vt_utils"], [2, 3, 7, 11, 19]
    names = ["AAAAA", "BBBBB", "CCCCC", "DDDDD", "EEEEE"]
    monkeypatch.setattr(judge, "generate_chains", lambda *_, **__: ([names], [lists.chain_of(names, "12345")]))
    with monkeypatch.context() as patch:
        patch.setattr(random, "sample", lambda *_: places)
        whole, answers = judge.generate_input_output(20, 1, lists.NUM_HOPS)
    own = lists.VT_TEXT.format(context=lists.track(lists.chain_of(names, "12345"), 20, places))
    own += lists.VT_QUESTION.format(value="12345") + lists.VT_ANSWER.format(number=5, value="12345")
    assert (own, names) == (whole, answers)
    for item in made(parts, lengths, "vt", 1500):
        *example, rest = item.text.split("Memorize and track")
        assert len(example) == 2
        assert re.search(r"they are:  ([A-Z]{3} ){4}[A-Z]{3}\n\n\n\n$", example[1])
        steps = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", rest)
        (value,) = re.findall(r"assigned the value (\d+)", item.prompt)
        assert [name for name, _ in steps] == list(item.answers)
        assert [target for _, target in steps] == [value, *item.answers[:-1]]


def test_common_words_are_listed_in_the_published_words(
    parts: Parts, lengths: Lengths, published: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches another wording, other numbers of repetitions, and an answer that is not the most common."""
    judge, words = published["cwe_utils"], [f"word{number}" for number in range(50)]
    still: Any = Unshuffled()
    monkeypatch.setattr(judge, "RNG", still)
    for num_tokens, shown, often in ((4000, (20, 3, 1), (6, 1)), (5000, (40, 10, 3), (30, 3))):
        with monkeypatch.context() as patch:
            patch.setattr(random, "sample", lambda _, number: words[:number])
            example, whole, answers = judge.generate_input_output(50, num_tokens)
        listed = [lists.word_list(words[:50], *often, still), lists.word_list(words[: shown[0]], *shown[1:], still)]
        asked = lists.CWE_QUESTION + lists.CWE_ANSWER
        assert lists.CWE_TEXT.format(context=listed[0]) + asked == whole
        assert lists.CWE_TEXT.format(context=listed[1]) + asked + lists.numbered(answers) == example
    for num_tokens, often in ((1500, {6, 1}), (5000, {30, 3})):
        for item in made(parts, lengths, "cwe", num_tokens, 2):
            _, example, rest = item.text.split("Below is a numbered list")
            assert "Answer: The top 10 words that appear most often in the list are:1. " in example
            counts = Counter(re.findall(r"\d+\. (\S+)", rest.partition("\n")[2]))
            assert {word for word, _ in counts.most_common(10)} == set(item.answers)
            assert set(counts.values()) == often


def test_coded_words_are_counted_in_the_published_words(
    parts: Parts, lengths: Lengths, published: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches another wording, other frequencies, and an answer that is not the most frequent."""
    judge = published["fwe_utils"]
    tokenizer = build_tiny_tokenizer()
    whole, _, num_words = judge.generate_input_output(1500, tokenizer, num_words=400, vocab_size=30)
    (text,) = re.findall(r"coded words\. (.*)\nQuestion", whole)
    assert lists.FWE_TEXT.format(context=text) + lists.FWE_QUESTION + lists.FWE_ANSWER == whole
    write, least, most = lists.prepare_fwe(1500, (0, 1), random.Random(0))
    counts = Counter(write(num_words).text.partition("coded words. ")[2].split())
    assert sorted(counts.values()) == sorted(Counter(text.split()).values())
    assert most is None
    for item in [write(least), *made(parts, lengths, "fwe", 1500)]:
        counts = Counter(item.text.partition("coded words. ")[2].split())
        (dots, _), *frequent = counts.most_common(5)
        assert dots == "..."
        assert [word for word, _ in frequent[:3]] == list(item.answers)
        assert frequent[2][1] > frequent[3][1]


def test_documents_are_asked_about_in_the_published_words(
    parts: Parts, lengths: Lengths, published: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches another wording, a document that is left out, and others that come before those of its article."""
    judge, documents = published["qa_utils"], ["One.", "Two.", "Three."]
    asked = [{"query": "Who?", "outputs": ["a"], "context": [0]}]
    with monkeypatch.context() as patch:
        patch.setattr(random, "Random", Unshuffled)
        whole, _ = judge.generate_input_output(0, 3, asked, documents)
    item = qa.worded(documents, "Who?", ("a",))
    assert item.text + item.prompt == f"{whole} {judge.CONFIG['answer_prefix']}"
    for item in made(parts, lengths, "qa_1", 500):
        (article, number) = re.findall(r"town (\d+) (\d)", item.prompt)[0]
        towns = re.findall(r"\nTown (\d+) (\d) was", item.text)
        assert (article, number) in towns
        assert sum(name == article for name, _ in towns) == min(4, len(towns))
        assert is_held_out(f"Towns {article}", HELD_OUT)
    for item in made(parts, lengths, "qa_2", 1500):
        (number,) = re.findall(r"river (\d+)", item.prompt)
        assert all(f"\n{kind} {number}\n" in item.text for kind in ("River", "Town", "Hill", "Lake"))


def test_questions_are_on_held_out_articles() -> None:
    """Catches a question whose article is trained on, and documents under another number."""
    data = of_squad(squad())
    assert len(data["documents"]) == 4 * NUM_ARTICLES
    assert len(data["questions"]) == 4 * sum(is_held_out(f"Towns {a}", HELD_OUT) for a in range(NUM_ARTICLES))
    for one in data["questions"]:
        assert one["answers"][1] in data["documents"][one["needed"][0]]
        assert len({*one["needed"], *one["related"]}) == 4
    data = of_hotpotqa(hotpotqa())
    assert 0 < len(data["questions"]) < NUM_QUESTIONS
    assert len(data["documents"]) == 4 * len(data["questions"])
    for one in data["questions"]:
        assert all(one["answers"][0] in data["documents"][number] for number in one["needed"])


def test_length_that_cannot_be_had_is_refused_with_one_that_can(parts: Parts, lengths: Lengths, tmp_path: Path) -> None:
    """Catches a text without its needles, and a length in the rows that no text has."""
    for name in NAMES:
        with pytest.raises(TransformerFamError, match=rf"{name}: a text of 30 tokens is too short, required are") as e:
            made(parts, lengths, name, 30)
        (least,) = re.findall(r"about ([\d,]+); change --tokens", str(e.value))
        assert lengths.of(made(parts, lengths, name, int(least.replace(",", "")), 1)[0]) > 30
    with pytest.raises(TransformerFamError, match="qa_1: a text of 50,000 tokens is too long, there is text for fewer"):
        made(parts, lengths, "qa_1", 50_000)
    with pytest.raises(TransformerFamError, match="ruler is not in .*; run fam data fetch ruler"):
        made(Parts(tmp_path), lengths, "niah_single_2", 1500)


def test_essays_that_repeat_are_said_to(parts: Parts, lengths: Lengths) -> None:
    """Catches a text read twice that rows do not tell from one that was not."""
    (item,) = made(parts, lengths, "niah_single_2", 20_000, 1)
    assert item.group == "niah_single_2, 20,000 tokens, essays repeat"
    assert 19_990 < lengths.of(item) <= 20_000


def test_missing_words_and_damaged_documents_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where a package is missing, or a file was edited."""
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(
        MissingPackageError, match=r'wonderwords has RULER.s words; pip install "transformerfam\[data\]"'
    ):
        Parts(tmp_path).words  # noqa: B018
    path = write_parts(tmp_path) / "ruler" / "test" / "squad.json"
    path.write_text("{" + " " * (path.stat().st_size - 2) + "}")
    with pytest.raises(CorruptFileError, match=r"squad.json has another form .*; remove its folder and run fam data"):
        Parts(tmp_path).documents("squad")
