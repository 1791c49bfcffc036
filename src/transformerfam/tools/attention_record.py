"""Record attention while a converted model reads: who looks at what, and what becomes of the FAM, block by block.

A back end of transformers' attention that keeps its weights replaces the model's own while the recording lasts.
It makes dense masks and whole matrices of weights, and is for looking, not for reading long texts.

Source: figures 4 and 11 of arXiv 2404.09173.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from transformerfam.decoder.arguments import check_ids
from transformerfam.decoder.served import family_of
from transformerfam.errors import TransformerFamError
from transformerfam.fam.layer import FamLayer
from transformerfam.fam.memory import memory_of
from transformerfam.fam.state import FamState

RECORDING_BACK_END = "fam_recording"


@dataclasses.dataclass(frozen=True)
class BlockRecord:
    """What one layer did in one block.

    Attributes:
        block_idx: number of the block, from 0.
        layer_idx: number of the layer.
        weights_HRS: attention weights of the block's rows, FAM rows first, over all keys in sight; None where the
            layer was not chosen.
        num_fam_rows: FAM rows in front of the tokens.
        num_memory: keys of sink tokens and memory segments in sight, in front of the FAM's.
        num_fam: keys of FAMs in sight.
        to_memory: mean share of their attention that tokens give to memory segments and sinks.
        to_fam: to FAMs.
        to_block: to their own block.
        fam_norm: root mean square of the FAM's rows after the block, mean over rows; None without FAM.
        fam_change: length of what the block changed in the FAM over the FAM's length, mean over rows.
        to_block_of_rows: share of each FAM row's attention that fell on the block, mean over heads: by how much a gated
            row was rewritten (but for the first update). Empty without FAM.
    """

    block_idx: int
    layer_idx: int
    weights_HRS: torch.Tensor | None
    num_fam_rows: int
    num_memory: int
    num_fam: int
    to_memory: float
    to_fam: float
    to_block: float
    fam_norm: float | None
    fam_change: float | None
    to_block_of_rows: tuple[float, ...] = ()


class _Recorder:
    """Take the weights of every layer in its turn."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            logits = logits + attention_mask
        weights_BHRS = logits.softmax(-1)
        self.weights.append(weights_BHRS[0])
        return (weights_BHRS @ value).transpose(1, 2), weights_BHRS


@contextlib.contextmanager
def _recording(model: PreTrainedModel) -> Iterator[_Recorder]:
    recorder, back_end = _Recorder(), model.config._attn_implementation
    AttentionInterface.register(RECORDING_BACK_END, recorder.attend)
    AttentionMaskInterface.register(RECORDING_BACK_END, sdpa_mask)
    model.set_attn_implementation(RECORDING_BACK_END)
    try:
        yield recorder
    finally:
        model.set_attn_implementation(back_end)


def require_recordable(model: PreTrainedModel) -> None:
    """Refuse a model whose attention cannot be recorded.

    Raises:
        TransformerFamError: its attention does not go through transformers' interface.
    """
    back_end = model.config._attn_implementation
    if not family_of(model).has_attention_interface or back_end in ("eager", "flex_attention"):
        raise TransformerFamError(
            f"attention of {type(model).__name__} on back end {back_end!r} cannot be recorded: it does more than a "
            "softmax over keys, or does not go through transformers' interface; load the model with "
            "attn_implementation='sdpa'"
        )


@torch.no_grad()
def read_end_of_block(model: PreTrainedModel, ids_1T: torch.Tensor, state: FamState) -> list[torch.Tensor | None]:
    """Read the tokens that complete a block, and return how every layer's FAM rows looked at the whole block.

    The tokens of the block in front of these may have been read by any back end.

    Args:
        model: converted, and recordable.
        ids_1T: `(1, T)` token ids, as many as the state's block still takes.
        state: of one sequence; it is advanced.

    Returns:
        Of every layer the rows' attention to the block's tokens, `(F, block_size)`, mean over heads; None of layers
        without FAM. What is missing to a row's sum of 1 is its attention to the FAM.
    """
    block_size, fam_length = state.config.block_size, state.config.fam_length
    room = block_size - state.block_fill[0]
    assert ids_1T.shape == (1, room), f"{tuple(ids_1T.shape)} ids, the block takes {room}"
    with _recording(model) as recorder:
        model.read(ids_1T, state)
    return [
        None if layer.fam is None else weights_HRS[:, :fam_length, -block_size:].float().mean(0)
        for layer, weights_HRS in zip(state.layers, recorder.weights, strict=True)
    ]


