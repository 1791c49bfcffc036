"""Words that a tokenizer does not know are reported; where nearly all are such, the text is refused."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from tiny_models import make_passkey_model, save_passkey_model
from training_recipes import small_recipe, small_values
from typer.testing import CliRunner

import transformerfam
from transformerfam.cli.app import app
from transformerfam.comparison import load_comparison
from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.tasks.next_token import evaluate_next_token
from transformerfam.tasks.passkey_evaluation import PasskeyEvaluation
from transformerfam.tasks.reading import read_text_stream
from transformerfam.tasks.text import encode
from transformerfam.tasks.unknown_words import known_pieces
from transformerfam.tasks.wordings import Wording
from transformerfam.training.setup import build_trainee
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
    with pytest.raises(TransformerFamError, match="tokens of instructions.files are words"):
        Trainer(small_recipe(**sections), tmp_path / "run")


def test_comparison_of_instructions_names_its_task(tmp_path: Path) -> None:
    """Catches a comparison that trains on instructions and queries passkeys."""
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


@pytest.fixture
def asked(tmp_path: Path) -> list[Any]:
    """Save a model and a state that it has read, and return the command that queries it."""
    save_passkey_model(tmp_path / "model")
    (tmp_path / "book.txt").write_text(KNOWN)
    run("read", tmp_path / "book.txt", "--model", tmp_path / "model", "--save", tmp_path / "s")
    return ["generate", "--model", tmp_path / "model", "--state", tmp_path / "s", "--max-new-tokens", 1]


def test_question_with_unknown_words_is_answered_and_said(asked: list[Any]) -> None:
    """Catches an answer to a question of which the model has seen no word."""
    said = "words that the tokenizer does not know, which all read alike"
    assert f"% of the question's tokens are {said}" in run(*asked, "What is the daemon's option?")
    assert f"100.0% of the question's tokens are {said}" in run(*asked, "daemon")
    assert said not in run(*asked, "What is the pass key? The pass key is")


def test_pictures_of_unknown_words_are_refused(asked: list[Any], tmp_path: Path) -> None:
    """Catches maps of attention to one unknown word after the other."""
    pytest.importorskip("matplotlib")
    (tmp_path / "manual.txt").write_text(MANUAL)
    command = ("report", "attention", "--model", tmp_path / "model", "--blocks", 1, "--text", tmp_path / "manual.txt")
    text = run(*command, "--output", tmp_path / "pictures", status=2)
    assert "of the tokens of the filler manual.txt are words that the tokenizer does not know" in text


def test_wording_of_unknown_words_is_refused_or_said(tmp_path: Path) -> None:
    """Catches keys that are given and queried in words that are all unknown to the model."""
    model, tokenizer = make_passkey_model()

    def evaluate(question: str) -> None:
        wording = Wording("There is a pass key. The key is {key}.", question, " The pass key is {key}", "own")
        options = {"filler_lengths": (8,), "num_keys": 1, "wording": wording}
        list(PasskeyEvaluation(**options).rows(model, tokenizer))

    with pytest.warns(UserWarning, match="of the wording own's tokens are words that the tokenizer does not know"):
        evaluate(" What is the daemon?")
    with pytest.raises(TransformerFamError, match="of the tokens of the wording own are words .*, or another wording"):
        evaluate(MANUAL)


def test_prompt_of_unknown_words_is_said(tmp_path: Path) -> None:
    """Catches a memory whose rows all begin as the unknown word."""
    recipe = small_recipe(model={"prompt_text": "The grass is green and some verbose option."})
    with pytest.warns(UserWarning, match="of model.prompt_text's tokens are words that the tokenizer does not know"):
        build_trainee(recipe)
    save_passkey_model(tmp_path / "model")
    text = run("convert", tmp_path / "model", tmp_path / "new", "--set", "block_size=64", "--prompt-text", MANUAL)
    assert "% of the prompt text's tokens are words that the tokenizer does not know" in text


def test_training_in_wordings_with_unknown_words_is_said(tmp_path: Path) -> None:
    """Catches a training in sentences that all read alike."""
    data = {"task": "worded-keys", "named_keys": (1, 1)}
    result = Trainer(small_recipe(data=data, schedule={"steps": 1}), tmp_path / "run").run()
    assert "% of the training text's tokens are words that its tokenizer does not know" in result.message
    plain = Trainer(small_recipe(data=data | {"task": "named-keys"}, schedule={"steps": 1}), tmp_path / "plain").run()
    assert "does not know" not in plain.message


def test_later_piece_of_a_text_is_said_where_it_is_unknown() -> None:
    """Catches a manual at the end of a long book, of which the share in all is small."""
    _, tokenizer = make_passkey_model()
    known, unknown = encode(tokenizer, KNOWN)[1:101], [tokenizer.unk_token_id] * 5
    with pytest.warns(UserWarning, match="100% of the tokens 1,000 to 1,005 of it are words that the tokenizer does"):
        assert len(list(known_pieces([known] * 10 + [unknown] + [known] * 10, tokenizer, "it", "no"))) == 21


def test_harness_says_unknown_words_once(caplog: pytest.LogCaptureFixture) -> None:
    """Catches scores of texts that read as one unknown word."""
    harness = pytest.importorskip("transformerfam.tools.lm_eval")
    model, tokenizer = make_passkey_model()
    lm = harness.FamLM(model, tokenizer=tokenizer)
    for text in (KNOWN, MANUAL, MANUAL):
        lm.tok_encode(text)
    assert [record.message[6:] for record in caplog.records] == [
        "of a text's tokens are words that the tokenizer does not know; others may too"
    ]


ENCODERS = {
    "encode",
    "encode_rest",
    "encode_start",
    "encoded",
    "stream_token_ids",
    "tokenizer",
    "apply_chat_template",
    "_encode",
    "tok_encode",
}
SAID = {
    # A text that a user gives, whose unknown words are reported.
    "cli.convert.convert_command": "say_unknown",
    "tools.lm_eval.tok_encode": "logged once; _continue and loglikelihood_rolling go through it",
    "tools.lm_eval._continue": "tok_encode",
    "tools.lm_eval.loglikelihood_rolling": "tok_encode",
    "cli.chat.turn": "say_unknown",
    "cli.demo.prepare_demo": "refuses a text of which it does not know enough",
    "study.begin.text_ids": "known_pieces",
    "tasks.facts.__init__": "refuses where a word of the stories is unknown",
    "tasks.named_keys.__init__": "wording_ids, which the evaluation and the training look at",
    "tasks.next_token.evaluate_next_token": "known_pieces",
    "tasks.documents.__init__": "require_known in read_documents",
    "cli.make._of_made": "say_unknown",
    "tasks.made_questions.of": "counts the tokens of a text that _of_made has looked at",
    "tasks.answers_evaluation._encoded": "require_known",
    "tasks.answers_evaluation._asked": "say_unknown",
    "tasks.answers_evaluation._question_ids": "_asked looks at the question",
    "tasks.answers_evaluation._fresh": "counts the tokens of the choices",
    "tasks.likelihood.likeliest": "_asked looks at the choices",
    "tasks.passkey.__init__": "wording_ids, which the evaluation and the training look at",
    "tasks.filler.load_filler": "require_filler in evaluations and reports, unknown_share in training",
    "tasks.reading.question_ids": "say_unknown",
    "tasks.reading.read_text_stream": "known_pieces",
    "serving.texts._run": "_look_at, for the memory's unknown_tokens",
    "serving.chat._rendered": "usage's unknown_tokens",
    "training.data.instructions._piece": "unknown_share of all pieces",
    "tasks.writing.load_books": "unknown_share of the book",
    "training.setup.build_trainee": "say_unknown",
    "tasks.worded_keys_training.__init__": "wording_ids, of which the training looks at the unknown share",
    "tasks.worded_keys_training._drawn": "wording_ids",
    "tasks.passages_training.__init__": "wording_ids, of which the training looks at the unknown share",
    "tasks.passages_training._load_texts": "unknown_share of the texts",
    "tasks.passages_training._passage_ids": "wording_ids",
    "tasks.passages_training._question": "asked about passages, whose words wording_ids has",
    "tasks.passages_training._repeated": "words of the texts, which the training looks at",
    # The package's own texts, of which something else is looked at.
    "comparison.run._description": "BEFORE_KEY, to measure bytes",
    "cli.demo.first_page": "the text that prepare_demo has looked at",
    "cli.progress.write": "a character encoding",
    "sources.source._write": "a character encoding",
    "study.lessons.__init__": "what follows a piece, the same words for every text",
    "study.lessons.require_room": "what follows a piece",
    "tools.lm_eval.apply_chat_template": "tok_encode of what it returns",
    "tasks.facts.encode": "words that __init__ has looked at",
    "tasks.facts.hide": "words that __init__ has looked at",
    "tasks.passkey._digit_ids": "digits, which __init__ has looked at",
    "tasks.passkey._number_ids": "digits, which __init__ has looked at",
    "tasks.reading.count_tokens": "counts the tokens of a text that is read next",
    "tasks.text._joins_space_in_front": "a probe",
    "tasks.text.encode": "itself",
    "tasks.text.encode_rest": "itself",
    "tasks.text.encode_start": "itself",
    "tasks.text.start_ids": "a probe",
    "tasks.text.stream_token_ids": "itself",
    "training.data.instructions.__init__": "what announces a repeated segment, of weight 0",
    "training.data.instructions._rendered": "_piece of what it returns",
    "tasks.facts_training.rows": "words that FactsText has looked at",
    "training.data.repeated.vocabulary": "single words",
    "tasks.worded_keys_training._encode": "itself",
    "tasks.passages_training._encode": "itself",
    "tasks.passages_training._pairs": "words of one token each",
    "tasks.passages_training._word": "a probe",
}


def test_every_place_that_encodes_a_text_is_known() -> None:
    """Catches a new place that encodes a text and does not say how many of its words are unknown: add it above."""
    root = Path(transformerfam.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                for call in ast.walk(function):
                    if isinstance(call, ast.Call) and _called(call) in ENCODERS and not _is_of_string(call):
                        found.add(f"{module}.{function.name}")
    assert found == set(SAID)


def _called(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _is_of_string(call: ast.Call) -> bool:
    """Return whether a call is `str.encode`, which has no text among its arguments."""
    return not call.args or any(keyword.arg == "errors" for keyword in call.keywords)
