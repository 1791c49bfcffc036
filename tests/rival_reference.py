"""The rivals' equations as plain loops over one sequence, written from their papers and not from `rivals`.

A segment is a list of rows; every row has a list of the rows that it sees. Vectors are taken one at a time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transformerfam.reference.layer import (
    LayerWeights,
    ReferenceWeights,
    attend,
    feed_forward,
    make_keys,
    make_queries,
    norm,
)


class PlainSystem:
    """Full attention within a segment, and nothing that outlives it; the rivals change what they change.

    Args:
        weights: of the model.
        parameters: the rival's own, by name.
        config: the rival's.
    """

    def __init__(self, weights: ReferenceWeights, parameters: dict[str, Tensor], config: Any) -> None:
        self.weights, self.parameters, self.config = weights, parameters, config

    def front(self) -> list[Tensor]:
        return []

    def behind(self) -> list[Tensor]:
        return []

    def sees(self, row: int, num_front: int, num_tokens: int, num_behind: int) -> list[int]:
        return list(range(row + 1))

    def enter(self, layer_idx: int, rows: list[Tensor]) -> list[Tensor]:
        return rows

    def read(self, layer_idx: int, row: int, query_HK: Tensor, attended: Tensor) -> Tensor:
        return attended

    def add(self, layer_idx: int, row_D: Tensor) -> Tensor | float:
        return 0.0

    def leave(self, layer_idx: int, rows: list[Tensor], keys: list[Any], place: slice) -> None:
        pass

    def end(self, top: list[Tensor], place: slice) -> None:
        pass

    def logits(self, ids: Tensor) -> Tensor:
        """Return the next-token logits `(T, V)` of a sequence."""
        hidden: list[Tensor] = []
        for part in ids.split(self.config.block_size):
            hidden += self.segment(part)
        return torch.stack(hidden) @ self.weights.output_embedding_VD.T

    def segment(self, ids: Tensor) -> list[Tensor]:
        is_whole = len(ids) == self.config.block_size
        front, behind = self.front(), self.behind() if is_whole else []
        rows = front + list(self.weights.embedding_VD[ids]) + behind
        place = slice(len(front), len(front) + len(ids))
        self.is_whole = is_whole
        for layer_idx, layer in enumerate(self.weights.layers):
            rows = self.layer(layer_idx, layer, rows, place, len(behind))
        top = list(norm(self.weights, torch.stack(rows), self.weights.final_norm_D))
        if is_whole:
            self.end(top, place)
        return top[place]

    def layer(
        self, layer_idx: int, layer: LayerWeights, rows: list[Tensor], place: slice, num_behind: int
    ) -> list[Tensor]:
        rows = self.enter(layer_idx, rows)
        positions = [float(i) for i in range(len(rows))]
        keys = make_keys(self.weights, layer, torch.stack(rows), positions)
        queries = make_queries(self.weights, layer, torch.stack(rows))
        self.keys, self.rows, self.place = keys, rows, place
        outputs = []
        for i, row in enumerate(rows):
            seen = [keys[j] for j in self.sees(i, place.start, place.stop - place.start, num_behind)]
            attended = attend(self.weights, queries[i], positions[i], seen)
            attended = self.read(layer_idx, i, queries[i], attended)
            summed = layer.output_DxHK @ attended + self.add(layer_idx, row) + row
            outputs.append(summed + feed_forward(self.weights, layer, summed[None])[0])
        self.leave(layer_idx, outputs, keys, place)
        return outputs


class PlainFull(PlainSystem):
    """One segment."""

    def logits(self, ids: Tensor) -> Tensor:
        return torch.stack(self.segment(ids)) @ self.weights.output_embedding_VD.T


class PlainRmt(PlainSystem):
    """[read | tokens | write], both groups seeing themselves; the write tokens' top is the next memory."""

    def front(self) -> list[Tensor]:
        self.memory = getattr(self, "memory", list(self.parameters["memory"]))
        return self.memory

    def behind(self) -> list[Tensor]:
        return self.memory

    def sees(self, row: int, num_front: int, num_tokens: int, num_behind: int) -> list[int]:
        if row < num_front:
            return list(range(num_front))
        if row >= num_front + num_tokens:
            return list(range(num_front + num_tokens + num_behind))
        return list(range(row + 1))

    def end(self, top: list[Tensor], place: slice) -> None:
        self.memory = top[place.stop :]


class PlainAutoCompressor(PlainSystem):
    """[summaries of all segments | tokens | summary tokens], all causal."""

    def front(self) -> list[Tensor]:
        self.summaries: list[Tensor] = getattr(self, "summaries", [])
        return self.summaries

    def behind(self) -> list[Tensor]:
        return list(self.parameters["summary"])

    def end(self, top: list[Tensor], place: slice) -> None:
        self.summaries = self.summaries + top[place.stop :]


