"""Keys that recipes once had: what each was fixed to, and what to do where a recipe still has one."""

from typing import Any, NamedTuple


class Removed(NamedTuple):
    """A key that is gone."""

    remedy: str
    """What to do."""
    default: Any
    """The value that its recipes are trained by now."""
    is_free: bool = False
    """Whether no value of it changes a number of a run."""


REMOVED = {
    "model.vocabulary_words": Removed("the vocabulary has the 2,000 most frequent words; leave it out", 2000),
    "optimizer.final_lr_fraction": Removed("the learning rate decays to 0.02 of itself; leave it out", 0.02),
    "schedule.log_every": Removed("every step is logged; leave it out", 1, is_free=True),
    "state_passing.start_accuracy": Removed("set start_step or start_stage in its place", None),
    "instructions.prompt_weight": Removed("prompts weigh 0; leave it out", 0.0),
    "instructions.answer_weight": Removed("answers weigh 1; change repeat_weight, which is relative to it", 1.0),
    "instructions.repeat_prompt": Removed("it is always the paper's; leave it out", "[repeat random segment]:"),
    "reading.num_sink_tokens": Removed("train with fam.num_sink_tokens, or leave it out", None),
}
"""By section and key."""


def without_removed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a stored recipe without the removed keys that say what is fixed now.

    Args:
        values: plain values, as an earlier version wrote them; they stay as they are.
    """
    kept = {section: dict(keys) if isinstance(keys, dict) else keys for section, keys in values.items()}
    for dotted, removed in REMOVED.items():
        section, _, name = dotted.partition(".")
        keys = kept.get(section)
        if isinstance(keys, dict) and name in keys and (removed.is_free or keys[name] == removed.default):
            del keys[name]
    return kept
