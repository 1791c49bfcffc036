"""Give a transformers decoder a working memory, in place.

The model's own forward runs unchanged, one piece at a time. FAM comes in through four seams: extra rows in front of
the tokens, the cache, the mask, and the residual of the first update. This is the only module that knows
transformers' internals.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from transformerfam.attention import KeyTurner, Piece, fam_offsets, first_position
from transformerfam.config import FamConfig
from transformerfam.errors import ReadInterrupted, StateMismatchError, TransformerFamError, UnsupportedModelError
from transformerfam.identity import ModelIdentity, describe_architecture
from transformerfam.seams import check_seams, check_structure
from transformerfam.state import FamLayer, FamState, Sections

SERVED_MODEL_TYPES = ("llama",)
EAGER_BACK_ENDS = ("eager", "sdpa")
Progress = Callable[[int, int, FamState], None]


class FamMemory(nn.Module):
    """The parameters and settings that conversion adds to a decoder, as its submodule `fam`.

    Attributes:
        prompt: `(F, D)` embeddings from which the initial FAM is made (`fam_init="prompt"`).
        prefix: `(L, F, D)` initial FAM of every layer (`fam_init="prefix"`).
    """

    def __init__(self, config: FamConfig, embedding: nn.Embedding, num_layers: int) -> None:
        super().__init__()
        self.config = config
        self.turner: KeyTurner | None = None
        self.identity: ModelIdentity | None = None
        if config.fam_length == 0:
            return
        rows = initial_prompt(embedding, config.fam_length)
        if config.fam_init == "prompt":
            self.prompt = nn.Parameter(rows)
        else:
            self.prefix = nn.Parameter(rows.expand(num_layers, -1, -1).clone())


def initial_prompt(embedding: nn.Embedding, fam_length: int) -> torch.Tensor:
    """Return the prompt that conversion starts from, `(F, D)`: the mean embedding, each row moved a little.

    The rows differ by a hundredth of the embeddings' spread, from a generator of their own, so that equal models
    convert to equal memories and no two rows stay twins in training.
    """
    weight = embedding.weight.detach().float()
    noise = torch.randn(fam_length, weight.shape[1], generator=torch.Generator().manual_seed(0))
    rows = weight.mean(0) + 0.01 * weight.std() * noise.to(weight.device)
    return rows.to(embedding.weight.dtype)


def convert(model: PreTrainedModel, config: FamConfig) -> PreTrainedModel:
    """Give `model` a working memory, in place; its class and weights stay as they are.

    Adds `model.fam_config`, `model.init_state()` and `model.read()`, and lets `model(...)` and `model.generate(...)` take
    a `FamState` as `past_key_values`. The seams are checked with numbers on the model at hand.

    Args:
        model: a decoder with a language-model head of a served family.
        config: block size, FAM length and every other choice.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: the family is not served, or a seam does not do what the algorithm says.

    Source: DESIGN, "How FAM enters a model"; Algorithms 1 and 2.
    """
    check_structure(model, config, SERVED_MODEL_TYPES)
    decoder = model.get_decoder()
    if hasattr(decoder, "fam"):
        raise UnsupportedModelError(
            "the model is converted already; load it again to convert it with another configuration"
        )
    embedding = model.get_input_embeddings()
    memory = FamMemory(config, embedding, len(decoder.layers)).to(embedding.weight.device)
    memory.turner = KeyTurner(decoder.rotary_emb.inv_freq)
    memory.identity = ModelIdentity(model, describe_architecture(model))
    decoder.fam = memory
    handles = []
    for layer_idx, layer in enumerate(decoder.layers):
        handles += [
            layer.register_forward_pre_hook(functools.partial(_enter_layer, layer_idx), with_kwargs=True),
            layer.register_forward_hook(functools.partial(_leave_layer, layer_idx), with_kwargs=True),
            layer.self_attn.register_forward_hook(functools.partial(_after_attention, layer_idx), with_kwargs=True),
        ]
    _bind(decoder, "forward", read_pieces)
    _bind(model, "init_state", init_state)
    _bind(model, "read", read)
    _bind(model, "_prepare_cache_for_generation", _prepare_cache_for_generation)
    type_of_model = type(model)
    model.fam_config = config
    try:
        check_seams(model)
    except UnsupportedModelError:
        revert(model, handles)
        raise
    assert type(model) is type_of_model
    return model


def _bind(target: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Make `function` a method of this one object, with the signature of the method it stands in for."""
    original = getattr(type(target), name, None)
    if original is not None:
        function = functools.wraps(original)(function)
        function.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    setattr(target, name, MethodType(function, target))


