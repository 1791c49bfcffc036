"""TransformerFAM for any transformers decoder: read input of any length in constant memory, and still use it.

Names are imported when they are first used, since torch and transformers take seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

import transformerfam.old_paths
from transformerfam.versions import check_versions

if TYPE_CHECKING:
    from transformerfam.config import FamConfig
    from transformerfam.fam.convert import convert
    from transformerfam.fam.state import FamState
    from transformerfam.weights.auto import AutoFamModelForCausalLM, from_pretrained
    from transformerfam.weights.pretrained import install

__all__ = ["AutoFamModelForCausalLM", "FamConfig", "FamState", "convert", "from_pretrained", "install"]

_PLACES = {
    "AutoFamModelForCausalLM": "weights.auto",
    "FamConfig": "config",
    "FamState": "fam.state",
    "convert": "fam.convert",
    "from_pretrained": "weights.auto",
    "install": "weights.pretrained",
}

check_versions()  # before anything is imported that older versions lack
transformerfam.old_paths.install()


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
