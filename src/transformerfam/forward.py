"""The forward of a converted decoder: input of any length, piece by piece.

The class's own forward runs once per piece, and a piece never crosses a block boundary. Every sequence of a batch keeps
its own place in its block, so that padding and decoding never mix them up.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MoeModelOutputWithPast

from transformerfam.arguments import check_ids, check_positions, own_mask, take_arguments
from transformerfam.attention import Piece
from transformerfam.cache_argument import CACHE_NAME, as_cache, take_cache
from transformerfam.errors import StateMismatchError, TransformerFamError
from transformerfam.hidden_gradients import take_gradients_of, without_gradients
from transformerfam.identity import ModelIdentity, UnboundIdentity
from transformerfam.memory import QUERY_BACK_ENDS, FamMemory, refresh_queries, run_decoder
from transformerfam.positions import warn_text_beyond_trained
from transformerfam.reading_state import ReadingState
from transformerfam.row_lora import bind_lora, leading_rows, refuse_adapter_names
from transformerfam.state import FamState

NOT_COMPILED = (
    "a model with a memory reads piece by piece, each of another shape, into a state; compile pieces with "
    "transformerfam.compiled.compile_decoding and compile_reading"
)
"""Why `torch.compile(model)` leaves the decoder as it is, and compiles what is around it."""

State = TypeVar("State", bound=ReadingState)
RunPiece = Callable[[Any, State, torch.Tensor, list[int], dict[str, Any]], MoeModelOutputWithPast]
"""Send one piece through a decoder's layers and move the state on: decoder, state, `(B, T, D)`, tokens of every row,
further arguments of the model's forward."""


@dataclasses.dataclass
class DecoderOutput(MoeModelOutputWithPast):
    """What a decoder gives, with what some heads look up in it.

    Attributes:
        shared_kv_states: None; Gemma 4's head copies it.
    """

    shared_kv_states: Any = None


