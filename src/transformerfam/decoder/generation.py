"""`generate` of a model with a memory: what of its input the state has read already, and rows that end early."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteriaList

from transformerfam.decoder.cache_argument import CACHE_NAME, rename_cache
from transformerfam.decoder.state import ReadingState, history_of
from transformerfam.errors import StateMismatchError, TransformerFamError

OWN_DRAFTS = ("assistant_early_exit", "use_mtp")
"""Options of `generate` that let a part of the model itself draft tokens."""


@dataclasses.dataclass
class _Call:
    """One call of `generate`.

    Attributes:
        ids_BT: its input, or None where that is embeddings.
        state: the state that it moves on.
        num_before: tokens of every row that the state had read when the input began.
        num_fresh: tokens of every row's input that the state had not read.
        num_columns: columns of the input in what `generate` returns.
        has_beams: whether rows of the state are beams.
        fresh_BT: which tokens of the input the state had not read, where it had read some.
        ended_B: rows that have come to their end, from the first end-of-text token on.
        num_given: columns of token ids that are given with embeddings, and returned in front of what is generated.
        expand: rows of the state for each row that the caller has.
    """

    ids_BT: torch.Tensor | None
    state: ReadingState | None = None
    num_before: tuple[int, ...] = ()
    num_fresh: list[int] = dataclasses.field(default_factory=list)
    num_columns: int = 0
    has_beams: bool = False
    fresh_BT: torch.Tensor | None = None
    ended_B: torch.Tensor | None = None
    num_given: int = 0
    expand: int = 1

    def take_back_expansion(self) -> None:
        """Leave a state with the rows that the caller gave it, where nothing but those was read."""
        state = self.state
        if state is not None and self.expand > 1 and state.row_lengths == self.num_before:
            state.batch_select_indices(torch.arange(0, state.batch_size, self.expand))
            self.has_beams, self.expand = False, 1


_CALL: contextvars.ContextVar[_Call] = contextvars.ContextVar("call of generate")


@contextlib.contextmanager
def _calling(call: _Call) -> Iterator[None]:
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)
        if call.state is not None:
            call.state.is_generating = False
            if call.has_beams and call.num_before and call.state.row_lengths != call.num_before:  # whatever ended it
                call.state.is_left_by_beams = True


def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the class's own `generate`; the state may come as `past_key_values` or as `cache`.

    The input is either new tokens alone, which follow what was read and generated before, or all tokens from the
    beginning of the reading on, as transformers continues a text: those that the state has read are not read again.
    Afterwards the state holds all tokens but the last one, as any cache of transformers; `state.unread_ids` has it, and
    the next call reads it in front of new tokens. A row that ends before others stays as it was at its end.

    Raises:
        TransformerFamError: two caches are given, or a state together with `use_cache=False`.
        StateMismatchError: it is unknown whether the input begins with what the state has read, it holds nothing
            else, or the state was left by beam search.
    """
    kwargs = rename_cache(args, kwargs)
    inputs = args[0] if args else kwargs.get("inputs")
    inputs = kwargs.get("input_ids") if inputs is None else inputs
    ids_BT = inputs if isinstance(inputs, torch.Tensor) and inputs.dim() == 2 else None
    call = _Call(ids_BT)
    if ids_BT is not None and kwargs.get("inputs_embeds") is not None:
        call = _Call(None, num_given=ids_BT.shape[1])
    with _calling(call):
        if isinstance(kwargs.get(CACHE_NAME), ReadingState):
            call.state = kwargs[CACHE_NAME]
            call.state.is_generating = True
        try:
            output = type(self).generate(self, *args, **kwargs)
        except BaseException:
            call.take_back_expansion()
            raise
        _note_last_tokens(call, output if isinstance(output, torch.Tensor) else output.sequences)
    return output


