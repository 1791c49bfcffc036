"""The text model inside a multimodal one, converted alone."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_families import CONFIG, HYBRID, SHAPE, draw_ids, make_tiny, read_in_chunks

from transformerfam import FamConfig, convert, from_pretrained
from transformerfam.decoder.text_models import text_model
from transformerfam.errors import UnsupportedModelError

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def make_gemma3() -> Any:
    text = transformers.Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=6, layer_types=HYBRID)
    vision = transformers.SiglipVisionConfig(**VISION)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def make_llava(**changes: Any) -> Any:
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**SHAPE | changes), vision_config=vision)
    return transformers.LlavaForConditionalGeneration(config).eval()


def make_mistral3() -> Any:
    text = transformers.MistralConfig(**SHAPE, sliding_window=None)
    config = transformers.Mistral3Config(
        text_config=text, vision_config=transformers.PixtralVisionConfig(**VISION, head_dim=8)
    )
    return transformers.Mistral3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [make_gemma3, make_llava, make_mistral3])
@torch.no_grad()
def test_text_model_reads_as_the_model_around_it(make: Any, tmp_path: Path) -> None:
    """Catches a text model with other weights, masks or positions than it has inside."""
    model, ids = make(), draw_ids(2, 33)
    expected = model(input_ids=ids).logits
    text: Any = text_model(model)
    assert text.get_decoder() is model.get_decoder()
    convert(text, CONFIG.replace(fam_length=0, num_memory_segments=7))
    torch.testing.assert_close(read_in_chunks(text, ids, [3, 9, 1, 20])[0], expected, atol=1e-4, rtol=1e-4)
    text.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, kind=type(text))
    torch.testing.assert_close(read_in_chunks(loaded, ids, [3, 30])[0], expected, atol=1e-4, rtol=1e-4)


def test_fam_is_carried_and_generates() -> None:
    text: Any = convert(text_model(make_llava()), CONFIG)
    state = text.read(draw_ids(1, 13))
    found = text.generate(draw_ids(1, 4), past_key_values=state, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert found.shape == (1, 7)


def test_snippet_of_the_docs_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "families.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {
        "multimodal": make_llava(max_position_embeddings=4096),
        "convert": convert,
        "FamConfig": FamConfig,
    }
    exec(compile(block, "families.md", "exec"), names)
    assert names["model"].fam_config.block_size == 512


def test_multimodal_model_itself_is_refused() -> None:
    """Catches a memory that the model around it goes past."""
    with pytest.raises(UnsupportedModelError, match="takes more than text: .*'llama'.* alone, which .*text_model"):
        convert(make_llava(), CONFIG)


def test_what_has_no_text_model_to_convert_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no text model inside"):
        text_model(make_tiny("llama"))
    model = make_llava()
    convert(text_model(model), CONFIG)
    with pytest.raises(UnsupportedModelError, match="converted already"):
        text_model(model)
    shape = SHAPE | {"head_dim": 8, "rope_parameters": {"rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = transformers.Qwen3VLConfig(text_config=shape | {"rope_type": "default"}, vision_config=vision)
    with pytest.raises(UnsupportedModelError, match="no causal decoder for the text model of Qwen3VLForCond"):
        text_model(transformers.Qwen3VLForConditionalGeneration(config))


def test_other_logits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a class around the text model that changes its logits."""
    model = make_llava()
    forward = type(model).forward

    def halved(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output

    monkeypatch.setattr(type(model), "forward", halved)
    with pytest.raises(UnsupportedModelError, match="gives other logits for text than Llava"):
        text_model(model)
