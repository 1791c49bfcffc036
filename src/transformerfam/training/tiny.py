"""The tiny model: a word-level tokenizer for the passkey text, and a small Llama with random weights."""

import re
from collections import Counter
from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from transformerfam.decoder.memory import memory_of
from transformerfam.tasks.filler import FILLER_SENTENCES
from transformerfam.tasks.passkey import AFTER_KEY, BEFORE_KEY, BETWEEN_KEYS, QUESTION
from transformerfam.training.recipe.sections import ModelSection

EMBEDDING_STD, LINEAR_STD = 1.0, 0.05
"""Standard deviations of the random weights, those of torch's own layers. With transformers' 0.02 for both, learning
sticks for thousands of steps where a key with a repeated digit is not answered right."""

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
SPACE = "▁"


def build_tiny_tokenizer(more_words: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are those of the passkey text, and `more_words`; every digit is one token."""
    text = " ".join((BEFORE_KEY, BETWEEN_KEYS, AFTER_KEY, FILLER_SENTENCES, QUESTION))
    known = set(re.findall(r"[A-Za-z]+", text))
    words = [f"{SPACE}{word}" for word in [*sorted(known), *sorted(set(more_words) - known)]]
    first_word = BEFORE_KEY.split()[0]  # has no space in front of it
    vocabulary = [UNKNOWN, BEGIN, END, SPACE, *"0123456789", ".", "?", first_word, *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(SPACE, prepend_scheme="never"),
            pre_tokenizers.Split(Regex(f"{SPACE}(?=[0-9])|[0-9]|[^A-Za-z0-9{SPACE}]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(SPACE, " ")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def frequent_words(text: str, number: int) -> list[str]:
    """Return the most frequent words of a text, equally frequent ones by the alphabet."""
    counts = Counter(re.findall(r"[A-Za-z]+", text))
    return sorted(counts, key=lambda word: (-counts[word], word))[:number]


def build_tiny_model(section: ModelSection, vocab_size: int) -> LlamaForCausalLM:
    """Return a small Llama in float32 with random weights that depend on `section.seed` alone."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=section.hidden_size,
        intermediate_size=section.intermediate_size,
        num_hidden_layers=section.num_hidden_layers,
        num_attention_heads=section.num_attention_heads,
        num_key_value_heads=section.num_key_value_heads,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
        initializer_range=LINEAR_STD,
        rope_parameters={"rope_type": "default", "rope_theta": section.rope_theta},
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(section.seed)
        model = LlamaForCausalLM(config)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
        return model


def draw_prompt(model: LlamaForCausalLM, seed: int) -> None:
    """Draw the learned rows of a random model's memory like its embeddings, in place.

    The mean embedding, from which `convert` starts, says nothing in a model that was never trained, and rows that are
    nearly equal take long to part.
    """
    generator = torch.Generator().manual_seed(seed)
    for rows in memory_of(model).learned_rows:
        with torch.no_grad():
            rows.copy_(EMBEDDING_STD * torch.randn(rows.shape, generator=generator))