class PlainFeedbackSegment(PlainSystem):
    """Keys and values of a layer's own outputs of the last m segments, in front of the segment."""

    def layer(
        self, layer_idx: int, layer: LayerWeights, rows: list[Tensor], place: slice, num_behind: int
    ) -> list[Tensor]:
        past = getattr(self, "past", {}).get(layer_idx, [])
        past = past[-self.config.num_memory_segments :]
        seen_before = [row for segment in past for row in segment]
        positions = [float(len(seen_before) + i) for i in range(len(rows))]
        keys = make_keys(self.weights, layer, torch.stack(rows), positions)
        if seen_before:
            old = make_keys(self.weights, layer, torch.stack(seen_before), [float(i) for i in range(len(seen_before))])
            keys = old + keys
        queries = make_queries(self.weights, layer, torch.stack(rows))
        outputs = []
        for i, row in enumerate(rows):
            attended = attend(self.weights, queries[i], positions[i], keys[: len(seen_before) + i + 1])
            summed = layer.output_DxHK @ attended + row
            outputs.append(summed + feed_forward(self.weights, layer, summed[None])[0])
        if self.is_whole:
            self.past = getattr(self, "past", {})
            self.past[layer_idx] = [*self.past.get(layer_idx, []), outputs]
        return outputs


