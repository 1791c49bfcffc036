"""The forward of a decoder with FAM: its state, and its pieces with FAM rows in front."""

from typing import Any

import torch
from transformers.modeling_outputs import MoeModelOutputWithPast

from transformerfam.decoder.cache_argument import take_cache
from transformerfam.decoder.peft_calls import refuse_adapters_by_place
from transformerfam.decoder.pieces import NOT_COMPILED, Inputs, read_in_pieces, state_or_new, take_over
from transformerfam.decoder.step import run_decoder
from transformerfam.errors import StateMismatchError
from transformerfam.fam.memory import QUERY_BACK_ENDS, FamMemory, refresh_queries
from transformerfam.fam.piece import Piece
from transformerfam.fam.row_lora import bind_lora, leading_rows
from transformerfam.fam.state import FamState


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
        attention_mask: `(B, T)`, 1 for tokens and 0 for padding, which takes no position, wherever it is; of a longer
            mask the last T columns count.
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
    refuse_adapters_by_place(self.fam.identity.model)
    inputs = Inputs.of(self, input_ids, inputs_embeds, attention_mask, position_ids, use_cache, kwargs)
    state = _own_state(self, take_cache(kwargs, cache), len(inputs.embeds_BTD))
    if max(state.block_fill) + inputs.embeds_BTD.shape[1] >= state.config.block_size:
        refresh_queries(self, state)
    return read_in_pieces(self, state, inputs, _run_piece, kwargs)


def _own_state(decoder: Any, cache: Any, batch_size: int) -> FamState:
    memory: FamMemory = decoder.fam
    assert memory.identity is not None
    cache = state_or_new(cache, FamState, memory.identity, batch_size)
    take_over(cache, memory.identity)
    if cache.config.replace(fam_key_bias=0.0) != memory.config.replace(fam_key_bias=0.0):
        raise StateMismatchError(
            f"state was made with {cache.config}, the model has {memory.config}; start a new one with "
            "model.init_state()"
        )
    return cache


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
