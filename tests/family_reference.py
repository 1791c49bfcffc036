"""Algorithms 1 and 2 for any family, as loops over the layers of a model that is not converted.

The layers' own forward makes queries, keys, values and the feed-forward; what every query sees is a list of plain
tensors here, kept at absolute positions. Nothing of the fast path is used: no turning, no buffers, no hooks on rows.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from transformerfam.config import FamConfig
from transformerfam.decoder.cache_argument import CACHE_NAME
from transformerfam.decoder.positions import fam_offsets
from transformerfam.reference.fam import fam_positions

LAYERS = ("layers", "h")
ATTENTION = ("self_attn", "attention", "self_attention")
LAST_NORM = ("norm", "final_layer_norm", "final_layernorm", "ln_f")
FEED_FORWARD = ("mlp", "block_sparse_moe")
CACHE_ARGUMENT = {"gpt_neox": "layer_past", "falcon": "layer_past"}
NORM_BEHIND_ATTENTION = {
    "gemma2": "post_attention_layernorm",
    "gemma3_text": "post_attention_layernorm",
    "gemma4_text": "post_attention_layernorm",
    "olmo2": "post_attention_layernorm",
    "olmo3": "post_attention_layernorm",
    "exaone4": "post_attention_layernorm",
    "flex_olmo": "post_attention_layernorm",
    "glm4": "post_self_attn_layernorm",
    "hyperclovax": "post_norm1",
}
NORM_IN_FRONT_OF_FEED_FORWARD = {
    "gemma2": "pre_feedforward_layernorm",
    "gemma3_text": "pre_feedforward_layernorm",
    "gemma4_text": "pre_feedforward_layernorm",
    "vaultgemma": "pre_feedforward_layernorm",
    "apertus": "feedforward_layernorm",
    "olmo2": None,
    "olmo3": None,
    "exaone4": None,
    "flex_olmo": None,
}
NORM_BEHIND_FEED_FORWARD = {
    "gemma2": "post_feedforward_layernorm",
    "gemma3_text": "post_feedforward_layernorm",
    "gemma4_text": "post_feedforward_layernorm",
    "olmo2": "post_feedforward_layernorm",
    "olmo3": "post_feedforward_layernorm",
    "exaone4": "post_feedforward_layernorm",
    "flex_olmo": "post_feedforward_layernorm",
    "glm4": "post_mlp_layernorm",
    "hyperclovax": "post_norm2",
}
KeysAndValues = tuple[Tensor, Tensor]


def _one_of(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


class _GivenKeys(Cache):
    """Put given keys in front of those that a layer makes, or in their place."""

    def __init__(self, given: list[KeysAndValues], sees_own: bool) -> None:
        super().__init__(layers=[])
        self.given = given
        self.sees_own = sees_own
        self.made: KeysAndValues | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> KeysAndValues:
        self.made = (key_states, value_states)
        seen = [*self.given, self.made] if self.sees_own else self.given
        keys, values = zip(*seen, strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


@dataclasses.dataclass
class _Memory:
    initial: Tensor
    fam: Tensor
    slots: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)
    """Of a FAM of keys and values: all rows that were written `(N, D)`, and what is left in each slot `(G, F, N)`."""
    fam_keys: KeysAndValues | None = None
    block_keys: list[KeysAndValues] = dataclasses.field(default_factory=list)


class FamilyReference:
    """Read with one model.

    Args:
        model: not converted; set to `eager` and evaluation mode.
        config: with `fam_layers` named where the model is a hybrid one.
        own_windows: every layer's own sliding window.
    """

    def __init__(self, model: PreTrainedModel, config: FamConfig, own_windows: list[int | None]) -> None:
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")  # the others multiply no float64
        self.model: Any = model
        self.decoder: Any = model.get_decoder()
        self.config = config
        self.own_windows = own_windows
        self.layers = list(_one_of(self.decoder, LAYERS))
        self.last_mlp: list[Tensor] = []
        self.last_branch: list[Tensor] = []
        self.last_weights: list[Tensor] = []

    def read(self, ids_T: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden states after the last norm, `(T, D)`, and the last FAM, `(L, F, D)`.

        Args:
            ids_T: token ids.
            initial: the prompt `(F, D)`, or the prefix `(L, F, D)`.
        """
        size = self.config.block_size
        memories = [_Memory(fam, fam) for fam in self._initial_fams(initial)]
        if self.config.has_slots:
            for memory in memories:
                memory.slots = [(memory.initial, torch.eye(len(memory.initial))[None])]
        blocks = []
        for start in range(0, len(ids_T), size):
            hidden = self._embed(ids_T[start : start + size])
            rows: Tensor | None = None  # what comes up from the FAM of the layers below
            for layer_idx, memory in enumerate(memories):
                hidden, rows = self._run_block(layer_idx, hidden, rows, memory, start)
            blocks.append(hidden)
        if self.config.has_slots:
            for layer_idx, memory in enumerate(memories):
                memory.fam = self._fam_of_slots(layer_idx, memory)
        last_norm = _one_of(self.decoder, LAST_NORM)
        fams = [m.fam if self.config.carries_fam(i) else torch.zeros_like(m.fam) for i, m in enumerate(memories)]
        return last_norm(torch.cat(blocks)), torch.stack(fams)

    def _embed(self, ids_T: Tensor) -> Tensor:
        return self._entered(self.model.get_input_embeddings()(ids_T))

    def _entered(self, rows_TD: Tensor) -> Tensor:
        """Return what the decoder makes of embeddings in front of its layers."""
        if self.model.config.model_type == "nanochat":
            return self.decoder.norm(rows_TD)
        return rows_TD * getattr(self.model.config, "embedding_multiplier", 1.0)

    def _branch_factor(self) -> float:
        config = self.model.config
        if config.model_type == "minicpm3":
            return config.scale_depth / len(self.layers) ** 0.5
        return getattr(config, "residual_multiplier", 1.0)

    def _initial_fams(self, initial: Tensor) -> list[Tensor]:
        if self.config.fam_init == "prefix" or self.config.fam_length == 0:
            return list(initial) if initial.dim() == 3 else [initial] * len(self.layers)
        positions, _ = fam_positions(self.config, 0)
        rows, inputs = self._entered(initial), []
        for layer_idx in range(len(self.layers)):
            inputs.append(rows)
            rows, _ = self._run_layer(layer_idx, rows, positions, [], torch.zeros(len(rows), len(rows)))
        return inputs

    def _run_block(
        self, layer_idx: int, block_TD: Tensor, below: Tensor | None, memory: _Memory, start: int
    ) -> tuple[Tensor, Tensor | None]:
        config, num_tokens = self.config, len(block_TD)
        has_fam, own_window = config.carries_fam(layer_idx), self.own_windows[layer_idx]
        is_local = own_window is not None and None in self.own_windows and not has_fam
        key_positions, query_positions = fam_positions(config, start)
        if has_fam and config.has_slots:
            memory.fam_keys = self._slot_keys(layer_idx, memory, key_positions)
        elif has_fam:
            length = config.fam_length
            unseen = torch.zeros(length, length)
            _, memory.fam_keys = self._run_layer(layer_idx, memory.fam, key_positions, [], unseen)
        num_segments = len(memory.block_keys) if is_local else config.num_memory_segments
        segments = memory.block_keys[max(0, len(memory.block_keys) - num_segments) :]
        window = min(w for w in (own_window, None if is_local else config.window, 10**9) if w is not None)
        num_past = config.block_size * len(segments)
        places = torch.cat((torch.arange(start - num_past, start), torch.arange(start, start + num_tokens)))
        distance = torch.arange(start, start + num_tokens)[:, None] - places
        mask = torch.zeros(distance.shape).masked_fill((distance < 0) | (distance >= window), -torch.inf)
        given = list(segments)
        if has_fam:
            assert memory.fam_keys is not None
            given.append(memory.fam_keys)
            bias = torch.full((num_tokens, config.fam_length), config.fam_key_bias)
            mask = torch.cat((mask[:, :num_past], bias, mask[:, num_past:]), dim=1)
        positions = [float(start + token) for token in range(num_tokens)]
        out_TD, block_keys = self._run_layer(layer_idx, block_TD, positions, given, mask)
        above = None
        if num_tokens == config.block_size:
            if has_fam and config.has_slots:
                assert memory.fam_keys is not None
                asking = memory.initial if below is None else below
                seen = [memory.fam_keys, block_keys]
                shown = torch.zeros(config.fam_length, config.fam_length + num_tokens)
                above, _ = self._run_layer(layer_idx, asking, query_positions, seen, shown, sees_own=False)
                weights_HFT = self.last_weights[-1][:, :, config.fam_length :]
                weights_GFT = weights_HFT.unflatten(0, (memory.fam_keys[0].shape[1], -1)).mean(1)
                share_GF = weights_GFT.sum(-1)
                value_GFN = (
                    weights_GFT / share_GF[..., None]
                    if config.fam_value == "block"
                    else torch.eye(config.fam_length).expand(len(share_GF), -1, -1)
                )
                if config.fam_share == "row":
                    share_GF = share_GF.mean(0).expand_as(share_GF)
                share_GF = torch.relu(share_GF - config.fam_share_threshold) / (1 - config.fam_share_threshold)
                if config.fam_update == "paper" or not memory.block_keys:
                    share_GF = torch.ones_like(share_GF)
                memory.slots = [(rows, left * (1 - share_GF)[..., None]) for rows, left in memory.slots]
                written = block_TD if config.fam_value == "block" else asking
                memory.slots.append((written, share_GF[..., None] * value_GFN))
            elif has_fam:
                assert memory.fam_keys is not None
                asking = memory.fam if config.fam_query == "previous" else memory.initial
                seen = [memory.fam_keys, block_keys]
                shown = torch.zeros(config.fam_length, config.fam_length + num_tokens)
                self._run_layer(layer_idx, asking, query_positions, seen, shown, sees_own=False)
                is_first = not memory.block_keys
                left_out = config.fam_residual == "none" or (
                    config.fam_residual == "previous" and config.zero_first_residual and is_first
                )
                residual = memory.initial if config.fam_residual == "initial" else memory.fam
                above = self._with_residual(layer_idx, residual * (not left_out))
                value = above if config.fam_feeds == "same" else below
                if value is not None:
                    share = self.last_weights[-1][:, :, config.fam_length :].sum(-1).mean(0)[:, None]
                    share = torch.relu(share - config.fam_share_threshold) / (1 - config.fam_share_threshold)
                    is_moved = config.fam_update == "gated" and not is_first
                    memory.fam = memory.fam + share * (value - memory.fam) if is_moved else value
            elif below is not None:
                shown = torch.zeros(config.fam_length, num_tokens)
                above, _ = self._run_layer(layer_idx, below, query_positions, [block_keys], shown, sees_own=False)
            memory.block_keys.append(block_keys)
        return out_TD, above

    def _slot_keys(self, layer_idx: int, memory: _Memory, positions: list[float]) -> KeysAndValues:
        """Return what is left of all rows that were written, as keys and values at positions, `(1, G, F, K)` each."""
        keys, values = [], []
        for slot, position in enumerate(positions):
            parts = []
            for rows, left_GFN in memory.slots:
                shown = torch.zeros(len(rows), len(rows))
                made = self._run_layer(layer_idx, rows, [position] * len(rows), [], shown)[1]
                parts.append([(left_GFN[None, :, slot, :, None] * part).sum(2, keepdim=True) for part in made])
            key, value = zip(*parts, strict=True)
            keys.append(sum(key))
            values.append(sum(value))
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def _fam_of_slots(self, layer_idx: int, memory: _Memory) -> Tensor:
        made = self._slot_keys(layer_idx, memory, fam_offsets(self.config).tolist())
        return torch.cat([part[0].transpose(0, 1).flatten(1) for part in made], dim=1)

    def _run_layer(
        self,
        layer_idx: int,
        rows_TD: Tensor,
        positions: list[float],
        given: list[KeysAndValues],
        mask: Tensor,
        sees_own: bool = True,
    ) -> tuple[Tensor, KeysAndValues]:
        """Return what a layer makes of rows that see given keys, and the keys and values that it made of them."""
        layer, model_config = self.layers[layer_idx], self.model.config
        cache = _GivenKeys(given, sees_own)
        position_ids = torch.tensor(positions)[None]
        kinds = [model_config.layer_types[layer_idx]] if hasattr(self.decoder.rotary_emb, "layer_types") else []
        attention, mlp = _one_of(layer, ATTENTION), _one_of(layer, FEED_FORWARD)
        norm = NORM_BEHIND_ATTENTION.get(model_config.model_type)
        behind = attention if norm is None else getattr(layer, norm)
        handles = [
            module.register_forward_hook(lambda _m, _a, output, to=to: to.append(self._clone(output)))
            for module, to in ((behind, self.last_branch), (mlp, self.last_mlp))
        ]
        handles.append(attention.register_forward_hook(lambda _m, _a, output: self.last_weights.append(output[1][0])))
        arguments: dict[str, Any] = {
            CACHE_ARGUMENT.get(model_config.model_type, CACHE_NAME): cache,
            "attention_mask": mask.to(rows_TD.dtype)[None, None],
            "position_ids": position_ids.clamp(min=0),  # Ministral 3's factor on queries is no number in front of 0
            "position_embeddings": self.decoder.rotary_emb(rows_TD[None], position_ids, *kinds),
        }
        if model_config.model_type == "falcon":
            arguments |= {"alibi": None, "output_attentions": True}
        if model_config.model_type == "gemma4_text":
            arguments["shared_kv_states"] = {}
        try:
            output = layer(rows_TD[None], **arguments)
        finally:
            for handle in handles:
                handle.remove()
        assert cache.made is not None
        return (output[0] if isinstance(output, tuple) else output)[0], cache.made

    @staticmethod
    def _clone(output: Any) -> Tensor:
        return (output[0] if isinstance(output, tuple) else output)[0].clone()

    def _with_residual(self, layer_idx: int, residual: Tensor) -> Tensor:
        """Return what the last run layer would have made had attention been added to other rows than it was made of."""
        config, layer = self.model.config, self.layers[layer_idx]
        factor, kind = self._branch_factor(), config.model_type
        attended = residual + self.last_branch[-1] * factor
        is_parallel = {
            "cohere": True,
            "cohere2": True,
            "phi": True,
            "gpt_neox": getattr(config, "use_parallel_residual", False),
            "stablelm": getattr(config, "use_parallel_residual", False),
            "falcon": getattr(config, "parallel_attn", False) or getattr(config, "new_decoder_architecture", False),
        }
        if is_parallel.get(kind, False):
            return attended + self.last_mlp[-1]
        in_front = NORM_IN_FRONT_OF_FEED_FORWARD.get(kind, "post_attention_layernorm")
        inner = (attended if in_front is None else getattr(layer, in_front)(attended))[None]
        made = _one_of(layer, FEED_FORWARD)(inner)
        made = made[0] if isinstance(made, tuple) else made
        if getattr(layer, "enable_moe_block", False):  # Gemma 4, whose experts are given the sum in front of the norm
            _, weights, chosen = layer.router(attended)
            routed = layer.experts(layer.pre_feedforward_layernorm_2(attended), chosen, weights)
            made = layer.post_feedforward_layernorm_1(made) + layer.post_feedforward_layernorm_2(routed)
        if kind == "granitemoeshared":
            made = made + layer.shared_mlp(inner)
        if kind in NORM_BEHIND_FEED_FORWARD:
            made = getattr(layer, NORM_BEHIND_FEED_FORWARD[kind])(made)
        return (attended + factor * made[0]) * getattr(layer, "layer_scalar", 1.0)
