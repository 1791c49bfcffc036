"""Controls: the same question with another memory, which a model that looks it up there must fail."""

from collections.abc import Callable

from transformerfam.reading_state import ReadingState

MEMORY_ZEROED, MEMORY_SWAPPED, MEMORY_INITIAL = "fam_memory_zeroed", "fam_memory_swapped", "fam_memory_initial"
CONTROLS: dict[str, Callable[[ReadingState], ReadingState]] = {
    MEMORY_ZEROED: ReadingState.zero_memory,
    MEMORY_SWAPPED: ReadingState.swap_memory,
    MEMORY_INITIAL: ReadingState.initial_memory,
}
"""What is done to the memory before a control is asked: zeros, which are foreign to a model; the memory of another
text; the memory of one who has read nothing."""
