"""What conversion adds to a decoder: the parameters of the memory, and the initial FAM made from them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from transformerfam.config import FamConfig
from transformerfam.decoder.arguments import as_tensor, check_ids
from transformerfam.decoder.flash import FLASH_BACK_ENDS
from transformerfam.decoder.half_precision import MEAN_SHARE, fitting
from transformerfam.decoder.identity import ModelIdentity
from transformerfam.decoder.kernels import BACK_END, Sight
from transformerfam.decoder.layouts import LayerLayout
from transformerfam.decoder.positions import fam_offsets, first_position, query_shift, warn_beyond_trained
from transformerfam.decoder.step import PassingStep, StepCache, run_decoder
from transformerfam.errors import TransformerFamError
from transformerfam.fam.layer import LayerPlan
from transformerfam.fam.row_lora import leading_rows

QUERY_BACK_ENDS = (BACK_END, *FLASH_BACK_ENDS.values())
"""Attention back ends that take queries of the rows from elsewhere."""


class FamMemory(nn.Module):
    """The parameters and settings that conversion adds to a decoder, as its submodule `fam`.

    Attributes:
        config: the configuration in force.
        layouts: what every layer hands to its cache.
        prompt: `(F, D)` embeddings from which the initial FAM is made (`fam_init="prompt"`).
        prefix: `(L, F, D)` initial FAM of every layer (`fam_init="prefix"`).
        mean_share: how large a row may be in the model's type, see `half_precision`.
        caches_queries: whether attention can be handed queries of the initial FAM, so that with `fam_query="initial"` F
            rows go through the layers, not 2 F: not where the feed-forward is given what attention is made from.
    """

    def __init__(self, config: FamConfig, embedding: nn.Embedding, layouts: Sequence[LayerLayout]) -> None:
        super().__init__()
        self.config = config
        self.layouts = tuple(layouts)
        self.identity: ModelIdentity | None = None
        self.mean_share = MEAN_SHARE
        self.caches_queries = False
        self.compiled_steps: list[Any] = []  # the pieces that go through a compiled graph, see `compiled`
        if config.fam_length == 0:
            return
        rows = initial_prompt(embedding, config.fam_length)
        if config.fam_init == "prompt":
            self.prompt = nn.Parameter(rows)
        else:
            self.prefix = nn.Parameter(rows.expand(len(layouts), -1, -1).clone())

    def __getstate__(self) -> dict[str, Any]:
        """Leave compiled steps out of copies and pickles, which are compiled again or not at all."""
        return self.__dict__ | {"compiled_steps": []}

    def fam_width(self, hidden_size: int) -> int:
        """Return the numbers of one row of the FAM: `hidden_size`, or with slots all heads' keys and values."""
        if not self.config.has_slots:
            return hidden_size
        lowest = next(layout for i, layout in enumerate(self.layouts) if self.config.carries_fam(i))
        return sum(count * width for count, width in (lowest.key_shape, lowest.value_shape))

    def plans(self) -> list[LayerPlan]:
        """Return what every layer keeps and sees with the configuration in force."""
        return LayerPlan.for_layers(self.config, [layout.window for layout in self.layouts])


def initial_prompt(embedding: nn.Embedding, fam_length: int) -> torch.Tensor:
    """Return the prompt that conversion starts from, `(F, D)`: the mean embedding, each row moved a little.

    The rows differ by a hundredth of the embeddings' spread, from a generator of their own, so that equal models
    convert to equal memories and no two rows stay twins in training.
    """
    weight = embedding.weight.detach().float()
    noise = torch.randn(fam_length, weight.shape[1], generator=torch.Generator().manual_seed(0))
    rows = weight.mean(0) + 0.01 * weight.std() * noise.to(weight.device)
    find_own: Any = getattr(embedding, "get_base_layer", lambda: embedding)  # inside of PEFT's
    factor = float(getattr(find_own(), "scalar_embed_scale", 1.0))  # Gemma's embedding multiplies what it looks up
    return (factor * rows).to(embedding.weight.dtype)


