"""Facts hidden in long texts: true stories, the supports that count, questions about their row's facts."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from training_recipes import SMALL_TRAINING

from transformerfam import FamConfig, convert
from transformerfam.comparison import load_comparison, run_one
from transformerfam.comparison.figures import plot_comparison
from transformerfam.comparison.names import RunName
from transformerfam.comparison.report import cells, comparison_tables
from transformerfam.comparison.run import is_finished
from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.reports.rows import read_rows
from transformerfam.tasks import facts
from transformerfam.tasks.facts import PEOPLE, FactsText, Story, draw_story, words
from transformerfam.tasks.facts_evaluation import FactsEvaluation
from transformerfam.training.data.sequences import SequenceBuilder
from transformerfam.training.recipe.sections import ModelSection
from transformerfam.training.recipe.toml import build_recipe
from transformerfam.training.setup import build_trainee
from transformerfam.training.tiny import build_tiny_model, build_tiny_tokenizer

TOLD = "went to the|took the|left the"
SMALL_MODEL = {"base": "tiny-random", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def places_of(sentences: list[str], thing_or_person: str) -> list[str]:
    """Follow a person or thing through the sentences and return every place where it was, in order."""
    where: dict[str, str] = {}
    holder: str | None = None
    visited: list[str] = []
    for sentence in sentences:
        person, verb, _, noun = sentence.strip(" .").replace("went to", "went").split()
        if verb == "went":
            where[person] = noun
            if thing_or_person in (person, None) or holder == person:
                visited.append(noun)
        elif noun == thing_or_person:
            holder = person if verb == "took" else None
            if verb == "took":
                visited.append(where[person])
    return [place for i, place in enumerate(visited) if i == 0 or place != visited[i - 1]]


def answer_to(story: Story, sentences: list[str]) -> str:
    """Answer a story's question from some of its sentences."""
    if found := re.match(r" Where was the (\w+) before the (\w+)\?", story.question):
        visited = places_of(sentences, found[1])
        return visited[visited.index(found[2]) - 1]
    found = re.match(r" Where is (?:the )?(\w+)\?", story.question)
    assert found is not None
    return places_of(sentences, found[1])[-1]


@pytest.mark.parametrize("num_supports", [1, 2, 3])
def test_answer_follows_from_the_story_and_from_its_supports_alone(num_supports: int) -> None:
    """Catches a world that forgets, and supports that are not those from which the answer follows."""
    draw = random.Random(num_supports)
    answers = set()
    for _ in range(200):
        story = draw_story(draw, num_supports, 12)
        assert len(story.sentences) == 12
        assert len(story.supports) == num_supports
        assert answer_to(story, list(story.sentences)) == story.answer.strip()
        answers.add(story.answer)
    assert len(answers) == 6  # every place is an answer


