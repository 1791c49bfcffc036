"""TransformerFAM for any transformers decoder: read input of any length in constant memory, and still use it."""

import transformerfam.loading  # noqa: F401  (from_pretrained gives converted models back)
from transformerfam.config import FamConfig
from transformerfam.convert import convert
from transformerfam.state import FamState

__all__ = ["FamConfig", "FamState", "convert"]