@torch.compiler.disable(reason=NOT_COMPILED)
def read_pieces(
    self: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: FamState | None = None,
    inputs_embeds: torch.Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Run the decoder over tokens of any number, piece by piece; a piece never crosses a block boundary.

    This is `forward` of a converted model's decoder. Positions follow from the state.

    Args:
        self: the decoder.
        input_ids: `(B, T)` new tokens.
        attention_mask: `(B, T)`, 1 for tokens and 0 for padding; of a longer mask the last T columns count.
        position_ids: `(1 or B, T)`, from any number on; refused where they do not run on by one.
        cache: the state to advance, or `past_key_values`; None starts one.
        inputs_embeds: `(B, T, D)` instead of `input_ids`.
        use_cache: False leaves the state out of the output; None is the model's configuration.
        **kwargs: go on to the model's own forward.

    Returns:
        Hidden states `(B, T, D)` after the last norm (of padding: any finite values), and the state.

    Raises:
        TransformerFamError: an argument asks for what is not done; the message names it.
        StateMismatchError: the state is another model's, or of another configuration or batch.
    """
    refuse_adapter_names(self.fam.identity.model)
    inputs = Inputs.of(self, input_ids, inputs_embeds, attention_mask, position_ids, use_cache, kwargs)
    state = _own_state(self, take_cache(kwargs, cache), len(inputs.embeds_BTD))
    if max(state.block_fill) + inputs.embeds_BTD.shape[1] >= state.config.block_size:
        refresh_queries(self, state)
    return read_in_pieces(self, state, inputs, _run_piece, kwargs)


@dataclasses.dataclass
class Inputs:
    """What one call of a decoder reads, checked.

    Attributes:
        embeds_BTD: embeddings.
        valid_BT: which tokens are none of padding; None: all.
        ids: token ids of every sequence, without padding; None where they are not known.
        gives_state: whether the state is in the output.
        gives_object: whether the output is an object, not a tuple.
    """

    embeds_BTD: torch.Tensor
    valid_BT: torch.Tensor | None
    ids: list[list[int]] | None
    gives_state: bool
    gives_object: bool

    @classmethod
    def of(
        cls,
        decoder: Any,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        use_cache: bool | None,
        kwargs: dict[str, Any],
    ) -> "Inputs":
        """Check a call's arguments, which are those of `read_pieces`.

        Raises:
            TransformerFamError: see `read_pieces`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise TransformerFamError("exactly one of input_ids and inputs_embeds is required")
        gives_object = take_arguments(decoder, kwargs)
        if inputs_embeds is None:
            embedding = decoder.get_input_embeddings()
            check_ids(input_ids, embedding.weight.shape[0])
            assert input_ids is not None
            if input_ids.dim() != 2:
                raise TransformerFamError(
                    f"token ids have shape {tuple(input_ids.shape)}, required is (batch, tokens); give one text as "
                    "ids[None]"
                )
            inputs_embeds = embedding(input_ids)
        batch_size, length = inputs_embeds.shape[:2]
        mask = own_mask(attention_mask, batch_size, length)
        valid = None if mask is None or bool(mask.all()) else mask.bool()
        check_positions(position_ids, valid, length)
        gives_state = decoder.config.use_cache if use_cache is None else use_cache
        return cls(inputs_embeds, valid, _rows_of(input_ids, valid), gives_state, gives_object)


def read_in_pieces(
    decoder: Any,
    state: State,
    inputs: Inputs,
    run_piece: RunPiece[State],
    kwargs: dict[str, Any],
) -> Any:
    """Cut an input of any length into pieces that cross no block boundary, and run one after the other.

    Args:
        decoder: whose layers they go through.
        state: what is advanced.
        inputs: what is read.
        run_piece: sends one piece through the layers and moves the state on.
        kwargs: go on to the model's own forward.

    Returns:
        As `read_pieces`.
    """
    inputs_BTD, valid, ids = inputs.embeds_BTD, inputs.valid_BT, inputs.ids
    batch_size, length = inputs_BTD.shape[:2]
    num_before = state.num_tokens_read
    state.note_input(inputs_BTD, valid, ids)
    lengths = [length] * batch_size if valid is None else valid.sum(1).tolist()
    if valid is not None:  # move padding behind the tokens
        order = torch.argsort(~valid, dim=1, stable=True)
        inputs_BTD = inputs_BTD.take_along_dim(order[..., None], dim=1)
    done = [0] * batch_size
    columns: list[list[int]] = [[] for _ in lengths]  # where each token's result stands in the joined pieces
    pieces: list[MoeModelOutputWithPast] = []
    width = 0
    is_checkpointed = decoder.gradient_checkpointing and decoder.training and torch.is_grad_enabled()
    run = functools.partial(_run_checkpointed_piece, run_piece) if is_checkpointed else run_piece
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        block_size = state.config.block_size
        counts = [min(n - d, block_size - f) for n, d, f in zip(lengths, done, state.block_fill, strict=True)]
        pieces.append(run(decoder, state, _slice_rows(inputs_BTD, done, counts), counts, kwargs))
        state.note_tokens(ids and [row[d : d + n] for row, d, n in zip(ids, done, counts, strict=True)], counts)
        for row, count in enumerate(counts):
            columns[row] += range(width, width + count)
            done[row] += count
        width += max(counts)
    if is_checkpointed:
        state.make_room()
    _warn_of_positions(decoder, state, num_before)
    why = None
    if is_checkpointed:
        why = "their block is computed again; switch activation checkpointing off"
    elif not isinstance(state, FamState):
        why = "a rival's rows are parted by where they stand; take those of a model with FAM"
    output = _join(pieces, columns, valid, inputs_BTD, state if inputs.gives_state else None, why)
    return output if inputs.gives_object else output.to_tuple()


def _warn_of_positions(decoder: Any, state: ReadingState, num_before: int) -> None:
    """Warn once of a reading whose positions grow with it, where they come to more than the model was trained on.

    Training at such positions is how they are learned, and is not warned of.
    """
    start, trained = state.text_start, getattr(decoder.config, "max_position_embeddings", None)
    if decoder.training or start is None or trained is None or (num_before and start + num_before > trained):
        return
    why = "fam_position 'zero' measures every block's distance from the text's beginning"
    if not isinstance(state, FamState):
        why = "full attention counts positions from the text's beginning"
    warn_text_beyond_trained(decoder.config, start + state.num_tokens_read, why)


def _rows_of(ids_BT: torch.Tensor | None, valid: torch.Tensor | None) -> list[list[int]] | None:
    """Return every sequence's token ids, without padding; None where there are none, or no values, as in a plan."""
    if ids_BT is None or isinstance(ids_BT, FakeTensor):
        return None
    if valid is None:
        return ids_BT.tolist()
    return [ids[keep].tolist() for ids, keep in zip(ids_BT, valid, strict=True)]


def state_or_new(cache: Any, kind: type[State], identity: ModelIdentity, batch_size: int) -> State:
    """Return the state that an input goes on with, a new one where there is none.

    Raises:
        StateMismatchError: `cache` is of another kind, of another number of sequences, of another model, or what beam
            search has left.
    """
    if cache is None:
        state: State = identity.model.init_state(batch_size)
        return state
    if not isinstance(cache, kind):
        raise StateMismatchError(
            f"{CACHE_NAME} is a {type(cache).__name__}, required is a {kind.__name__}; start one with "
            "model.init_state()"
        )
    if cache.batch_size != batch_size:
        raise StateMismatchError(
            f"state holds {cache.batch_size} sequences, input has {batch_size}; start a new state with "
            f"init_state(batch_size={batch_size})"
        )
    cache.require_own_rows()
    if isinstance(cache.identity, UnboundIdentity):
        identity.check(cache.identity.to_metadata(cache.config), cache.config, "the state")
        cache.identity = identity
    cache.leave_inference_mode()
    return cache


def _own_state(decoder: Any, cache: Any, batch_size: int) -> FamState:
    memory: FamMemory = decoder.fam
    assert memory.identity is not None
    cache = state_or_new(cache, FamState, memory.identity, batch_size)
    if cache.identity is not memory.identity:
        if cache.identity.architecture != memory.identity.architecture:
            raise StateMismatchError("state belongs to another model; start a new one with model.init_state()")
        if cache.identity.model is not memory.identity.model:  # PEFT's copies of a memory are of one model
            memory.identity.warn_of_weights(cache.identity.to_metadata(cache.config), "the state")
        cache.identity = memory.identity
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
    decoder: Any, state: FamState, tokens_BTD: torch.Tensor, counts: list[int], kwargs: dict[str, Any]
) -> MoeModelOutputWithPast:
    """Send one piece through the layers, and move the state on once it is through."""
    piece = Piece(state, counts, takes_queries=decoder.config._attn_implementation in QUERY_BACK_ENDS)
    if piece.num_rows:
        rows = tokens_BTD.new_zeros(len(tokens_BTD), piece.num_rows, tokens_BTD.shape[2])
        tokens_BTD = torch.cat((rows, tokens_BTD), dim=1)
    step = next((step for step in decoder.fam.compiled_steps if step.serves(piece)), None)
    if step is not None and kwargs.get("output_hidden_states", decoder.config.output_hidden_states):
        step = None  # a compiled step gives the last ones alone
    if piece.begins and state.config.fam_lora == "rows":
        bind_lora(decoder.fam.identity.model)
    state.step = piece
    try:
        with leading_rows(piece.num_rows):
            if step is not None:
                output = MoeModelOutputWithPast(last_hidden_state=step.run(piece, tokens_BTD))
            else:
                output = run_decoder(decoder, tokens_BTD, piece.position_ids(tokens_BTD.device), state, **kwargs)
        piece.advance()
    finally:
        state.step = None
    router_logits = getattr(output, "router_logits", None)  # of every layer with experts, `(B * rows, experts)`
    return MoeModelOutputWithPast(
        last_hidden_state=output.last_hidden_state[:, piece.num_rows :],
        hidden_states=output.hidden_states,  # with FAM rows, to the tensors that the layers have used
        router_logits=router_logits
        and tuple(logits.unflatten(0, (len(counts), -1))[:, piece.num_rows :] for logits in router_logits),
    )