def revert(model: PreTrainedModel, handles: Sequence[Any]) -> None:
    """Undo a conversion that the checks refused."""
    decoder = model.get_decoder()
    for handle in handles:
        handle.remove()
    del decoder.fam, decoder.forward, model.init_state, model.read, model.fam_config
    del model._prepare_cache_for_generation


def memory_of(model: PreTrainedModel) -> FamMemory:
    """Return the converted model's `FamMemory`.

    Raises:
        TransformerFamError: the model is not converted.
    """
    memory = getattr(model.get_decoder(), "fam", None)
    if memory is None:
        raise TransformerFamError("the model has no memory yet; call convert(model, FamConfig(...)) first")
    return memory


def fam_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the only new parameters: prompt `(F, D)` or prefix `(L, F, D)`; none for BSWA."""
    return list(memory_of(model).parameters())


def set_key_bias(model: PreTrainedModel, value: float) -> None:
    """Set `fam_key_bias` of a converted model; states that exist keep theirs."""
    memory = memory_of(model)
    memory.config = memory.config.replace(fam_key_bias=float(value))
    model.fam_config = memory.config


# The seams


def _piece_of(kwargs: dict[str, Any]) -> "Piece | InitialFam | None":
    state = kwargs.get("past_key_values")
    return getattr(state, "step", None) if isinstance(state, Cache) else None


def _enter_layer(
    layer_idx: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    piece = _piece_of(kwargs)
    if piece is None:
        return None
    state = kwargs["past_key_values"]
    hidden_BTD = piece.enter_layer(state.layers[layer_idx], args[0])
    mask = piece.mask(state.layers[layer_idx], hidden_BTD.dtype, hidden_BTD.device)
    return (hidden_BTD, *args[1:]), kwargs | {"attention_mask": mask}


def _after_attention(
    layer_idx: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    piece = _piece_of(kwargs)
    if piece is None:
        return output
    return (piece.after_attention(kwargs["past_key_values"].layers[layer_idx], output[0]), *output[1:])


def _leave_layer(
    layer_idx: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    piece = _piece_of(kwargs)
    if piece is not None:
        hidden_BTD = output[0] if isinstance(output, tuple) else output
        piece.leave_layer(kwargs["past_key_values"].layers[layer_idx], hidden_BTD)


class InitialFam:
    """Send the prompt up alone and note what enters every layer: the initial FAM (B.1)."""

    def __init__(self) -> None:
        self.fams: list[torch.Tensor] = []

    def enter_layer(self, layer: None, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Note a layer's input `(1, F, D)`."""
        self.fams.append(hidden_BTD)
        return hidden_BTD

    def mask(self, layer: None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Let every prompt row see every other."""
        length = self.fams[-1].shape[1]
        return torch.zeros(1, 1, length, length, dtype=dtype, device=device)

    def attend(self, layer: None, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep nothing."""
        return key, value

    def after_attention(self, layer: None, output_BTD: torch.Tensor) -> torch.Tensor:
        """Leave the attention output as it is."""
        return output_BTD

    def leave_layer(self, layer: None, hidden_BTD: torch.Tensor) -> None:
        """Note nothing."""


class _PromptCache(Cache):
    """The cache of the prompt's way up: it keeps nothing."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[])
        self.layers = [None] * num_layers
        self.step = InitialFam()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


def _run_decoder(decoder: nn.Module, embeddings_BTD: torch.Tensor, positions: torch.Tensor, cache: Cache, **kwargs: Any):
    """Run the class's own forward over one piece."""
    return type(decoder).forward(
        decoder,
        inputs_embeds=embeddings_BTD,
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=embeddings_BTD.dtype, device=embeddings_BTD.device),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        **kwargs,
    )


def initial_fam(decoder: nn.Module) -> list[torch.Tensor]:
    """Return every layer's initial FAM, `(1, F, D)` each.

    Source: B.1, "prompt tuning" and, for the ablation, "prefix tuning".
    """
    memory: FamMemory = decoder.fam
    config = memory.config
    if config.fam_init == "prefix":
        return [rows[None] for rows in memory.prefix]
    if config.fam_position == "zero":
        positions = torch.zeros(1, config.fam_length, dtype=torch.long)
    else:
        positions = (fam_offsets(config) + first_position(config))[None]
        positions = positions.float() if config.fam_position == "fractional" else positions.long()
    cache = _PromptCache(len(decoder.layers))
    _run_decoder(decoder, memory.prompt[None], positions.to(memory.prompt.device), cache)
    return cache.step.fams


