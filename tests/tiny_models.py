"""A tiny random model with an untrained memory, in memory and as a folder that `--model` takes."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from transformerfam import FamConfig, convert
from transformerfam.training.recipe.sections import ModelSection
from transformerfam.training.tiny import build_tiny_model, build_tiny_tokenizer
from transformerfam.weights.models import save_model

BLOCK_SIZE = 8
PASSKEY_TEXT = "The grass is green. The sky is blue. The pass key is 12345. Remember it. Here we go. " * 20
SECTION = ModelSection(
    base="tiny-random",
    num_hidden_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=16,
)


def make_passkey_model(fam_length: int = 2, update: str = "paper") -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Make a converted model whose vocabulary is that of the passkey text, and its tokenizer."""
    tokenizer = build_tiny_tokenizer()
    model = build_tiny_model(SECTION, len(tokenizer)).eval()
    with torch.no_grad():  # small embeddings, so that attention, and with it the memory, shows in the answers
        model.get_input_embeddings().weight.mul_(0.05)
    shape = {"fam_key_bias": 0.0, "block_size": BLOCK_SIZE, "fam_length": fam_length, "num_memory_segments": 0}
    config = FamConfig.preset(update, **shape)
    return convert(model, config), tokenizer


def save_passkey_model(folder: Path) -> None:
    """Write such a model with notes as training leaves them."""
    save_model(*make_passkey_model(), folder, notes={"max_training_filler_tokens": 512})


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, 61)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
