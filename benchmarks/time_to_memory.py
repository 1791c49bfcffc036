"""How long until there is a memory? From the plain model to one that recalls keys after 512 tokens of filler."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness import Row, row
from transformerfam.cli.progress import training_bar
from transformerfam.tasks.controls import ZEROED
from transformerfam.tasks.passkey_evaluation import PasskeyEvaluation
from transformerfam.training.checkpoint import CHECKPOINT_FILE
from transformerfam.training.recipe.toml import load_recipe
from transformerfam.training.trainer import Trainer
from transformerfam.weights.models import load_model

RECIPES = tuple(Path("recipes") / f"smollm2_quick_{part}.toml" for part in (1, 2))
FOLDER = Path("runs") / "time_to_memory"
LENGTHS = (512, 1024)
SYSTEMS = ("fam", f"fam{ZEROED}")
NUM_KEYS = 20


def run(model: str = "smollm2", quick: bool = False, lengths: Sequence[int] = LENGTHS) -> Iterator[Row]:
    """Train by the recipes, one after the other, then query keys; loading counts, querying does not.

    What was trained is kept in `FOLDER` until all keys are queried, and the same command resumes from it.
    """
    if model != "smollm2":
        return  # a random model has nothing to recall with
    folder, num_steps, seconds = FOLDER, 0, 0.0
    for part, path in enumerate(RECIPES):
        overrides = ["schedule.steps=2"] if quick else []
        recipe = load_recipe(path, [*overrides, f"model.memory={folder}"] if part else overrides)
        folder = FOLDER / path.stem
        start = time.perf_counter()
        trainer = Trainer(recipe, folder, resume=(folder / CHECKPOINT_FILE).exists())
        seconds += time.perf_counter() - start  # of loading, without the steps that were done before
        with training_bar(recipe.schedule.steps) as update:
            result = trainer.run(lambda _, values, update=update: update(values))
        if not result.is_complete:
            raise KeyboardInterrupt(result.message)
        seconds += result.seconds
        num_steps += result.steps
    evaluation = PasskeyEvaluation(
        filler_lengths=lengths, num_keys=1 if quick else NUM_KEYS, systems=SYSTEMS, batch_size=10
    )
    asked = list(evaluation.rows(*load_model(folder)))
    num_right = Counter((answer["system"], answer["filler_tokens"]) for answer in asked if answer["correct"])
    num_asked = Counter((answer["system"], answer["filler_tokens"]) for answer in asked)
    for (system, length), num in num_asked.items():
        yield row(
            "time_to_memory",
            system=system,
            model=model,
            num_tokens=length,
            block_size=recipe.reading_config.block_size,
            fam_length=recipe.reading_config.fam_length,
            num_memory_segments=recipe.reading_config.num_memory_segments,
            num_steps=num_steps,
            seconds_training=seconds,
            num_keys_right=num_right[system, length],
            num_keys=num,
        )
    shutil.rmtree(FOLDER)
