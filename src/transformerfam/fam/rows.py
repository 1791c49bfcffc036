"""The FAM rows of a piece: when there are any, what they enter a layer as, and what they become.

Source: Algorithm 2 of arXiv 2404.09173; B.1 for the first update.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensor

from transformerfam.decoder.half_precision import fitting
from transformerfam.decoder.positions import first_position, row_offsets
from transformerfam.decoder.step import Step
from transformerfam.errors import TransformerFamError
from transformerfam.fam.layer import FamLayer, joined_slots
from transformerfam.fam.masks import Phase
from transformerfam.fam.state import FamState


def bounded(rows_BFD: torch.Tensor, bound: float) -> torch.Tensor:
    """Return FAM rows, those whose root mean square is above `bound` scaled down to it."""
    mean_square = rows_BFD.float().pow(2).mean(-1, keepdim=True).clamp(min=bound**2)
    return rows_BFD * (bound * mean_square.rsqrt()).to(rows_BFD.dtype)


class FamRows(Step):
    """The rows in front of a piece's tokens, which make the FAM's keys, and its update where a block is complete.

    Args:
        state: the state that the piece advances.
        counts: tokens that each sequence adds, at most what its block still takes.
        takes_queries: whether the attention back end takes queries that the state has of the initial FAM.

    Attributes:
        phase: where the sequences are in their blocks.
        num_tokens: most tokens that a sequence adds.
        begins: whether a sequence begins a block.
        completes: per sequence, whether it completes one.
        has_queries: whether the rows' queries are the state's own.
        writes_slots: whether the FAM is written as the keys and values that it is.
        num_rows: rows in front of the tokens; 0 where nothing is made of the FAM.
        updates: whether the rows become the next FAM of a sequence.
        is_first_update: whether it is the first one, one bool or `(B,)`.
    """

    def __init__(self, state: FamState, counts: list[int], takes_queries: bool = False) -> None:
        config = state.config
        for layer in state.layers:
            layer.forget_piece()
        self.state = state
        self.config = config
        self.counts = counts
        self.phase = Phase.of(state, counts)
        self.num_tokens = max(counts)
        fills = state.block_fill
        self.completes = [n + c == config.block_size and c > 0 for n, c in zip(fills, counts, strict=True)]
        self.begins = any(n == 0 and c > 0 for n, c in zip(fills, counts, strict=True))
        self.has_queries = takes_queries and any(layer.query is not None for layer in state.layers)
        num_rows = config.fam_length if self.has_queries else config.num_rows
        self.writes_slots = config.has_slots and self.begins
        makes_keys = self.begins and not config.has_slots
        self.num_rows = num_rows if config.fam_length and (makes_keys or any(self.completes)) else 0
        self.updates = self.num_rows > 0 and any(self.completes)
        firsts = [
            done and n == 0 and not from_saved
            for done, n, from_saved in zip(
                self.completes, state.num_blocks_per_row, state.starts_from_saved_fam, strict=True
            )
        ]
        self.is_first_update = self._flags(firsts)

    def _flags(self, flags: list[bool]) -> bool | torch.Tensor:
        """Return one bool when all sequences agree, else a tensor `(B,)`."""
        return flags[0] if len(set(flags)) == 1 else torch.tensor(flags)

    @property
    def wants_weights(self) -> bool:
        """Whether the rows' attention on the block moves the FAM, or makes its new value."""
        return self.updates and (self.config.fam_update == "gated" or self.config.takes_block)

    def _first_block_key(self, layer: FamLayer) -> int | None:
        """Return the first key of the block among those in sight, where the attention on it is wanted."""
        if not self.wants_weights or layer.fam is None:
            return None
        return layer.sections.block - self.phase.window_of_slots(self.config, layer.plan, layer.sections).start

    def enter_layer(self, layer: FamLayer, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Replace the rows in front of a layer by the residual to which their attention is added.

        Source: Algorithm 2; B.1 for the first update, whose residual is zero.
        """
        if not self.num_rows or layer.fam is None or (self.config.has_slots and not layer.is_lowest):
            return hidden_BTD
        if self.updates and self.config.fam_feeds == "next" and not layer.is_lowest:
            layer.new_value = fitting(hidden_BTD[:, : self.config.fam_length], layer.fam.dtype, copy=True)
        rows = fitting(self._with_key_rows(layer, self._residual(layer)), hidden_BTD.dtype, layer.mean_share)
        if torch.is_grad_enabled():
            return torch.cat((rows, hidden_BTD[:, self.num_rows :]), dim=1)
        hidden_BTD[:, : self.num_rows] = rows  # the layer before has noted what its own rows became
        return hidden_BTD

    def enter_branch(self, layer: FamLayer, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Replace the rows in front of the norm by those that query, where they are not the residual itself.

        Source: Algorithm 2, the input of QKV(norm(F)).
        """
        if not self.num_rows or layer.fam is None or self.config.has_slots:
            return hidden_BTD
        query_rows = self._query_rows(layer)
        if query_rows is self._residual(layer):
            return hidden_BTD
        rows = fitting(self._with_key_rows(layer, query_rows), hidden_BTD.dtype, layer.mean_share)
        return torch.cat((rows, hidden_BTD[:, self.num_rows :]), dim=1)

    def _query_rows(self, layer: FamLayer) -> torch.Tensor:
        """Return the rows `(B, F, D)` that query, or, where their queries are cached, those of the keys."""
        rows = layer.fam if self.has_queries or self.config.fam_query == "previous" else layer.initial_fam
        assert rows is not None
        return rows

    def _residual(self, layer: FamLayer) -> torch.Tensor:
        """Return the rows `(B, F, D)` to which attention is added: those that query where nothing is updated."""
        assert layer.fam is not None
        choice, is_first = self.config.fam_residual, self.is_first_update
        if not self.updates:
            return self._query_rows(layer)
        if choice in ("initial", "below"):  # what is below the lowest layer's
            assert layer.initial_fam is not None
            return layer.initial_fam
        if choice == "none" or (self.config.zero_first_residual and is_first is True):
            return torch.zeros_like(layer.fam)
        if self.config.zero_first_residual and isinstance(is_first, torch.Tensor):
            return layer.fam.masked_fill(is_first.to(layer.fam.device)[:, None, None], 0)
        return layer.fam

    def _with_key_rows(self, layer: FamLayer, rows_BFD: torch.Tensor) -> torch.Tensor:
        """Return the rows with those after them that make the FAM's keys, where the query is another."""
        if self.num_rows == self.config.fam_length:
            return rows_BFD
        assert layer.fam is not None
        return torch.cat((rows_BFD, layer.fam), dim=1)

    def note_weights(self, layer: FamLayer, weights: torch.Tensor | None) -> None:
        """Note the share of the rows' attention that fell on the block, mean over the heads that move together.

        With `fam_value="block"` what the weights make of the block is noted, too.

        Args:
            layer: the layer's part of the state.
            weights: shares `(B, H, F)`, weights over the block's keys `(B, H, F, T)`, or of all rows over all keys in
                sight `(B, H, num_rows + T, S)`.

        Raises:
            TransformerFamError: the back end gives neither.
        """
        first = self._first_block_key(layer)
        if first is None:
            return
        if weights is None:
            raise TransformerFamError(
                "fam_update is 'gated', and this attention back end gives no weights, by which rows move; set "
                "model.set_attn_implementation('fam'), or 'eager' for models with soft caps or sinks"
            )
        if weights.dim() == 4:
            if weights.shape[2] > self.config.fam_length:
                weights = weights[:, :, : self.config.fam_length, first:]
            weights = weights.float()
            if self.config.takes_block:
                layer.new_value = self._mean_of_block(layer, weights)
            weights = weights.sum(-1)
        if self.config.fam_share == "row":
            layer.share = weights.mean(1)
        else:
            layer.share = weights.unflatten(1, (layer.keys.shape[1], -1)).mean(2).mT  # (B, F, G)

    def _mean_of_block(self, layer: FamLayer, weights_BHFT: torch.Tensor) -> torch.Tensor:
        """Return the mean of the block's keys and values, `(B, F, W)`, by the weights of each row and head.

        Keys are turned to where no position is, and their means to where the FAM is, as `FamLayer.slots` has them.
        """
        assert layer.fam is not None
        num_keys, start = weights_BHFT.shape[-1], first_position(self.config)
        block = slice(layer.sections.block, layer.sections.block + num_keys)
        exact = torch.promote_types(layer.fam.dtype, torch.float32)
        key, value = layer.keys[:, :, block].to(exact), layer.values[:, :, block].to(exact)
        key, value = layer.turner.turn(key, value, tuple(range(-start, -start - num_keys, -1)))
        weights_BGFT = weights_BHFT.to(exact).unflatten(1, (key.shape[1], -1)).mean(2)
        weights_BGFT = weights_BGFT / weights_BGFT.sum(-1, keepdim=True).clamp_min(torch.finfo(exact).tiny)
        mean = layer.turner.turn(weights_BGFT @ key, weights_BGFT @ value, row_offsets(self.config))
        return fitting(joined_slots(*mean), layer.fam.dtype)

    def leave_layer(self, layer: FamLayer, hidden_BTD: torch.Tensor) -> None:
        """Note what the FAM rows became; it is the layer's FAM once the whole piece is through.

        Source: Algorithm 2, `F_t = FF(norm(Af)) + Af`.
        """
        if not self.updates or layer.fam is None:
            return
        if self.config.fam_feeds == "same":
            updated = fitting(hidden_BTD[:, : self.config.fam_length], layer.fam.dtype, copy=True)
            if hidden_BTD.dtype != layer.fam.dtype:
                # The part of the residual that the model's type cannot hold is not lost.
                residual = self._residual(layer)
                held = fitting(residual, hidden_BTD.dtype, layer.mean_share)
                updated = updated + (residual - held.to(residual.dtype))
        elif layer.new_value is None:
            return  # the lowest layer's FAM stays
        else:
            updated, layer.new_value = layer.new_value, None
        if self.config.fam_update == "gated":
            updated = self._gated(layer, updated)
        layer.fam_before_bound = updated if torch.is_grad_enabled() else None
        if self.config.fam_norm_bound is not None:
            updated = bounded(updated, self.config.fam_norm_bound)
        done = self._flags(self.completes)
        if isinstance(done, torch.Tensor):
            updated = torch.where(done.to(updated.device)[:, None, None], updated, layer.fam)
        layer.next_fam = updated

    def _gated(self, layer: FamLayer, value_BFD: torch.Tensor) -> torch.Tensor:
        """Move the rows towards their new value by their share above the threshold; the first time all the way."""
        assert layer.share is not None
        is_first = self.is_first_update
        if is_first is True:
            return value_BFD
        assert layer.fam is not None
        share, threshold = layer.share, self.config.fam_share_threshold
        if threshold > 0:
            share = (share - threshold).clamp_min(0) / (1 - threshold)
        share = share[..., None] if share.dim() == 2 else layer.by_head(share)
        moved = torch.lerp(layer.fam, value_BFD, share.to(layer.fam.dtype))
        if is_first is False:
            return moved
        return torch.where(is_first.to(moved.device)[:, None, None], value_BFD, moved)

    def _check_shares(self) -> None:
        """Refuse shares that are not numbers: they would stay in the FAM for good."""
        shares = [layer.share for layer in self.state.layers if layer.share is not None]
        for layer in self.state.layers:
            layer.share = None
        if not shares or isinstance(shares[0], FakeTensor):  # of a plan, which has no values
            return
        if not bool(torch.stack([share.detach() for share in shares]).isfinite().all()):
            raise TransformerFamError(
                "the attention of a FAM row is not a number, so the memory is not updated; look for values out of "
                f"range in the weights or the input, or read in another type than {shares[0].dtype}"
            )

    def _check_fams(self) -> None:
        """Refuse a FAM that is not finite, where it begins; a training step finds it in its loss."""
        written = [(layer_idx, layer.next_fam) for layer_idx, layer in enumerate(self.state.layers)]
        fams = {layer_idx: fam for layer_idx, fam in written if fam is not None}
        if torch.is_grad_enabled() or not fams or isinstance(next(iter(fams.values())), FakeTensor):
            return
        largest = torch.stack([fam.abs().amax().to(self.state.layers[0].keys.device) for fam in fams.values()])
        if bool(largest.isfinite().all()):
            return
        layer_idx = list(fams)[int(largest.isfinite().logical_not().nonzero()[0])]
        raise TransformerFamError(
            f"the FAM of layer {layer_idx} is not finite after block {max(self.state.num_blocks_per_row)}, so the "
            "memory is not updated; look for values out of range in the weights or the input, or read in another type "
            f"than {self.state.layers[layer_idx].keys.dtype}"
        )
