"""FAM rows in a type that may be too small for them.

The paper's update adds to the FAM in every block, and float16 ends at 65,504: rows that were cast there unchecked
became infinite, and with them every token that saw them.
"""

import torch

LARGEST_SHARE = 1 / 2
"""Of a type's largest number: what a number of a row may reach, so that a layer has room to add to it."""

MEAN_SHARE = 1 / 32
"""The same for a row's root mean square, so that a projection has room to multiply it."""

MEAN_SHARE_WITHOUT_NORM = 1 / 2048
"""The same where a feed-forward is given rows without a norm, and multiplies one projection of them by another."""


def fitting(rows: torch.Tensor, dtype: torch.dtype, mean_share: float = MEAN_SHARE, copy: bool = False) -> torch.Tensor:
    """Return FAM rows `(..., D)` in a type; in float16, rows that come near its largest number are scaled down.

    A row keeps its direction, which is all that a norm in front of a layer lets through. With `copy` the rows that are
    returned share no memory with those given.
    """
    if dtype != torch.float16:  # the others' largest number is above 1e38
        return rows.to(dtype, copy=copy)
    bound, exact = torch.finfo(dtype).max, rows.float()
    mean = exact.pow(2).mean(-1, keepdim=True).sqrt() / mean_share
    largest = torch.maximum(exact.abs().amax(-1, keepdim=True) / LARGEST_SHARE, mean)
    return (exact * (bound / largest.clamp(min=bound))).to(dtype)
