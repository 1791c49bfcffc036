"""Several keys by their names: texts, training sequences, and what is measured."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from training_recipes import SMALL_TRAINING

from transformerfam import FamConfig, convert
from transformerfam.comparison import Comparison, load_comparison, run_one
from transformerfam.comparison import named_keys as comparison_named_keys
from transformerfam.comparison.figures import plot_comparison
from transformerfam.comparison.named_keys import capacities
from transformerfam.comparison.names import RunName
from transformerfam.comparison.report import comparison_tables
from transformerfam.comparison.run import is_finished
from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.reports.rows import read_rows
from transformerfam.tasks.named_keys import NAMES, NamedKeysText, Telling, draw_named_keys
from transformerfam.tasks.named_keys_evaluation import NamedKeysEvaluation
from transformerfam.training.data.sequences import SequenceBuilder
from transformerfam.training.recipe.sections import ModelSection
from transformerfam.training.recipe.toml import build_recipe
from transformerfam.training.state_passing import SavedFam
from transformerfam.training.tiny import build_tiny_model, build_tiny_tokenizer
from transformerfam.training.trainer import Trainer

SMALL_MODEL = {"base": "tiny-random", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def recipe(stages: Any = ({"filler_tokens": [8, 32]},), **data: Any) -> Any:
    values = {
        "model": SMALL_MODEL,
        "fam": {"block_size": 16, "fam_length": 2, "num_memory_segments": 0},
        "schedule": {"steps": 2, "batch_size": 4, "curriculum": list(stages)},
        "data": {"named_keys": [1, 3]} | data,
    }
    return build_recipe(values)


def test_text_tells_every_key_and_asks_for_the_newest() -> None:
    """Catches a question whose answer is an outdated key, and words that the tiny model does not know."""
    tokenizer = build_tiny_tokenizer()
    text = NamedKeysText(tokenizer)
    keys = draw_named_keys(random.Random(3), 4, 2, apart=(1, 9))
    ids = text.intro_ids(keys)
    told = tokenizer.decode(ids)
    assert tokenizer.unk_token_id not in ids
    assert len(keys.tellings) == 6
    assert len(keys.newest) == 4
    assert len(keys.outdated) == 2
    for telling in keys.tellings:
        assert f" The pass key of {NAMES[telling.name]} is {telling.key}." in " " + told
    for name, old in keys.outdated.items():
        assert keys.newest[name] not in old
        assert told.rindex(str(keys.newest[name])) > told.rindex(str(old[0]))
    assert list(keys.newest)[-1] == keys.tellings[-1].name
    question = tokenizer.decode(text.question_ids(0))
    assert question == " What is the pass key of grass? The pass key of grass is"
    with pytest.raises(TransformerFamError, match="num_told is 17 and num_retold 0, required is 1 to 16"):
        draw_named_keys(random.Random(0), 17)


def test_training_rows_ask_for_one_of_their_keys() -> None:
    """Catches rows of different length, an answer that is not the text's last one, and weights on other tokens."""
    tokenizer = build_tiny_tokenizer()
    own = recipe(retold_keys=[0, 2], keys_apart=[0, 5], prefix_tokens=[0, 4])
    builder = SequenceBuilder(own, tokenizer)
    for step in range(12):
        batch = builder.batch(step, 0)
        assert torch.equal(batch.input_ids_BT, builder.batch(step, 0).input_ids_BT)
        for row, key in enumerate(batch.keys):
            text = tokenizer.decode(batch.input_ids_BT[row].tolist())
            assert text.endswith(f" is {key}")
            name = text.rsplit("? The pass key of ", 1)[1].split(" is ")[0]
            last = text.rsplit("What is the pass key of", 1)[0].rsplit(f"The pass key of {name} is ", 1)[1]
            assert last.startswith(str(key))
            (places,) = batch.is_key_BT[row].nonzero(as_tuple=True)
            answer = tokenizer.decode(batch.labels_BT[row, places].tolist())
            assert answer.strip() == str(key)
        assert batch.question_start <= batch.input_ids_BT.shape[1] - len(["What", "is"])


