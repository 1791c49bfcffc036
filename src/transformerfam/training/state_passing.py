"""Random state passing (RSP): a step may start from the FAM that the step before ended with.

Source: B.2.3.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from transformerfam.tasks.batch import Held
from transformerfam.training.recipe.sections import StatePassingSection


@dataclass
class SavedFam:
    """The FAM at the end of a step."""

    fam_LBFD: torch.Tensor
    """`(L, B, F, D)`, detached."""
    keys: tuple[Held | None, ...]
    """The key, or the questions with their answers, that each row's FAM holds, None where it was not given before the
    FAM was taken or the row's answer was wrong: a lost key teaches nothing when it is queried again."""


def held_keys(start: SavedFam | None, asked: Sequence[Held | None], is_held: Sequence[bool]) -> tuple[Held | None, ...]:
    """Say which key each row's FAM holds at the end of a step.

    Args:
        start: what the step started from, None for the initial FAM.
        asked: the key that each row queried; a row without a question keeps the key it started with.
        is_held: whether the row's FAM holds the queried key.
    """
    started = start.keys if start is not None else (None,) * len(asked)
    rows = zip(started, asked, is_held, strict=True)
    return tuple(old if key is None else key if held else None for old, key, held in rows)


class StatePassing:
    """Decide which steps start from a saved FAM, and keep it from step to step.

    With probability p a step continues where the last one ended, so chains of steps have geometric length.
    """

    def __init__(self, section: StatePassingSection, seed: int) -> None:
        self.section = section
        self.seed = seed
        self.saved: SavedFam | None = None
        self.started = False

    def update_start(self, step: int, stage_idx: int) -> None:
        """Begin, for good, when the step or the stage of the recipe is reached."""
        section = self.section
        conditions = (
            section.start_step is not None and step >= section.start_step,
            section.start_stage is not None and stage_idx >= section.start_stage,
            section.start_step is section.start_stage is None,
        )
        self.started = self.started or any(conditions)

    def draw(self, step: int) -> SavedFam | None:
        """Return the FAM that this step starts from, or None for the initial one."""
        passes = random.Random(f"{self.seed}/pass/{step}").random() < self.section.probability
        return self.saved if self.started and passes else None

    def rows_from_saved(self, step: int, is_told_B: torch.Tensor) -> list[bool]:
        """Say which rows of a passed step start from the saved FAM; the others start from the initial one.

        Args:
            step: number of the step.
            is_told_B: rows that give their own key, shape (B,).
        """
        draw = random.Random(f"{self.seed}/overwrite/{step}")
        return [not told or draw.random() < self.section.overwrite for told in is_told_B.tolist()]

    def blocks_between(self, step: int) -> int:
        """Return how many blocks a passed FAM reads after a step, without gradient; 0 before passing begins."""
        if not self.started:
            return 0
        least, most = self.section.between_blocks
        if step < self.section.between_steps:
            most = least + (most - least) * step // self.section.between_steps
        return random.Random(f"{self.seed}/between/{step}").randint(least, most)

    def keep(self, step: int, fam_LBFD: torch.Tensor | None, keys: tuple[Held | None, ...]) -> None:
        """Save a step's FAM, with noise; one that is not finite is dropped, so that it cannot poison later steps.

        Args:
            step: number of the step.
            fam_LBFD: every layer's FAM, or None where the step has none to pass.
            keys: the key that each row's FAM holds and the row got right, else None.
        """
        if self.section.probability == 0:
            return
        if fam_LBFD is None or not bool(torch.isfinite(fam_LBFD).all()):
            self.saved = None
            return
        fam_LBFD = fam_LBFD.detach()
        if self.section.rows == "first":
            fam_LBFD = fam_LBFD[:, :1].expand_as(fam_LBFD)
            keys = (keys[0],) * len(keys)
        if self.section.noise > 0:
            generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/noise/{step}").getrandbits(63))
            noise_LBFD = torch.randn(fam_LBFD.shape, generator=generator).to(fam_LBFD)
            rms_LBF1 = fam_LBFD.pow(2).mean(-1, keepdim=True).sqrt()
            fam_LBFD = fam_LBFD + self.section.noise * rms_LBF1 * noise_LBFD
        self.saved = SavedFam(fam_LBFD.contiguous(), keys)