# The methods of a converted model


def init_state(
    self: PreTrainedModel,
    batch_size: int = 1,
    fam: torch.Tensor | None = None,
    position_offset: int = 0,
    is_saved: Sequence[bool] | None = None,
) -> FamState:
    """Start a reading: allocate all of its state.

    Args:
        self: the converted model.
        batch_size: number of sequences.
        fam: `(L, F, D)` or `(L, batch_size, F, D)` saved FAM to start from instead of the initial one; its residual
            counts from the first update on (B.2.3).
        position_offset: position of the first token; felt by `fam_position="zero"` alone (B.2.2).
        is_saved: per sequence, whether it starts from `fam`; the others start from the initial FAM. None: all do.

    Returns:
        A state of `batch_size` sequences that have read nothing.

    Raises:
        TransformerFamError: `batch_size` is below 1, or `fam` has another shape.
    """
    if batch_size < 1:
        raise TransformerFamError(f"batch_size is {batch_size}, required is at least 1")
    decoder, memory = self.get_decoder(), memory_of(self)
    config, model_config = memory.config, self.config
    head_dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // model_config.num_attention_heads
    num_layers, weight = len(decoder.layers), self.get_input_embeddings().weight
    fam_dtype = getattr(torch, config.fam_dtype)
    saved = [fam is not None] * batch_size if is_saved is None else list(is_saved)
    initial = initial_fam(decoder) if config.fam_length and not (all(saved) and config.fam_copy) else None
    if fam is not None:
        expected = (num_layers, batch_size, config.fam_length, model_config.hidden_size)
        fam = fam[:, None].expand(-1, batch_size, -1, -1) if fam.dim() == 3 else fam
        if tuple(fam.shape) != expected:
            raise StateMismatchError(
                f"fam has shape {tuple(fam.shape)}, required is (layers, batch, fam_length, hidden_size) {expected}; "
                "save it from a state of the same model and configuration"
            )
    layers = []
    for i in range(num_layers):
        sections = Sections.of(config, config.carries_fam(i))
        shape = (batch_size, model_config.num_key_value_heads, sections.num_slots, head_dim)
        buffers = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2)]
        rows = asking = None
        if config.carries_fam(i):
            start = initial[i].to(fam_dtype).expand(batch_size, -1, -1) if initial else None
            rows = start if fam is None else fam[i].to(weight.device, fam_dtype)
            if fam is not None and not all(saved):
                rows = torch.where(torch.tensor(saved, device=weight.device)[:, None, None], rows, start)
            rows = rows.clone(memory_format=torch.contiguous_format)
            asking = None if config.fam_copy else start.clone(memory_format=torch.contiguous_format)
        layers.append(FamLayer(buffers[0], buffers[1], sections, rows, asking))
    return FamState(
        layers,
        config,
        memory.identity,
        batch_size,
        starts_from_saved_fam=saved,
        position_offset=position_offset,
    )


@torch.no_grad()
def read(
    self: PreTrainedModel,
    input_ids: torch.Tensor | Sequence[int],
    state: FamState | None = None,
    attention_mask: torch.Tensor | None = None,
    progress: bool | Progress = False,
) -> FamState:
    """Read tokens of any number into a state, in constant memory and without logits.

    Args:
        self: the converted model.
        input_ids: `(T,)` or `(B, T)` token ids.
        state: reading to go on with, in place; None starts one.
        attention_mask: `(B, T)`, 1 for tokens and 0 for padding, on either side.
        progress: True draws a bar; a function is called with (tokens done, tokens in all, state) after every block.

    Returns:
        The state, advanced by the tokens.

    Raises:
        TransformerFamError: empty input, token ids out of range, or a batch that does not fit the state.
        ReadInterrupted: Ctrl-C; it carries the state and says how to go on.
    """
    ids = torch.as_tensor(input_ids, dtype=torch.long)
    ids = (ids[None] if ids.dim() == 1 else ids).to(self.device)
    _check_ids(ids, self.get_input_embeddings().num_embeddings)
    state = self.init_state(len(ids)) if state is None else state
    if progress is True:
        from transformerfam.progress import reading_bar

        with reading_bar(ids.shape[1]) as update:
            return self.read(ids, state, attention_mask, update)
    decoder, total, done = self.get_decoder(), ids.shape[1], 0
    try:
        while done < total:
            # Whole blocks for rows in step; with rows out of step any chunk is right.
            count = min(total - done, self.fam_config.block_size - state.block_fill[0])
            mask = None if attention_mask is None else attention_mask[:, done : done + count]
            decoder(input_ids=ids[:, done : done + count], attention_mask=mask, past_key_values=state)
            done += count
            if callable(progress):
                progress(done, total, state)
    except KeyboardInterrupt as error:
        raise ReadInterrupted(state, done) from error
    return state


