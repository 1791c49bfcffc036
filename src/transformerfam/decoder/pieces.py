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

from transformerfam.decoder.architecture import difference
from transformerfam.decoder.arguments import check_ids, check_positions, own_mask, take_arguments
from transformerfam.decoder.cache_argument import CACHE_NAME, as_cache
from transformerfam.decoder.hidden_gradients import take_gradients_of, without_gradients
from transformerfam.decoder.identity import ModelIdentity, UnboundIdentity
from transformerfam.decoder.positions import warn_text_beyond_trained
from transformerfam.decoder.state import ReadingState
from transformerfam.errors import StateMismatchError, TransformerFamError

NOT_COMPILED = (
    "a model with a memory reads piece by piece, each of another shape, into a state; compile pieces with "
    "transformerfam.fam.compiled.compile_decoding and compile_reading"
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
        kwargs: passed on to the model's own forward.

    Returns:
        As `read_pieces`.
    """
    inputs_BTD, valid, ids = inputs.embeds_BTD, inputs.valid_BT, inputs.ids
    batch_size, length = inputs_BTD.shape[:2]
    num_before = state.num_tokens_read
    state.make_room()
    state.note_input(inputs_BTD, valid, ids)
    lengths = [length] * batch_size if valid is None else valid.sum(1).tolist()
    if valid is not None:  # move padding after the tokens
        order = torch.argsort(~valid, dim=1, stable=True)
        inputs_BTD = inputs_BTD.take_along_dim(order[..., None], dim=1)
    done = [0] * batch_size
    columns: list[list[int]] = [[] for _ in lengths]  # place of each token's result in the joined pieces
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
    why = state.why_no_gradients
    if is_checkpointed:
        why = "their block is computed again; switch activation checkpointing off"
    output = _join(pieces, columns, valid, inputs_BTD, state if inputs.gives_state else None, why)
    return output if inputs.gives_object else output.to_tuple()


def _warn_of_positions(decoder: Any, state: ReadingState, num_before: int) -> None:
    """Warn once of a reading whose positions grow with it, where they come to more than the model was trained on.

    Training at such positions is how they are learned, and is not warned of.
    """
    start, trained = state.text_start, getattr(decoder.config, "max_position_embeddings", None)
    if decoder.training or start is None or trained is None or (num_before and start + num_before > trained):
        return
    warn_text_beyond_trained(decoder.config, start + state.num_tokens_read, state.why_positions_grow)


def _rows_of(ids_BT: torch.Tensor | None, valid: torch.Tensor | None) -> list[list[int]] | None:
    """Return every sequence's token ids, without padding; None where there are none, or no values, as in a plan."""
    if ids_BT is None or isinstance(ids_BT, FakeTensor):
        return None
    if valid is None:
        return ids_BT.tolist()
    return [ids[keep].tolist() for ids, keep in zip(ids_BT, valid, strict=True)]


def state_or_new(cache: Any, kind: type[State], identity: ModelIdentity, batch_size: int) -> State:
    """Return the state that an input continues, a new one where there is none.

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
        cache.read_with = identity.check(cache.identity_metadata(), cache.config, "the state")
        cache.identity = identity
    cache.leave_inference_mode()
    cache.leave_graph()
    return cache


def take_over(state: ReadingState, identity: ModelIdentity, num_tokens: int) -> None:
    """Let a state be continued by the model of `identity`, which may not be the one that it was made on.

    Which weights read is noted for more than one token and where a block begins: a look at all of them is a small
    part of reading such a piece, not of generating a token.

    Raises:
        StateMismatchError: the models differ in more than their weights.

    Warns:
        UserWarning: the weights differ.
    """
    before = state.identity
    if before is not identity:
        if difference(before.architecture, identity.architecture) is not None:
            raise StateMismatchError("state belongs to another model; start a new one with model.init_state()")
        if before.model is not identity.model:  # PEFT's copies of a memory are of one model
            state.read_with = identity.warn_of_weights(state.identity_metadata(), "the state")
        state.identity = identity
    if num_tokens > 1 or not all(state.block_fill):
        state.read_with = identity.read_with(state.read_with, before)


def _slice_rows(inputs_BTD: torch.Tensor, starts: list[int], counts: list[int]) -> torch.Tensor:
    """Return each sequence's next tokens, `(B, max(counts), D)`; what lies after a sequence's count is padding."""
    longest = max(counts)
    if len(set(starts)) == 1:
        return inputs_BTD[:, starts[0] : starts[0] + longest]
    columns = torch.tensor(starts)[:, None] + torch.arange(longest)
    columns = columns.clamp(max=inputs_BTD.shape[1] - 1).to(inputs_BTD.device)
    return inputs_BTD.take_along_dim(columns[..., None], dim=1)


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
