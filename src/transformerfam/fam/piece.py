"""Attention over [sinks | memory segments | FAMs | this block]: positions, and what a piece sees and writes.

A *piece* is a run of tokens of one block. Its rows are

    [FAM rows, if the piece begins or completes a block | tokens]

Source: sections 2.1, 2.2 and B.2.1, Algorithms 1 and 2 of arXiv 2404.09173.
"""

import dataclasses

import torch

from transformerfam.decoder.half_precision import fitting
from transformerfam.decoder.kernels import Sight
from transformerfam.decoder.positions import fam_offsets, first_position, query_shift
from transformerfam.fam.layer import FamLayer, joined_slots
from transformerfam.fam.masks import piece_mask
from transformerfam.fam.rows import FamRows
from transformerfam.fam.state import FamState


class Piece(FamRows):
    """One piece on its way through the layers: what it sees, what it writes, and how it moves the state on.

    Args:
        state: the state that it advances.
        counts: tokens that each sequence adds, at most what its block still takes.
        takes_queries: whether the attention back end takes queries that the state has of the initial FAM.
    """

    def __init__(self, state: FamState, counts: list[int], takes_queries: bool = False) -> None:
        super().__init__(state, counts, takes_queries)
        self._masks: dict[int, torch.Tensor] = {}  # by the kind of layer
        self._sights: dict[int, Sight | None] = {}
        self._token_places: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

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
            before = torch.tensor([self.state.position_offset + n * config.block_size for n in blocks])[:, None]
            rows = (start - before).expand(-1, self.num_rows)
        else:
            written = fam_offsets(config) + start
            query = written + self.query_shift
            rows = (query if self.num_rows == len(query) else torch.cat((query, written)))[None]
            rows = rows.to(torch.float32) if config.fam_position == "fractional" else rows.long()
        batch = max(len(rows), len(tokens))
        return torch.cat((rows.expand(batch, -1), tokens.to(rows.dtype).expand(batch, -1)), dim=1).to(device)

    @property
    def query_shift(self) -> int:
        """Positions from where the FAM was written to where its query is."""
        return query_shift(self.config)

    def mask(self, layer: FamLayer, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return the mask of a layer; see `piece_mask`."""
        if layer.kind not in self._masks:
            self._masks[layer.kind] = piece_mask(self.config, layer.plan, self.num_rows, self.phase, dtype, device)
        return self._masks[layer.kind]

    def sight(self, layer: FamLayer) -> Sight | None:
        """Return what the rows see, for the back end that needs no mask; None where a mask is needed.

        A mask is needed when sequences are at different places, when the window of a layer with FAM or sinks ends
        within what it keeps, when the FAM keys have a bias or are not seen, and when a slot in sight is still empty.
        """
        if layer.kind not in self._sights:
            self._sights[layer.kind] = self._sight(layer)
        sight, query = self._sights[layer.kind], self._query(layer)
        return sight if sight is None or query is None else dataclasses.replace(sight, query=query)

    def _sight(self, layer: FamLayer) -> Sight | None:
        config, phase, plan, sections = self.config, self.phase, layer.plan, layer.sections
        if not phase.is_uniform or (plan.has_fam and (config.fam_key_bias != 0 or phase.is_empty[0])):
            return None
        num_tokens = phase.num_memory_tokens(config, plan)[0] + phase.fills[0] + phase.counts[0]
        cuts = plan.window is not None and plan.window < num_tokens
        if cuts and (plan.has_fam or plan.num_sink_tokens):
            return None  # FAM and sinks stay in sight beyond the window
        seen = phase.window_of_slots(config, plan, sections)
        num_filled = num_tokens + phase.has_sinks(config, plan)[0] * plan.num_sink_tokens
        num_filled += plan.has_fam * (phase.num_older_fams(config)[0] + 1) * config.fam_length
        if num_filled != seen.stop - seen.start:
            return None
        sight = Sight(self.num_rows, sections.fam - seen.start, plan.window if cuts else None)
        first = self._first_block_key(layer)
        return dataclasses.replace(sight, first_block_key=first, wants_every_weight=config.takes_block)

    def _query(self, layer: FamLayer) -> torch.Tensor | None:
        """Return what queries in place of the rows' own queries, where the block is compressed."""
        return layer.query if self.has_queries and self.updates else None

    def masked_sight(self, layer: FamLayer, mask: torch.Tensor) -> Sight | torch.Tensor:
        """Return what a back end that knows `Sight` gets where a mask is needed."""
        first, query = self._first_block_key(layer), self._query(layer)
        if first is None and query is None:
            return mask
        num_seen = 0 if first is None else first - self.config.fam_length
        every = self.config.takes_block
        return Sight(self.num_rows, num_seen, first_block_key=first, mask=mask, query=query, wants_every_weight=every)

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
            # The rows are where the update will be.
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
            # FAM and tokens are next to each other, and out of place one write is cheaper than two.
            both = torch.cat((fam_key, key_BGTK), dim=2), torch.cat((fam_value, value_BGTK), dim=2)
            layer.put(layer.sections.fam, *both)
        else:
            layer.put(layer.sections.fam, fam_key, fam_value)
            self._put_tokens(layer, key_BGTK, value_BGTK)

    def _put_tokens(self, layer: FamLayer, key_BGTK: torch.Tensor, value_BGTK: torch.Tensor) -> None:
        """Write the tokens' keys and values after those of the block so far."""
        sections = layer.sections
        if self.phase.is_uniform:
            layer.put(sections.block + self.phase.fills[0], key_BGTK, value_BGTK)
            return
        if not torch.is_grad_enabled():  # written in place, so that the rest of the block is not copied
            rows, columns, slots = self._places(key_BGTK.device)
            for buffer, new in ((layer.keys, key_BGTK), (layer.values, value_BGTK)):
                buffer[rows, :, sections.block + slots] = new[rows, :, columns].to(buffer.dtype)
            return
        old = slice(sections.block, sections.num_slots)
        key = self._spread(key_BGTK, layer.keys[:, :, old])
        layer.put(sections.block, key, self._spread(value_BGTK, layer.values[:, :, old]))

    def _places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the sequence of every token of the piece, its column there, and its place in the block."""
        if self._token_places is None:
            spans = list(zip(self.phase.fills, self.phase.counts, strict=True))
            rows = torch.tensor([row for row, (_, count) in enumerate(spans) for _ in range(count)])
            columns = torch.cat([torch.arange(count) for _, count in spans])
            fills = torch.tensor(self.phase.fills)[rows]
            self._token_places = rows.to(device), columns.to(device), (fills + columns).to(device)
        rows, columns, slots = self._token_places
        return rows.to(device), columns.to(device), slots.to(device)

    def _spread(self, new_BGTK: torch.Tensor, old_BGTK: torch.Tensor) -> torch.Tensor:
        """Put each sequence's tokens at its own place in the block."""
        fills = torch.tensor(self.phase.fills, device=new_BGTK.device)[:, None]
        counts = torch.tensor(self.phase.counts, device=new_BGTK.device)[:, None]
        source = torch.arange(self.config.block_size, device=new_BGTK.device)[None] - fills
        is_new = ((source >= 0) & (source < counts))[:, None, :, None]
        source = source.clamp(0, new_BGTK.shape[2] - 1)[:, None, :, None]
        spread = new_BGTK.take_along_dim(source, dim=2)
        return torch.where(is_new, spread.to(old_BGTK.dtype), old_BGTK)

    def advance(self, hidden_BTD: torch.Tensor) -> None:
        """Move the state on: count the tokens, and make complete blocks memory segments and FAMs the past.

        Args:
            hidden_BTD: all rows after the last norm, of which nothing is kept.

        Raises:
            TransformerFamError: a share of attention, or a number of the FAM, is not finite; the state stays as
                it was before the piece.
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

    def _roll(self, layer: FamLayer, done: bool | torch.Tensor) -> None:
        """Shift the memory segments and older FAMs of a layer by one block, turned back by `block_size`."""
        config, sections = self.config, layer.sections
        size, sinks = config.block_size, layer.plan.num_sink_tokens
        moves: list[tuple[slice, slice, int, bool | torch.Tensor]] = []  # source, target, distance, sequences
        if sinks and 0 in self.state.num_blocks_per_row:
            first = [d and n == 0 for d, n in zip(self.completes, self.state.num_blocks_per_row, strict=True)]
            distance = -sections.older_fams  # to just before the memory segments
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
