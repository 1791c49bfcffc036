"""What does a block, a token and a training step take, counted? The same on every machine, so any growth is the code's.

Counted are calls of torch's operators and the bytes of the tensors that they make; views make none. Times follow both,
since at these sizes a call costs some microseconds and a byte is written and read again.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import Row, row
from benchmarks.models import converted, random_tokens
from transformerfam.training.data.instructions import weighed_batch
from transformerfam.training.step.blocks import run_batch


class OperatorCount(TorchDispatchMode):
    """Count operator calls and the bytes of new tensors while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one call and what it made."""
        output = func(*args, **(kwargs or {}))
        given = {storage_of(t) for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)}
        made = {storage_of(t): t for t in tree_leaves(output) if isinstance(t, torch.Tensor)}
        self.num_calls += 1
        self.num_bytes += sum(t.untyped_storage().nbytes() for storage, t in made.items() if storage not in given)
        return output


def storage_of(tensor: torch.Tensor) -> int:
    """Return what distinguishes a tensor's memory from another's."""
    return tensor.untyped_storage().data_ptr()


def run(model: str = "random_8m", quick: bool = False) -> Iterator[Row]:
    """Count a block and the first two tokens of the next one, for m = 0 and 3, and a training step of two blocks."""
    block_size = 64 if quick else 256
    fields = {"block_size": block_size, "fam_length": block_size // 16}

    def counted_row(system: str, num_tokens: int, num_segments: int, side: Callable[[], Any]) -> Row:
        with OperatorCount() as count:
            side()
        return row(
            "counts",
            system=system,
            model=model,
            **fields,
            num_memory_segments=num_segments,
            num_tokens=num_tokens,
            num_calls=count.num_calls,
            bytes_made=count.num_bytes,
        )

    for num_segments in (0, 3):
        reader = converted(model, num_memory_segments=num_segments, **fields)
        state = reader.read(random_tokens(model, 6 * block_size))
        for system, num_tokens in (("block", block_size), ("first_token", 1), ("token", 1)):
            ids = random_tokens(model, num_tokens)
            with torch.no_grad():
                side = functools.partial(reader, input_ids=ids, past_key_values=state, logits_to_keep=1)
                yield counted_row(system, num_tokens, num_segments, side)
    trained = converted(model, is_shared=False, num_memory_segments=0, **fields).train()
    ids_BT = random_tokens(model, 2 * block_size)
    batch = weighed_batch(ids_BT, torch.ones(ids_BT.shape))
    step = functools.partial(run_batch, trained, batch, trained.init_state())
    yield counted_row("training_step", 2 * block_size, 0, lambda: step().loss.backward())
