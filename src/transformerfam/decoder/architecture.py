"""What two models must share so that what was made on one fits the other: their architecture, as plain values."""

import fnmatch
import json
from collections.abc import Mapping
from typing import Any

ARCHITECTURE_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "layer_types",
    "sliding_window",
    "tie_word_embeddings",
)

CONSTANTS = "constants"
"""Key of an architecture under which all further numbers of a model's configuration are, and its activations."""

NOT_FELT = (
    *("output_*", "return_*", "use_cache", "chunk_size_feed_forward", "is_*", "tie_*", "num_labels", "gradient*"),
    *("*dropout*", "*pdrop", "*jitter*", "*_coef", "*initializer*", "*token_id*", "pretraining_tp", "num_nextn_*"),
    "max_position_embeddings",
)
"""Numbers of a configuration that change nothing of what a model reads: patterns of their names."""


def describe_architecture(model: Any) -> dict[str, Any]:
    """Return what two models must share so that a state of one fits the other, as JSON values."""
    values = model.config.to_dict()
    chosen = {"class": type(model).__name__} | {key: values.get(key) for key in ARCHITECTURE_KEYS}
    chosen[CONSTANTS] = {
        key: value
        for key, value in sorted(values.items())
        if (isinstance(value, int | float) or (isinstance(value, str) and "activation" in key))
        and key not in ARCHITECTURE_KEYS
        and not any(fnmatch.fnmatch(key, pattern) for pattern in NOT_FELT)
    }
    return json.loads(json.dumps(chosen))


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first key in which two architectures differ, with both values; None where they are equal.

    Of `CONSTANTS` those are compared that both have: versions of transformers add some, and old files have none.
    """
    for key in sorted({*there, *here} - {CONSTANTS}):
        if there.get(key) != here.get(key):
            return key, there.get(key), here.get(key)
    own, other = there.get(CONSTANTS) or {}, here.get(CONSTANTS) or {}
    for key in sorted(own.keys() & other.keys()):
        if own[key] != other[key]:
            return key, own[key], other[key]
    return None
