"""Train a memory by a recipe: the loop, its log, its checkpoints, and what is kept at the end."""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from transformerfam.decoder.memory import memory_of
from transformerfam.errors import NonFiniteLossError, RecipeError
from transformerfam.fam.convert import set_block_size, set_key_bias
from transformerfam.processes import ends_noted, uninterrupted
from transformerfam.tasks.batch import Batch
from transformerfam.tasks.provenance import device_name, memory_notes
from transformerfam.tasks.text import start_ids
from transformerfam.tasks.unknown_words import SOME_UNKNOWN
from transformerfam.training.checkpoint import Place, cut_log, load_checkpoint, save_checkpoint
from transformerfam.training.curriculum import Curriculum
from transformerfam.training.data.instructions import PackedInstructions
from transformerfam.training.data.sequences import SequenceBuilder
from transformerfam.training.optimizer import AverageOfWeights, build_optimizer, key_bias_at, lr_factor
from transformerfam.training.random_numbers import RandomNumbers
from transformerfam.training.ranks import Ranks
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.training.result import TrainingResult, save_trained
from transformerfam.training.run_folder import LOG_FILE, begin_run, claim_folder, release
from transformerfam.training.setup import build_teacher, build_trainee
from transformerfam.training.sharding import whole
from transformerfam.training.state_passing import SavedFam, StatePassing, held_keys
from transformerfam.training.step.auxiliary import auxiliary_losses
from transformerfam.training.step.blocks import TRY_AGAIN, find_non_finite, find_non_finite_gradient
from transformerfam.training.step.step import read_on, start_state
from transformerfam.training.step.stored_filler import StoredFiller, keep_filler
from transformerfam.training.validation import Validation
from transformerfam.weights.models import BASE_NOTE

OnStep = Callable[["Trainer", dict[str, Any]], bool | None]


