"""Evaluation while training: what is measured is what will be read, the best weights are kept, resuming is exact."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from training_recipes import small_values

from transformerfam.errors import CorruptFileError, RecipeError
from transformerfam.files.tensors import load_tensors, save_tensors
from transformerfam.tasks.text import encode
from transformerfam.training.recipe.toml import build_recipe
from transformerfam.training.trainer import Trainer
from transformerfam.training.validation import FORMAT_VERSION, LOSS, SCORE, Validation
from transformerfam.weights.folders import BEST_FILE, BEST_KIND
from transformerfam.weights.models import load_model

TRAINED = "The grass is green. The sky is blue. Here we go again. What is the pass key? 12345 is it. " * 8
HELD_OUT = "The sun is yellow. There and back again. The grass is green. 54321 is the pass key. " * 6


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """Write a text to train on, one that is held out, and a question."""
    (tmp_path / "trained.txt").write_text(TRAINED)
    (tmp_path / "held_out.txt").write_text(HELD_OUT)
    item = {"text": "The grass is green.", "question": "What is the grass?", "choices": ["green", "blue"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(item | {"answers": ["green"]}) + "\n")
    return {name: str(tmp_path / name) for name in ("trained.txt", "held_out.txt", "questions.jsonl")}


def make_recipe(texts: dict[str, str], evaluation: dict[str, Any], **sections: Any) -> Any:
    instructions = {"files": [texts["trained.txt"]], "length": 40, "repeat_tokens": 0}
    values = small_values(instructions=instructions, evaluation=evaluation, data={"allow_unknown": True})
    del values["schedule"]["curriculum"]
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return build_recipe(values)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_loss_is_that_of_the_memory_as_it_will_be_read(texts: dict[str, str], tmp_path: Path) -> None:
    """Catches a loss of the training's block size, of repeated segments, of the live weights, or of trained texts."""
    evaluation = {"every": 2, "files": [texts["held_out.txt"]], "num_sequences": 5}
    recipe = make_recipe(
        texts,
        evaluation,
        reading={"block_size": 8},
        optimizer={"average_decay": 0.9},
        instructions={"repeat_tokens": 4},
    )
    trainer = Trainer(recipe, tmp_path / "run")
    trainer.run()
    rows = log_of(tmp_path / "run")
    assert [LOSS in row for row in rows] == [False, True] * 3
    best = min(rows, key=lambda row: row.get(LOSS, 99.0))
    model, tokenizer = load_model(tmp_path / "run")
    assert model.fam_config.block_size == 8
    texts_read = Validation(recipe, tokenizer).texts
    assert texts_read is not None
    held_out = set(encode(tokenizer, HELD_OUT))
    losses = []
    for number in range(5):
        ids_T, _ = texts_read.sequence(number)
        assert len(ids_T) == 40
        assert set(ids_T.tolist()) <= held_out | {tokenizer.eos_token_id}
        with torch.no_grad():
            logits_TV = model(ids_T[None]).logits[0, :-1]
        losses.append(F.cross_entropy(logits_TV, ids_T[1:]).item())
    assert best[LOSS] == pytest.approx(sum(losses) / 5, abs=1e-5)
    assert trainer.validation.notes["best"] == {"step": best["step"] + 1, LOSS: best[LOSS]}


