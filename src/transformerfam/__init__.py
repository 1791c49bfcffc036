"""TransformerFAM for any transformers decoder: read input of any length in constant memory, and still use it."""

from transformerfam.versions import check_versions

check_versions()  # first, since what follows imports names that older versions lack

import transformerfam.loading  # noqa: E402, F401  (from_pretrained gives converted models back)
from transformerfam.config import FamConfig  # noqa: E402
from transformerfam.convert import convert  # noqa: E402
from transformerfam.state import FamState  # noqa: E402

__all__ = ["FamConfig", "FamState", "convert"]
