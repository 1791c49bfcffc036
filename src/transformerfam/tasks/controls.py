"""Controls: the same question with another memory, which a model that looks it up there must fail.

A control is called by the system whose memory is changed: `fam_memory_zeroed`, `armt_memory_swapped`.
"""

from collections.abc import Callable

from transformerfam.decoder.state import ReadingState

ZEROED, SWAPPED, INITIAL = "_memory_zeroed", "_memory_swapped", "_memory_initial"
CONTROLS: dict[str, Callable[[ReadingState], ReadingState]] = {
    ZEROED: ReadingState.zero_memory,
    SWAPPED: ReadingState.swap_memory,
    INITIAL: ReadingState.initial_memory,
}
"""By the end of a name, what is done to the memory in front of a question: zeros, which are foreign to a model; the
memory of another text; the memory of one who has read nothing."""


def control_of(name: str) -> tuple[str, Callable[[ReadingState], ReadingState]] | None:
    """Return the system and what is done to its memory, where a name is that of a control."""
    for ending, change in CONTROLS.items():
        if name.endswith(ending):
            return name.removesuffix(ending), change
    return None
