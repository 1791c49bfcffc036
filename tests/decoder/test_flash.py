"""Flash attention by construction: what it is called with, computed by a plain emulation of what it promises."""

from typing import Any

import pytest
import torch
from tiny_families import draw_ids, make_converted, make_tiny, read_in_chunks
from transformers import AttentionInterface
from transformers.integrations import flash_attention

from transformerfam import FamConfig, convert
from transformerfam.config import UPDATE_PRESETS
from transformerfam.errors import TransformerFamError

CONFIG = FamConfig(block_size=5, fam_length=2, num_memory_segments=1, fam_key_bias=0.0)
CASES = ("llama", "gemma2", "gemma3_text", "cohere2", "gpt_oss", "deepseek_v3", "qwen2 with windows")
calls: list[dict[str, Any]] = []


def emulate(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute what flash attention computes: causal to the lower right, a window, soft caps and sinks; no mask."""
    assert attention_mask is None
    is_causal = module.is_causal if is_causal is None else is_causal
    calls.append({"name": module.config._attn_implementation, "is_causal": is_causal, "window": sliding_window})
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    num_queries, num_keys = logits.shape[-2:]
    distance = torch.arange(num_queries)[:, None] + num_keys - num_queries - torch.arange(num_keys)
    if is_causal:
        logits = logits.masked_fill(distance < 0, -torch.inf)
    if is_causal and sliding_window is not None:
        logits = logits.masked_fill(distance >= sliding_window, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat((logits, sinks), dim=-1)
    weights = logits.softmax(-1)[..., :num_keys]
    return (weights @ value).transpose(1, 2), None


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "flash_attention_forward", emulate)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", emulate)
    calls.clear()


def make_flash(case: str, config: FamConfig = CONFIG) -> Any:
    """Convert a model that would run on flash attention 2, its memory drawn as `make_converted` draws it."""
    model = make_tiny(case)
    model.config._attn_implementation_internal = "flash_attention_2"  # without checking whether it is installed
    converted = convert(model, config)
    plain = make_converted(case, config)
    converted.load_state_dict(plain.state_dict())
    return converted


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "update"),
    [
        *((case, "paper") for case in CASES),
        *(pytest.param(case, "gated_rows", marks=pytest.mark.slow) for case in CASES),
        *(
            (case, "gated")
            for case in CASES
            if len(set(getattr(make_tiny(case).config, "layer_types", None) or [])) < 2
        ),
    ],
)
def test_flash_attention_is_called_without_masks_and_gives_the_same(case: str, update: str) -> None:
    """Catches a dense mask on its way, a window that is lost or put on FAM rows, and sinks or soft caps left out."""
    config = CONFIG.replace(**UPDATE_PRESETS[update] | ({"fam_feeds": "same"} if update == "gated_rows" else {}))
    plain, flash = make_converted(case, config), make_flash(case, config)
    assert flash.config._attn_implementation == "fam_fa2"
    ids = draw_ids(2, 33)
    for lengths in ([33], [3, 9, 1, 1, 1, 18]):
        (expected, expected_state), (found, state) = (read_in_chunks(m, ids, lengths) for m in (plain, flash))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(state.fams, expected_state.fams, atol=1e-4, rtol=1e-4)
    assert {call["name"] for call in calls} == {"flash_attention_2"}
    windows = {call["window"] for call in calls if call["is_causal"]}
    assert (6 in windows) == (case not in ("llama", "deepseek_v3"))
    assert {call["window"] for call in calls if not call["is_causal"]} <= {None}


@torch.no_grad()
def test_what_needs_a_mask_is_refused() -> None:
    """Catches a mask that is dropped silently."""
    flash = make_flash("llama")
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    with pytest.raises(TransformerFamError, match="flash attention takes no mask, which this piece needs"):
        flash(input_ids=draw_ids(2, 9), attention_mask=mask)
    biased = make_flash("llama", CONFIG.replace(fam_key_bias=-2.0))
    with pytest.raises(TransformerFamError, match="fam_key_bias other than 0"):
        biased(input_ids=draw_ids(1, 9))
