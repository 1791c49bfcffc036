"""The rivals that are choices of `FamConfig`, by name, and the sections of a recipe that train any system."""

import difflib
from typing import Any

from transformerfam.config import PLAIN_UPDATE, UPDATE_PRESETS, FamConfig
from transformerfam.errors import TransformerFamError
from transformerfam.rivals.config import RIVAL_NAMES

NUM_SINK_TOKENS = 4
"""First tokens that StreamingLLM keeps."""

_BSWA: dict[str, Any] = PLAIN_UPDATE | {"fam_length": 0, "fam_layers": None}

PRESETS: dict[str, dict[str, Any]] = {
    "fam": {},
    "fam_gated": UPDATE_PRESETS["gated"],
    "fam_prefix": {"fam_init": "prefix"},
    "static_summary": {"fam_query": "initial", "fam_residual": "none"},
    "bswa": _BSWA,
    **{f"bswa_m{m}": _BSWA | {"num_memory_segments": m} for m in range(13)},
    "bswa_stop_gradient": _BSWA | {"num_memory_segments": 1, "stop_gradient": True},
    "transformer_xl": _BSWA | {"num_memory_segments": 1, "window": "block_size"},
    "attention_sinks": _BSWA | {"num_memory_segments": 1, "num_sink_tokens": NUM_SINK_TOKENS},
}
"""What differs from the configuration of the comparison: BSWA with m = 0 ... 12 memory segments, without their gradient
(M1_SG), with Transformer-XL's mask (table 8), with attention sinks (B.4.4), and the static summary (C.3)."""


def preset(name: str, config: FamConfig) -> FamConfig:
    """Return `config` as one of `PRESETS`.

    Raises:
        TransformerFamError: there is no such preset.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(PRESETS)}"
        raise TransformerFamError(f"there is no preset {name!r}; {hint}")
    changes = PRESETS[name]
    if changes.get("window") == "block_size":
        changes = changes | {"window": config.block_size}
    return config.replace(**changes)


def sections_of(system: str, fam: FamConfig) -> dict[str, dict[str, Any] | None]:
    """Return the sections of a recipe that train a system in place of FAM.

    Args:
        system: one of `PRESETS` or of `RIVAL_NAMES`.
        fam: the recipe's FAM.

    Returns:
        Plain values by section; None where a section is FAM's alone, and is left out.

    Raises:
        TransformerFamError: there is no such system.
    """
    if system not in RIVAL_NAMES:
        chosen = preset(system, fam).to_dict()
        return {"fam": {name: value for name, value in chosen.items() if value is not None}}
    plain = {"block_size": fam.block_size, "fam_length": 0, "num_memory_segments": 0}
    rival = {"system": system, "block_size": fam.block_size}
    rival |= {"num_memory_tokens": fam.fam_length} if fam.fam_length else {}
    return {"fam": plain, "rival": rival, "key_bias": None, "reading": None}
