"""The recipes for a reader of your own model, on random models of the families that they are for."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from transformerfam.training.recipe.toml import load_recipe
from transformerfam.training.tiny import build_tiny_tokenizer
from transformerfam.training.trainer import Trainer

TURNS = "{% for m in messages %}{{ m.content }} . {% endfor %}"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAM = ["fam.block_size=16", "fam.fam_length=4", "schedule.steps=2", "model.dtype=float32"]
FILLER = "[{filler_tokens=[0,8],max_steps=1},{filler_tokens=[33,40]}]"


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow), "qwen3"])
def test_both_parts_train(family: str, tmp_path: Path) -> None:
    """Catches a recipe that a user's model, or its second part, cannot begin."""
    tokenizer, base = build_tiny_tokenizer(), tmp_path / "base"
    tokenizer.chat_template = TURNS
    config = AutoConfig.for_model(family, **SMALL, num_key_value_heads=2, vocab_size=len(tokenizer), head_dim=8)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "book.txt").write_text("The grass is green. The sky is blue. Here we go.\n\n" * 40)
    asked = [{"question": "What is the sky?", "answers": ["blue"]}]
    (tmp_path / "asked.jsonl").write_text(json.dumps({"text": "The sky is blue. Here we go."} | asked[0]) + "\n")
    (tmp_path / "tasks.jsonl").write_text(json.dumps(asked[0]) + "\n")
    first = [
        "model.prompt_text=The sky is blue.",
        "instructions.length=64",
        "instructions.sampled_tokens=8",
        f'instructions.files=["{texts}"]',
    ]
    second = [
        f'data.questions=["{tmp_path}/asked.jsonl"]',
        f'data.texts=["{texts}"]',
        f'data.instructions=["{tmp_path}/tasks.jsonl"]',
        "data.unanswerable=0",
        "data.pairs=0",
        "data.repeated=0",
        "data.passage_tokens=[4,40]",
        "data.passage_prefix=[0,8]",
        "data.allow_unknown=true",
        "loss.num_other_tokens=8",
        f"schedule.curriculum={FILLER}",
        f"model.memory={tmp_path}/run_1",
    ]
    for part, changes in ((1, first), (2, second)):
        recipe = load_recipe(Path("recipes") / f"own_reader_{part}.toml", [f"model.base={base}", *FAM, *changes])
        assert (recipe.fam.num_sink_tokens, recipe.fam.num_memory_segments) == (4, 1)
        losses: list[float] = []
        result = Trainer(recipe, tmp_path / f"run_{part}").run(lambda _, row, losses=losses: losses.append(row["loss"]))
        assert result.is_complete
        assert len(losses) == 2
        assert all(loss > 0 for loss in losses)