def test_stories_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an endless search for a question that hardly exists."""
    with pytest.raises(TransformerFamError, match="num_supports is 4 and num_sentences 9, required is 1 to 3"):
        draw_story(random.Random(0), 4, 9)
    monkeypatch.setattr(facts, "MAX_TRIES", 1)
    with pytest.raises(TransformerFamError, match="in 3 sentences there is hardly ever a question with 3 supports"):
        draw_story(random.Random(0), 3, 3)


def test_story_is_hidden_whole_and_in_order() -> None:
    """Catches a sentence that is lost, cut or moved, and a distance to the wrong sentence."""
    tokenizer = build_tiny_tokenizer(words())
    text = FactsText(tokenizer)
    for seed in range(20):
        draw = random.Random(seed)
        story = draw_story(draw, 2, 8)
        hidden = text.hide(story, 100, draw)
        said = tokenizer.decode(hidden.ids_T.tolist())
        assert tokenizer.unk_token_id not in hidden.ids_T.tolist()
        places = []
        for sentence in story.sentences:
            places.append(said.index(sentence.strip(), places[-1] + 1 if places else 0))
        told = sum(len(tokenizer(sentence, add_special_tokens=False).input_ids) for sentence in story.sentences)
        assert len(hidden.ids_T) == 100 + told
        for support, distance in zip(story.supports, hidden.support_distances, strict=True):
            before = tokenizer.decode(hidden.ids_T[: len(hidden.ids_T) - distance].tolist())
            assert before.endswith(story.sentences[support].strip())
    with pytest.raises(TransformerFamError, match="the tokenizer does not know 'Mary'"):
        FactsText(build_tiny_tokenizer())


def test_training_rows_of_facts() -> None:
    """Catches rows of different lengths, and an answer with weight on the wrong tokens."""
    tokenizer = build_tiny_tokenizer(words())
    values: dict[str, Any] = {
        "model": SMALL_MODEL,
        "fam": {"block_size": 16, "fam_length": 2, "num_memory_segments": 0},
        "schedule": {"steps": 2, "batch_size": 4, "curriculum": [{"filler_tokens": [8, 32]}]},
        "data": {"facts": [1, 3], "fact_sentences": [8, 10]},
    }
    builder = SequenceBuilder(build_recipe(values), tokenizer)
    for step in range(8):
        batch = builder.batch(step, 0)
        for row in range(4):
            text = tokenizer.decode(batch.input_ids_BT[row].tolist())
            (places,) = batch.is_key_BT[row].nonzero(as_tuple=True)
            assert text.endswith(tokenizer.decode(batch.labels_BT[row, places].tolist()))
            assert len(places) == 1
            assert " Where " in text
    with pytest.raises(RecipeError, match=r"data.facts is \[1, 4\], required is 1 to 3"):
        build_recipe(values | {"data": {"facts": [1, 4]}})
    with pytest.raises(RecipeError, match="data.named_keys is a key of task .*, and the task is 'facts'"):
        build_recipe(values | {"data": {"facts": [1, 2], "named_keys": [1, 2]}})


def test_training_rows_ask_several_facts() -> None:
    """Catches further questions whose answers are another story's, and answers that are not weighed."""
    tokenizer = build_tiny_tokenizer(words())
    stage = {"filler_tokens": [0, 0], "data": {"fact_sentences": [5, 5]}}
    values: dict[str, Any] = {
        "model": SMALL_MODEL,
        "fam": {"block_size": 16, "fam_length": 2, "num_memory_segments": 0},
        "schedule": {"steps": 2, "batch_size": 4, "curriculum": [stage]},
        "data": {"facts": [1, 2], "fact_sentences": [8, 10], "facts_asked": [3, 3]},
    }
    builder = SequenceBuilder(build_recipe(values), tokenizer)
    for step in range(8):
        batch = builder.batch(step, 0)
        for row in range(4):
            ids = batch.input_ids_BT[row].tolist()
            told, *asked = tokenizer.decode(ids).split(" Where ")
            (places,) = batch.is_key_BT[row].nonzero(as_tuple=True)
            answers = tokenizer.decode(batch.labels_BT[row, places].tolist()).split()
            assert len(answers) == len(asked) > 1
            sentences = [f" {said}" for said in re.findall(rf"(?:{'|'.join(PEOPLE)}) [a-z ]+\.", told)]
            assert len(sentences) == 5
            for question, answer in zip(asked, answers, strict=True):
                said = question.removesuffix(".").removesuffix(f" {answer}")
                story = Story(
                    tuple(sentences), f" Where {said}", f" {answer}", (0,) if said.split()[1] in PEOPLE else (0, 1)
                )
                assert answer_to(story, sentences) == answer


def test_stories_are_hidden_in_a_novel() -> None:
    """Catches a vocabulary without the novel's words, and filler that is not the novel."""
    values: dict[str, Any] = {
        "model": SMALL_MODEL | {"vocabulary_from": "northanger_abbey"},
        "fam": {"block_size": 16, "fam_length": 2, "num_memory_segments": 0},
        "schedule": {"steps": 2, "batch_size": 4, "curriculum": [{"filler_tokens": [100, 100]}]},
        "data": {"facts": [1, 3], "fact_sentences": [8, 10], "fact_filler": "northanger_abbey"},
    }
    recipe = build_recipe(values)
    model, tokenizer = build_trainee(recipe)
    assert "Catherine" in tokenizer.get_vocab() or "▁Catherine" in tokenizer.get_vocab()
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    batch = SequenceBuilder(recipe, tokenizer).batch(0, 0)
    known = (batch.input_ids_BT != tokenizer.unk_token_id).float().mean()
    assert 0.6 < float(known) < 1


def test_evaluation_gives_a_row_per_question() -> None:
    """Catches rows that depend on how many texts are read side by side."""
    tokenizer = build_tiny_tokenizer(words())
    model = build_tiny_model(ModelSection(**SMALL_MODEL), len(tokenizer)).eval()
    convert(model, FamConfig(block_size=16, fam_length=2, num_memory_segments=0, fam_key_bias=0.0))
    options: dict[str, Any] = {"filler_lengths": [10, 50], "num_supports": [1, 2], "num_sentences": 6, "num_texts": 3}
    rows = list(FactsEvaluation(**options, batch_size=2).rows(model, tokenizer))
    assert len(rows) == 2 * 2 * 3
    assert all(len(row["support_distances"]) == row["num_supports"] for row in rows)
    assert rows == list(FactsEvaluation(**options, batch_size=3).rows(model, tokenizer))
    with pytest.raises(TransformerFamError, match=r"filler_lengths is \[\]"):
        FactsEvaluation(filler_lengths=[])


