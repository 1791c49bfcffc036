"""What the rows of a segment see of one another."""

import functools

import torch


@functools.lru_cache(maxsize=16)
@torch.inference_mode(mode=False)
def segment_mask(
    start: int,
    num_rows: int,
    num_front: int,
    num_joined_front: int,
    num_joined_behind: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Return the mask of a piece as a bias on its logits, `(1, 1, num_rows, start + num_rows)`.

    Args:
        start: rows of the segment in front of the piece.
        num_rows: of the piece.
        num_front: memory rows in front of the segment, which no window hides.
        num_joined_front: first rows of the piece, which see each other.
        num_joined_behind: last rows of the piece, which see each other.
        window: last places that a row sees, its own included; None is all.
        dtype: floating type of the logits.
        device: where to.
    """
    place, row = torch.arange(start + num_rows)[None], torch.arange(start, start + num_rows)[:, None]
    seen = place <= row
    if window is not None:
        seen &= (row - place < window) | (place < num_front)
    seen[:num_joined_front, start : start + num_joined_front] = True
    if num_joined_behind:
        seen[-num_joined_behind:, -num_joined_behind:] = True
    mask = torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype).masked_fill(seen, 0)
    return mask[None, None].to(device)