@pytest.mark.parametrize("keep", ["loss", "last"])
def test_best_weights_become_the_memory(
    texts: dict[str, str], tmp_path: Path, keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the last weights in the place of the best, and the best where the last were asked for."""
    measured = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(Validation, "_loss", lambda *_: next(measured))
    evaluation = {"every": 2, "files": [texts["held_out.txt"]], "keep": keep}
    recipe, seen = make_recipe(texts, evaluation), {}

    def on_step(trainer: Trainer, row: dict[str, Any]) -> None:
        seen[row["step"] + 1] = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    Trainer(recipe, tmp_path / "run").run(on_step)
    model, _ = load_model(tmp_path / "run")
    kept = dict(model.named_parameters())
    for name, value in seen[4 if keep == "loss" else 6].items():
        torch.testing.assert_close(kept[name], value)
    assert (tmp_path / "run" / BEST_FILE).exists() == (keep == "loss")


def test_evaluation_changes_no_number_of_the_training(texts: dict[str, str], tmp_path: Path) -> None:
    """Catches drawn numbers, a mode or a configuration that an evaluation leaves behind."""
    evaluation = {"every": 1, "files": [texts["held_out.txt"]], "questions": texts["questions.jsonl"], "keep": "last"}
    losses = []
    for number, section in enumerate((evaluation, evaluation | {"every": 1000, "questions": None})):
        recipe = make_recipe(texts, section, reading={"num_memory_segments": 1}, optimizer={"average_decay": 0.5})
        Trainer(recipe, tmp_path / str(number)).run()
        losses.append([(row["loss"], row["grad_norm"]) for row in log_of(tmp_path / str(number))])
    assert losses[0] == losses[1]
    assert all(0 <= row[SCORE] <= 1 for row in log_of(tmp_path / "0"))


def test_run_that_was_killed_keeps_the_same_best(texts: dict[str, str], tmp_path: Path) -> None:
    """Catches a best that is forgotten on resuming, so that a worse one takes its place."""
    evaluation = {"every": 1, "files": [texts["held_out.txt"]], "num_sequences": 2}
    recipe = make_recipe(texts, evaluation, optimizer={"lr": 0.5, "warmup_steps": 1})
    whole, folder = Trainer(recipe, tmp_path / "whole"), tmp_path / "killed"

    def leave(trainer: Trainer, row: dict[str, Any]) -> None:
        if row["step"] == 2:
            trainer.save_checkpoint()
        if row["step"] == 3:
            shutil.copytree(trainer.folder, folder)  # what a kill would leave now

    whole.run(leave)
    resumed = Trainer(recipe, folder, resume=True)
    resumed.run()
    assert resumed.validation.notes == whole.validation.notes
    assert [row.get(LOSS) for row in log_of(folder)] == [row.get(LOSS) for row in log_of(tmp_path / "whole")]


def test_run_without_a_checkpoint_begins_again_and_a_damaged_best_is_refused(
    texts: dict[str, str], tmp_path: Path
) -> None:
    """Catches a best file that keeps a folder from being used, and one that is read whatever is in it."""
    evaluation = {"every": 1, "files": [texts["held_out.txt"]], "num_sequences": 2}
    recipe, folder = make_recipe(texts, evaluation), tmp_path / "run"

    def leave(trainer: Trainer, row: dict[str, Any]) -> bool:
        shutil.copytree(trainer.folder, folder)  # what a kill would leave now
        return True

    Trainer(recipe, tmp_path / "whole").run(leave)
    assert (folder / BEST_FILE).exists()
    trainer = Trainer(recipe, folder)
    assert not (folder / BEST_FILE).exists()
    trainer.run(lambda trainer, row: True)
    content = bytearray((folder / BEST_FILE).read_bytes())
    content[-3] ^= 1
    (folder / BEST_FILE).write_bytes(content)
    with pytest.raises(CorruptFileError, match="checksum does not match"):
        Trainer(recipe, folder, resume=True)


def test_best_file_of_another_form_is_refused(texts: dict[str, str], tmp_path: Path) -> None:
    """Catches a KeyError after hours of training, and weights of another model that become the memory."""
    recipe, folder = make_recipe(texts, {"every": 1, "files": [texts["held_out.txt"]]}), tmp_path / "run"
    trainer = Trainer(recipe, folder)
    trainer.run(lambda trainer, row: True)
    tensors, metadata = load_tensors(folder / BEST_FILE, BEST_KIND, FORMAT_VERSION)
    save_tensors(folder / BEST_FILE, tensors, metadata | {"best": {"step": 1}})
    with pytest.raises(CorruptFileError, match="metadata of another form"):
        Trainer(recipe, folder, resume=True)
    save_tensors(folder / BEST_FILE, dict(list(tensors.items())[1:]), metadata)
    with pytest.raises(CorruptFileError, match="holds other weights than those that are trained here"):
        Trainer(recipe, folder, resume=True).validation.load_best(folder, trainer.model)


@pytest.mark.parametrize(
    ("evaluation", "match"),
    [
        ({"every": 2}, "neither files nor questions"),
        ({"every": 0, "files": ["held_out.txt"]}, "every"),
        ({"every": 2, "questions": "questions.jsonl", "keep": "loss"}, "keep is 'loss', and evaluation has no files"),
        ({"every": 2, "files": ["held_out.txt"], "keep": "score"}, "keep is 'score', and evaluation has no questions"),
        ({"every": 2, "files": ["trained.txt"]}, "trained.txt, which instructions.files has, too"),
        ({"every": 2, "files": ["nowhere.txt"]}, "evaluation.files: cannot read"),
        ({"every": 2, "files": []}, "neither files nor questions"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    texts: dict[str, str], tmp_path: Path, evaluation: dict[str, Any], match: str
) -> None:
    """Catches hours of training before the first evaluation fails."""
    named = {name: texts.get(name, str(tmp_path / name)) for name in (*texts, "nowhere.txt")}
    section = evaluation | {"files": [named[name] for name in evaluation.get("files", ())]}
    if "questions" in section:
        section["questions"] = named[section["questions"]]
    with pytest.raises(RecipeError, match=match):
        Trainer(make_recipe(texts, section), tmp_path / "run")


def test_text_that_is_trained_on_is_refused_by_whatever_path(texts: dict[str, str], tmp_path: Path) -> None:
    """Catches a folder that holds the held-out text."""
    recipe = make_recipe(
        texts, {"every": 2, "files": [texts["held_out.txt"]]}, instructions={"files": [str(tmp_path)], "length": 40}
    )
    with pytest.raises(RecipeError, match=r"held_out.txt, which instructions.files has, too"):
        Trainer(recipe, tmp_path / "run")


def test_what_is_not_finite_is_never_the_best(
    texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches NaN that takes the place of the best weights, since nothing is greater."""
    measured = iter([math.nan, 1.0, math.nan])
    monkeypatch.setattr(Validation, "_loss", lambda *_: next(measured))
    trainer = Trainer(make_recipe(texts, {"every": 2, "files": [texts["held_out.txt"]]}), tmp_path / "run")
    trainer.run()
    assert trainer.validation.notes["best"]["step"] == 4


def test_held_out_texts_without_instructions_are_refused(texts: dict[str, str]) -> None:
    """Catches sequences without a length."""
    with pytest.raises(RecipeError, match="without a section instructions"):
        build_recipe(small_values(evaluation={"every": 2, "files": [texts["held_out.txt"]]}))


def test_other_held_out_texts_are_another_run(texts: dict[str, str], tmp_path: Path) -> None:
    """Catches a best that is compared with the loss of another text."""
    recipe = make_recipe(texts, {"every": 1, "files": [texts["held_out.txt"]]})
    Trainer(recipe, tmp_path / "run").run(lambda trainer, row: True)
    Path(texts["held_out.txt"]).write_text(HELD_OUT * 2)
    with pytest.raises(RecipeError, match=r"evaluation.files.0 was changed"):
        Trainer(recipe, tmp_path / "run", resume=True)