def memory_of(model: PreTrainedModel) -> FamMemory:
    """Return the converted model's `FamMemory`; of several, as PEFT keeps them per adapter, the active one's.

    Raises:
        TransformerFamError: the model is not converted, or an adapter has the name of a parameter of the memory.
    """
    memory = getattr(model.get_decoder(), "fam", None)
    if memory is None:
        raise TransformerFamError("the model has no memory yet; call convert(model, FamConfig(...)) first")
    if isinstance(memory, FamMemory):
        return memory
    for name in memory.modules_to_save:
        if name in dict(memory.original_module.named_parameters()):
            raise TransformerFamError(
                f"an adapter is named {name!r}, as a parameter of the memory is, which PEFT could not save with it; "
                "name the adapter otherwise"
            )
    own = [name for name in memory.active_adapters if name in memory.modules_to_save]
    return memory.modules_to_save[own[0]] if own else memory.original_module


def fam_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the only new parameters: prompt `(F, D)` or prefix `(L, F, D)`; none for BSWA."""
    return list(memory_of(model).parameters())


def initial_rows(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the learned rows that stand among the tokens: prompt or prefix, or those of a rival; none for BSWA."""
    rival = getattr(model.get_decoder(), "rival", None)
    if rival is None:
        return fam_parameters(model)
    return [parameter for name, parameter in rival.named_parameters() if name in rival.learned_rows]


def hold_weights_in(dtype: str, model: PreTrainedModel, only_frozen: bool = False) -> None:
    """Hold a converted model's weights in another type, in place; its memory's rows, and what states check, stay.

    Tables of RoPE stay float32, which `model.to(dtype)` would round.

    Args:
        dtype: "float32", "bfloat16" or "float16".
        model: converted, or with a rival.
        only_frozen: leave what is trained as it is.
    """
    decoder = model.get_decoder()
    memory = decoder.rival if hasattr(decoder, "rival") else memory_of(model)
    assert memory.identity is not None
    kept = {id(parameter) for parameter in fam_parameters(model)} if hasattr(decoder, "fam") else set()
    kept |= {id(parameter) for parameter in model.parameters() if only_frozen and parameter.requires_grad}
    with memory.identity.keeping_digests(of_memory=False):
        for parameter in model.parameters():
            if parameter.is_floating_point() and id(parameter) not in kept:
                parameter.data = parameter.data.to(getattr(torch, dtype))


def set_key_bias(model: PreTrainedModel, value: float) -> None:
    """Set `fam_key_bias` of a converted model; states that exist keep theirs."""
    _change_config(model, fam_key_bias=float(value) if type(value) is int else value)


def set_block_size(model: PreTrainedModel, block_size: int) -> None:
    """Set `block_size` of a converted model; a state with another one is refused from now on, its FAM is not."""
    _change_config(model, block_size=block_size)
    warn_beyond_trained(model.config, first_position(model.fam_config) + block_size)


def _change_config(model: PreTrainedModel, **changes: Any) -> None:
    config = memory_of(model).config.replace(**changes)
    for module in model.get_decoder().modules():
        if isinstance(module, FamMemory):
            module.config = config
    model.fam_config = config


def _require_prompt(memory: FamMemory) -> None:
    length = memory.config.fam_length
    if length == 0 or memory.config.fam_init != "prompt":
        raise TransformerFamError(
            f"fam_init is {memory.config.fam_init!r} and fam_length {length}, required is a prompt of at least one row"
        )


@torch.no_grad()
def prefix_from_prompt(model: PreTrainedModel) -> None:
    """Replace the prompt of a converted model by the prefix that it makes, in place; the model reads as before.

    A prompt's rows come out of the layers nearly alike. As a prefix, each layer's rows can be trained apart. Where the
    first residual is zero only their directions act, and they are scaled to root mean square 1, so that one learning
    rate suits all layers.

    Raises:
        TransformerFamError: there is no prompt, or the memory has slots.

    Source: B.1, prompt tuning and prefix tuning.
    """
    memory = memory_of(model)
    _require_prompt(memory)
    if memory.config.has_slots:
        raise TransformerFamError(
            "fam_feeds is 'slots', required for a prefix is another, since rows go up from a prompt"
        )
    rows_LFD = torch.cat(initial_fam(model.get_decoder()))
    config = memory.config
    if config.fam_residual == "none" or (config.fam_residual == "previous" and config.zero_first_residual):
        rows_LFD = rows_LFD / rows_LFD.pow(2).mean(-1, keepdim=True).sqrt()
    del memory.prompt
    memory.prefix = nn.Parameter(rows_LFD.clone())
    _change_config(model, fam_init="prefix")


