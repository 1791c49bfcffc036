"""The arguments of a call: those used as in transformers, and those refused by name."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from transformerfam.errors import TransformerFamError

PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments by which transformers' attention knows where the texts of one row begin."""

ATTENTION_ARGUMENTS = ("softcap", "s_aux", "scaling", "sliding_window", "dropout", "position_bias")
"""What layers hand to attention, and some back ends also take from the call of the model."""


LARGEST_NUMBER = 2**53
"""Of tokens, blocks or sequences: what every part of a computation holds exactly."""


def require_integer(name: str, value: Any, least: int, most: int = LARGEST_NUMBER) -> int:
    """Return a number of tokens or sequences, which may be one of numpy's or torch's, as Python's own.

    Args:
        name: of the argument.
        value: that is given.
        least: that is allowed.
        most: that is allowed.

    Raises:
        TransformerFamError: it is no integer, or out of range.
    """
    try:
        number = None if getattr(value, "dtype", type(value)) in (bool, torch.bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        limit = "2^53" if most == LARGEST_NUMBER else most
        raise TransformerFamError(f"{name} is {value!r}, required is an integer from {least} to {limit}; change {name}")
    return number


def as_tensor(name: str, value: Any, required: str) -> torch.Tensor:
    """Return numbers as a tensor: a tensor as it is, lists and numpy's arrays as torch takes them.

    Args:
        name: of the argument.
        value: that is given.
        required: what it has to be, for the message.

    Raises:
        TransformerFamError: torch makes no tensor of it.
    """
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TransformerFamError(f"{name} is not a tensor ({error}); required are {required}") from error


def saved_flags(is_saved: Any, batch_size: int, has_fam: bool) -> list[bool]:
    """Return which sequences start from a saved FAM, as Python's own flags.

    Args:
        is_saved: a flag for each sequence; None: all do, where there is a saved FAM.
        batch_size: number of sequences.
        has_fam: whether there is one.

    Raises:
        TransformerFamError: some are no flags, there are more or fewer than sequences, or one is True without a FAM.
    """
    if is_saved is None:
        return [has_fam] * batch_size
    flags: Any = is_saved.tolist() if hasattr(is_saved, "tolist") else is_saved
    flags = list(flags) if isinstance(flags, Iterable) else [flags]
    if any(type(flag) is not bool for flag in flags):
        raise TransformerFamError(f"is_saved is {is_saved}, required are True or False for every sequence")
    if len(flags) != batch_size or (any(flags) and not has_fam):
        raise TransformerFamError(
            f"is_saved is {flags}, required are {batch_size} flags, and a saved fam where one is True"
        )
    return flags


def check_ids(input_ids: torch.Tensor | None, vocab_size: int) -> None:
    """Refuse empty input, token ids that are no integers, and those out of range.

    Raises:
        TransformerFamError: with the id and the range.
    """
    if input_ids is None or input_ids.numel() == 0:
        raise TransformerFamError("input is empty, required is at least one token; give token ids")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TransformerFamError(
            f"token ids are of type {input_ids.dtype}, required are integers; give the tokenizer's ids as they are"
        )
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise TransformerFamError(
            f"token id {low if low < 0 else high} is out of range, required is 0 to {vocab_size - 1}; use the "
            "tokenizer of this model"
        )


def own_mask(attention_mask: torch.Tensor | None, batch_size: int, length: int) -> torch.Tensor | None:
    """Return the columns `(B, T)` of a mask that belong to T new tokens: the last ones, as transformers has it.

    Raises:
        TransformerFamError: the mask has another shape, fewer columns, or other entries than 0 and 1.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or len(attention_mask) != batch_size or attention_mask.shape[1] < length:
        raise TransformerFamError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, required is (batch, tokens) "
            f"({batch_size}, {length}); a converted model makes its own mask of blocks and memory"
        )
    if not isinstance(attention_mask, FakeTensor) and attention_mask.dtype != torch.bool:
        others = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
        if others.numel():
            raise TransformerFamError(
                f"attention_mask has the entry {others[0].item()}, required are 1 for tokens and 0 for padding; give "
                "those, not what is added to attention's logits"
            )
    return attention_mask[:, -length:]


def check_positions(position_ids: torch.Tensor | None, valid_BT: torch.Tensor | None, length: int) -> None:
    """Refuse positions that do not run on by one from token to token, as those of several texts packed into a row.

    Args:
        position_ids: `(1 or B, T)`.
        valid_BT: which tokens are none of padding; None: all.
        length: T.

    Raises:
        TransformerFamError: they jump or restart.
    """
    if position_ids is None or isinstance(position_ids, FakeTensor):
        return
    rows = position_ids[..., -length:].reshape(-1, min(length, position_ids.shape[-1])).cpu()
    if valid_BT is None:
        runs_on = bool((rows.diff(dim=1) == 1).all())
    else:
        rows = rows.expand(len(valid_BT), -1)
        runs_on = all(bool((row[keep].diff() == 1).all()) for row, keep in zip(rows, valid_BT.cpu(), strict=True))
    if not runs_on or rows.shape[1] != length:
        raise TransformerFamError(
            f"position_ids are {rows[0].tolist()[:8]}..., required are positions that run on by one from token to "
            "token (positions follow from the state); give texts that are packed into one row as rows of a batch"
        )


def take_arguments(decoder: Any, kwargs: dict[str, Any]) -> bool:
    """Take what a piece must not get out of a call's further arguments, and refuse what is not done.

    Args:
        decoder: the decoder that is called.
        kwargs: of the call; passed on to the class's own forward.

    Returns:
        Whether the output is an object, not a tuple.

    Raises:
        TransformerFamError: attention weights, packed texts, another attention or sight of later tokens are wanted.
    """
    if kwargs.get("output_attentions", decoder.config.output_attentions):
        raise TransformerFamError(
            "output_attentions is not available on a converted model, since every piece sees another number of keys; "
            "call it with output_attentions=False"
        )
    for name in PACKING_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise TransformerFamError(
                f"{name} is given, and texts packed into one row would share a memory; give them as rows of a batch"
            )
    for name in ATTENTION_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise TransformerFamError(
                f"{name} is given, which a layer's attention has from the model's configuration; change it there"
            )
    if kwargs.pop("is_causal", None) is False:
        raise TransformerFamError("is_causal is False, required is True: a memory holds what was read before")
    return kwargs.pop("return_dict", None) is not False
