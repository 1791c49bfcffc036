"""Attention over [sinks | memory segments | FAMs | this block]: positions, and what a piece sees and writes.

A *piece* is a run of tokens of one block. Its rows are

    [FAM rows, if the piece begins or completes a block | tokens]

Source: sections 2.1, 2.2 and B.2.1, Algorithms 1 and 2 of arXiv 2404.09173.
"""

import dataclasses

import torch
from torch._subclasses.fake_tensor import FakeTensor

from transformerfam.decoder.half_precision import fitting
from transformerfam.decoder.kernels import Sight
from transformerfam.decoder.positions import fam_offsets, first_position, query_shift, row_offsets
from transformerfam.decoder.step import Step
from transformerfam.errors import TransformerFamError
from transformerfam.fam.layer import FamLayer, joined_slots
from transformerfam.fam.masks import Phase, piece_mask
from transformerfam.fam.state import FamState


def bounded(rows_BFD: torch.Tensor, bound: float) -> torch.Tensor:
    """Return FAM rows, those whose root mean square is above `bound` scaled down to it."""
    mean_square = rows_BFD.float().pow(2).mean(-1, keepdim=True).clamp(min=bound**2)
    return rows_BFD * (bound * mean_square.rsqrt()).to(rows_BFD.dtype)


class Piece(Step):
    """One piece on its way through the layers: what it sees, what it writes, and how it moves the state on.

    Args:
        state: the state that it advances.
        counts: tokens that each sequence adds, at most what its block still takes.
        takes_queries: whether the attention back end takes queries that the state has of the initial FAM.
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
        self._masks: dict[int, torch.Tensor] = {}  # by the kind of layer
        self._sights: dict[int, Sight | None] = {}
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

    def position_ids(self, device: torch.device) -> torch.Tensor:
        """Return the positions of FAM rows and tokens, `(1 or B, num_rows + T)`; fractional ones are floats."""
        config, start = self.config, first_position(self.config)
        tokens = torch.tensor(self.phase.fills)[:, None] + torch.arange(self.num_tokens) + start
        if not self.num_rows:
            return tokens.to(device)
        if config.fam_position == "zero":  # absolute, so it moves away from the block with every block
            blocks = (
                self.state.num_blocks_per_row
                if len(set(self.state.num_blocks_per_row)) > 1
                else [self.state.num_blocks_per_row[0]]
            )
            behind = torch.tensor([self.state.position_offset + n * config.block_size for n in blocks])[:, None]
            rows = (start - behind).expand(-1, self.num_rows)
        else:
            written = fam_offsets(config) + start
            query = written + self.query_shift
            rows = (query if self.num_rows == len(query) else torch.cat((query, written)))[None]
            rows = rows.to(torch.float32) if config.fam_position == "fractional" else rows.long()
        batch = max(len(rows), len(tokens))
        return torch.cat((rows.expand(batch, -1), tokens.to(rows.dtype).expand(batch, -1)), dim=1).to(device)

    @property
    def query_shift(self) -> int:
        """Positions from where the FAM was written to where its query stands."""
        return query_shift(self.config)

    def mask(self, layer: FamLayer, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return the mask of a layer; see `piece_mask`."""
        if layer.kind not in self._masks:
            self._masks[layer.kind] = piece_mask(self.config, layer.plan, self.num_rows, self.phase, dtype, device)
        return self._masks[layer.kind]

    def sight(self, layer: FamLayer) -> Sight | None:
        """Return what the rows see, for the back end that needs no mask; None where a mask is needed.

        It is when sequences stand at different places, when the window of a layer with FAM or sinks ends within what
        it keeps, when the FAM keys have a bias, and when a slot in sight is still empty.
        """
        if layer.kind not in self._sights:
            self._sights[layer.kind] = self._sight(layer)
        sight, query = self._sights[layer.kind], self._query(layer)
        return sight if sight is None or query is None else dataclasses.replace(sight, query=query)

    def _sight(self, layer: FamLayer) -> Sight | None:
        config, phase, plan, sections = self.config, self.phase, layer.plan, layer.sections
        if not phase.is_uniform or (plan.has_fam and config.fam_key_bias != 0):
            return None
        num_tokens = phase.num_memory_tokens(config, plan)[0] + phase.fills[0] + phase.counts[0]
        cuts = plan.window is not None and plan.window < num_tokens
        if cuts and (plan.has_fam or plan.num_sink_tokens):
            return None  # FAM and sinks stay in sight behind the window
        seen = phase.window_of_slots(config, plan, sections)
        num_filled = num_tokens + phase.has_sinks(config, plan)[0] * plan.num_sink_tokens
        num_filled += plan.has_fam * (phase.num_older_fams(config)[0] + 1) * config.fam_length
        if num_filled != seen.stop - seen.start:
            return None
        sight = Sight(self.num_rows, sections.fam - seen.start, plan.window if cuts else None)
        first = self._first_block_key(layer)
        return dataclasses.replace(sight, first_block_key=first, wants_every_weight=config.takes_block)

    def _query(self, layer: FamLayer) -> torch.Tensor | None:
        """Return what asks in the place of the rows' own queries, where the block is compressed."""
        return layer.query if self.has_queries and self.updates else None

    def _first_block_key(self, layer: FamLayer) -> int | None:
        """Return the first key of the block among those in sight, where the attention on it is wanted."""
        if not self.wants_weights or layer.fam is None:
            return None
        return layer.sections.block - self.phase.window_of_slots(self.config, layer.plan, layer.sections).start

    def masked_sight(self, layer: FamLayer, mask: torch.Tensor) -> Sight | torch.Tensor:
        """Return what a back end that knows `Sight` gets where a mask is needed."""
        first, query = self._first_block_key(layer), self._query(layer)
        if first is None and query is None:
            return mask
        num_seen = 0 if first is None else first - self.config.fam_length
        every = self.config.takes_block
        return Sight(self.num_rows, num_seen, first_block_key=first, mask=mask, query=query, wants_every_weight=every)

    @property
    def wants_weights(self) -> bool:
        """Whether the rows' attention on the block moves the FAM, or makes its new value."""
        return self.updates and (self.config.fam_update == "gated" or self.config.takes_block)

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
        """Replace the rows in front of the norm by those that ask, where they are not the residual itself.

        Source: Algorithm 2, the input of QKV(norm(F)).
        """
        if not self.num_rows or layer.fam is None or self.config.has_slots:
            return hidden_BTD
        asking = self._asking(layer)
        if asking is self._residual(layer):
            return hidden_BTD
        rows = fitting(self._with_key_rows(layer, asking), hidden_BTD.dtype, layer.mean_share)
        return torch.cat((rows, hidden_BTD[:, self.num_rows :]), dim=1)

    def _asking(self, layer: FamLayer) -> torch.Tensor:
        """Return the rows `(B, F, D)` that ask, or, where their queries are cached, those of the keys."""
        rows = layer.fam if self.has_queries or self.config.fam_query == "previous" else layer.initial_fam
        assert rows is not None
        return rows

    def _residual(self, layer: FamLayer) -> torch.Tensor:
        """Return the rows `(B, F, D)` to which attention is added: those that ask where nothing is updated."""
        assert layer.fam is not None
        choice, is_first = self.config.fam_residual, self.is_first_update
        if not self.updates:
            return self._asking(layer)
        if choice in ("initial", "below"):  # what is below the lowest layer's
            assert layer.initial_fam is not None
            return layer.initial_fam
        if choice == "none" or (self.config.zero_first_residual and is_first is True):
            return torch.zeros_like(layer.fam)
        if self.config.zero_first_residual and isinstance(is_first, torch.Tensor):
            return layer.fam.masked_fill(is_first.to(layer.fam.device)[:, None, None], 0)
        return layer.fam

    def _with_key_rows(self, layer: FamLayer, rows_BFD: torch.Tensor) -> torch.Tensor:
        """Return the rows with those behind them that make the FAM's keys, where the query is another."""
        if self.num_rows == self.config.fam_length:
            return rows_BFD
        assert layer.fam is not None
        return torch.cat((rows_BFD, layer.fam), dim=1)

    def attend(
        self, layer: FamLayer, key_BGTK: torch.Tensor, value_BGTK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values of FAM rows and tokens, and return all slots in sight.

        Source: Algorithm 2, K^ and V^; both rows and tokens read them through their own mask.
        """
        sections = layer.sections
        key, value = key_BGTK[:, :, self.num_rows :], value_BGTK[:, :, self.num_rows :]
        fam = self._fam_keys(layer, key_BGTK, value_BGTK)
        if fam is None:
            self._put_tokens(layer, key, value)
        else:
            self._put_fam_and_tokens(layer, *fam, key, value)
        seen = self.phase.window_of_slots(self.config, layer.plan, sections)
        # Under autocast queries have another type than what is kept.
        return layer.keys[:, :, seen].to(key_BGTK.dtype), layer.values[:, :, seen].to(value_BGTK.dtype)

    def _fam_keys(
        self, layer: FamLayer, key_BGTK: torch.Tensor, value_BGTK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the FAM's keys and values to write, None where none are; note what rows would make of slots."""
        config = self.config
        if layer.fam is None:
            return None
        if not config.has_slots:
            if not self.num_rows:
                return None
            rows = slice(self.num_rows - config.fam_length, self.num_rows)
            fam_key, fam_value = key_BGTK[:, :, rows], value_BGTK[:, :, rows]
            if self.num_rows > config.fam_length:
                return fam_key, fam_value
            # The rows stand where the update will stand.
            return layer.turner.turn(fam_key, fam_value, -self.query_shift)
        if self.updates and not config.takes_block:
            rows = slice(0, config.fam_length)
            distance = -self.query_shift - first_position(config)
            exact = torch.promote_types(layer.fam.dtype, key_BGTK.dtype)
            made_key, made_value = (part[:, :, rows].to(exact) for part in (key_BGTK, value_BGTK))
            made = joined_slots(*layer.turner.turn(made_key, made_value, distance))
            layer.new_value = fitting(made, layer.fam.dtype)
        if not self.writes_slots:
            return None
        fam_key, fam_value = layer.turner.turn(*layer.slots(), first_position(config))
        return fam_key.to(key_BGTK.dtype), fam_value.to(value_BGTK.dtype)

    def _put_fam_and_tokens(
        self,
        layer: FamLayer,
        fam_key: torch.Tensor,
        fam_value: torch.Tensor,
        key_BGTK: torch.Tensor,
        value_BGTK: torch.Tensor,
    ) -> None:
        """Write the FAM's keys and values and the tokens'."""
        if torch.is_grad_enabled() and self.phase.is_uniform and self.phase.fills[0] == 0:
            # FAM and tokens stand side by side, and out of place one write is cheaper than two.
            both = torch.cat((fam_key, key_BGTK), dim=2), torch.cat((fam_value, value_BGTK), dim=2)
            layer.put(layer.sections.fam, *both)
        else:
            layer.put(layer.sections.fam, fam_key, fam_value)
            self._put_tokens(layer, key_BGTK, value_BGTK)

    def _put_tokens(self, layer: FamLayer, key_BGTK: torch.Tensor, value_BGTK: torch.Tensor) -> None:
        """Write the tokens' keys and values behind those of the block so far."""
        sections = layer.sections
        if self.phase.is_uniform:
            layer.put(sections.block + self.phase.fills[0], key_BGTK, value_BGTK)
            return
        old = slice(sections.block, sections.num_slots)
        key = self._spread(key_BGTK, layer.keys[:, :, old])
        layer.put(sections.block, key, self._spread(value_BGTK, layer.values[:, :, old]))

    def _spread(self, new_BGTK: torch.Tensor, old_BGTK: torch.Tensor) -> torch.Tensor:
        """Put each sequence's tokens at its own place in the block."""
        fills = torch.tensor(self.phase.fills, device=new_BGTK.device)[:, None]
        counts = torch.tensor(self.phase.counts, device=new_BGTK.device)[:, None]
        source = torch.arange(self.config.block_size, device=new_BGTK.device)[None] - fills
        is_new = ((source >= 0) & (source < counts))[:, None, :, None]
        source = source.clamp(0, new_BGTK.shape[2] - 1)[:, None, :, None]
        spread = new_BGTK.take_along_dim(source, dim=2)
        return torch.where(is_new, spread.to(old_BGTK.dtype), old_BGTK)

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

        Keys are turned to where no position is, and their means to where the FAM stands, as `FamLayer.slots` has them.
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

    def advance(self, hidden_BTD: torch.Tensor) -> None:
        """Move the state on: count the tokens, and make complete blocks memory segments and FAMs the past.

        Args:
            hidden_BTD: all rows behind the last norm, of which nothing is kept.

        Raises:
            TransformerFamError: a share of attention, or a number of the FAM, is not finite; the state stays in front
                of the piece.
        """
        state = self.state
        self._check_shares()
        self._check_fams()
        done = self._flags(self.completes)
        for layer in state.layers:
            layer.keep_fam()
            if done is not False:
                self._roll(layer, done)
        for row, (count, completes) in enumerate(zip(self.counts, self.completes, strict=True)):
            state.block_fill[row] = 0 if completes else state.block_fill[row] + count
            state.num_blocks_per_row[row] += completes

    def _check_shares(self) -> None:
        """Refuse shares that are no numbers: they would be in the FAM for good."""
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

    def _roll(self, layer: FamLayer, done: bool | torch.Tensor) -> None:
        """Shift the memory segments and older FAMs of a layer by one block, turned back by `block_size`."""
        config, sections = self.config, layer.sections
        size, sinks = config.block_size, layer.plan.num_sink_tokens
        moves: list[tuple[slice, slice, int, bool | torch.Tensor]] = []  # source, target, distance, sequences
        if sinks and 0 in self.state.num_blocks_per_row:
            first = [d and n == 0 for d, n in zip(self.completes, self.state.num_blocks_per_row, strict=True)]
            distance = -sections.older_fams  # to just in front of the memory segments
            moves.append((slice(sections.block, sections.block + sinks), slice(0, sinks), distance, self._flags(first)))
        kept = min(size, layer.plan.num_memory_tokens)  # of this block
        parts = [(sections.older_fams - sections.memory, sections.memory, kept, sections.num_slots - kept)]
        parts.append((sections.fam - sections.older_fams, sections.older_fams, config.fam_length, sections.fam))
        for length, start, step, newest in parts:
            if length:
                # Segments and FAMs shift to the left; the newest come in from their own section.
                moves.append((slice(start + step, start + length), slice(start, start + length - step), -size, done))
                moves.append((slice(newest, newest + step), slice(start + length - step, start + length), -size, done))
        detach = config.stop_gradient
        for source, target, distance, rows in moves:
            if rows is False or target.stop == target.start:
                continue
            old_key, old_value = layer.keys[:, :, source], layer.values[:, :, source]
            key, value = layer.turner.turn(old_key, old_value, distance)
            # Source and target overlap, and what carries no position is not new.
            key = key.clone() if key is old_key else key
            value = value.clone() if value is old_value else value
            if detach and target.start < sections.older_fams:
                key, value = key.detach(), value.detach()
            if isinstance(rows, torch.Tensor):
                chosen = rows.to(key.device)[:, None, None, None]
                key = torch.where(chosen, key, layer.keys[:, :, target])
                value = torch.where(chosen, value, layer.values[:, :, target])
            layer.put(target.start, key, value)
