"""The processes of one training run, as `accelerate launch` starts them: who reads what, and what they share.

Every process builds the whole batch of a step, which is cheap, and reads its own share of the rows; gradients are
averaged by DistributedDataParallel through accelerate, or by torch's `fully_shard`, which accelerate starts on
accelerators alone, with the layers' weights sharded. Losses, keys and accuracies are those of the whole batch, so
that the curriculum advances alike in all processes. State passing: with `rows = "first"` the FAM of the whole batch's
first sequence, which rank 0 reads, goes to all; with `rows = "all"` each sequence's FAM stays with the process that
reads it.
"""

import contextlib
import dataclasses
import os
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from transformerfam.decoder.served import decoder_layers
from transformerfam.decoder.state import ReadingState
from transformerfam.errors import MissingPackageError, RecipeError, UnsupportedVersionError
from transformerfam.tasks.batch import Batch
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.training.sharding import whole
from transformerfam.training.state_passing import SavedFam
from transformerfam.training.step.scores import StepOutput
from transformerfam.training.step.step import run_step
from transformerfam.versions import OLDEST_TORCH_THAT_SHARDS, release


class StepModule(nn.Module):
    """A training step as a module's forward, which is what DistributedDataParallel wraps."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any) -> StepOutput:
        """Run `run_step` on this model."""
        return run_step(self.model, *arguments)


class Ranks:
    """One process alone, or one of several that `accelerate launch` started."""

    def __init__(self, recipe: Recipe) -> None:
        """Join the other processes.

        Raises:
            RecipeError: the batch cannot be split evenly, or the processes have different recipes.
            UnsupportedVersionError: `schedule.shard` with a torch that cannot train so.
            MissingPackageError: several processes without the package accelerate.
        """
        self.accelerator: Any = None
        self.rank, self.world = 0, int(os.environ.get("WORLD_SIZE", "1"))
        self.is_sharded = recipe.schedule.shard and self.world > 1
        if self.world == 1:
            return
        if self.is_sharded and release(torch.__version__) < release(OLDEST_TORCH_THAT_SHARDS):
            raise UnsupportedVersionError(
                f"torch is {torch.__version__}, required for schedule.shard is at least {OLDEST_TORCH_THAT_SHARDS}; "
                "install a newer torch, or set schedule.shard to false"
            )
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs
        except ImportError as error:
            raise MissingPackageError(
                "training in several processes needs the package accelerate; run pip install accelerate"
            ) from error
        # A prompt has no gradient in a step that starts from saved FAMs alone.
        self.accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
        self.rank = self.accelerator.process_index
        if recipe.schedule.batch_size % (self.world * recipe.schedule.accumulate):
            raise RecipeError(
                f"schedule.batch_size is {recipe.schedule.batch_size}, required for {self.world} processes is a "
                "multiple of their number, times schedule.accumulate"
            )
        alone = {
            "schedule.stored_blocks": recipe.schedule.stored_blocks,
            "state_passing.noise": recipe.state_passing.noise,
            "loss.teacher": recipe.loss.teacher,
            "loss.fam_change": recipe.loss.fam_change,
        }
        for name, value in alone.items():
            if value:
                raise RecipeError(
                    f"{name} is {value}, required for {self.world} processes is 0, since it is not split; set it "
                    "to 0, or train in one process"
                )

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def require_alike(self, values: Any, what: str) -> None:
        """Refuse processes that disagree.

        Raises:
            RecipeError: another process has other values.
        """
        if self.accelerator is None:
            return
        everyone = self.gather_objects(values)
        if any(other != everyone[0] for other in everyone):
            different = next(rank for rank, other in enumerate(everyone) if other != everyone[0])
            raise RecipeError(f"process {different} has another {what} than process 0; start all with the same")

    def wrap(self, model: PreTrainedModel) -> nn.Module:
        """Return the module whose forward is a training step, its gradients averaged over the processes."""
        module: nn.Module = StepModule(model)
        if self.world == 1:
            return module
        if not self.is_sharded:
            wrapped: nn.Module = self.accelerator.prepare_model(module)
            return wrapped
        mesh = init_device_mesh(self.accelerator.device.type, (self.world,))
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh)
        return module

    def read_in_parts(
        self, module: nn.Module, recipe: Recipe, own: Batch, state: ReadingState, *rest: Any
    ) -> StepOutput:
        """Run a step and its backward pass on this process's rows, part by part.

        Args:
            module: what `wrap` gave.
            recipe: how many parts.
            own: this process's rows.
            state: where they start.
            *rest: passed on to `run_step`, after the recipe.

        Returns:
            The output of all parts; its loss has lost its graph.
        """
        num_rows, num_parts = len(own.keys), recipe.schedule.accumulate
        share, outputs = num_rows // num_parts, []
        for part in range(num_parts):
            rows = slice(part * share, (part + 1) * share)
            is_last = part == num_parts - 1
            no_sync: Any = getattr(module, "no_sync", contextlib.nullcontext)  # of DistributedDataParallel
            with contextlib.nullcontext() if is_last else no_sync():
                piece = state if num_parts == 1 else state.select(list(range(rows.start, rows.stop)))
                output = module(_rows_of(own, rows) if num_parts > 1 else own, piece, recipe, *rest)
                # The processes' gradients are averaged; the parts share the state's graph, to the initial FAM.
                (output.loss * self.world).backward(retain_graph=not is_last)
            outputs.append(dataclasses.replace(output, loss=output.loss.detach()))
        return outputs[0] if num_parts == 1 else _joined(own, outputs, share)

    def share_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Average the gradients of what is whole in every process; sharded layers have done so."""
        if not self.is_sharded:
            return
        kept = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        num_with_gradient = self._sum(torch.tensor([float(parameter.grad is not None) for parameter in kept]))
        for parameter, num_processes in zip(kept, num_with_gradient.tolist(), strict=True):
            if num_processes == 0:
                continue  # AdamW leaves it as it is, as in one process
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.copy_(self.accelerator.reduce(parameter.grad, reduction="mean"))

    def clip(self, parameters: list[nn.Parameter], largest_norm: float) -> torch.Tensor:
        """Scale all gradients together to a norm of at most `largest_norm`, and return what it was."""
        if not self.is_sharded:
            return nn.utils.clip_grad_norm_(parameters, largest_norm)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        total = torch.stack([whole(gradient.norm()) for gradient in gradients]).norm()
        for gradient in gradients:
            gradient.mul_((largest_norm / (total + 1e-6)).clamp(max=1.0))
        return total

    def own_rows(self, num_rows: int) -> slice:
        """Return the rows of a batch that this process reads."""
        share = num_rows // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    def own_batch(self, batch: Batch) -> Batch:
        """Return this process's share of a batch; its weights stay those of the whole batch."""
        if self.world == 1:
            return batch
        return _rows_of(batch, self.own_rows(len(batch.keys)))

    def whole_output(self, output: StepOutput, own: Batch, whole: Batch) -> StepOutput:
        """Return the output of the whole batch; the FAM that is passed on stays that of this process's rows."""
        if self.world == 1:
            return output
        share = own.is_key_BT.sum() / whole.is_key_BT.sum().clamp(min=1)
        return dataclasses.replace(
            output,
            loss=self._sum(output.loss),
            attention_distance=self._sum(output.attention_distance),
            key_loss=self._sum(output.key_loss * share.to(output.key_loss)),
            is_right_B=self.accelerator.gather(output.is_right_B.to(self.accelerator.device)).cpu(),
        )

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self.accelerator.reduce(value.detach().to(self.accelerator.device), reduction="sum")
        return total

    def passed_fam(self, fam_LBFD: torch.Tensor | None, rows: str) -> torch.Tensor | None:
        """Return the FAM that this process's rows start from next."""
        if self.world == 1 or fam_LBFD is None or rows == "all":
            return fam_LBFD
        from accelerate.utils import broadcast

        first: torch.Tensor = broadcast(fam_LBFD[:, :1].contiguous())
        return first.expand_as(fam_LBFD)

    def any(self, flag: bool) -> bool:
        """Return whether it holds in any process."""
        if self.world == 1:
            return flag
        return bool(self._sum(torch.tensor(float(flag))) > 0)

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the value of every process."""
        if self.world == 1:
            return [value]
        from accelerate.utils import gather_object

        everyone: list[Any] = gather_object([value])
        return everyone

    def whole_saved(self, saved: SavedFam | None) -> SavedFam | None:
        """Return a saved FAM with the rows of all processes, as one process would keep it."""
        if self.world == 1 or saved is None:
            return saved
        fam_BLFD = saved.fam_LBFD.transpose(0, 1).contiguous()
        return SavedFam(self.accelerator.gather(fam_BLFD).transpose(0, 1).contiguous(), saved.keys)

    def own_saved(self, saved: SavedFam | None) -> SavedFam | None:
        """Return this process's rows of a saved FAM."""
        if self.world == 1 or saved is None:
            return saved
        return SavedFam(saved.fam_LBFD[:, self.own_rows(saved.fam_LBFD.shape[1])], saved.keys)

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