def _check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    if input_ids.numel() == 0:
        raise TransformerFamError("input is empty, required is at least one token; give token ids")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise TransformerFamError(
            f"token id {low if low < 0 else high} is out of range, required is 0 to {vocab_size - 1}; use the tokenizer "
            "of this model"
        )


def _check_mask(attention_mask: torch.Tensor | None, batch_size: int, length: int) -> torch.Tensor | None:
    """Return the `(B, T)` boolean mask of this call's tokens, or None where all are real."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or len(attention_mask) != batch_size or attention_mask.shape[1] < length:
        raise TransformerFamError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, required is (batch, tokens) "
            f"({batch_size}, {length}); a converted model makes its own mask of blocks and memory"
        )
    valid = attention_mask[:, -length:].bool()  # while it decodes, generate gives the whole text's mask
    return None if bool(valid.all()) else valid


def read_pieces(
    self: nn.Module,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: FamState | None = None,
    inputs_embeds: torch.Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """Run the decoder over tokens of any number, piece by piece; a piece never crosses a block boundary.

    This is `forward` of a converted model's decoder. `position_ids` are not used: positions follow from the state.

    Args:
        self: the decoder.
        input_ids: `(B, T)` new tokens.
        attention_mask: `(B, T)`, 1 for tokens and 0 for padding; of a longer mask the last T columns count.
        position_ids: ignored.
        past_key_values: the state to advance; None starts one.
        inputs_embeds: `(B, T, D)` instead of `input_ids`.
        use_cache: False leaves the state out of the output.
        **kwargs: go on to the model's own forward.

    Returns:
        Hidden states `(B, T, D)` after the last norm (of padding: any finite values), and the state.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise TransformerFamError("exactly one of input_ids and inputs_embeds is required")
    if kwargs.get("output_attentions"):
        raise TransformerFamError(
            "output_attentions is not available on a converted model, since every piece sees another number of keys; "
            "call it with output_attentions=False"
        )
    if inputs_embeds is None:
        _check_ids(input_ids, self.embed_tokens.num_embeddings)
        inputs_embeds = self.embed_tokens(input_ids)
    batch_size, length = inputs_embeds.shape[:2]
    state = _own_state(self, past_key_values, batch_size)
    valid = _check_mask(attention_mask, batch_size, length)
    lengths = [length] * batch_size if valid is None else valid.sum(1).tolist()
    if valid is not None:  # move padding behind the tokens
        order = torch.argsort(~valid, dim=1, stable=True)
        inputs_embeds = inputs_embeds.take_along_dim(order[..., None], dim=1)
    done = [0] * batch_size
    columns: list[list[int]] = [[] for _ in lengths]  # where each token's result stands in the joined pieces
    pieces: list[BaseModelOutputWithPast] = []
    width = 0
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        block_size = state.config.block_size
        counts = [min(n - d, block_size - f) for n, d, f in zip(lengths, done, state.block_fill, strict=True)]
        pieces.append(_run_piece(self, state, _slice_rows(inputs_embeds, done, counts), counts, kwargs))
        for row, count in enumerate(counts):
            columns[row] += range(width, width + count)
            done[row] += count
        width += max(counts)
    return _join(pieces, columns, valid, inputs_embeds, state if use_cache is not False else None)


