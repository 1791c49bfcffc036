"""The methods that every model with a memory has beside its own, or in their place."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from transformerfam.decoder.arguments import as_tensor, check_ids, own_mask
from transformerfam.decoder.cache_argument import rename_cache
from transformerfam.decoder.generation import GENERATION_METHODS
from transformerfam.decoder.state import ReadingState
from transformerfam.errors import ReadInterrupted, StateMismatchError, TransformerFamError
from transformerfam.processes import process_share, uninterrupted

Progress = Callable[[int, int, ReadingState], None]
"""Of (tokens done, tokens in all, state)."""


@torch.no_grad()
def read(
    self: PreTrainedModel,
    input_ids: torch.Tensor | Sequence[int],
    state: ReadingState | None = None,
    attention_mask: torch.Tensor | None = None,
    progress: bool | Progress = False,
) -> ReadingState:
    """Read tokens of any number into a state, in constant memory and without logits.

    Args:
        self: the converted model.
        input_ids: `(T,)` or `(B, T)` token ids, which follow what the state has read; `generate` leaves the last token
            that it generated unread, so begin with that one, `state.unread_ids`.
        state: reading to continue, in place; None starts one.
        attention_mask: `(B, T)`, 1 for tokens and 0 for padding, on either side; of a longer one the last T columns.
        progress: True draws a bar; a function is called with (tokens done, tokens in all, state) after every block.

    Returns:
        The state, advanced by the tokens.

    Raises:
        TransformerFamError: empty input, token ids that are no integers or out of range, a mask of another shape, or a
            batch that does not fit the state.
        ReadInterrupted: Ctrl-C; it carries the state and says how to go on.
    """
    ids = as_tensor("input_ids", input_ids, "token ids, (tokens,) or (batch, tokens)")
    check_ids(ids, self.get_input_embeddings().weight.shape[0])
    if ids.dim() not in (1, 2):
        raise TransformerFamError(f"token ids have shape {tuple(ids.shape)}, required is (tokens,) or (batch, tokens)")
    ids = (ids[None] if ids.dim() == 1 else ids).to(self.device, torch.long)
    if attention_mask is not None:
        attention_mask = as_tensor("attention_mask", attention_mask, "a 0 or 1 for every token").to(self.device)
        attention_mask = attention_mask[None] if attention_mask.dim() == 1 else attention_mask
        attention_mask = own_mask(attention_mask, *ids.shape)
    if not (isinstance(progress, bool) or callable(progress)):
        raise TransformerFamError(f"progress is {progress!r}, required is True, False or a function")
    if state is None:
        state = self.init_state(len(ids))
    elif not isinstance(state, ReadingState):
        raise StateMismatchError(
            f"state is a {type(state).__name__}, required is one of this model; start one with model.init_state()"
        )
    if progress is True:
        is_silent = process_share()[0] > 0
        with tqdm(desc="reading", total=ids.shape[1], unit=" tokens", unit_scale=True, disable=is_silent) as bar:

            def move(done: int, total: int, state: ReadingState) -> None:
                bar.set_postfix_str(f"state {state.num_bytes / 1e6:.1f} MB", refresh=False)
                bar.update(done - bar.n)

            return self.read(ids, state, attention_mask, move)
    decoder, total, done = self.get_decoder(), ids.shape[1], 0
    try:
        while done < total:
            # Whole blocks for rows in step; with rows out of step any chunk is right.
            count = min(total - done, state.config.block_size - state.block_fill[0])
            mask = None if attention_mask is None else attention_mask[:, done : done + count]
            with uninterrupted():  # half a piece would leave some layers in front of others
                decoder(input_ids=ids[:, done : done + count], attention_mask=mask, past_key_values=state)
                done += count
            if callable(progress):
                progress(done, total, state)
    except KeyboardInterrupt as error:
        raise ReadInterrupted(state, done) from error
    return state


def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Call the class's own `forward`; the state may come as `past_key_values` or as `cache`.

    Raises:
        TransformerFamError: both are given.
    """
    return type(self).forward(self, *args, **rename_cache(args, kwargs))


READER_METHODS: dict[str, Callable[..., Any]] = {
    "forward": forward,
    "read": read,
    **GENERATION_METHODS,
}
"""What every model with a memory has in the place of its class's methods, or beside them."""
