"""`hidden_states[i].retain_grad()` of a model that reads in pieces, as of one that reads at once.

What a caller gets of a layer is joined from what every piece had, and no layer has used the joined tensor. Its gradient
is therefore that of the pieces' own tensors, joined alike. A hook and `torch.autograd.grad` would see what the caller
computes from the joined tensor alone. Hooks are refused; `autograd.grad` cannot be: call `retain_grad()`, `backward()`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from transformerfam.errors import TransformerFamError


def take_gradients_of(
    whole_BTD: torch.Tensor,
    parts: Sequence[tuple[torch.Tensor, slice]],
    join: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Let `retain_grad()` of a joined tensor collect the gradients of the pieces' tensors; return it.

    Args:
        whole_BTD: what the caller gets.
        parts: for every piece the tensor `(B, rows, D)` that goes through its layers, and which rows of it are joined.
        join: puts pieces `(B, T', D)` side by side where `whole_BTD` has their tokens; padding gets zeros.
    """

    def retain_grad() -> None:
        torch.Tensor.retain_grad(whole_BTD)  # what a caller computes from it is in the pieces' gradients, too
        lengths = [range(hidden.shape[1])[rows] for hidden, rows in parts]
        width = sum(map(len, lengths))
        side_by_side = whole_BTD.new_zeros(len(whole_BTD), width, whole_BTD.shape[2])
        start = 0
        for (hidden, rows), length in zip(parts, lengths, strict=True):
            own = side_by_side[:, start : start + len(length)]
            start += len(length)
            if not hidden.requires_grad:
                continue

            def note(grad: torch.Tensor, rows: slice = rows, own: torch.Tensor = own) -> None:
                if whole_BTD.grad is None:
                    side_by_side.zero_()  # also where the caller has set it to None between two backward passes
                own += grad[:, rows]
                whole_BTD.grad = join(side_by_side)

            hidden.register_hook(note)

    whole_BTD.retain_grad = retain_grad  # type: ignore[method-assign]
    return _without_hooks(whole_BTD, "a layer has used each piece's own tensor; call retain_grad() and backward()")


def _without_hooks(whole_BTD: torch.Tensor, why: str) -> torch.Tensor:
    def register_hook(*args: Any, **kwargs: Any) -> None:
        raise TransformerFamError(f"a hook on these hidden states would not see their gradient: {why}")

    whole_BTD.register_hook = register_hook  # type: ignore[method-assign]
    return whole_BTD


def without_gradients(whole_BTD: torch.Tensor, why: str) -> torch.Tensor:
    """Let `retain_grad()` of a joined tensor say that there is no gradient to be had; return it.

    Args:
        whole_BTD: what the caller gets.
        why: the reason and the remedy.
    """

    def retain_grad() -> None:
        raise TransformerFamError(f"these hidden states have no gradient to keep: {why}")

    whole_BTD.retain_grad = retain_grad  # type: ignore[method-assign]
    return _without_hooks(whole_BTD, why)