def test_training_rows_ask_for_several_keys() -> None:
    """Catches answers of earlier questions without weight, or weighed next to their place, and tokens weighed twice."""
    tokenizer = build_tiny_tokenizer()
    builder = SequenceBuilder(recipe(named_keys=[3, 5], keys_asked=[2, 4], retold_keys=[1, 1]), tokenizer)
    numbers = set()
    for step in range(12):
        batch = builder.batch(step, 0)
        for row, key in enumerate(batch.keys):
            ids = batch.input_ids_BT[row].tolist()
            told, *asked = tokenizer.decode(ids).split(" What is the pass key of ")
            numbers.add(len(asked))
            answers = [part.rsplit(" is ", 1)[1].rstrip(".") for part in asked]
            names = [part.split("?")[0] for part in asked]
            assert len(set(names)) == len(names)
            for name, answer in zip(names, answers, strict=True):
                assert told.rsplit(f"The pass key of {name} is ", 1)[1].startswith(f"{answer}.")
            assert answers[-1] == str(key)
            (places,) = batch.is_key_BT[row].nonzero(as_tuple=True)
            assert tokenizer.decode(batch.labels_BT[row, places].tolist()).split() == answers
            (others,) = ((batch.weights_BT[row] > 0) & ~batch.is_key_BT[row]).nonzero(as_tuple=True)
            assert max(others) < batch.question_start
            assert tokenizer.decode(ids[batch.question_start :]).count("What is") == len(asked)
    assert numbers == {2, 3, 4}


def test_stages_tell_more_and_more_keys() -> None:
    """Catches a stage whose own number of keys is not used, and numbers of keys that cannot be given."""
    tokenizer = build_tiny_tokenizer()
    stages = ({"filler_tokens": [8, 32], "data": {"named_keys": [1, 1]}}, {"filler_tokens": [8, 32]})
    builder = SequenceBuilder(recipe(stages, named_keys=[4, 4]), tokenizer)
    for stage, number in ((0, 1), (1, 4)):
        text = tokenizer.decode(builder.batch(0, stage).input_ids_BT[0].tolist())
        assert text.count(" The pass key of") == number + 1
    with pytest.raises(RecipeError, match=r"schedule.curriculum.0: data.named_keys is \[1, 17\], required is 1 to 16"):
        recipe(({"filler_tokens": [8, 32], "data": {"named_keys": [1, 17]}},))
    with pytest.raises(RecipeError, match="curriculum.0: data.facts is a key of task 'facts', and the task is"):
        recipe(({"filler_tokens": [8, 32], "data": {"facts": [1, 1]}},))
    with pytest.raises(RecipeError, match=r"data.keys_asked is \[0, 1\], required is 1 <= low"):
        recipe(keys_asked=[0, 1])


def test_stages_have_keys_of_their_own_length() -> None:
    """Catches a stage whose number of digits is not used, and more keys than there are of so few digits."""
    tokenizer = build_tiny_tokenizer()
    stages = ({"filler_tokens": [8, 32], "data": {"key_digits": [1, 1]}}, {"filler_tokens": [8, 32]})
    builder = SequenceBuilder(recipe(stages, key_digits=[3, 3]), tokenizer)
    for stage, digits in ((0, 1), (1, 3)):
        assert {len(str(key)) for step in range(4) for key in builder.batch(step, stage).keys} == {digits}
    with pytest.raises(RecipeError, match="give up to 11 different keys of 1 digits, of which there are 9"):
        recipe(stages, named_keys=[1, 8], retold_keys=[0, 3])
    with pytest.raises(RecipeError, match=r"curriculum.0: data.key_digits is \[0, 1\], required is 1 <= low"):
        recipe(({"filler_tokens": [8, 32], "data": {"key_digits": [0, 1]}},))


def test_rows_ask_later_for_what_a_state_holds(tmp_path: Path) -> None:
    """Catches rows that give what they query later, query something else, or forget it over a checkpoint."""
    tokenizer = build_tiny_tokenizer()
    passing = {"probability": 1.0, "rows": "all", "ask_later": 1.0, "before_question": True}
    values = recipe(named_keys=[3, 3], keys_asked=[2, 2]).to_dict() | {"state_passing": passing}
    own = build_recipe(values)
    builder = SequenceBuilder(own, tokenizer)
    told = builder.batch(0, 0)
    num_told = 3 * len(NamedKeysText(tokenizer).told_ids(Telling(0, 12345, 0)))
    assert told.num_told_B.tolist() == [num_told] * 4
    later = builder.batch(1, 0, [told.held[0], None, told.held[2], told.held[3]])
    assert later.is_told_B.tolist() == [False, True, False, False]
    assert later.num_told_B.tolist() == [0, num_told, 0, 0]
    assert later.held[0] == told.held[0] != later.held[1]
    for row in (0, 2, 3):
        before, *asked = tokenizer.decode(later.input_ids_BT[row].tolist()).split(" What is the pass key of ")
        _, *first = tokenizer.decode(told.input_ids_BT[row].tolist()).split(" What is the pass key of ")
        assert asked == first
        assert "pass key" not in before
        (places,) = later.is_key_BT[row].nonzero(as_tuple=True)
        assert len(places) == 2 * len(NamedKeysText(tokenizer).key_ids(12345))
    trainer = Trainer(own, tmp_path)
    trainer.passing.saved = SavedFam(torch.ones(2, 4, 2, 32), later.held)
    trainer.save_checkpoint()
    assert Trainer(own, tmp_path, resume=True).passing.saved.keys == later.held


