"""TransformerFAM for any transformers decoder: read input of any length in constant memory, and still use it."""

from transformerfam.versions import check_versions

check_versions()  # first, since what follows imports names that older versions lack

import transformerfam.old_paths  # noqa: E402
from transformerfam.config import FamConfig  # noqa: E402
from transformerfam.fam.convert import convert  # noqa: E402
from transformerfam.fam.state import FamState  # noqa: E402
from transformerfam.weights.auto import AutoFamModelForCausalLM, from_pretrained  # noqa: E402
from transformerfam.weights.pretrained import install  # noqa: E402

transformerfam.old_paths.install()

__all__ = ["AutoFamModelForCausalLM", "FamConfig", "FamState", "convert", "from_pretrained", "install"]
