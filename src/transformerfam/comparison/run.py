"""One run of a comparison: train a system with one seed, ask it at every length, and describe it."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from transformerfam.comparison.names import RunName
from transformerfam.comparison.plan import UNTRAINED, Asking, Comparison
from transformerfam.comparison.questions import Questions
from transformerfam.errors import RecipeError
from transformerfam.files.writing import make_folder
from transformerfam.reports.rows import Row, RowFile, require_same_weights
from transformerfam.rivals import PRESETS
from transformerfam.tasks.passkey import BEFORE_KEY
from transformerfam.tasks.provenance import device_name, memory_notes, provenance, weights_of
from transformerfam.tasks.text import encode
from transformerfam.training.data.sources import require_same_sources, sources_of
from transformerfam.training.random_numbers import RandomNumbers
from transformerfam.training.recipe.removed import in_former_keys
from transformerfam.training.run_folder import FREE_TO_CHANGE, require_same_run, save_recipe
from transformerfam.training.setup import build_trainee
from transformerfam.training.trainer import Trainer
from transformerfam.weights.folders import CHECKPOINT_FILE
from transformerfam.weights.models import load_model

ROWS_FILE = "rows.jsonl"
TRAINED_TASK, BYTES_TASK = "comparison-training", "comparison-bytes"
BYTES_LENGTHS = (1024, 4096, 16384)
"""Tokens after which the carried bytes are noted."""

Progress = Callable[[str, int, int], None]


def run_folder(folder: Path, run: RunName) -> Path:
    """Return where a run is in the folder of its comparison."""
    return folder / str(run)


def is_finished(comparison: Comparison, run: RunName, rows: list[Row]) -> bool:
    """Say whether `rows` hold all answers of a run, to the comparison's questions, and its description."""
    own = [row for row in rows if row["seed"] == run.seed and row["model"] == comparison.name]
    if not any(row["task"] == TRAINED_TASK and row["system"] == run.system for row in own):
        return False
    questions = Questions(comparison)
    return questions.num_answered(own, run) == questions.num_asked(run)


def recipe_digest(comparison: Comparison, run: RunName, is_whole: bool = False) -> str:
    """Return the SHA-256 of what a run's recipe is made of; a key that a later version adds does not change it.

    Args:
        comparison: what the run is one of.
        run: which system, and which seed.
        is_whole: count what changes no number of a run, too, as earlier versions did.
    """
    recipe, changes = in_former_keys(comparison.recipe), comparison.changes.get(run.system, {})
    if not is_whole and isinstance(recipe.get("schedule"), dict):
        kept = {name: value for name, value in recipe["schedule"].items() if name not in FREE_TO_CHANGE}
        recipe = recipe | {"schedule": kept}
    if not is_whole:
        changes = {key: value for key, value in changes.items() if key.partition("schedule.")[2] not in FREE_TO_CHANGE}
    parts: list[Any] = [recipe, comparison.system_of(run.system), changes, run.seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def require_same_recipe(comparison: Comparison, rows: Iterable[Row]) -> None:
    """Refuse rows of runs that were trained by another recipe, or on other files; time and threads may differ.

    Raises:
        RecipeError: with the run.
    """
    known = set(comparison.runs)
    for row in rows:
        run = RunName(row["system"], row["seed"])
        if row["task"] != TRAINED_TASK or row["model"] != comparison.name or run not in known:
            continue
        if row["recipe_digest"] not in (recipe_digest(comparison, run), recipe_digest(comparison, run, is_whole=True)):
            raise RecipeError(
                f"the rows of {run} come from another recipe than the one at hand; give the comparison another name or "
                "file of rows, or take the recipe by which they were made"
            )
        if row.get("sources") is not None:
            require_same_sources(row["sources"], comparison.recipe_of(run), f"the run of the rows of {run}")


def run_one(
    comparison: Comparison,
    run: RunName,
    folder: Path,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Train and ask; what was done before is not done again. Threads of torch are the process's: the command sets them.

    Args:
        comparison: what the run is one of.
        run: which system, and which seed.
        folder: of the comparison; the run gets a folder in it, with the trained model, the log and `rows.jsonl`.
        progress: called with what is being done, how much of it is, and how much there is to do.
        device: where it trains and is asked; a run may resume on another device.

    Raises:
        RecipeError: what is there was made by another recipe; all but time and threads must agree.
        TransformerFamError: a question cannot be asked; nothing is trained.
        KeyboardInterrupt: Ctrl-C; the same call resumes.
    """
    questions = Questions(comparison)
    questions.require_askable()
    own, recipe = run_folder(folder, run), comparison.recipe_of(run)
    make_folder(own)
    if (own / CHECKPOINT_FILE).exists() or (own / ROWS_FILE).exists():
        require_same_run(own, recipe)
    system = comparison.system_of(run.system)
    if system == UNTRAINED:
        with RandomNumbers(recipe.schedule.seed).in_force():
            model, tokenizer = build_trainee(recipe)
        save_recipe(own, recipe)
        notes: dict[str, Any] = {}
    else:
        _train(questions, recipe, own, progress, device)
        loaded = "fam" if system in PRESETS else system
        model, tokenizer = load_model(own, loaded)
        notes = memory_notes(own, loaded)
    model.to(device).eval()
    with RowFile(own / ROWS_FILE) as rows:
        require_same_weights(rows.rows, comparison.name, comparison.rows_of(run), **weights_of(model))

        def update(done: int, total: int, state: Any) -> None:
            if progress is not None:
                progress("ask", done, total)

        for row in comparison.ask(Asking(run, model, tokenizer, questions.answers(rows.rows), notes, update)):
            rows.append(row)
        if not any(row["task"] == TRAINED_TASK for row in rows.rows):
            for row in _description(comparison, run, model, tokenizer, notes):
                rows.append(row)


def _train(
    questions: Questions, recipe: Any, folder: Path, progress: Progress | None, device: torch.device | str
) -> None:
    """Train in the run's folder, or resume there."""

    def update(trainer: Trainer, row: dict[str, Any]) -> None:
        if progress is not None:
            progress("train", row["step"] + 1, recipe.schedule.steps)

    trainer = Trainer(recipe, folder, resume=(folder / CHECKPOINT_FILE).exists(), device=device)
    questions.comparison.require_tokens(trainer.tokenizer)
    if not trainer.run(update).is_complete:
        raise KeyboardInterrupt


@torch.no_grad()
def _description(
    comparison: Comparison, run: RunName, model: Any, tokenizer: Any, notes: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return rows of what the system is: parameters, tokens of training, and carried bytes by length."""
    common = {"system": run.system, "model": comparison.name, "seed": run.seed} | weights_of(model) | provenance()
    rows = []
    state, ids = model.init_state(1), encode(tokenizer, BEFORE_KEY)
    for length in BYTES_LENGTHS:
        missing = length - state.num_tokens_read
        start = time.perf_counter()
        model.read((ids * (missing // len(ids) + 1))[:missing], state)
        speed = missing / (time.perf_counter() - start)
        rows.append(
            {"task": BYTES_TASK, **common, "num_tokens": length, "bytes_carried": state.num_bytes}
            | {"tokens_per_second": round(speed), "device": device_name(model.device)}
        )
    trained = {name: notes.get(name) for name in ("steps", "num_tokens", "cpu_seconds", "seconds", "device")}
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    digest = {"recipe_digest": recipe_digest(comparison, run), "sources": sources_of(comparison.recipe_of(run))}
    return [*rows, {"task": TRAINED_TASK, **common, "num_parameters": num_parameters, **trained, **digest}]
