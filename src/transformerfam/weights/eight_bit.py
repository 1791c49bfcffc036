"""Small models whose weights are stored in 8 bits, and computed with in float32.

Every row of a matrix is stored as 8-bit integers and its largest absolute value: a quarter of float32's bytes.
"""

import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.files.tensors import load_tensors, save_tensors
from transformerfam.files.writing import make_folder
from transformerfam.weights.pretrained import load_pretrained

EIGHT_BIT_FILE, KIND, FORMAT_VERSION = "model-int8.safetensors", "8-bit model", 1
LARGEST = 127
SCALE = ".scale"
"""What the name of a matrix's scales ends in."""


def save_eight_bit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str]) -> None:
    """Write a model without a memory; matrices are rounded, all else is kept in float32.

    Args:
        model: any of transformers'; of tied weights one is stored.
        tokenizer: its tokenizer.
        folder: where to; made if need be.

    Raises:
        TransformerFamError: a weight is not finite, the disk is full, or a file there is not of this package.
    """
    folder = Path(folder)
    make_folder(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if name not in model.state_dict():
            continue
        value = parameter.detach().float()
        if not bool(value.isfinite().all()):
            raise TransformerFamError(f"{name} holds numbers that are not finite; store a model without such weights")
        if value.ndim == 2:
            scale_R1 = value.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
            tensors[name] = (value / scale_R1).round().to(torch.int8)
            tensors[name + SCALE] = scale_R1[:, 0]
        else:
            tensors[name] = value
    save_tensors(folder / EIGHT_BIT_FILE, tensors, {"kind": KIND, "format_version": FORMAT_VERSION})
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_eight_bit(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Load what `save_eight_bit` wrote, in float32.

    Raises:
        CorruptFileError: the file is damaged, or does not hold all weights of the configuration, in their sizes.
        UnsupportedModelError: the configuration names code to run, which is never run.
    """
    folder = Path(folder)
    stored, _ = load_tensors(folder / EIGHT_BIT_FILE, KIND, FORMAT_VERSION)
    scales = {name.removesuffix(SCALE): stored.pop(name) for name in list(stored) if name.endswith(SCALE)}
    weights = {}
    for name, value in stored.items():
        is_rounded = value.dtype == torch.int8
        if is_rounded != (name in scales) or (is_rounded and scales[name].shape != value.shape[:1]):
            raise CorruptFileError(
                f"{folder / EIGHT_BIT_FILE} holds {name} of type {value.dtype} without scales of its rows, or scales "
                "of something else; make the file again"
            )
        weights[name] = value.float() * scales.pop(name)[:, None] if is_rounded else value
    if scales:
        raise CorruptFileError(f"{folder / EIGHT_BIT_FILE} lacks {min(scales)}, of which it has scales; make it again")
    config = load_pretrained(AutoConfig, folder)
    with torch.random.fork_rng(devices=[]):  # it draws weights, which are replaced
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    names = {id(value): name for name, value in model.named_parameters()}  # of tied weights the first
    needed = {*names.values(), *(name for name, _ in model.named_buffers() if name in model.state_dict())}
    if different := sorted(needed ^ weights.keys()):
        raise CorruptFileError(
            f"{folder / EIGHT_BIT_FILE} lacks {different[0]}, or holds it where config.json has no such weight; copy "
            "the model again, with all of its files"
        )
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CorruptFileError(f"{folder} holds weights of other sizes than its config.json says: {error}") from error
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = load_pretrained(GenerationConfig, folder)
    model.name_or_path = model.config._name_or_path = str(folder)
    return model.eval()
