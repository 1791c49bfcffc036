"""`fam chat`, and what `fam generate` draws."""

from pathlib import Path
from typing import Any

import pytest
from command_line import run
from typer.testing import CliRunner

from transformerfam.cli.app import app
from transformerfam.tasks.reading import generate_text
from transformerfam.weights.models import load_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} is {{ m.content }} . {% endfor %}"
    "{% if add_generation_prompt %}assistant is{% endif %}"
)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


def test_generate_draws_by_its_flags_and_stops(folder: Path, tmp_path: Path, book: Path) -> None:
    """Catches flags that change nothing, and another answer than before where none is given."""
    state = tmp_path / "state"
    run("read", book, "--model", folder, "--save", state)
    command = ("generate", "The pass key is", "--model", folder, "--state", state, "--max-new-tokens", 12)
    from transformerfam import FamState

    model, tokenizer = load_model(folder)
    greedy = generate_text(model, tokenizer, "The pass key is", FamState.load(state, model), 12)
    said = run(*command)
    assert said.startswith(" ".join(greedy.split()))
    drawn = [run(*command, "--temperature", 2, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert run(*command, "--temperature", 2, "--top-p", 1e-9) == said
    word = greedy.split()[2]
    assert word not in run(*command, "--stop", word).split("%")[0]


def test_chat_reads_each_turn_once_and_continues_what_was_saved(folder: Path, tmp_path: Path, template: Path) -> None:
    """Catches turns that are lost between two lines, and a chat that is saved in the middle of a turn."""
    options: list[Any] = ["chat", "--model", folder, "--chat-template", template, "--max-new-tokens", 5]
    turns = ["The sky", "The grass", "Here we go"]

    def answers(*lines: str, more: tuple[Any, ...] = ()) -> list[str]:
        result = CliRunner().invoke(app, [str(o) for o in (*options, *more)], input="\n".join(lines) + "\n")
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    whole = answers(*turns)
    assert len(whole) == 3
    file = tmp_path / "chat.fam.safetensors"
    assert answers(turns[0], f"/save {file}", turns[1]) == whole[:2]
    assert answers(turns[1], turns[2], more=("--state", file)) == whole[1:]
    assert answers(f"/load {file}", turns[1], turns[2]) == whole[1:]
    assert answers(turns[0], "/fork a", turns[2], "/load a", turns[1], "/quit", turns[2])[::2] == whole[:2]
    sampled = ("--temperature", 2, "--seed", 3)
    assert answers(*turns, more=sampled) == answers(*turns, more=sampled) != whole


def test_chat_that_cannot_be_led_says_why(folder: Path, tmp_path: Path, template: Path) -> None:
    """Catches a chat in a form that the model was never trained on, and a command that is taken for a turn."""
    assert "no chat template; give --chat-template FILE" in run("chat", "--model", folder, status=2)
    command = ("chat", "--model", folder, "--chat-template", template)
    assert "'/sav x' is no command of the chat; /save FILE" in run(*command, status=2, stdin="/sav x\n")
    assert "/save FILE keeps the chat" in run(*command, stdin="/help\n")
    assert "does not exist" in run(*command, status=2, stdin=f"/load {tmp_path / 'none'}\n")
    (tmp_path / "book.txt").write_text("mine")
    assert "only a state may replace" in run(*command, status=2, stdin=f"The sky\n/save {tmp_path / 'book.txt'}\n")
