"""Make the random model that `recipes/books_8m.toml` trains: a byte-level BPE tokenizer and a small Llama.

    fam data fetch books theorems --folder runs/data
    python scripts/make_books_base.py runs/books_base --folder runs/data

The tokenizer is learned from the training texts of both; the model's weights depend on the seed alone. The same data
gives the same folder.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from transformerfam.sources.registry import SOURCES
from transformerfam.sources.source import find_source

END = "<|endoftext|>"
VOCABULARY = 8192
BYTES_OF_THEOREMS = 12_000_000
"""Of the proofs, about as much as there is of the books: their words are few, and come again and again."""


def texts(folder: Path | None) -> Iterator[str]:
    """Yield the texts that the tokenizer is learned from."""
    for path in find_source(SOURCES["books"], folder).paths("train"):
        yield path.read_text(encoding="utf-8")
    paths = find_source(SOURCES["theorems"], folder).paths("train")
    random.Random(0).shuffle(paths)
    left = BYTES_OF_THEOREMS
    for path in paths:
        text = path.read_text(encoding="utf-8")[:left]
        left -= len(text)
        yield text


def make_tokenizer(folder: Path | None) -> PreTrainedTokenizerFast:
    """Learn byte pairs; digits are single tokens, so that numbers are read as they are written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(folder), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def make_model(vocab_size: int, seed: int) -> LlamaForCausalLM:
    """Draw a Llama of 9.4 million parameters, 2.4 of them embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the model and its tokenizer")
    parser.add_argument("--folder", type=Path, help="where fam data keeps its data")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    options = parser.parse_args()
    tokenizer = make_tokenizer(options.folder)
    model = make_model(len(tokenizer), options.seed)
    tokenizer.save_pretrained(options.output)
    model.save_pretrained(options.output)
    print(f"{sum(weights.numel() for weights in model.parameters()):,} parameters in {options.output}")


if __name__ == "__main__":
    main()