def prepare_cache_for_generation(
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Give `generate` a state where the caller gave none, and let it begin after what the state has read."""
    if getattr(generation_config, "is_assistant", False):
        raise TransformerFamError(
            "assistant_model has a memory, required is one without: tokens that it drafts and that are not accepted "
            "cannot be taken back out of a memory; give the base model"
        )
    if generation_config.cache_implementation is not None:
        raise TransformerFamError(
            f"cache_implementation is {generation_config.cache_implementation!r}, required is None; a converted model "
            "carries a FamState"
        )
    for name in OWN_DRAFTS:
        if getattr(generation_config, name, None):
            raise TransformerFamError(
                f"{name} is {getattr(generation_config, name)!r}, required is None: a part of the model that drafts "
                "tokens has no memory; give assistant_model or prompt_lookup_num_tokens"
            )
    call = _CALL.get()
    num_beams = generation_config.num_beams or 1
    expand = max(num_beams, generation_config.num_return_sequences or 1)
    state = model_kwargs.get(CACHE_NAME)
    if state is None:
        if generation_config.use_cache is False:
            return
        state = model_kwargs[CACHE_NAME] = self.init_state(batch_size * expand)
    elif not isinstance(state, ReadingState):
        return  # which forward refuses
    elif generation_config.use_cache is False:
        raise TransformerFamError(
            f"use_cache is False and {CACHE_NAME} is a state, required is use_cache=True with a state; leave one out"
        )
    state.require_own_rows()
    if expand > 1 and state.batch_size == batch_size:
        state.batch_repeat_interleave(expand)
        call.expand = expand
    state.is_generating = True
    call.state, call.has_beams, call.num_before = state, num_beams > 1, state.row_lengths
    if call.ids_BT is not None and len(call.ids_BT) * expand == state.batch_size:
        ids_BT = call.ids_BT.repeat_interleave(expand, dim=0)
        model_kwargs["attention_mask"] = _find_history(self, call, ids_BT, model_kwargs.get("attention_mask"))
        return
    read_last_tokens(self, state)
    embeds_BTD, mask_BT = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    length = 1 if embeds_BTD is None else embeds_BTD.shape[1]  # without any input a text begins with one token
    call.num_before = state.row_lengths
    call.num_columns = 1 if embeds_BTD is None else call.num_given
    call.num_fresh = [length] * state.batch_size if mask_BT is None else mask_BT[:, -length:].sum(1).tolist()


def _find_history(
    model: PreTrainedModel, call: _Call, ids_BT: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Note what of an input its rows have read, after reading what is missing in front of it.

    Returns:
        The input's own mask, with what was read, since penalties and drafts see all tokens.
    """
    state = call.state
    assert state is not None
    mask_BT = torch.ones_like(ids_BT) if attention_mask is None else attention_mask[:, -ids_BT.shape[1] :]
    rows = [ids[keep].tolist() for ids, keep in zip(ids_BT, mask_BT.bool().to(ids_BT.device), strict=True)]
    if _has_history(state, rows):
        num_read_B1 = torch.tensor(state.row_lengths, device=mask_BT.device)[:, None]
        call.fresh_BT = mask_BT.cumsum(1) > num_read_B1
        call.num_fresh = [len(row) - num_read for row, num_read in zip(rows, state.row_lengths, strict=True)]
    else:
        read_last_tokens(model, state)
        call.num_fresh = [len(row) for row in rows]
    call.num_before, call.num_columns = state.row_lengths, ids_BT.shape[1]
    return attention_mask if call.fresh_BT is None else mask_BT


def _has_history(state: ReadingState, rows: list[list[int]]) -> bool:
    """Return whether rows begin with all that their sequences have read, or are new tokens alone.

    Raises:
        StateMismatchError: it is unknown, or differs from row to row, or there is nothing else.
    """
    found = set()
    for row, num_read, history in zip(rows, state.row_lengths, state.histories, strict=True):
        if num_read == 0:
            continue
        if len(row) >= num_read and history is None:
            raise StateMismatchError(
                f"the input has {len(row)} tokens and the state has read {num_read}, of which it does not know the "
                "ids, so it is unknown whether the input begins with them; read() all new tokens but the last one "
                "into the state, and give the last one alone"
            )
        begins = len(row) >= num_read and history_of(row[:num_read]) == history
        if begins and len(row) == num_read:
            raise StateMismatchError(
                f"the input is the {num_read} tokens that the state has read, required is at least one token after "
                "them; give what follows, or the whole text with it"
            )
        found.add(begins)
    if len(found) > 1:
        raise StateMismatchError(
            "some rows of the input begin with what their sequences have read and others do not; give all of them from "
            "their beginning (with an attention_mask where they are padded), or new tokens alone"
        )
    return found == {True}


def read_last_tokens(model: Any, state: ReadingState) -> None:
    """Read what was generated last and is not in the state yet."""
    if all(token is None for token in state.unread_ids):
        return
    ids_B1 = torch.tensor([[token or 0] for token in state.unread_ids])
    model.read(ids_B1, state, attention_mask=torch.tensor([[token is not None] for token in state.unread_ids]))


def _note_last_tokens(call: _Call, sequences_BT: torch.Tensor) -> None:
    """Note in the state which token of every row is not in it."""
    state = call.state
    if state is None:
        return
    if not call.has_beams and len(sequences_BT) == state.batch_size:
        places = zip(state.row_lengths, call.num_before, call.num_fresh, strict=True)
        for row, (now, before, fresh) in enumerate(places):
            missing = sequences_BT[row, call.num_columns + now - before - fresh :].tolist()
            state.unread_ids[row] = missing[0] if missing else None


class _NotingCriteria(StoppingCriteriaList):
    """Note which rows have come to their end."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done_B: torch.Tensor = super().__call__(input_ids, scores, **kwargs)
        call = _CALL.get()
        call.ended_B = done_B if call.ended_B is None else call.ended_B | done_B
        return done_B


def get_stopping_criteria(self: Any, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
    """Return the class's own criteria; where `generate` pads after an end, they note which rows have ended."""
    criteria: StoppingCriteriaList = type(self)._get_stopping_criteria(self, *args, **kwargs)
    call = _CALL.get()
    if call.state is None or call.has_beams or call.state.batch_size == 1:  # where an end is the end of all
        return criteria
    if not any(hasattr(one, "eos_token_id") for one in criteria):
        return criteria
    return _NotingCriteria(criteria)


def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the class's own inputs of a step, in which what was read and the padding after ended rows are masked."""
    inputs: dict[str, Any] = type(self).prepare_inputs_for_generation(self, *args, **kwargs)
    call = _CALL.get(None)
    if call is None or not isinstance(inputs.get(CACHE_NAME), ReadingState):
        return inputs
    if call.ended_B is not None:
        inputs["attention_mask"] = (~call.ended_B).long()[:, None]
    elif call.fresh_BT is not None:
        mask = inputs["attention_mask"].clone()
        length = min(mask.shape[1], call.fresh_BT.shape[1])
        mask[:, :length] *= call.fresh_BT[:, :length]
        inputs["attention_mask"] = mask
    return inputs


def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse transformers' continuous batching, whose paged cache is none that carries a memory.

    Raises:
        TransformerFamError: always.
    """
    raise TransformerFamError(
        "continuous batching (generate_batch, cache_implementation='paged') has a paged cache, required is a state; "
        "call generate() with a batch"
    )


GENERATION_METHODS: dict[str, Callable[..., Any]] = {
    "generate": generate,
    "prepare_inputs_for_generation": prepare_inputs_for_generation,
    "_prepare_cache_for_generation": prepare_cache_for_generation,
    "init_continuous_batching": init_continuous_batching,
    "_get_stopping_criteria": get_stopping_criteria,
}
"""What a model with a memory has in place of its class's methods."""
