"""Where a decoder carries its memory: one submodule, by whose name files and PEFT's configurations know its parameters.

There is one memory at most. Every class of memory adds the name of its submodule to `SLOTS`.
"""

from typing import Any

SLOTS: set[str] = set()


def memory_in(decoder: Any) -> Any:
    """Return the memory that a decoder carries, inside PEFT's wrapper where it has one; None where there is none."""
    return next((getattr(decoder, slot) for slot in sorted(SLOTS) if hasattr(decoder, slot)), None)
