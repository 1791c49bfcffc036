"""How long until there is a memory? From the plain model to one that recalls keys behind 512 tokens of filler."""

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness import Row, row
from transformerfam.models import load_model
from transformerfam.tasks.passkey_evaluation import MEMORY_ZEROED, PasskeyEvaluation
from transformerfam.training.recipe_file import load_recipe
from transformerfam.training.trainer import Trainer

RECIPES = tuple(Path("recipes") / f"smollm2_quick_{part}.toml" for part in (1, 2))
LENGTHS = (512, 1024)
SYSTEMS = ("fam", MEMORY_ZEROED)
NUM_KEYS = 20


def run(model: str = "smollm2", quick: bool = False, lengths: Sequence[int] = LENGTHS) -> Iterator[Row]:
    """Train by the recipes, one after the other, then ask for keys; loading counts, asking does not."""
    if model != "smollm2":
        return  # a random model has nothing to recall with
    with tempfile.TemporaryDirectory() as name:
        folder, num_steps, start = None, 0, time.perf_counter()
        for part, path in enumerate(RECIPES):
            overrides = [] if folder is None else [f"model.memory={folder}"]
            recipe = load_recipe(path, overrides + (["schedule.steps=2"] if quick else []))
            folder = Path(name) / str(part)
            num_steps += Trainer(recipe, folder).run().steps
        seconds = time.perf_counter() - start
        assert folder is not None
        evaluation = PasskeyEvaluation(lengths, 1 if quick else NUM_KEYS, systems=SYSTEMS, batch_size=10)
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
