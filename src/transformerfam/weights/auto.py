"""Converted models by name or folder, in one call."""

import os
from pathlib import Path
from typing import Any, cast

from transformers import AutoModelForCausalLM

from transformerfam.errors import TransformerFamError
from transformerfam.fam.memory import FamModel
from transformerfam.weights.folders import CONFIG_FILE
from transformerfam.weights.models import NAMED_MODELS, load_model
from transformerfam.weights.pretrained import load_with_memory

RUNS_CODE = ("trust_remote_code", "code_revision")


def from_pretrained(name_or_folder: str | os.PathLike[str], *, kind: Any = None, **options: Any) -> FamModel:
    """Load a converted model with its memory, in evaluation mode.

    Args:
        name_or_folder: "tiny", "smollm2", what `save_pretrained` of a converted model wrote (a folder, or its name on
            the Hub), or any folder that `load_model` takes.
        kind: the class of transformers' that loads it; None is `AutoModelForCausalLM`.
        **options: of that class's `from_pretrained`, for example `dtype` and `device_map`; for such folders alone.

    Returns:
        The model, of its base's class.

    Raises:
        TransformerFamError: the model is not converted, an option has no effect on it, or code of the folder would run.
        CorruptFileError: it cannot be read.
    """
    for name in RUNS_CODE:
        if options.pop(name, None):
            raise TransformerFamError(f"{name} is given, and no code of a model is ever run; leave it out")
    folder = Path(name_or_folder)
    if str(folder) in NAMED_MODELS or (folder.is_dir() and not (folder / CONFIG_FILE).is_file()):
        given = sorted(options) + ([] if kind is None else ["kind"])
        if given:
            raise TransformerFamError(
                f"{given[0]} is given, and {name_or_folder} is not a folder that transformers loads; leave it out, and "
                "move or cast the model afterwards"
            )
        return load_model(name_or_folder)[0]
    options.setdefault("local_files_only", False)
    model = load_with_memory(AutoModelForCausalLM if kind is None else kind, name_or_folder, **options)
    return cast(FamModel, model.eval())


class AutoFamModelForCausalLM:
    """The same in the manner of transformers and PEFT: `AutoFamModelForCausalLM.from_pretrained(FOLDER)`."""

    def __init__(self) -> None:
        raise TransformerFamError(
            "AutoFamModelForCausalLM makes no model itself; call its from_pretrained(NAME_OR_FOLDER)"
        )

    from_pretrained = staticmethod(from_pretrained)
