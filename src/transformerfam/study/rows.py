"""The rows of a reading as what learns: everything else of the model and of the reading stays as it is."""

from collections.abc import Mapping

import torch
from torch import nn

from transformerfam.errors import TransformerFamError
from transformerfam.fam.state import FamState


class LearnedRows:
    """Give readings whose rows learn.

    A row is moved by `scale * change`, where `scale` is the root mean square of its column over the rows that it starts
    from: keys and values, and the layers, differ by orders of magnitude, and one learning rate is to serve them all.

    Args:
        state: a reading of one sequence that ends with a block; it stays as it is.
        fam_LBFD: rows to start from in place of the reading's, `(L, 1, F, D)`.

    Attributes:
        changes: what learns, by the layer's number, `(F, D)` each, in float32.

    Raises:
        TransformerFamError: the reading has no rows, several sequences, or a block that is not complete.
    """

    def __init__(self, state: FamState, fam_LBFD: torch.Tensor | None = None) -> None:
        if state.batch_size != 1 or state.block_fill != [0]:
            raise TransformerFamError(
                f"the reading has {state.batch_size} sequences with {state.block_fill} tokens of a block, required is "
                "one that ends with a block; read whole blocks of one text"
            )
        fam_LBFD = (state.fams if fam_LBFD is None else fam_LBFD).detach().float()
        self.before = state.fork().detach()
        self._batches: dict[int, FamState] = {}
        carrying = [i for i, layer in enumerate(state.layers) if layer.fam is not None]
        self.start = {i: fam_LBFD[i, 0].clone() for i in carrying}
        self.scale = {i: _scale(rows_FD) for i, rows_FD in self.start.items()}
        self.changes = {i: nn.Parameter(torch.zeros_like(rows_FD)) for i, rows_FD in self.start.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Return what learns, from the lowest layer up."""
        return [self.changes[i] for i in sorted(self.changes)]

    def of_layer(self, layer_idx: int) -> torch.Tensor:
        """Return the rows of a layer as they are now, `(F, D)` in float32, with their graph."""
        return self.start[layer_idx] + self.scale[layer_idx] * self.changes[layer_idx]

    @torch.no_grad()
    def put(self, changes: Mapping[int, torch.Tensor]) -> None:
        """Set what learns."""
        for layer_idx, change in self.changes.items():
            change.copy_(changes[layer_idx])

    def state(self, batch_size: int = 1) -> FamState:
        """Return a reading with the rows as they are now, for so many sequences.

        While gradients are recorded, they reach the rows; else the reading is a copy, which may be moved on.
        """
        if batch_size not in self._batches:
            self._batches[batch_size] = self.before.select([0] * batch_size)
        state = self._batches[batch_size].shallow_copy()
        for layer_idx in self.start:
            layer = state.layers[layer_idx]
            layer.fam = self.of_layer(layer_idx).to(layer.fam.dtype).expand(batch_size, -1, -1)
        return state if torch.is_grad_enabled() else state.fork()


def _scale(rows_FD: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of every column, at least a tenth of that of all, `(D,)`."""
    squares_D = rows_FD.square().mean(0)
    return squares_D.clamp_min(0.01 * squares_D.mean()).clamp_min(1e-12).sqrt()
