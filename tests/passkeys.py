"""Passkeys evaluated as the tests do it, and one question answered without an evaluation."""

import torch

from transformerfam.tasks import evaluate_passkey


def evaluate(model, tokenizer, **changes):
    options = {"filler_lengths": [3, 40], "num_keys": 3, "seed": 5, "batch_size": 2} | changes
    return list(evaluate_passkey(model, tokenizer, **options))


def answer_alone(model, tokenizer, ids, num_tokens):
    """Read a text in one piece, and say the likeliest tokens one by one."""
    said = []
    with torch.no_grad():
        for _ in range(num_tokens):
            said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
    return tokenizer.decode(said).strip()
