"""Rows know the weights that answered: those of a model that was trained further are not added to the old ones."""

import json

import pytest
import tiny_models
import torch
from command_line import run
from tiny_models import PASSKEY_TEXT
from training_recipes import SMALL_TRAINING

from transformerfam.comparison import load_comparison
from transformerfam.comparison.report import comparison_tables, current_rows
from transformerfam.comparison.run import TRAINED_TASK
from transformerfam.errors import StateMismatchError
from transformerfam.fam.memory import change_config
from transformerfam.reports.accuracy import accuracy_by_length
from transformerfam.reports.rows import read_rows, require_same_weights
from transformerfam.rivals import RivalConfig, attach
from transformerfam.tasks.provenance import weights_of
from transformerfam.weights.models import load_model, save_model


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    tiny_models.save_passkey_model(path)
    return path


def train_on(folder, part):
    """Change a weight of the base model, or of its memory, as training does, or how the memory is read with."""
    if part == "config":
        model, tokenizer = load_model(folder, config_overrides={"fam_key_bias": -1.0})
        return save_model(model, tokenizer, folder)
    model, tokenizer = load_model(folder)
    with torch.no_grad():
        (model.get_decoder().fam.prompt if part == "memory" else model.get_input_embeddings().weight).add_(0.5)
    save_model(model, tokenizer, folder)


@pytest.mark.parametrize("part", ["memory", "base", "config"])
@pytest.mark.parametrize("task", ["passkey", "next-token"])
def test_model_that_was_trained_on_is_not_asked_into_the_same_file(folder, tmp_path, part, task):
    """Would catch old answers shown for the new weights, and no new evaluation."""
    (tmp_path / "book.txt").write_text(PASSKEY_TEXT)
    output = tmp_path / "rows.jsonl"
    asked = ("--filler-tokens", "9", "--num-keys", 2) if task == "passkey" else (tmp_path / "book.txt",)
    command = ("evaluate", task, *asked, "--model", folder, "--output", output)
    run(*command)
    run(*command)
    before = output.read_text()
    train_on(folder, part)
    text = run(*command, status=2)
    what = "another configuration" if part == "config" else "other weights"
    assert f"were answered with {what}" in text
    assert "write the new answers to another file" in text
    assert output.read_text() == before
    run(*command[:-1], tmp_path / "new.jsonl")
    digests = {
        row["config" if part == "config" else "weights"]
        for name in ("rows", "new")
        for row in read_rows([tmp_path / f"{name}.jsonl"])
    }
    assert len(digests) == 2


def test_systems_of_one_model_may_have_weights_of_their_own(folder, tmp_path):
    """Would catch a refusal of BSWA next to FAM, whose memories differ."""
    output = tmp_path / "rows.jsonl"
    command = ("evaluate", "passkey", "--filler-tokens", "9", "--num-keys", 2, "--model", folder, "--output", output)
    run(*command, "--system", "fam,bswa,fam_untrained")
    run(*command, "--system", "bswa,fam,fam_untrained")


def row(weights, **more):
    fixed = {"task": "passkey", "system": "fam", "model": "m", "filler_tokens": 9, "correct": True, "seed": 0}
    return fixed | ({} if weights is None else {"weights": weights}) | more


def test_answers_of_different_weights_are_not_pooled():
    """Would catch one accuracy of two models; seeds of a comparison are trained apart, and older rows say nothing."""
    with pytest.raises(StateMismatchError, match="rows of fam of m were answered with different weights .a and b.; "):
        accuracy_by_length([row("a"), row("b", filler_tokens=99)])
    with pytest.raises(StateMismatchError, match="were answered with different configurations .x and y."):
        accuracy_by_length([row("a", config="x"), row("a"), row("a", config="y")])
    pooled = accuracy_by_length([row("a"), row("b", seed=1), row(None), row("c", model="n"), row("d", system="bswa")])
    assert [points[0].num_questions for points in pooled.values()] == [1, 3, 1]
    require_same_weights([row("a"), row(None), row("b", system="bswa"), row("b", model="n")], "m", ["fam"], "a")


NEXT_TOKEN = {"file": "a", "first_token": 0, "num_tokens": 9, "loss": 1.0, "accuracy": 0.5}


@pytest.mark.parametrize("name", ["weights", "config"])
@pytest.mark.parametrize("task", ["passkey", "next-token"])
def test_report_refuses_mixed_rows(tmp_path, task, name):
    """Would catch a table that hides that a model was trained on in between."""
    path = tmp_path / "rows.jsonl"
    rows = [row(None) | NEXT_TOKEN | {"task": task, name: digest} for digest in "ab"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "report them apart" in run("report", path, status=2)
    path.write_text("".join(json.dumps(row | {"model": row[name]}) + "\n" for row in rows))
    run("report", path)


@pytest.mark.parametrize("name", ["weights", "config"])
def test_comparison_refuses_answers_of_two_trainings(tmp_path, name):
    """Would catch one accuracy of a run that was trained twice, and its description counted twice."""
    (tmp_path / "training.toml").write_text(SMALL_TRAINING)
    path = tmp_path / "m.toml"
    path.write_text(
        'recipe = "training.toml"\nsystems = ["fam"]\nseeds = [0, 1]\nfiller_tokens = [9, 40]\nnum_keys = 1\n'
    )
    comparison = load_comparison(path)
    mixed = [row(None, version="1") | {name: digest} for digest in "ab"]
    with pytest.raises(StateMismatchError, match="rows of fam of m were answered with different .* .a and b."):
        comparison_tables(comparison, mixed)
    trained = {"num_parameters": 5, "num_tokens": 7, "cpu_seconds": 3, "task": TRAINED_TASK}
    rows = [mixed[1], mixed[0] | {"seed": 1}, mixed[0] | trained, *[mixed[1] | trained] * 2]
    assert [found.get(name) for found in current_rows(comparison, rows)] == ["b", "a", "b"]
    old = [row(None, version="1"), row(None, version="1", **trained)]
    assert current_rows(comparison, old) == old


def test_digest_of_a_configuration_is_of_what_differs_from_the_default():
    """Would catch two configurations of one digest, or a digest that changes from version to version."""
    model, _ = tiny_models.make_passkey_model()
    plain = weights_of(model)
    digests = {plain["config"]}
    for change in ({"block_size": 4}, {"fam_key_bias": -3.0}, {"fam_layers": (0,)}, {"fam_update": "gated"}):
        model, _ = tiny_models.make_passkey_model()
        change_config(model, **change)
        assert weights_of(model)["weights"] == plain["weights"]
        digests.add(weights_of(model)["config"])
    assert len(digests) == 5
    assert plain["config"] == "6a2264bb07867169"


def test_digest_is_of_all_weights_and_of_rivals_too():
    """Would catch a digest that misses the memory, or a model without one."""
    model, _ = tiny_models.make_passkey_model()
    first = weights_of(model)
    assert first == weights_of(model)
    with torch.no_grad():
        model.get_decoder().fam.prompt.add_(1)
    second = weights_of(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert len({digest["weights"] for digest in (first, second, weights_of(model))}) == 3
    from tiny_llama import make_tiny_llama

    rival = attach(make_tiny_llama(), RivalConfig(system="rmt", block_size=8, num_memory_tokens=2))
    assert {name: len(digest) for name, digest in weights_of(rival).items()} == {"weights": 16, "config": 16}
