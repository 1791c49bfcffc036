"""Say what a model with a memory will need, without its weights: parameters, bytes, operations, hours.

The model is built of fake tensors, which have shapes and no values, and goes through real steps of reading and training
on them; what torch would allocate is counted as it goes. So every family, optimizer and block size is planned by the
code that will run.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, LlamaConfig, PreTrainedModel

from transformerfam.config import FamConfig
from transformerfam.decoder.served import decoder_layers, require_row
from transformerfam.errors import CorruptFileError, TransformerFamError, UnsupportedModelError
from transformerfam.fam.convert import fam_parameters
from transformerfam.fam.masks import piece_mask
from transformerfam.fam.memory import memory_of
from transformerfam.fam.state import FamState
from transformerfam.tools.costs import flops_per_token, full_cache_bytes
from transformerfam.tools.fake_model import AllocatedBytes, build_on_meta, convert_fake, make_fake
from transformerfam.training.optimizer import new_optimizer
from transformerfam.training.recipe.sections import OptimizerSection
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.folders import FAM_FILE
from transformerfam.weights.models import NAMED_MODELS, base_folder, find_folder, load_base
from transformerfam.weights.pretrained import load_pretrained

Training = Literal["full", "lora", "none"]
OptimizerKind = Literal["adamw", "adafactor"]

PAPER_SHAPES: dict[str, dict[str, int]] = {
    "paper-1b": {"num_hidden_layers": 18, "hidden_size": 1536, "intermediate_size": 12288, "num_attention_heads": 12},
    "paper-8b": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32},
    "paper-24b": {
        "num_hidden_layers": 56,
        "hidden_size": 4096,
        "intermediate_size": 32768,
        "num_attention_heads": 32,
        "num_key_value_heads": 1,
    },
}
"""Table 3, with a gated feed-forward layer and a vocabulary of 256,000."""
WALKED_BLOCKS = 16
"""Up to so many blocks, a reading is followed until it is steady; beyond, its first block and its end are."""
PLANNED_BLOCKS = (2, 3)
"""Blocks that are trained on fake tensors; what more of them need grows by the same number of bytes for each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a model needs. Bytes are per device and count tensors; an allocator takes more."""

    model: str
    parameters: int
    """Of the base model and the memory."""
    trained_parameters: int
    context_tokens: int
    gpus: int
    bytes_state: int
    """Of one sequence, whatever was read."""
    bytes_full_cache: int
    """Of full attention's keys and values of one sequence at `context_tokens`, for comparison."""
    bytes_weights: int
    bytes_gradients: int
    bytes_optimizer: int
    bytes_activations: int
    """The most that a training step holds besides weights, gradients and optimizer: one block's activations, its logits
    and the states of all blocks."""
    bytes_reading: int
    """The most that reading holds besides the weights, the state included."""
    flops_per_token_reading: float
    flops_per_token_training: float
    hours: float | None
    """To train on `training_tokens`; None without them."""

    @property
    def bytes_training(self) -> int:
        """The most that a training step holds on one device."""
        return self.bytes_weights + self.bytes_gradients + self.bytes_optimizer + self.bytes_activations


def find_config(model: str) -> Any:
    """Return the transformers configuration of a model: of the paper, of this package, of a folder or of the Hub.

    Raises:
        TransformerFamError: there is none.
    """
    if model in PAPER_SHAPES:
        shape = PAPER_SHAPES[model]
        return LlamaConfig(vocab_size=256_000, tie_word_embeddings=True, **shape)
    if model in NAMED_MODELS:
        return load_base(model)[0].config
    if Path(model).is_dir():
        model = str(base_folder(model))
    try:
        return load_pretrained(AutoConfig, model, local_files_only=False)
    except CorruptFileError as error:
        known = ", ".join([*PAPER_SHAPES, *NAMED_MODELS])
        raise TransformerFamError(
            f"there is no configuration for {model!r} ({str(error).splitlines()[0]}); give {known}, a folder with "
            "config.json, or a name on the Hub"
        ) from error


def find_memory(model: str) -> FamConfig:
    """Return the configuration of a model's memory, the paper's where it has none yet; `model` is for `find_config`."""
    folder = find_folder(model) if model in NAMED_MODELS else Path(model)
    return FamAdapter.from_pretrained(folder).config if (folder / FAM_FILE).is_file() else FamConfig()