def _rows_of(batch: Batch, rows: slice) -> Batch:
    """Return some rows of a batch; their weights stay those of the whole batch."""
    fields = ("input_ids_BT", "labels_BT", "weights_BT", "is_key_BT", "keys", "is_told_B", "is_taught_BT")
    chosen: dict[str, Any] = {name: getattr(batch, name) for name in fields}
    chosen = {name: None if value is None else value[rows] for name, value in chosen.items()}
    return dataclasses.replace(batch, **chosen)


def _joined(own: Batch, outputs: list[StepOutput], share: int) -> StepOutput:
    """Return the output of several parts of `share` rows each as that of all rows."""
    num_asked = own.is_key_BT.sum().clamp(min=1)
    asked = [own.is_key_BT[part * share : (part + 1) * share].sum() for part in range(len(outputs))]
    key_loss = sum(output.key_loss * n.to(output.key_loss) for output, n in zip(outputs, asked, strict=True))
    fams = [output.passed_fam_LBFD for output in outputs if output.passed_fam_LBFD is not None]
    return dataclasses.replace(
        outputs[0],
        loss=torch.stack([output.loss for output in outputs]).sum(),
        key_loss=torch.as_tensor(key_loss / num_asked),
        is_right_B=torch.cat([output.is_right_B for output in outputs]),
        passed_fam_LBFD=torch.cat(fams, dim=1) if fams else None,
    )
