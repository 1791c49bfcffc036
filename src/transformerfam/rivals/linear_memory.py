"""Reading a linear memory: a matrix that keys have written values into, over the sum of what they wrote."""

import torch

LEAST_NORM = 1e-5
"""What a norm is taken for if it is smaller: of an empty memory it is zero."""


def retrieve(features: torch.Tensor, matrix: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Return what features read; zero from an empty memory, where the equation is 0 / 0.

    Args:
        features: of queries or keys, `(..., T, N)`.
        matrix: `(..., N, V)`.
        sums: `(..., N)`.

    Returns:
        `(..., T, V)`.
    """
    norm = (features @ sums[..., None]).clamp(min=LEAST_NORM)
    return features @ matrix / norm
