"""Batches on stored filler: all rows packed into one sequence, for which a block of any size costs what it reads.

All rows of such a batch have the same filler, so that a layer holds its keys and values once, and not once per row.
A block is one forward over its *rows*: for every sequence its FAM and the tokens that the batch reads in that block.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from transformerfam.config import FamConfig
from transformerfam.decoder.positions import Turner, fam_offsets, first_position, query_shift
from transformerfam.decoder.step import Step, StepCache, run_decoder
from transformerfam.fam.memory import memory_of
from transformerfam.fam.rows import bounded
from transformerfam.fam.state import FamState
from transformerfam.tasks.batch import Batch
from transformerfam.training.step.blocks import block_spans
from transformerfam.training.step.scores import Scores, StepOutput, score
from transformerfam.training.step.stored_filler import StoredFiller
from transformerfam.training.step.teacher import Teaching


class PackedBlock(Step):
    """One block of all sequences on its way through the layers.

    Args:
        config: the configuration, without memory segments, sinks and further previous FAMs.
        turners: per layer, what turns its keys.
        fams: per layer `(B, F, D)`.
        filler: the filler's places in the block `(P,)`, and per layer its keys and values `(1, G, P, K)`.
        read_places_R: the places of the tokens that are read, the same in all sequences.
        is_first_B: sequences whose first update this is, without residual.
        is_whole: whether the block is complete, so that it updates the FAM.
    """

    def __init__(
        self,
        config: FamConfig,
        turners: Sequence[Turner],
        fams: list[torch.Tensor],
        filler: tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]],
        read_places_R: torch.Tensor,
        is_first_B: torch.Tensor,
        is_whole: bool,
    ) -> None:
        self.config = config
        self.turners = turners
        self.fams = fams
        filler_places_P, self.filler = filler
        self.is_first_B = is_first_B
        self.is_whole = is_whole
        self.next_fams = list(fams)
        batch_size, self.num_reads = len(is_first_B), len(read_places_R)
        start = first_position(config)
        rows = fam_offsets(config) + start + query_shift(config)
        places = torch.cat((rows, (read_places_R + start).to(rows.dtype)))
        places = places.to(torch.float32) if config.fam_position == "fractional" else places.long()
        device = fams[0].device
        self.position_ids = places.repeat(batch_size)[None].to(device)
        self._mask = self._build_mask(batch_size, filler_places_P, read_places_R, fams[0].dtype).to(device)

    def _build_mask(
        self, batch_size: int, filler_places_P: torch.Tensor, read_places_R: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return what every row sees of `[filler | every sequence's FAM and tokens]`, as a bias on its logits."""
        config, length = self.config, self.config.fam_length
        num_rows, shut = length + self.num_reads, torch.finfo(dtype).min
        filler = torch.zeros(num_rows, len(filler_places_P), dtype=dtype)
        own = torch.zeros(num_rows, num_rows, dtype=dtype)
        own[length:, :length] = config.fam_key_bias
        for places, tokens_see in ((filler_places_P, filler[length:]), (read_places_R, own[length:, length:])):
            distance = read_places_R[:, None] - places
            is_seen = (distance >= 0) & (distance < (config.window or config.block_size))
            tokens_see.masked_fill_(~is_seen, shut)
        others = torch.full((batch_size, num_rows, batch_size, num_rows), shut, dtype=dtype)
        each = torch.arange(batch_size)
        others[each, :, each] = own
        return torch.cat((filler.repeat(batch_size, 1), others.flatten(0, 1).flatten(1, 2)), dim=1)[None, None]

    def by_sequence(self, packed: torch.Tensor, dim: int) -> torch.Tensor:
        """Give every sequence its own dimension, in front of its rows."""
        return packed.unflatten(dim, (len(self.is_first_B), -1))

    def enter_layer(self, layer: int, hidden_1ND: torch.Tensor) -> torch.Tensor:
        """Replace the FAM rows by the layer's FAM; zeros in a first update, which has no residual."""
        rows = self.fams[layer]
        if self._has_first_update:
            rows = rows.masked_fill(self.is_first_B[:, None, None].to(rows.device), 0)
        return self._with_rows(hidden_1ND, rows)

    def enter_branch(self, layer: int, hidden_1ND: torch.Tensor) -> torch.Tensor:
        """Put the layer's FAM where attention is made from, if its residual is another."""
        return self._with_rows(hidden_1ND, self.fams[layer]) if self._has_first_update else hidden_1ND

    @property
    def _has_first_update(self) -> bool:
        return self.is_whole and bool(self.is_first_B.any())

    def _with_rows(self, hidden_1ND: torch.Tensor, rows_BFD: torch.Tensor) -> torch.Tensor:
        tokens = self.by_sequence(hidden_1ND, 1)[0, :, self.config.fam_length :]
        return torch.cat((rows_BFD.to(tokens.dtype), tokens), dim=1).flatten(0, 1)[None]

    def sight(self, layer: int) -> None:
        """Return None: sequences are packed side by side here, and only a mask separates them."""

    def mask(self, layer: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return the mask of the block."""
        return self._mask

    def attend(self, layer: int, key_1GNK: torch.Tensor, value_1GNK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the filler in front; FAM keys go back to where the FAM was written."""
        length = self.config.fam_length
        parts = [self.by_sequence(tensor, 2) for tensor in (key_1GNK, value_1GNK)]
        fam_key, fam_value = (part[..., :length, :] for part in parts)
        turned = self.turners[layer].turn(fam_key, fam_value, -query_shift(self.config))
        key, value = (
            torch.cat((rows, part[..., length:, :]), -2).flatten(2, 3) for rows, part in zip(turned, parts, strict=True)
        )
        filler_key, filler_value = self.filler[layer]
        return torch.cat((filler_key, key), dim=2), torch.cat((filler_value, value), dim=2)

    def leave_layer(self, layer: int, hidden_1ND: torch.Tensor) -> None:
        """Note what the FAM rows became."""
        if not self.is_whole:
            return
        updated = self.by_sequence(hidden_1ND, 1)[0, :, : self.config.fam_length].to(self.fams[layer].dtype)
        bound = self.config.fam_norm_bound
        self.next_fams[layer] = updated if bound is None else bounded(updated, bound)


def run_packed_batch(
    model: PreTrainedModel,
    batch: Batch,
    state: FamState,
    stored: StoredFiller,
    *,
    pass_before_question: bool = False,
    teaching: Teaching | None = None,
) -> StepOutput:
    """Read a batch that was written on stored filler; `run_batch` for such batches.

    After the last whole block before the question the FAM is updated by further stored blocks, as many as the
    batch names. The filler has no gradient, and does not see the key in front of it in its block.

    Args:
        model: the converted model.
        batch: what is read and predicted.
        state: where reading starts, at the beginning of a block; it is not changed.
        stored: the filler on which the batch was written.
        pass_before_question: as in `run_batch`.
        teaching: what the teacher had in mind; None without a teacher.
    """
    assert batch.is_read_T is not None
    config, length = model.fam_config, batch.input_ids_BT.shape[1]
    fams: list[torch.Tensor] = [layer.fam for layer in state.layers]
    is_first_B = ~torch.tensor(state.starts_from_saved_fam) & config.zero_first_residual
    scores = Scores.zero(len(batch.keys), model.device)
    passed, num_passed_blocks = (state.fams.detach() if pass_before_question else None), 0
    spans = list(block_spans(length, config.block_size))
    for source, (start, stop) in zip(batch.sources, spans, strict=False):
        is_whole = stop - start == config.block_size
        is_before_question = is_whole and stop <= batch.question_start
        columns = start + batch.is_read_T[start:stop].nonzero()[:, 0]
        asks_teacher = teaching is not None and teaching.is_about(columns)
        filler = stored.without(source, stop - start, columns - start)
        block = PackedBlock(config, _turners(model), fams, filler, columns - start, is_first_B, is_whole)
        fams, output = _run_block(model, block, batch.input_ids_BT[:, columns], asks_teacher)
        scores = scores + score(model, batch, columns, output[-1], output if asks_teacher else None, teaching)
        is_first_B = is_first_B & (not is_whole)
        if is_before_question and stop + config.block_size > batch.question_start:
            fams = update_by_stored(model, fams, stored, batch.sources[len(spans) :])
        if is_before_question if pass_before_question else is_whole:
            passed = torch.stack(fams).detach()
            num_passed_blocks += 1
    return scores.output(batch, teaching, passed, num_passed_blocks)


def update_by_stored(
    model: PreTrainedModel, fams: list[torch.Tensor], stored: StoredFiller, sources: Sequence[int]
) -> list[torch.Tensor]:
    """Let FAMs that are not initial ones compress stored blocks.

    Args:
        model: the converted model.
        fams: per layer `(B, F, D)`.
        stored: the filler.
        sources: the stored blocks, in their order, the same for all sequences.

    Returns:
        Every layer's FAM after them.
    """
    none = torch.zeros(0, dtype=torch.long)
    has_residual_B = torch.zeros(len(fams[0]), dtype=torch.bool)
    for source in sources:
        filler = stored.without(source, model.fam_config.block_size, none)
        block = PackedBlock(model.fam_config, _turners(model), fams, filler, none, has_residual_B, is_whole=True)
        fams, _ = _run_block(model, block, none.expand(len(fams[0]), 0), asks_teacher=False)
    return fams


def _turners(model: PreTrainedModel) -> list[Turner]:
    return [layout.turner for layout in memory_of(model).layouts]


def _run_block(
    model: PreTrainedModel, block: PackedBlock, ids_BR: torch.Tensor, asks_teacher: bool
) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Send a block through the layers.

    Returns:
        Every layer's FAM after it, and the tokens' hidden states `(B, R, D)`: the last, or with a teacher those of the
        embedding and of every layer.
    """
    decoder = model.get_decoder()
    tokens_BRD = decoder.get_input_embeddings()(ids_BR.to(model.device))
    length = block.config.fam_length
    rows_BND = nn.functional.pad(tokens_BRD, (0, 0, length, 0))
    output = run_decoder(
        decoder,
        rows_BND.flatten(0, 1)[None],
        block.position_ids,
        StepCache(range(len(block.fams)), block),
        output_hidden_states=asks_teacher,
    )
    hidden_states = output.hidden_states if asks_teacher else (output.last_hidden_state,)
    return block.next_fams, tuple(block.by_sequence(hidden, 1)[0, :, length:] for hidden in hidden_states)