class Trainer:
    """Train the memory of a recipe in a folder.

    The folder gets `log.jsonl`, `checkpoint.safetensors`, `recipe.json` and, at the end, the trained memory: a whole
    model after full training, an adapter in float16 after LoRA.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: str | Path,
        resume: bool = False,
        device: torch.device | str = "cpu",
        overwrite: bool = False,
    ) -> None:
        """Build model, data and optimizer.

        Threads of torch and the treatment of denormal numbers are the process's: `fam train` sets them. Random numbers
        are the run's own, and leave the process's as they are.

        Args:
            recipe: what to train.
            folder: where to; made if need be.
            resume: continue from the folder's checkpoint.
            device: where model and teacher are; a run may resume on another device.
            overwrite: start over and replace a run that is there.

        Raises:
            RecipeError: the folder holds a run already and `resume` is False, or another recipe's and it is True.
            CorruptFileError: `resume` is True and there is no checkpoint that can be read.
            TransformerFamError: another process trains there, or the folder is that of something else.
        """
        self.recipe = recipe
        self.folder = Path(folder)
        self.ranks = Ranks(recipe)
        self.ranks.require_alike(recipe.to_dict(), "recipe")
        device = device if self.ranks.accelerator is None else self.ranks.accelerator.device
        self.random_numbers = RandomNumbers(recipe.schedule.seed, device)
        self.takes_a_place, self.is_over = overwrite and not resume, False
        self.lock = claim_folder(self.folder, recipe, resume, self.ranks, overwrite)
        with self.random_numbers.in_force():
            self._build(recipe, device)
        if resume:
            self._restore()

    def _build(self, recipe: Recipe, device: torch.device | str) -> None:
        """Build everything that a step needs, as it is before the first one."""
        self.model, self.tokenizer = build_trainee(recipe)
        self.start_ids = start_ids(self.tokenizer)
        if self.start_ids and recipe.schedule.stored_blocks:
            raise RecipeError(
                "schedule.stored_blocks is above 0, and the tokenizer begins texts with special tokens, for which "
                "stored blocks leave no place; set it to 0"
            )
        self.model.to(device)
        self.step_module = self.ranks.wrap(self.model)
        self.auxiliary = auxiliary_losses(self.model, recipe)
        self.started_from = None if recipe.model.memory is None else memory_notes(recipe.model.memory)
        self.teacher, self.attention = build_teacher(recipe, self.model, device)
        self.sequences: Any = (SequenceBuilder if recipe.instructions is None else PackedInstructions)(
            recipe, self.tokenizer
        )
        self.validation = Validation(recipe, self.tokenizer)
        self.optimizer = build_optimizer(self.model, recipe)
        self.average = AverageOfWeights(self.model, recipe.optimizer.average_decay)
        self.passing = StatePassing(recipe.state_passing, recipe.schedule.seed)
        self.stored: StoredFiller | None = None
        self.step = 0
        self.curriculum = Curriculum(recipe.schedule.curriculum)
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.num_tokens = 0
        self.devices: list[str] = []  # that steps were taken on

    def run(self, on_step: OnStep | None = None) -> TrainingResult:
        """Train to the end, or to Ctrl-C, SIGTERM or SIGHUP.

        Args:
            on_step: called after every step with the trainer and the step's values, for progress; a result of True
                stops the run, as Ctrl-C does.

        Raises:
            NonFiniteLossError: the loss or a gradient is not finite; nothing of that step reaches the weights.
            RecipeError: it ran before, and so no longer holds its folder.
        """
        if self.is_over:
            raise RecipeError(
                f"this trainer of {self.folder} ran before; build another with resume=True, which continues from its "
                "checkpoint"
            )
        self.is_over = True
        try:
            with self.random_numbers.in_force():
                return self._run(on_step)
        finally:
            release(self.lock)

    def _run(self, on_step: OnStep | None) -> TrainingResult:
        schedule = self.recipe.schedule
        if self.ranks.is_main and self.takes_a_place:
            begin_run(self.folder, self.recipe)
        self.ranks.wait()
        self.model.train()
        if self.step < schedule.steps:
            self.devices = sorted({*self.devices, device_name(self.model.device)})
        begin, seconds_before = time.monotonic(), self.seconds
        last_save, cpu = begin, time.process_time()
        is_ended = False
        with ends_noted() as ends, (self.folder / LOG_FILE).open("a", encoding="utf-8") as log:
            while self.step < schedule.steps and not self.ranks.any(bool(ends) or is_ended):
                row = self._train_step() | self._validate()
                now = time.monotonic()
                self.seconds = seconds_before + now - begin
                self.cpu_seconds += time.process_time() - cpu
                cpu = time.process_time()
                row |= {
                    "cpu_seconds": round(self.cpu_seconds, 2),
                    "seconds": round(self.seconds, 2),
                    "tokens_per_second": round(self.num_tokens / self.seconds, 1),
                }
                if self.ranks.is_main:
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                if on_step is not None and self.ranks.is_main:
                    is_ended = self._tell(on_step, row) is True and self.step < schedule.steps
                if self.ranks.any(now - last_save >= schedule.checkpoint_seconds):
                    self.save_checkpoint()
                    last_save = time.monotonic()
                if schedule.max_seconds is not None and self.ranks.any(self.seconds >= schedule.max_seconds):
                    break
        with uninterrupted():
            self.save_checkpoint()
        if self.ranks.any(bool(ends) or is_ended):
            text = f"stopped after step {self.step} of {schedule.steps}; resume with: fam train RECIPE --resume"
            return TrainingResult(self.folder, self.step, self.seconds, False, text)
        if not self.validation.load_best(self.folder, self.model):
            self.average.copy_to(self.model)
        trained = {name: whole(p.detach()) for name, p in self.model.named_parameters() if p.requires_grad}
        if self.ranks.is_main:
            with uninterrupted():
                self.save_memory(trained)
        text = f"{self.step} steps in {self.seconds:.0f} s; the memory is in {self.folder}"
        unknown = getattr(self.sequences, "unknown_share", 0.0)
        if unknown >= SOME_UNKNOWN:
            text += f"; {unknown:.1%} of the training text's tokens are words that its tokenizer does not know"
        return TrainingResult(self.folder, self.step, self.seconds, True, text)

    def _tell(self, on_step: OnStep, row: dict[str, Any]) -> bool | None:
        """Pass a step on; what it raises loses no step, unless other processes would have to save with this one."""
        try:
            return on_step(self, row)
        except BaseException:
            if self.ranks.world == 1:
                with uninterrupted():
                    self.save_checkpoint()
            raise

    def _train_step(self) -> dict[str, Any]:
        step, recipe = self.step, self.recipe
        if recipe.key_bias is not None:
            set_key_bias(self.model, key_bias_at(recipe.key_bias, step))
        saved = self.passing.draw(step)
        self.stored = keep_filler(self.stored, self.model, self.sequences, step, self.passing.saved)
        if recipe.schedule.block_sizes:
            set_block_size(self.model, self.sequences.block_size(step))
        factor = lr_factor(recipe.optimizer, step, recipe.schedule.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        stored_ids_NT = None if self.stored is None else self.stored.ids_NT
        passed_keys = None if saved is None else saved.keys
        batch = self.sequences.batch(step, self.curriculum.stage_idx, passed_keys, stored_ids_NT)
        batch = batch.begun(self.start_ids, is_passed=saved is not None)
        own = self.ranks.own_batch(batch)
        lesson = None if self.teacher is None else self.teacher.read(own)
        num_repeats = self.sequences.num_repeats(step)
        rows = self.ranks.own_rows(len(batch.keys))
        state = start_state(self.model, recipe, self.passing, step, batch, saved, rows)
        self.optimizer.zero_grad()
        rest = (self.stored, lesson, num_repeats, self.auxiliary, self.attention)
        output = self.ranks.read_in_parts(self.step_module, recipe, own, state, *rest)
        output = self.ranks.whole_output(output, own, batch)
        self._require_finite(output.loss, batch, saved)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.ranks.share_gradients(trained)
        grad_norm = self.ranks.clip(trained, recipe.optimizer.clip_norm)
        if not bool(torch.isfinite(grad_norm)):
            raise NonFiniteLossError(
                f"the gradient of {find_non_finite_gradient(self.model)} is not finite at step {self.step}, though the "
                f"loss is; {TRY_AGAIN}"
            )
        self.optimizer.step()
        self.average.update(self.model, step)
        num_passed_tokens = output.num_passed_blocks * memory_of(self.model).config.block_size
        is_held_B = output.is_right_B & (~batch.is_told_B | (batch.num_told_B <= num_passed_tokens))
        held = held_keys(saved, batch.held, is_held_B.tolist())
        self.passing.keep(step, self.ranks.passed_fam(output.passed_fam_LBFD, recipe.state_passing.rows), held)
        self._read_between(step)
        self.num_tokens += batch.num_tokens
        row = {
            "step": self.step,
            "stage": self.curriculum.stage_idx,
            "state_passed": saved is not None,
            **output.measured(batch),
            "grad_norm": float(grad_norm),
            "block_size": memory_of(self.model).config.block_size,
            "lr": self.optimizer.param_groups[0]["lr"],
            "fam_key_bias": getattr(memory_of(self.model).config, "fam_key_bias", None),
            "tokens": self.num_tokens,
            "processes": self.ranks.world,
        }
        self.step += 1
        self.curriculum.advance(row["key_accuracy"])
        self.passing.update_start(self.step, self.curriculum.stage_idx)
        return row

    def _validate(self) -> dict[str, float]:
        """Measure on held-out texts and questions, where the recipe asks for it now, and keep the best weights."""
        if not self.validation.is_due(self.step):
            return {}
        found = self.validation.measure(self.model, self.average)
        folder = self.folder if self.ranks.is_main else None
        with uninterrupted():
            self.validation.keep_best(folder, self.model, self.average, self.step, found)
        return found

    def _read_between(self, step: int) -> None:
        """Let the passed FAM read some filler before the next step, without gradient."""
        saved = self.passing.saved
        num_blocks = self.passing.blocks_between(step)
        if saved is None or num_blocks == 0:
            return
        saved.fam_LBFD = read_on(self.model, saved.fam_LBFD, self.sequences, step, num_blocks, self.stored)

    def _require_finite(self, loss: torch.Tensor, batch: Batch, saved: SavedFam | None) -> None:
        if bool(torch.isfinite(loss)):
            return
        rows = self.ranks.own_rows(len(batch.keys))
        with torch.no_grad():
            state = start_state(self.model, self.recipe, self.passing, self.step, batch, saved, rows)
        place = find_non_finite(self.model, self.ranks.own_batch(batch), state)
        raise NonFiniteLossError(
            f"loss is {loss.item()} at step {self.step}; hidden states are first not finite in {place}; {TRY_AGAIN}"
        )

    def save_checkpoint(self) -> None:
        """Write everything that the next step depends on."""
        progress = {
            "step": self.step,
            **self.curriculum.to_dict(),
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "num_tokens": self.num_tokens,
            "devices": self.devices,
        }
        passing = copy.copy(self.passing)
        passing.saved = self.ranks.whole_saved(passing.saved)
        parts = (self.folder, self.model, self.optimizer, self.average, passing, progress)
        save_checkpoint(
            *parts,
            self.random_numbers.state,
            self.stored,
            place=Place(self.ranks.rank, self.ranks.world, self.ranks.wait),
        )
        self.ranks.wait()

    def _restore(self) -> None:
        parts = (self.folder, self.model, self.optimizer, self.average, self.passing)
        progress, random_state, self.stored = load_checkpoint(*parts, num_stages=len(self.curriculum.stages))
        self.random_numbers.go_on_from(random_state)
        self.passing.saved = self.ranks.own_saved(self.passing.saved)
        self.step = progress["step"]
        self.curriculum.restore(progress)
        self.seconds, self.cpu_seconds = progress["seconds"], progress["cpu_seconds"]
        self.num_tokens = progress["num_tokens"]
        self.devices = progress.get("devices", [])  # checkpoints of earlier versions have none
        self.validation.restore(self.folder)
        if self.ranks.is_main:
            cut_log(self.folder / LOG_FILE, self.step)

    def save_memory(self, trained: dict[str, torch.Tensor]) -> None:
        """Write the trained memory into the folder.

        Args:
            trained: the trained weights, whole, averaged where the recipe says so.
        """
        if self.ranks.is_sharded:  # this model holds a share of its weights alone
            self.model, _ = build_trainee(self.recipe)
            self.model.load_state_dict(trained, strict=False)
        longest_before = (self.started_from or {}).get("max_training_filler_tokens", 0)
        notes = {
            BASE_NOTE: self.recipe.model.base,
            "recipe": self.recipe.to_dict(),
            "steps": self.step,
            "seconds": round(self.seconds),
            "cpu_seconds": round(self.cpu_seconds),
            "num_tokens": self.num_tokens,
            "device": ", ".join(self.devices),
            "max_training_filler_tokens": max(self.recipe.max_filler_tokens, longest_before),
            "started_from": self.started_from,
            **self.validation.notes,
        }
        save_trained(self.model, self.tokenizer, self.folder, self.recipe, notes)