def test_rows_ask_later_for_facts_in_their_own_filler() -> None:
    """Catches a story that appears again, filler of another task, and a story that a state has read in part."""
    passing = {"probability": 1.0, "rows": "all", "ask_later": 1.0}
    values = {
        "model": SMALL_MODEL | {"vocabulary_from": "northanger_abbey"},
        "fam": {"block_size": 16, "fam_length": 2, "num_memory_segments": 0},
        "schedule": {"steps": 2, "batch_size": 3, "curriculum": [{"filler_tokens": [20, 60]}]},
        "state_passing": passing,
        "data": {"facts": [1, 2], "facts_asked": [2, 2], "fact_filler": "northanger_abbey"},
    }
    own = build_recipe(values)
    _, tokenizer = build_trainee(own)
    builder = SequenceBuilder(own, tokenizer)
    told = builder.batch(0, 0)
    later = builder.batch(1, 0, told.held)
    for row in range(3):
        (places,) = told.is_key_BT[row].nonzero(as_tuple=True)
        (again,) = later.is_key_BT[row].nonzero(as_tuple=True)
        assert told.labels_BT[row, places].tolist() == later.labels_BT[row, again].tolist()
        text = tokenizer.decode(later.input_ids_BT[row].tolist())
        assert text.count("Where") >= 1
        assert not re.search(TOLD, text)
        end = int(told.num_told_B[row])
        assert re.search(rf"({TOLD}) \w+\.$", tokenizer.decode(told.input_ids_BT[row, :end].tolist()))
        assert not re.search(TOLD, tokenizer.decode(told.input_ids_BT[row, end:].tolist()))
    assert len(set(told.num_told_B.tolist())) > 1
    assert not torch.equal(builder.filler(0, 30), later.input_ids_BT[:, :30])
    assert "grass" not in tokenizer.decode(builder.filler(0, 30)[0].tolist())


def test_repeated_tokens_are_words_of_stories() -> None:
    """Catches random tokens among thousands of words of a novel, which are not learned in a stage."""
    values = {
        "model": SMALL_MODEL | {"vocabulary_from": "northanger_abbey"},
        "fam": {"block_size": 16, "fam_length": 2, "num_memory_segments": 0},
        "schedule": {"steps": 2, "curriculum": [{"filler_tokens": [0, 0], "repeated_tokens": [20, 20]}]},
        "data": {"facts": [1, 1]},
    }
    own = build_recipe(values)
    _, tokenizer = build_trainee(own)
    batch = SequenceBuilder(own, tokenizer).batch(0, 0)
    said = {tokenizer.decode([token]).strip() for token in batch.input_ids_BT.unique().tolist()}
    assert len(said) > 10
    assert said <= set(words())


def test_comparison_of_facts(tmp_path: Path, short_bytes: None) -> None:
    """Catches questions of different kinds in one cell."""
    (tmp_path / "training.toml").write_text(SMALL_TRAINING + "[data]\nfacts = [1, 2]\n")
    (tmp_path / "small.toml").write_text(
        'recipe = "training.toml"\nsystems = ["fam", "infini"]\nnum_keys = 2\ntask = "facts"\nnum_supports = [1, 2]\n'
        "filler_tokens = [8, 24]\nnum_sentences = 6\n"
    )
    comparison = load_comparison(tmp_path / "small.toml")
    run_one(comparison, RunName("fam", 0), tmp_path / "runs")
    rows = read_rows([tmp_path / "runs" / "fam-0" / "rows.jsonl"])
    assert is_finished(comparison, RunName("fam", 0), rows)
    for row in rows:
        row["correct"] = row.get("num_supports") == 1
    assert cells(comparison, rows, 1)["fam"][8].by_seed == {0: 1}
    assert cells(comparison, rows, 2)["fam"][8].by_seed == {0: 0}
    assert len(comparison_tables(comparison, rows)) == 4
    plot_comparison(comparison, rows, tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert drawn.count("empty: infini") == 2
    for text in (">chance<", ">answers right<", ">novel that the story is hidden in (tokens)<"):
        assert drawn.count(text) == 2
    assert "key" not in drawn.replace("marker", "")