@torch.no_grad()
def set_prompt(model: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Let the prompt of a converted model begin as the embeddings of a text's last tokens, in place.

    Rows that come up as words of a question look from the first step on for what that question asks for. (PEFT's
    prompt tuning has the same start; the paper says nothing of it.)

    Args:
        model: converted, with `fam_init="prompt"`.
        token_ids: of the text, at least `fam_length`.

    Raises:
        TransformerFamError: there is no prompt, or too few tokens for its rows.
    """
    memory = memory_of(model)
    length = memory.config.fam_length
    _require_prompt(memory)
    if len(token_ids) < length:
        raise TransformerFamError(
            f"the text has {len(token_ids)} tokens, required are at least fam_length ({length}); give a longer text"
        )
    ids = as_tensor("token_ids", token_ids, "ids of a text")
    check_ids(ids, model.get_input_embeddings().weight.shape[0])
    rows = ids[-length:].to(memory.prompt.device)
    memory.prompt.copy_(model.get_input_embeddings()(rows))


@torch.no_grad()
def personal_memory(model: PreTrainedModel, fam_LFD: torch.Tensor) -> list[nn.Parameter]:
    """Let a converted model start every reading from a saved FAM, and train that alone, in place.

    The saved FAM becomes the prefix, whose residual counts from the first update on, since it holds context. All other
    weights are frozen. What a task or a person needs can so be trained into `L * F * D` numbers.

    Args:
        model: converted.
        fam_LFD: `(L, F, D)`, as `state.fams[:, 0]`.

    Returns:
        The only trained parameters.

    Raises:
        TransformerFamError: `fam_LFD` has another shape, or numbers that are not finite.

    Source: B.2.3, "the saved FAM can also be used as a trained prefix for a task or a person".
    """
    memory = memory_of(model)
    if not bool(torch.isfinite(fam_LFD).all()):
        raise TransformerFamError("the saved FAM has numbers that are not finite; take state.fams[:, 0] of a reading")
    if memory.config.has_slots:
        raise TransformerFamError(
            "fam_feeds is 'slots', where a saved FAM is keys and values and no prefix of hidden states; required for a "
            "personal memory is another fam_feeds"
        )
    shape = (len(memory.layouts), memory.config.fam_length, model.get_input_embeddings().weight.shape[1])
    if tuple(fam_LFD.shape) != shape:
        raise TransformerFamError(
            f"the saved FAM has shape {tuple(fam_LFD.shape)}, required is (layers, fam_length, hidden_size) {shape}; "
            "take state.fams[:, 0] of the same model"
        )
    for name in [name for name, _ in memory.named_parameters()]:
        delattr(memory, name)
    model.requires_grad_(False)
    weight = model.get_input_embeddings().weight
    memory.prefix = nn.Parameter(fitting(fam_LFD.to(weight.device), weight.dtype, copy=True))
    _change_config(model, fam_init="prefix", zero_first_residual=False)
    return [memory.prefix]


class InitialFam(PassingStep):
    """Send the prompt up alone and note what enters every layer: the initial FAM (B.1)."""

    def __init__(self) -> None:
        self.fams: list[torch.Tensor] = []
        self.slots: list[tuple[torch.Tensor, torch.Tensor]] = []

    def enter_layer(self, layer: None, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Note a layer's input `(1, F, D)`."""
        self.fams.append(hidden_BTD)
        return hidden_BTD

    def mask(self, layer: None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Let every prompt row see every other."""
        length = self.fams[-1].shape[1]
        return torch.zeros(1, 1, length, length, dtype=dtype, device=device)

    def sight(self, layer: None) -> Sight:
        """Let every prompt row see every other."""
        return Sight(self.fams[-1].shape[1], 0)

    def attend(self, layer: None, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the rows' keys and values, `(1, G, F, K)` each."""
        self.slots.append((key, value))
        return key, value


class _InitialQueries(PassingStep):
    """Send every layer's initial FAM through that layer alone, and note its queries."""

    def __init__(self, fams: Sequence[torch.Tensor], mean_share: float) -> None:
        self.fams = iter(fams)
        self.mean_share = mean_share
        self.length = fams[0].shape[1]
        self.queries: list[torch.Tensor] = []

    def enter_layer(self, layer: None, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return the layer's initial FAM."""
        return fitting(next(self.fams), hidden_BTD.dtype, self.mean_share)

    def sight(self, layer: None) -> Sight:
        """Let every row see every other, and note what asks."""
        return Sight(self.length, 0, queries=self.queries)

    def attend(self, layer: None, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep nothing."""
        return key, value


def _row_positions(config: FamConfig, shift: int = 0) -> torch.Tensor:
    """Return where the initial FAM stands, `(1, F)`, moved by `shift`."""
    positions = (fam_offsets(config) + first_position(config) + shift)[None]
    return positions.float() if config.fam_position == "fractional" else positions.long()


def initial_fam(decoder: Any) -> list[torch.Tensor]:
    """Return every layer's initial FAM, `(1, F, D)` each: the rows that enter the layer.

    Source: B.1, "prompt tuning" and, for the ablation, "prefix tuning".
    """
    memory: FamMemory = decoder.fam
    if memory.config.fam_init == "prefix":
        return [rows[None] for rows in memory.prefix]
    return prompt_pass(decoder).fams


def prompt_pass(decoder: Any) -> InitialFam:
    """Send the prompt of a converted decoder up through its layers, and return what was noted in each."""
    memory: FamMemory = decoder.fam
    config = memory.config
    if config.fam_position == "zero":
        positions = torch.zeros(1, config.fam_length, dtype=torch.long)
    else:
        positions = _row_positions(config)
    step = InitialFam()
    cache = StepCache([None] * len(memory.layouts), step)
    rows = memory.prompt.to(decoder.get_input_embeddings().weight.dtype)  # it may be trained in another
    with leading_rows(config.fam_length):
        run_decoder(decoder, rows[None], positions.to(rows.device), cache)
    return step


def initial_queries(decoder: Any, fams: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """Return what every layer's initial FAM asks with in every block, `(1, H, F, K)` each.

    None where it is no constant (`fam_position="zero"`), or attention cannot be handed it: then the rows that ask go
    through the layers beside those that make the keys.

    Args:
        decoder: the converted decoder.
        fams: every layer's initial FAM, as `initial_fam` gives it.
    """
    memory: FamMemory = decoder.fam
    config = memory.config
    takes_queries = decoder.config._attn_implementation in QUERY_BACK_ENDS
    if config.fam_query != "initial" or config.fam_position == "zero" or not (memory.caches_queries and takes_queries):
        return None
    positions = _row_positions(config, query_shift(config)).to(fams[0].device)
    step = _InitialQueries(fams, memory.mean_share)
    weight = decoder.get_input_embeddings().weight
    cache = StepCache([None] * len(memory.layouts), step)
    with leading_rows(config.fam_length):
        run_decoder(decoder, torch.zeros_like(fams[0], dtype=weight.dtype), positions, cache)
    return step.queries


def refresh_queries(decoder: Any, state: Any) -> None:
    """Make the queries that a reading keeps again, where the weights have changed since or other LoRA is in force.

    Args:
        decoder: the converted decoder.
        state: a `FamState` of it.
    """
    if state.queries_key is None:
        return
    memory: FamMemory = decoder.fam
    assert memory.identity is not None
    key = memory.identity.weights_key()
    if key != state.queries_key:
        queries = initial_queries(decoder, initial_fam(decoder))
        for layer_idx, layer in enumerate(state.layers):
            layer.query = queries[layer_idx] if queries is not None and memory.config.carries_fam(layer_idx) else None
        state.queries_key = key