class PlainInfini(PlainSystem):
    """A_mem = s(q) M / s(q) z, mixed by a gate; M and z written after the segment, with the delta rule or without."""

    def read(self, layer_idx: int, row: int, query_HK: Tensor, attended: Tensor) -> Tensor:
        memories = getattr(self, "memories", {}).get(layer_idx)
        per_group = self.weights.num_attention_heads // self.weights.num_key_value_heads
        outputs = []
        for head, local in enumerate(attended.view(self.weights.num_attention_heads, -1)):
            gate = torch.sigmoid(self.parameters["gates"][layer_idx, head])
            found = torch.zeros_like(local)
            if memories is not None:
                matrix, sums = memories[head // per_group]
                feature = torch.nn.functional.elu(query_HK[head]) + 1
                found = (feature @ matrix) / (feature @ sums)
            outputs.append(gate * found + (1 - gate) * local)
        return torch.cat(outputs)

    def leave(self, layer_idx: int, rows: list[Tensor], keys: list[Any], place: slice) -> None:
        if not self.is_whole:
            return
        self.memories: dict[int, Any] = getattr(self, "memories", {})
        old, new = self.memories.get(layer_idx), []
        for group in range(self.weights.num_key_value_heads):
            width = self.weights.head_dim
            matrix, sums = (torch.zeros(width, width), torch.zeros(width)) if old is None else old[group]
            next_matrix, next_sums = matrix, sums
            for key in keys[place]:
                feature = torch.nn.functional.elu(key.key_GK[group]) + 1
                value = key.value_GK[group]
                if self.config.use_delta_rule and old is not None:
                    value = value - (feature @ matrix) / (feature @ sums)
                next_matrix = next_matrix + torch.outer(feature, value)
                next_sums = next_sums + feature
            new.append((next_matrix, next_sums))
        self.memories[layer_idx] = new


class PlainGatedLinear(PlainSystem):
    """S = diag(a) S + k v^T token by token; the read state over its root mean square, mixed by a gate."""

    def read(self, layer_idx: int, row: int, query_HK: Tensor, attended: Tensor) -> Tensor:
        self.states: dict[tuple[int, int], Tensor] = getattr(self, "states", {})
        width, groups = self.weights.head_dim, self.weights.num_key_value_heads
        entered = self.rows[row] / self.rows[row].pow(2).mean().add(torch.finfo(torch.float32).eps).sqrt()
        down, up = self.parameters[f"down.{layer_idx}.weight"], self.parameters[f"up.{layer_idx}.weight"]
        decay_GK = torch.sigmoid(up @ (down @ entered) + self.parameters[f"bias.{layer_idx}"]).view(groups, width)
        decay_GK = decay_GK ** (1 / self.config.decay_temperature)
        key = self.keys[row]
        for group in range(groups):
            state = self.states.get((layer_idx, group), torch.zeros(width, width))
            state = decay_GK[group][:, None] * state + torch.outer(key.key_GK[group], key.value_GK[group])
            self.states[layer_idx, group] = state
        outputs = []
        for head, local in enumerate(attended.view(self.weights.num_attention_heads, -1)):
            state = self.states[layer_idx, head // (self.weights.num_attention_heads // groups)]
            found = query_HK[head] @ state / width**0.5
            found = found / found.pow(2).mean().add(1e-5).sqrt()
            gate = torch.sigmoid(self.parameters["gates"][layer_idx, head])
            outputs.append(gate * found + (1 - gate) * local)
        return torch.cat(outputs)


class PlainArmt(PlainRmt):
    """x + A f(q) / z f(q) in front of every layer; A and z written by the memory tokens after it."""

    def front(self) -> list[Tensor]:
        return []

    def behind(self) -> list[Tensor]:
        return list(self.parameters["tokens"])

    def end(self, top: list[Tensor], place: slice) -> None:
        pass

    def feature(self, vector: Tensor) -> Tensor:
        both = torch.cat((vector.clamp(min=0), (-vector).clamp(min=0)))
        shifted = [torch.cat((both[-shift:], both[:-shift])) for shift in range(1, self.config.num_feature_shifts + 1)]
        return torch.cat([both * other for other in shifted])

    def enter(self, layer_idx: int, rows: list[Tensor]) -> list[Tensor]:
        memory = getattr(self, "associations", {}).get(layer_idx)
        if memory is None:
            return rows
        matrix, sums = memory
        features = [self.feature(self.parameters[f"query.{layer_idx}.weight"] @ row) for row in rows]
        return [row + matrix @ found / (sums @ found) for row, found in zip(rows, features, strict=True)]

    def leave(self, layer_idx: int, rows: list[Tensor], keys: list[Any], place: slice) -> None:
        if not self.is_whole:
            return
        self.associations: dict[int, Any] = getattr(self, "associations", {})
        old = self.associations.get(layer_idx)
        num_features = 2 * self.config.association_width * self.config.num_feature_shifts
        matrix, sums = old or (torch.zeros(len(rows[0]), num_features), torch.zeros(num_features))
        next_matrix, next_sums = matrix, sums
        for row in rows[place.stop :]:
            key = self.feature(self.parameters[f"key.{layer_idx}.weight"] @ row)
            value = self.parameters[f"value.{layer_idx}.weight"] @ row
            share = torch.sigmoid(self.parameters[f"share.{layer_idx}.weight"] @ row)
            new = torch.tensor(1.0)
            if old is not None:
                value = value - matrix @ key / (sums @ key)
                new = (1 - (sums @ key) / (key @ key)).clamp(0, 1).detach()
            next_matrix = next_matrix + share * torch.outer(value, key)
            next_sums = next_sums + new * key
        self.associations[layer_idx] = (next_matrix, next_sums)


class PlainBlockRecurrent(PlainSystem):
    """Tokens and state vectors of one layer see each other through their own projections; a gate moves the state."""

    layer_idx = 1  # the second of three: the last that ends within ten twelfths

    def normed(self, vector: Tensor) -> Tensor:
        return vector / vector.pow(2).mean().add(torch.finfo(torch.float32).eps).sqrt()

    def state(self) -> list[Tensor]:
        self.vectors = getattr(self, "vectors", list(self.parameters["start"]))
        identities = self.parameters["identities"]
        return [self.normed(vector) + own for vector, own in zip(self.vectors, identities, strict=True)]

    def by_head(self, name: str, row: Tensor) -> Tensor:
        return (self.parameters[f"{name}.weight"] @ row).view(self.weights.num_attention_heads, -1)

    def mixed(self, query_HK: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        heads = []
        for head, query in enumerate(query_HK):
            logits = torch.stack([query @ key[head] for key in keys]) / len(query) ** 0.5
            shares = logits.softmax(0)
            heads.append(sum((s * value[head] for s, value in zip(shares, values, strict=True)), torch.zeros(())))
        return torch.cat(heads)

    def add(self, layer_idx: int, row_D: Tensor) -> Tensor | float:
        if layer_idx != self.layer_idx:
            return 0.0
        state = self.state()
        keys, values = ([self.by_head(name, row) for row in state] for name in ("key", "value"))
        read = self.mixed(self.by_head("token_query", self.normed(row_D)), keys, values)
        return self.parameters["vertical.weight"] @ read

    def leave(self, layer_idx: int, rows: list[Tensor], keys: list[Any], place: slice) -> None:
        if not self.is_whole or layer_idx != self.layer_idx:
            return
        per_group = self.weights.num_attention_heads // self.weights.num_key_value_heads
        state = self.state()
        state_keys, state_values = ([self.by_head(name, row) for row in state] for name in ("key", "value"))
        token_keys = [key.key_GK.repeat_interleave(per_group, 0) for key in keys[place]]
        token_values = [key.value_GK.repeat_interleave(per_group, 0) for key in keys[place]]
        gate = torch.sigmoid(self.parameters["gate"])
        moved = []
        for vector, row in zip(self.vectors, state, strict=True):
            own = self.mixed(self.by_head("state_query", row), state_keys, state_values)
            block = self.mixed(self.by_head("block_query", row), token_keys, token_values)
            read = self.parameters["horizontal.weight"] @ torch.cat((own, block))
            moved.append(gate * vector + (1 - gate) * read)
        self.vectors = moved


PLAIN: dict[str, Callable[..., PlainSystem]] = {
    "full": PlainFull,
    "rmt": PlainRmt,
    "autocompressor": PlainAutoCompressor,
    "feedback_segment": PlainFeedbackSegment,
    "block_recurrent": PlainBlockRecurrent,
    "infini": PlainInfini,
    "armt": PlainArmt,
    "gated_linear": PlainGatedLinear,
}
