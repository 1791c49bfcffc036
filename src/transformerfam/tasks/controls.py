"""Controls: the same question with another memory, which a model that looks it up there must fail.

A control is called by the system whose memory is changed: `fam_memory_zeroed`, `armt_memory_swapped`.
"""

from collections.abc import Callable
from operator import methodcaller

from transformerfam.decoder.state import ReadingState

ZEROED, SWAPPED, INITIAL = "_memory_zeroed", "_memory_swapped", "_memory_initial"
CONTROLS: dict[str, Callable[[ReadingState], ReadingState]] = {
    ZEROED: methodcaller("zero_memory"),
    SWAPPED: methodcaller("swap_memory"),
    INITIAL: methodcaller("initial_memory"),
}
"""By the end of a name, what is done to the memory before a question: zeros, which are foreign to a model; the memory
of another text; the memory of one who has read nothing. The method is the state's: every memory has its own."""


def control_of(name: str) -> tuple[str, Callable[[ReadingState], ReadingState]] | None:
    """Return the system and what is done to its memory, where a name is that of a control."""
    for ending, change in CONTROLS.items():
        if name.endswith(ending):
            return name.removesuffix(ending), change
    return None
