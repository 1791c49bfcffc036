"""Words that a tokenizer does not know are said, and where nearly all are such, the text is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_passkey_model, save_passkey_model
from training_recipes import small_recipe, small_values
from typer.testing import CliRunner

from transformerfam.cli import app
from transformerfam.comparison.plan import load_comparison
from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.tasks.next_token import evaluate_next_token
from transformerfam.tasks.passkey_evaluation import PasskeyEvaluation
from transformerfam.tasks.reading import read_text_stream
from transformerfam.training.trainer import Trainer

KNOWN = "The grass is green. The sky is blue. " * 30
MANUAL = "Use option verbose to print more of what the daemon writes to its log file on every restart. " * 20


def test_reading_of_unknown_words_is_refused_or_said() -> None:
    """Catches a manual that a model of fifty words reads as one unknown word after the other."""
    model, tokenizer = make_passkey_model()
    with pytest.raises(TransformerFamError, match=r"8\d% of the tokens of the text are words that the tokenizer does"):
        read_text_stream(model, tokenizer, [MANUAL])
    with pytest.warns(UserWarning, match=r"8\d\.\d% of the text's tokens are words that the tokenizer does not know"):
        read_text_stream(model, tokenizer, [MANUAL], allow_unknown=True)
    with pytest.warns(UserWarning, match=r"\d\.\d% of the text's tokens are words"):
        read_text_stream(model, tokenizer, [KNOWN + "Use option verbose to print more."])
    read_text_stream(model, tokenizer, [KNOWN])  # a warning would be an error


def test_training_on_unknown_words_is_refused_or_said(tmp_path: Path) -> None:
    """Catches a vocabulary that leaves a share of the training text unknown without a word."""
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text(KNOWN + "Use option verbose to print more. " * 10)
    data = {"books": str(tmp_path / "books"), "book": 1.0, "passkey_sentences": 0.0}
    few = small_recipe(data=data, schedule={"steps": 1, "curriculum": [{"filler_tokens": [1, 9]}]})
    message = Trainer(few, tmp_path / "few").run().message
    assert "% of the training text's tokens are words that its tokenizer does not know" in message
    (tmp_path / "books" / "a.txt").write_text(MANUAL)
    with pytest.raises(TransformerFamError, match="tokens of the training text are words .*data.allow_unknown = true"):
        Trainer(few, tmp_path / "many")
    Trainer(small_recipe(data=data | {"allow_unknown": True}), tmp_path / "allowed")


def test_instructions_with_unknown_words_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{MANUAL}"}}\n' * 20)
    sections = {"instructions": {"files": [str(tmp_path / "a.jsonl")], "length": 600}, "schedule": {"curriculum": []}}
    with pytest.raises(TransformerFamError, match="tokens of the instructions are words"):
        Trainer(small_recipe(**sections), tmp_path / "run")


def test_comparison_of_instructions_names_its_task(tmp_path: Path) -> None:
    """Catches a comparison that trains on instructions and asks for passkeys."""
    import json

    values = small_values(instructions={"files": ["a.jsonl"], "length": 600}, schedule={"steps": 2})
    values["schedule"] = {"steps": 2, "batch_size": 2}
    recipe = "\n".join(
        f"[recipe.{name}]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in section.items())
        for name, section in values.items()
    )
    path = tmp_path / "comparison.toml"
    path.write_text(f'systems = ["fam"]\nfiller_tokens = [8]\n{recipe}')
    with pytest.raises(RecipeError, match="trains on .instructions. and the comparison names no task"):
        load_comparison(path)
    path.write_text(f'task = "passkey"\n{path.read_text()}')
    assert load_comparison(path).task == "passkey"


def test_command_says_how_many_words_are_unknown(tmp_path: Path) -> None:
    """Catches a command that reads a manual without a word, or has no way to read it all the same."""
    save_passkey_model(tmp_path / "model")
    (tmp_path / "manual.txt").write_text(MANUAL)
    command = ["read", str(tmp_path / "manual.txt"), "--model", str(tmp_path / "model"), "--save", str(tmp_path / "s")]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code != 0
    assert not (tmp_path / "s").exists()
    allowed = CliRunner().invoke(app, [*command, "--allow-unknown"])
    assert allowed.exit_code == 0
    assert "% of the text's tokens are words that the tokenizer does not know" in " ".join(allowed.output.split())


def test_evaluation_on_unknown_words_is_refused_or_said(tmp_path: Path) -> None:
    """Catches a filler, or a scored text, of which a model of fifty words sees one unknown word after the other."""
    model, tokenizer = make_passkey_model()
    (tmp_path / "manual.txt").write_text(MANUAL)
    (tmp_path / "mixed.txt").write_text("Use option verbose to print more. " * 3 + KNOWN)
    options = {"filler_lengths": (8,), "num_keys": 1, "systems": ("fam",)}
    evaluations: list[Callable[[str], Any]] = [
        lambda name: list(PasskeyEvaluation(**options, filler=str(tmp_path / name)).rows(model, tokenizer)),
        lambda name: list(evaluate_next_token(model, tokenizer, tmp_path / name, num_tokens=200)),
    ]
    for evaluate in evaluations:
        with pytest.raises(TransformerFamError, match=r"tokens of .*manual.txt are words that the tokenizer does not"):
            evaluate("manual.txt")
        with pytest.warns(UserWarning, match=r"of .*mixed.txt's tokens are words that the tokenizer does not know"):
            evaluate("mixed.txt")
