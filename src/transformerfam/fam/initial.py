"""The initial FAM: the rows that learn, sent up through the layers, and their queries.

Source: B.1 of arXiv 2404.09173.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from transformerfam.config import FamConfig
from transformerfam.decoder.flash import FLASH_BACK_ENDS
from transformerfam.decoder.half_precision import fitting
from transformerfam.decoder.kernels import BACK_END, Sight
from transformerfam.decoder.positions import fam_offsets, first_position, query_shift
from transformerfam.decoder.slot import memory_in
from transformerfam.decoder.step import Step, StepCache, run_decoder
from transformerfam.fam.row_lora import leading_rows

QUERY_BACK_ENDS = (BACK_END, *FLASH_BACK_ENDS.values())
"""Attention back ends that take queries of the rows from elsewhere."""


def initial_prompt(embedding: nn.Embedding, fam_length: int) -> torch.Tensor:
    """Return the prompt that conversion starts from, `(F, D)`: the mean embedding, each row moved a little.

    The rows differ by a hundredth of the embeddings' spread, from a separate generator, so that equal models
    convert to equal memories and no two rows stay twins in training.
    """
    weight = embedding.weight.detach().float()
    noise = torch.randn(fam_length, weight.shape[1], generator=torch.Generator().manual_seed(0))
    rows = weight.mean(0) + 0.01 * weight.std() * noise.to(weight.device)
    find_own: Any = getattr(embedding, "get_base_layer", lambda: embedding)  # inside of PEFT's
    factor = float(getattr(find_own(), "scalar_embed_scale", 1.0))  # Gemma's embedding multiplies what it looks up
    return (factor * rows).to(embedding.weight.dtype)


class InitialFam(Step):
    """Send the prompt up alone and note what enters every layer: the initial FAM (B.1)."""

    def __init__(self) -> None:
        self.fams: list[torch.Tensor] = []
        self.slots: list[tuple[torch.Tensor, torch.Tensor]] = []

    def enter_layer(self, layer: None, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Note a layer's input `(1, F, D)`."""
        self.fams.append(hidden_BTD)
        return hidden_BTD

    def mask(self, layer: None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Let every prompt row see every other."""
        length = self.fams[-1].shape[1]
        return torch.zeros(1, 1, length, length, dtype=dtype, device=device)

    def sight(self, layer: None) -> Sight:
        """Let every prompt row see every other."""
        return Sight(self.fams[-1].shape[1], 0)

    def attend(self, layer: None, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the rows' keys and values, `(1, G, F, K)` each."""
        self.slots.append((key, value))
        return key, value


class _InitialQueries(Step):
    """Send every layer's initial FAM through that layer alone, and note its queries."""

    def __init__(self, fams: Sequence[torch.Tensor], mean_share: float) -> None:
        self.fams = iter(fams)
        self.mean_share = mean_share
        self.length = fams[0].shape[1]
        self.queries: list[torch.Tensor] = []

    def enter_layer(self, layer: None, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return the layer's initial FAM."""
        return fitting(next(self.fams), hidden_BTD.dtype, self.mean_share)

    def mask(self, layer: None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Let every row see every other."""
        return torch.zeros(1, 1, self.length, self.length, dtype=dtype, device=device)

    def sight(self, layer: None) -> Sight:
        """Let every row see every other, and note the queries."""
        return Sight(self.length, 0, queries=self.queries)

    def attend(self, layer: None, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep nothing."""
        return key, value


def _row_positions(config: FamConfig, shift: int = 0) -> torch.Tensor:
    """Return the positions of the initial FAM, `(1, F)`, moved by `shift`."""
    positions = (fam_offsets(config) + first_position(config) + shift)[None]
    return positions.float() if config.fam_position == "fractional" else positions.long()


def initial_fam(decoder: Any) -> list[torch.Tensor]:
    """Return every layer's initial FAM, `(1, F, D)` each: the rows that enter the layer.

    Source: B.1, "prompt tuning" and, for the ablation, "prefix tuning".
    """
    memory = memory_in(decoder)
    if memory.config.fam_init == "prefix":
        return [rows[None] for rows in memory.prefix]
    return prompt_pass(decoder).fams


def prompt_pass(decoder: Any) -> InitialFam:
    """Send the prompt of a converted decoder up through its layers, and return what was noted in each."""
    memory = memory_in(decoder)
    config = memory.config
    if config.fam_position == "zero":
        positions = torch.zeros(1, config.fam_length, dtype=torch.long)
    else:
        positions = _row_positions(config)
    step = InitialFam()
    cache = StepCache([None] * len(memory.layouts), step)
    rows = memory.prompt.to(decoder.get_input_embeddings().weight.dtype)  # it may be trained in another
    with leading_rows(config.fam_length):
        run_decoder(decoder, rows[None], positions.to(rows.device), cache)
    return step


def initial_queries(decoder: Any, fams: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """Return the queries of every layer's initial FAM in every block, `(1, H, F, K)` each.

    None where it is no constant (`fam_position="zero"`), or attention cannot be handed it: then the rows that query go
    through the layers next to those that make the keys.

    Args:
        decoder: the converted decoder.
        fams: every layer's initial FAM, as `initial_fam` gives it.
    """
    memory = memory_in(decoder)
    config = memory.config
    takes_queries = decoder.config._attn_implementation in QUERY_BACK_ENDS
    if config.fam_query != "initial" or config.fam_position == "zero" or not (memory.caches_queries and takes_queries):
        return None
    positions = _row_positions(config, query_shift(config)).to(fams[0].device)
    step = _InitialQueries(fams, memory.mean_share)
    weight = decoder.get_input_embeddings().weight
    cache = StepCache([None] * len(memory.layouts), step)
    with leading_rows(config.fam_length):
        run_decoder(decoder, torch.zeros_like(fams[0], dtype=weight.dtype), positions, cache)
    return step.queries


def refresh_queries(decoder: Any, state: Any) -> None:
    """Make the queries that a reading keeps again, where the weights have changed since or other LoRA is in force.

    Args:
        decoder: the converted decoder.
        state: a `FamState` of it.
    """
    if state.queries_key is None:
        return
    memory = memory_in(decoder)
    key = memory.identity.weights_key()
    if key != state.queries_key:
        queries = initial_queries(decoder, initial_fam(decoder))
        for layer_idx, layer in enumerate(state.layers):
            layer.query = queries[layer_idx] if queries is not None and memory.config.carries_fam(layer_idx) else None
        state.queries_key = key