def make_plan(
    model: str,
    fam: FamConfig,
    *,
    context_tokens: int,
    gpus: int = 1,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    training: Training = "lora",
    lora_rank: int = 64,
    optimizer: OptimizerKind = "adamw",
    training_tokens: float | None = None,
    tflops: float = 400.0,
    config: Any = None,
) -> Plan:
    """Plan a model.

    Args:
        model: for `find_config`, or any name together with `config`.
        fam: the memory.
        context_tokens: tokens of a training sequence.
        gpus: devices that share weights, gradients and optimizer (FSDP); each trains its own sequences.
        batch_size: sequences per device and step.
        dtype: type of weights and activations.
        training: what is trained.
        lora_rank: of the adapters.
        optimizer: whose averages are kept.
        training_tokens: tokens of the whole training; None leaves `hours` out.
        tflops: operations per second that a device does in this work, in units of 10^12.
        config: a transformers configuration in place of the model's.

    Raises:
        UnsupportedModelError: the family is not served, or cannot be planned.
        TransformerFamError: there is no such model.
    """
    config = find_config(model) if config is None else config
    require_row(config.model_type, "a plan")
    converted, peak = _fake_run(config, fam, dtype, training, lora_rank, batch_size, optimizer, context_tokens)
    hours = None
    reading, in_training = flops_per_token(converted, is_frozen=training == "lora")
    if training_tokens is not None:
        hours = training_tokens * in_training / (gpus * tflops * 1e12) / 3600
    parameters = list(converted.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    largest = max(_bytes(layer.parameters()) for layer in decoder_layers(converted))
    return Plan(
        model=model,
        parameters=sum(parameter.numel() for parameter in parameters),
        trained_parameters=sum(parameter.numel() for parameter in trained),
        context_tokens=context_tokens,
        gpus=gpus,
        bytes_state=peak["state"] // batch_size,
        bytes_full_cache=full_cache_bytes(converted, context_tokens, dtype),
        bytes_weights=_bytes(parameters) // gpus + (2 * largest if gpus > 1 else 0),
        bytes_gradients=_bytes(trained) // gpus,
        bytes_optimizer=peak["optimizer"] // gpus,
        bytes_activations=peak["activations"],
        bytes_reading=peak["reading"],
        flops_per_token_reading=reading,
        flops_per_token_training=in_training,
        hours=hours,
    )


def _fake_run(
    config: Any,
    fam: FamConfig,
    dtype: torch.dtype,
    training: Training,
    lora_rank: int,
    batch_size: int,
    optimizer: OptimizerKind,
    context_tokens: int,
) -> tuple[PreTrainedModel, dict[str, int]]:
    """Return a converted model of fake tensors, and the bytes that its steps take."""
    fam = fam.replace(fam_key_bias=0.0)  # as training ends, and without a dense mask
    converted = build_on_meta(config, dtype, training, lora_rank)
    piece_mask.cache_clear()
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
            # With torch up to 2.10 transformers' experts check how their tensors are aligned.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            make_fake(converted)
            convert_fake(converted, fam)
            for parameter in fam_parameters(converted):
                parameter.requires_grad_(training != "none")
            peak = _measured(converted, batch_size, training, optimizer, context_tokens)
    except RuntimeError as error:  # so torch reports an operation without support for such fake tensors
        reason = str(error).splitlines()[0]
        raise UnsupportedModelError(
            f"{config.model_type} cannot be planned in {dtype} ({reason}); try bfloat16"
        ) from error
    finally:
        piece_mask.cache_clear()  # which holds fake masks now
    return converted, peak


def _bytes(parameters: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _measured(
    model: PreTrainedModel, batch_size: int, training: Training, optimizer: OptimizerKind, context_tokens: int
) -> dict[str, int]:
    """Read and train on fake tensors, and return the most that each part takes, in bytes."""
    fam: FamConfig = model.fam_config
    steady = max(plan.num_blocks_until_steady(fam) for plan in memory_of(model).plans())
    with torch.no_grad(), AllocatedBytes() as counter:
        counter.ignore(*model.parameters(), *model.buffers())
        state, passed = _begun(model, batch_size, steady)
        for _ in range(steady + 1 - passed):
            _hidden(model, state, batch_size)
        reading = counter.peak
    peak = {"state": state.num_bytes, "reading": reading, "optimizer": 0, "activations": 0}
    if training == "none":
        return peak
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = new_optimizer([{"params": trained}], OptimizerSection(kind=optimizer))
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    steps.step()
    averages = [
        value for values in steps.state.values() for value in values.values() if isinstance(value, torch.Tensor)
    ]
    peak["optimizer"] = _bytes(averages)
    few, more = (_training_peak(model, batch_size, trained, averages, steady, n) for n in PLANNED_BLOCKS)
    num_blocks = -(-context_tokens // fam.block_size)
    peak["activations"] = max(0, few + (more - few) * (num_blocks - steady + passed - PLANNED_BLOCKS[0]))
    return peak


def _begun(model: Any, batch_size: int, steady: int) -> tuple[FamState, int]:
    """Return a new state and the blocks that it has passed: 0, or where it is long until it is steady, nearly all."""
    state = model.init_state(batch_size)
    if steady <= WALKED_BLOCKS:
        return state, 0
    with torch.no_grad():
        _hidden(model, state, batch_size)
    state.num_blocks_per_row = [steady] * batch_size
    return state, steady


def _hidden(model: Any, state: FamState, batch_size: int) -> torch.Tensor:
    size, width = model.fam_config.block_size, model.config.hidden_size
    block_BTD = torch.zeros(batch_size, size, width, dtype=model.dtype)
    return model.get_decoder()(inputs_embeds=block_BTD, past_key_values=state).last_hidden_state


def _training_peak(model: Any, batch_size: int, trained: Any, averages: Any, steady: int, num_more: int) -> int:
    """Return the most that a step holds besides weights, gradients and averages: `num_more` blocks from `steady` on."""
    head, size = model.get_output_embeddings(), model.fam_config.block_size
    labels_N = torch.zeros(batch_size * size, dtype=torch.long)

    def run(before: FamState) -> tuple[torch.Tensor, FamState]:
        after = before.shallow_copy()
        after.make_room()
        logits_NV = head(_hidden(model, after, batch_size)).flatten(0, 1)
        after.drop_complete_block()
        return cross_entropy(logits_NV.float(), labels_N), after

    with AllocatedBytes() as counter:
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        counter.ignore(*model.parameters(), *model.buffers(), *averages, *gradients)
        (state, passed), total = _begun(model, batch_size, steady), torch.zeros(())
        for _ in range(steady - passed + num_more):
            loss, state = checkpoint(run, state, use_reentrant=False)
            total = total + loss
        total.backward()
        return counter.peak
