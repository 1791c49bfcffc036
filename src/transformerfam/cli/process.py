"""What a command sets for its whole process. Nothing else of the package sets such a thing."""

import torch


def set_up_training(threads: int | None) -> None:
    """Set torch's threads, and take numbers too small for full precision as 0, which takes less time.

    Args:
        threads: of the recipe; None leaves them.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