def _run_checkpointed_piece(
    run_piece: RunPiece[State],
    decoder: Any,
    state: State,
    tokens_BTD: torch.Tensor,
    counts: list[int],
    kwargs: dict[str, Any],
) -> MoeModelOutputWithPast:
    """Send one piece through the layers, and again in the backward pass instead of keeping its activations.

    A layer alone cannot be computed again, since it has written its cache; a piece can, from the state in front of it.

    Source: section 2.1, "gradient checkpointing" block after block.
    """

    def run(before: State, tokens_BTD: torch.Tensor) -> tuple[MoeModelOutputWithPast, State]:
        after = before.shallow_copy()
        after.make_room()
        output = run_piece(decoder, after, tokens_BTD, counts, kwargs)
        after.drop_complete_block()
        return output, after

    output, after = checkpoint(run, state.shallow_copy(), tokens_BTD, use_reentrant=False)
    state.go_on_from(after)
    return output


def _join(
    pieces: list[MoeModelOutputWithPast],
    columns: list[list[int]],
    valid: torch.Tensor | None,
    inputs_BTD: torch.Tensor,
    state: ReadingState | None,
    why_no_gradients: str | None,
) -> MoeModelOutputWithPast:
    """Join the pieces' hidden states and put every token's back where the caller had it."""
    if not pieces:  # a chunk of padding alone
        return DecoderOutput(last_hidden_state=torch.zeros_like(inputs_BTD), **as_cache(state))
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

    last_hidden_state = joined([piece.last_hidden_state for piece in pieces])
    hidden_states = None
    if pieces[0].hidden_states is not None:

        def placed_alike(side_by_side: torch.Tensor) -> torch.Tensor:
            whole = joined([side_by_side])
            return whole if valid is None else whole * valid[..., None]

        layers = []
        widths = [piece.last_hidden_state.shape[1] for piece in pieces]
        for parts in zip(*(piece.hidden_states for piece in pieces), strict=True):
            tokens = [slice(part.shape[1] - width, None) for part, width in zip(parts, widths, strict=True)]
            sources = list(zip(parts, tokens, strict=True))
            whole = joined([part[:, rows] for part, rows in sources])
            if whole.requires_grad and why_no_gradients is None:
                whole = take_gradients_of(whole, sources, placed_alike)
            elif whole.requires_grad:
                whole = without_gradients(whole, str(why_no_gradients))
            layers.append(whole)
        hidden_states = (*layers[:-1], last_hidden_state)
    router_logits = None
    if pieces[0].router_logits is not None:
        by_layer = zip(*(p.router_logits for p in pieces), strict=True)
        router_logits = tuple(joined(parts).flatten(0, 1) for parts in by_layer)
    return DecoderOutput(
        last_hidden_state=last_hidden_state,
        hidden_states=hidden_states,
        router_logits=router_logits,
        **as_cache(state),
    )
