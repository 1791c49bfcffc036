"""The loop of a study: lessons in turn, a look at those held out now and again, and the best rows kept."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from transformerfam.errors import NonFiniteLossError
from transformerfam.fam.state import FamState
from transformerfam.processes import ends_noted, uninterrupted
from transformerfam.study.checkpoint import Progress, StudyFiles, load_checkpoint, save_checkpoint
from transformerfam.study.document import Pieces
from transformerfam.study.lessons import Lesson, LessonMaker, divergence
from transformerfam.study.options import StudyOptions
from transformerfam.study.rows import LearnedRows
from transformerfam.training.checkpoint import cut_log

CHECKPOINT_SECONDS = 60.0
OnStep = Callable[[dict[str, Any]], None]
"""Called with the row of the log of every step."""


@dataclass(frozen=True)
class StudyResult:
    """How a study ended.

    Attributes:
        state: the whole text, read with the best rows.
        progress: how far it came.
        reason: "minutes", "steps", "held_out" or "interrupted".
    """

    state: FamState
    progress: Progress
    reason: str

    @property
    def is_better(self) -> bool:
        """Whether the rows are better on held-out lessons than those of the reading."""
        return self.progress.best_step > 0

    @property
    def message(self) -> str:
        """One line for the user."""
        progress = self.progress
        ends = {
            "minutes": "the time is up",
            "steps": "all steps are done",
            "held_out": "the held-out lessons no longer improve",
            "interrupted": "interrupted",
        }
        done = f"{ends[self.reason]} after {progress.step:,} steps in {progress.seconds / 60:.1f} minutes"
        if progress.start_loss is None or progress.best_step == progress.num_worse == 0:
            return f"{done}, before the rows were compared on held-out lessons; the rows are those of the reading"
        if not self.is_better:
            return (
                f"{done}; the study did not improve on the held-out lessons ({progress.start_loss:.3f} nats a token "
                "from the teacher), so the rows are those of the reading"
            )
        return (
            f"{done}; on the held-out lessons the rows of step {progress.best_step:,} are {progress.best_loss:.3f} "
            f"nats a token from the teacher, those of the reading {progress.start_loss:.3f}"
        )


class Study:
    """Improve the rows of one reading.

    Args:
        model: a converted model; its weights stay.
        tokenizer: its tokenizer.
        reading: of the text up to its last complete block.
        ids: token ids of the whole text.
        options: what it is made with.
        files: where it is kept; None keeps nothing.
        resume: continue from the checkpoint there.

    Raises:
        TransformerFamError: a lesson does not fit the window, the text is shorter than a piece, or the checkpoint is of
            other options.
        CorruptFileError: the checkpoint is damaged.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        reading: FamState,
        ids: list[int],
        options: StudyOptions,
        files: StudyFiles | None = None,
        resume: bool = False,
    ) -> None:
        self.model, self.options, self.files, self.ids = model, options, files, ids
        self.rows = LearnedRows(reading)
        self.maker = LessonMaker(
            model,
            tokenizer,
            Pieces(torch.tensor(ids, dtype=torch.long), options.piece_tokens),
            batch_size=options.pieces_per_step,
            answer_tokens=options.answer_tokens,
            temperature=options.temperature,
            seed=options.seed,
            hides_memory=options.hide_memory,
        )
        self.optimizer = torch.optim.Adam(self.rows.parameters(), lr=options.lr, betas=(0.9, 0.99))
        self.progress = Progress()
        self.best = {i: torch.zeros_like(change) for i, change in self.rows.changes.items()}
        self._lessons: dict[int, Lesson] = {}
        self._held_out: list[Lesson] = []
        if resume and files is not None:
            loaded = load_checkpoint(files.checkpoint, self.rows.changes, self.optimizer, options)
            self.progress, self.best = loaded
            cut_log(files.log, self.progress.step)
        else:
            self.save()
            if files is not None:
                files.log.unlink(missing_ok=True)

    def save(self) -> None:
        """Write the checkpoint.

        Raises:
            TransformerFamError: it cannot be written.
        """
        if self.files is not None:
            changes = {i: change.detach() for i, change in self.rows.changes.items()}
            path = self.files.checkpoint
            save_checkpoint(path, changes, self.best, self.optimizer, self.progress, self.options)

    def run(
        self, max_seconds: float = math.inf, max_steps: int | None = None, on_step: OnStep | None = None
    ) -> StudyResult:
        """Study until the time is up, the steps are done, the held-out lessons get no better, or a signal comes.

        Args:
            max_seconds: of training, all runs together.
            max_steps: all runs together.
            on_step: called after every step.

        Raises:
            NonFiniteLossError: the loss is not finite; the checkpoint is that of an earlier step.
            TransformerFamError: the disk is full.
        """
        progress, last_saved = self.progress, time.monotonic()
        with ends_noted() as noted, frozen(self.model):
            while (reason := self._reason(max_seconds, max_steps, noted)) is None:
                begun = time.monotonic()
                if progress.start_loss is None:
                    progress.start_loss = progress.best_loss = self.held_out_loss()
                    progress.seconds += time.monotonic() - begun
                    continue
                row = self._step()
                progress.seconds += time.monotonic() - begun
                self._log(row | {"seconds": round(progress.seconds, 3)}, on_step)
                if time.monotonic() - last_saved >= CHECKPOINT_SECONDS:
                    self.save()
                    last_saved = time.monotonic()
            self.save()
        return StudyResult(self.state(), progress, reason)

    def _reason(self, max_seconds: float, max_steps: int | None, noted: list[int]) -> str | None:
        """Return why the study ends now; None where it does not."""
        progress = self.progress
        if noted:
            return "interrupted"
        if progress.num_worse >= self.options.patience:
            return "held_out"
        if max_steps is not None and progress.step >= max_steps:
            return "steps"
        return "minutes" if progress.seconds >= max_seconds else None

    def _step(self) -> dict[str, Any]:
        """Learn from one lesson, and look at those held out where it is time; return the row of the log."""
        options, progress = self.options, self.progress
        lesson = self._lesson(options.lesson_number(progress.step))
        rate = options.lr * min(1.0, (progress.step + 1) / options.warmup_steps)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss = divergence(self.model, self.rows.state(len(lesson.ids_BT)), lesson)
            loss.backward()
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"the loss of step {progress.step} is {value}, required is a finite number; the last checkpoint is "
                "kept; start over with a lower learning rate"
            )
        self.optimizer.step()
        row = {"step": progress.step, "kind": lesson.kind, "loss": value, "lr": rate, "held_out_loss": None}
        progress.step += 1
        if progress.step % options.evaluate_every == 0:
            row["held_out_loss"] = self._look()
        return row

    def _look(self) -> float:
        """Ask the held-out lessons, keep the rows if they are the best so far, and return the loss."""
        progress, loss = self.progress, self.held_out_loss()
        assert progress.best_loss is not None
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.num_worse = loss, progress.step, 0
            self.best = {i: change.detach().clone() for i, change in self.rows.changes.items()}
        else:
            progress.num_worse += 1
        return loss

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return how far the rows are from the teacher on the held-out lessons, in nats a token."""
        if not self._held_out:
            numbers = range(self.options.num_held_out)
            self._held_out = [self.maker.lesson(number, held_out=True) for number in numbers]
        losses = [divergence(self.model, self.rows.state(len(one.ids_BT)), one) for one in self._held_out]
        return torch.stack(losses).mean().item()

    def _lesson(self, number: int) -> Lesson:
        """Return a lesson, made where it is new; those of the pool are kept."""
        if number not in self._lessons:
            first = number // self.options.pool * self.options.pool
            self._lessons = {n: lesson for n, lesson in self._lessons.items() if n >= first}
            self._lessons[number] = self.maker.lesson(number)
        return self._lessons[number]

    def _log(self, row: dict[str, Any], on_step: OnStep | None) -> None:
        if self.files is not None:
            with uninterrupted(), self.files.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
        if on_step is not None:
            on_step(row)

    @torch.no_grad()
    def state(self) -> FamState:
        """Return the whole text, read with the best rows: an ordinary state."""
        now = {i: change.detach().clone() for i, change in self.rows.changes.items()}
        try:
            self.rows.put(self.best)
            state = self.rows.state()
        finally:
            self.rows.put(now)
        rest = self.ids[state.num_tokens_read :]
        if rest:
            self.model.read(torch.tensor(rest), state)
        return state


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Let no weight of a model require gradients in the body."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
