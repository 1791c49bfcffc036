"""One step: tokens through all blocks with gradients (`blocks`, `packed`), stored filler, teacher, losses and scores.

May import: `data`, `recipe`, and what `training` may.
One more loss: `auxiliary`, and its weight in `recipe/sections.py`.
"""

from transformerfam.old_paths import names_of

__getattr__ = names_of("transformerfam.training.step", "transformerfam.training.step.step")