def test_recipes_that_cannot_tell_keys_apart_are_refused() -> None:
    """Catches names together with options for a single key."""
    with pytest.raises(RecipeError, match=r"data.named_keys is \[1, 17\], required is 1 to 16"):
        recipe(named_keys=[1, 17])
    with pytest.raises(RecipeError, match="data.boundary_share is a key of task 'passkey', and the task is"):
        recipe(task="named-keys", boundary_share=0.1)
    with pytest.raises(RecipeError, match=r"data.named_keys is \[0, 0\], required is 1 <= low"):
        recipe(named_keys=[0, 0], retold_keys=[0, 1])


def test_evaluation_scores_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an outdated key that is taken for right, and rows whose name and key do not belong together."""
    tokenizer = build_tiny_tokenizer()
    model = build_tiny_model(ModelSection(**SMALL_MODEL), len(tokenizer)).eval()
    convert(model, FamConfig(block_size=16, fam_length=2, num_memory_segments=0, fam_key_bias=0.0))
    read: list[torch.Tensor] = []
    original = type(model).forward

    def forward(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = original(self, input_ids=input_ids, **kwargs)
        read.append(input_ids)
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    options: dict[str, Any] = {"filler_lengths": [0, 20], "num_told": [1, 3], "num_retold": 1, "apart": (0, 4)}
    rows = list(NamedKeysEvaluation(**options, num_texts=3, batch_size=2).rows(model, tokenizer))
    assert len(rows) == 2 * 3 * (1 + 3)
    assert {row["order"] for row in rows if row["num_told"] == 3} == {0, 1, 2}
    for text in range(3):
        own = [row for row in rows if (row["text"], row["filler_tokens"], row["num_told"]) == (text, 20, 3)]
        assert sum(row["is_retold"] for row in own) == 1
    asked = [ids for ids in read if ids.shape[1] > 1]
    text = NamedKeysText(tokenizer)
    num_question, num_key = len(text.question_ids(0)), len(text.key_ids(12345))
    for num_tokens in (num_question, num_question + num_key - 1):  # the question alone, and with the key for its bits
        assert sum(ids.shape[1] == num_tokens for ids in asked) == 2 * 2 * (1 + 3)  # every name per batch and length
    assert len(asked) == 2 * 2 * 2 * (1 + 3)
    same = list(NamedKeysEvaluation(**options, num_texts=3, batch_size=3).rows(model, tokenizer))
    names = ("num_told", "filler_tokens", "text", "order", "key", "answer")
    assert sorted([row[n] for n in names] for row in rows) == sorted([row[n] for n in names] for row in same)
    with pytest.raises(TransformerFamError, match=r"num_told is \[0\], required are one or more numbers of at least 1"):
        NamedKeysEvaluation(filler_lengths=[1], num_told=[0])


def test_bits_are_what_the_key_says_less_its_surprise() -> None:
    """Catches a key that is shifted by a token, padding that is read, and a state that the measure changes."""
    tokenizer = build_tiny_tokenizer()
    model = build_tiny_model(ModelSection(**SMALL_MODEL), len(tokenizer)).eval()
    convert(model, FamConfig(block_size=16, fam_length=2, num_memory_segments=0, fam_key_bias=0.0))
    text = NamedKeysText(tokenizer)
    evaluation = NamedKeysEvaluation(filler_lengths=[20], num_told=[2], num_texts=2, batch_size=2)
    rows = list(evaluation.rows(model, tokenizer))
    for number in range(2):
        draw = random.Random("0/2/named keys")
        keys = [draw_named_keys(draw, 2) for _ in range(2)][number]
        for order, (name, key) in enumerate(keys.newest.items()):
            start = number * 7919
            ids = text.intro_ids(keys, start) + text.filler.slice(start, 20).tolist() + text.question_ids(name)
            state, bits = model.read(torch.tensor([ids[:-1]])), math.log2(90_000)
            last = ids[-1]
            for token in text.key_ids(key):
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([[last]]), past_key_values=state).logits[0, -1]
                bits += float(logits.log_softmax(-1)[token]) / math.log(2)
                last = token
            (row,) = (r for r in rows if (r["text"], r["order"]) == (number, order))
            assert row["key"] == key
            assert row["bits"] == pytest.approx(bits, abs=2e-3)


def small(folder: Path) -> Comparison:
    (folder / "training.toml").write_text(SMALL_TRAINING + "[data]\nnamed_keys = [1, 3]\n")
    (folder / "small.toml").write_text(
        'recipe = "training.toml"\nsystems = ["fam", "bswa"]\nnum_keys = 2\ntask = "named-keys"\nnum_told = [1, 3]\n'
        "filler_tokens = [8, 24]\nnum_retold = 1\n"
    )
    return load_comparison(folder / "small.toml")


def test_comparison_of_named_keys(tmp_path: Path, short_bytes: None) -> None:
    """Catches a capacity that counts outdated keys, and questions that are evaluated twice after a stop."""
    comparison = small(tmp_path)
    run = RunName("fam", 0)
    run_one(comparison, run, tmp_path / "runs")
    path = tmp_path / "runs" / "fam-0" / "rows.jsonl"
    rows = read_rows([path])
    assert is_finished(comparison, run, rows)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]))
    run_one(comparison, run, tmp_path / "runs")
    assert [row["key"] for row in read_rows([path]) if "key" in row] == [row["key"] for row in rows if "key" in row]
    for row in rows:
        if row["task"] == "named-keys":
            row["correct"], row["is_outdated"] = row["order"] == 0, row["is_retold"]
    found = capacities(comparison, rows)
    assert found["fam"][8, 3].recalled == {0: 1.0}
    assert found["fam"][8, 3].outdated == 1.0
    told = [row["bits"] for row in rows if row.get("num_told") == 3 and row["filler_tokens"] == 8]
    assert found["fam"][8, 3].bits == pytest.approx(sum(told) / comparison.num_keys)
    assert found["bswa"][8, 3].recalled == {}
    assert len(comparison_tables(comparison, rows)) == 3
    plot_comparison(comparison, rows, tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert "empty: bswa" in drawn
    assert "rows of FAM" not in drawn


def test_most_that_fams_hold_is_drawn_against_their_rows(tmp_path: Path) -> None:
    """Catches a FAM on the line of another width, or at another number of rows."""
    small(tmp_path)
    overrides = [
        'systems=["fam","rows_4","wide","bswa"]',
        'variants={rows_4="fam",wide="fam"}',
        'changes={rows_4={"fam.fam_length"=4},wide={"model.hidden_size"=64}}',
    ]
    comparison = load_comparison(tmp_path / "small.toml", overrides)
    common = {"task": "named-keys", "model": "small", "version": "1", "seed": 0, "filler_tokens": 8, "is_retold": False}
    rows = [
        common | {"system": system, "num_told": 3, "bits": 5.0, "correct": order < right}
        for system, right in (("fam", 1), ("rows_4", 3), ("wide", 2))
        for order in range(3)
    ]
    lines: dict[str, list[float | None]] = {}
    found = capacities(comparison, rows)
    for system, keys in (("fam", 1), ("rows_4", 3), ("wide", 2)):
        assert found[system][8, 3].keys == pytest.approx(keys)
        assert found[system][8, 3].bits == pytest.approx(15)
    original = comparison_named_keys._draw_capacity

    def draw(axes: Any, places: Any, values: Any, top: float) -> None:
        if list(places) == [2, 4] and top < 10:
            lines.update(values)
        original(axes, places, values, top)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison_named_keys, "_draw_capacity", draw)
        plot_comparison(comparison, rows, tmp_path / "figure.svg")
    assert lines == {"width 32": [1.0, 3.0], "width 64": [2.0, None]}
    assert "rows of FAM" in (tmp_path / "figure.svg").read_text()