def _own_state(decoder: nn.Module, cache: Any, batch_size: int) -> FamState:
    memory: FamMemory = decoder.fam
    if cache is None:
        return memory.identity.model.init_state(batch_size)
    if not isinstance(cache, FamState):
        raise StateMismatchError(
            f"past_key_values is a {type(cache).__name__}, required is a FamState; start one with model.init_state()"
        )
    if cache.batch_size != batch_size:
        raise StateMismatchError(
            f"state holds {cache.batch_size} sequences, input has {batch_size}; start a new state with "
            f"init_state(batch_size={batch_size})"
        )
    if cache.identity is not memory.identity and cache.identity.architecture != memory.identity.architecture:
        raise StateMismatchError("state belongs to another model; start a new one with model.init_state()")
    if cache.config.replace(fam_key_bias=0.0) != memory.config.replace(fam_key_bias=0.0):
        raise StateMismatchError(
            f"state was made with {cache.config}, the model has {memory.config}; start a new one with "
            "model.init_state()"
        )
    return cache


def _slice_rows(inputs_BTD: torch.Tensor, starts: list[int], counts: list[int]) -> torch.Tensor:
    """Return each sequence's next tokens, `(B, max(counts), D)`; what lies behind a sequence's count is padding."""
    longest = max(counts)
    if len(set(starts)) == 1:
        return inputs_BTD[:, starts[0] : starts[0] + longest]
    columns = torch.tensor(starts)[:, None] + torch.arange(longest)
    columns = columns.clamp(max=inputs_BTD.shape[1] - 1).to(inputs_BTD.device)
    return inputs_BTD.take_along_dim(columns[..., None], dim=1)


def _run_piece(
    decoder: nn.Module, state: FamState, tokens_BTD: torch.Tensor, counts: list[int], kwargs: dict[str, Any]
) -> BaseModelOutputWithPast:
    """Send one piece through the layers, and move the state on once it is through."""
    piece = Piece(state, counts, decoder.fam.turner)
    if piece.num_rows:
        rows = tokens_BTD.new_zeros(len(tokens_BTD), piece.num_rows, tokens_BTD.shape[2])
        tokens_BTD = torch.cat((rows, tokens_BTD), dim=1)
    state.step = piece
    try:
        output = _run_decoder(decoder, tokens_BTD, piece.position_ids(tokens_BTD.device), state, **kwargs)
        piece.advance()
    finally:
        state.step = None
    output.last_hidden_state = output.last_hidden_state[:, piece.num_rows :]
    if output.hidden_states is not None:
        output.hidden_states = tuple(hidden[:, piece.num_rows :] for hidden in output.hidden_states)
    return output


def _join(
    pieces: list[BaseModelOutputWithPast],
    columns: list[list[int]],
    valid: torch.Tensor | None,
    inputs_BTD: torch.Tensor,
    state: FamState | None,
) -> BaseModelOutputWithPast:
    """Join the pieces' hidden states and put every token's back where the caller had it."""
    if not pieces:  # a chunk of padding alone
        return BaseModelOutputWithPast(last_hidden_state=torch.zeros_like(inputs_BTD), past_key_values=state)
    in_order = columns[0] == list(range(inputs_BTD.shape[1])) and all(c == columns[0] for c in columns)
    index = None
    if not in_order:
        placed = torch.zeros(inputs_BTD.shape[:2], dtype=torch.long)
        for row, own in enumerate(columns):
            targets = torch.arange(len(own)) if valid is None else valid[row].cpu().nonzero()[:, 0]
            placed[row, targets] = torch.tensor(own, dtype=torch.long)
        index = placed[..., None].to(inputs_BTD.device)

    def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        return whole if index is None else whole.take_along_dim(index, dim=1)

    hidden_states = None
    if pieces[0].hidden_states is not None:
        hidden_states = tuple(joined(parts) for parts in zip(*(p.hidden_states for p in pieces), strict=True))
    return BaseModelOutputWithPast(
        last_hidden_state=joined([piece.last_hidden_state for piece in pieces]),
        past_key_values=state,
        hidden_states=hidden_states,
    )


def _prepare_cache_for_generation(
    self: PreTrainedModel,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Give `generate` a FamState where the caller gave none, and refuse caches of other kinds."""
    if generation_config.cache_implementation is not None:
        raise TransformerFamError(
            f"cache_implementation is {generation_config.cache_implementation!r}, required is None; a converted model "
            "carries a FamState"
        )
    expand = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    given = model_kwargs.get("past_key_values")
    if given is None:
        if generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.init_state(batch_size * expand)
        return
    if isinstance(given, FamState) and expand > 1 and given.batch_size == batch_size:
        given.batch_repeat_interleave(expand)