@torch.no_grad()
def record_attention(
    model: PreTrainedModel,
    input_ids: torch.Tensor | Sequence[int],
    layers: Sequence[int] = (),
    keep_blocks: Sequence[int] | None = None,
) -> Iterator[BlockRecord]:
    """Read a text block after block and yield what every layer did in each.

    Args:
        model: converted.
        input_ids: `(T,)` token ids; a last part that fills no block is left out.
        layers: layers whose weights are kept.
        keep_blocks: blocks whose weights are kept; None is all.

    Yields:
        A record per block and layer.

    Raises:
        TransformerFamError: the text is shorter than a block, there is no such layer, or the family's attention does
            not go through transformers' interface.
    """
    require_recordable(model)
    ids_1T = torch.as_tensor(input_ids).reshape(1, -1).to(model.device)
    config, num_layers = memory_of(model).config, len(memory_of(model).layouts)
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise TransformerFamError(f"there is no layer {layer}, the model has layers 0 to {num_layers - 1}")
    num_blocks = ids_1T.shape[1] // config.block_size
    if num_blocks == 0:
        raise TransformerFamError(
            f"the text has {ids_1T.shape[1]} tokens, required is a whole block of {config.block_size}; give more"
        )
    check_ids(ids_1T, model.get_input_embeddings().weight.shape[0])
    state: FamState = model.init_state(1)
    for block_idx in range(num_blocks):
        before = [None if layer.fam is None else layer.fam.clone() for layer in state.layers]
        ids = ids_1T[:, block_idx * config.block_size : (block_idx + 1) * config.block_size]
        with _recording(model) as recorder:
            model.get_decoder()(input_ids=ids, past_key_values=state)
        keeps = keep_blocks is None or block_idx in keep_blocks
        for layer_idx, (layer, weights_HRS) in enumerate(zip(state.layers, recorder.weights, strict=True)):
            kept = weights_HRS if keeps and layer_idx in layers else None
            yield _record(block_idx, layer_idx, layer, before[layer_idx], weights_HRS, kept)


def _record(
    block_idx: int,
    layer_idx: int,
    layer: FamLayer,
    before_BFD: torch.Tensor | None,
    weights_HRS: torch.Tensor,
    kept_HRS: torch.Tensor | None,
) -> BlockRecord:
    """Sum up one layer's block; keys in sight are those of memory, FAMs and block, in this order."""
    sections = layer.sections
    block_size = sections.num_slots - sections.block
    num_rows, num_seen = weights_HRS.shape[1:]
    num_fam_rows = num_rows - block_size
    num_fam = min(sections.block - sections.older_fams, num_seen - block_size)
    num_memory = num_seen - block_size - num_fam
    of_tokens_S = weights_HRS[:, num_fam_rows:].mean((0, 1))
    norm, change, to_block_of_rows = None, None, ()
    if layer.fam is not None and before_BFD is not None:
        after_FD, before_FD = layer.fam[0].float(), before_BFD[0].float()
        norm = float(after_FD.pow(2).mean(-1).sqrt().mean())
        lengths_F = torch.linalg.vector_norm(before_FD, dim=-1).clamp(min=1e-6)
        of_rows_F = weights_HRS[:, : len(after_FD), num_seen - block_size :].float().sum(-1).mean(0)
        to_block_of_rows = tuple(of_rows_F.tolist())
        change = float((torch.linalg.vector_norm(after_FD - before_FD, dim=-1) / lengths_F).mean())
    to_memory, to_fam, to_block = (
        float(part.sum()) for part in of_tokens_S.split((num_memory, num_fam, block_size), dim=0)
    )
    return BlockRecord(
        block_idx,
        layer_idx,
        kept_HRS,
        num_fam_rows,
        num_memory,
        num_fam,
        to_memory,
        to_fam,
        to_block,
        norm,
        change,
        to_block_of_rows,
    )
