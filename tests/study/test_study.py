"""A study: rows come nearer to the teacher, it resumes to the last bit, and whatever ends it, nothing is lost."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import run
from study_models import OPTIONS, SMALL, STUDY_BLOCK, TEXT, make_study_model
from tiny_models import make_passkey_model

from transformerfam import FamState
from transformerfam.cli import progress
from transformerfam.cli import study as cli_study
from transformerfam.errors import CorruptFileError, NonFiniteLossError, StateMismatchError, TransformerFamError
from transformerfam.fam.state import STATE_FORMAT_VERSION
from transformerfam.files.tensors import load_tensors, save_tensors
from transformerfam.study import study as study_module
from transformerfam.study.begin import begin_study
from transformerfam.study.checkpoint import StudyFiles
from transformerfam.study.options import StudyOptions
from transformerfam.weights.models import load_model, save_model


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def begun(text, name="s", *, options=SMALL, resume=False, made=None, **more):
    model, tokenizer = made or make_study_model()
    files = StudyFiles(text.parent / name)
    return begin_study(model, tokenizer, str(text), options, files, resume=resume, **more)


def test_rows_come_nearer_to_the_teacher_and_weights_stay(text):
    """Catches rows that move the wrong way, or best rows that are not those that are saved."""
    study = begun(text, options=StudyOptions(**{**OPTIONS, "evaluate_every": 10}, num_held_out=4, lr=0.1))
    weights = {name: p.clone() for name, p in study.model.named_parameters()}
    result = study.run(max_steps=40)
    progress = result.progress
    assert result.reason == "steps"
    assert result.is_better
    assert progress.best_loss < 0.7 * progress.start_loss
    assert f"the rows of step {progress.best_step} are {progress.best_loss:.3f} nats" in result.message
    study.rows.put(study.best)
    assert study.held_out_loss() == pytest.approx(progress.best_loss, rel=1e-5)
    assert all(torch.equal(p, weights[name]) for name, p in study.model.named_parameters())
    rows = [json.loads(line) for line in study.files.log.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(40))
    assert min(row["held_out_loss"] for row in rows if row["held_out_loss"]) == progress.best_loss


def test_state_of_a_study_is_an_ordinary_one_of_the_whole_text(text):
    """Catches a state without the tokens after the last block, or one that no model loads."""
    study = begun(text, options=StudyOptions(**OPTIONS, lr=0.1))
    state = study.run(max_steps=8).state
    model, plain = study.model, study.model.read(study.ids)
    assert state.num_tokens_read == len(study.ids) == plain.num_tokens_read
    assert 0 < state.block_fill[0] < STUDY_BLOCK
    assert state.histories == plain.histories
    assert not torch.equal(state.fams, plain.fams)
    state.save(text.parent / "state")
    loaded = FamState.load(text.parent / "state", model)
    question = torch.tensor([study.ids[:9]])
    with torch.no_grad():
        expected = model(input_ids=question, past_key_values=state).logits
        assert torch.equal(model(input_ids=question, past_key_values=loaded).logits, expected)
        assert not torch.equal(model(input_ids=question, past_key_values=plain).logits, expected)


def test_study_that_does_not_improve_keeps_the_rows_of_the_reading(text, monkeypatch):
    """Catches a reading that is made worse, without a word."""
    losses = iter([1.0, 1.5, 1.0, 2.0, 9.0])
    monkeypatch.setattr(study_module.Study, "held_out_loss", lambda self: next(losses))
    study = begun(text, options=StudyOptions(**OPTIONS, patience=3, lr=0.1))
    result = study.run(max_steps=100)
    assert (result.reason, result.progress.step, result.is_better) == ("held_out", 6, False)
    assert "no longer improve after 6 steps" in result.message
    assert "did not improve on the held-out lessons (1.000 nats" in result.message
    assert torch.equal(result.state.fams, study.model.read(study.ids).fams)
    assert study.run(max_steps=100).progress.step == 6  # nor does it go on when it is resumed


@pytest.mark.parametrize("stops", [(3,), (1, 4)])
def test_resumed_study_is_that_of_one_run_to_the_last_bit(text, stops):
    """Catches moments, best rows, lessons, patience or a learning rate that a checkpoint forgets."""
    whole = begun(text, "whole")
    whole.run(max_steps=7)
    begun(text, "parts").run(max_steps=0)
    for stop in (*stops, 7):
        parts = begun(text, "parts", resume=True)
        parts.run(max_steps=stop)
    for ending, kind, version in (("reading", "state", STATE_FORMAT_VERSION), ("study", "study", 1)):
        one, other = (load_tensors(text.parent / f"{name}.{ending}", kind, version)[0] for name in ("whole", "parts"))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    logs = []
    for name in ("whole", "parts"):
        rows = [json.loads(line) for line in (text.parent / f"{name}.study.jsonl").read_text().splitlines()]
        logs.append([{key: value for key, value in row.items() if key != "seconds"} for row in rows])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 7
    assert whole.progress.best_step == parts.progress.best_step
    assert torch.equal(whole.state().fams, parts.state().fams)


def test_lines_of_the_log_after_the_checkpoint_are_cut(text, monkeypatch):
    """Catches steps that a killed run had done, and that are in the log twice."""
    begun(text).run(max_steps=2)
    study = begun(text, resume=True)
    monkeypatch.setattr(study, "save", lambda: None)  # killed before the next checkpoint
    study.run(max_steps=5)
    with study.files.log.open("a") as log:
        log.write('{"step": 5, "lo')
    again = begun(text, resume=True)
    assert again.progress.step == 2
    again.run(max_steps=5)
    assert [json.loads(line)["step"] for line in again.files.log.read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert torch.equal(again.state().fams, study.state().fams)
    assert all(torch.equal(one, other) for one, other in zip(again.best.values(), study.best.values(), strict=True))


def test_time_counts_over_all_runs(text, monkeypatch):
    """Catches minutes that begin again with every run, and a study that cannot end before its first step."""
    clock = iter(range(0, 10_000, 1))
    monkeypatch.setattr(study_module.time, "monotonic", lambda: float(next(clock)))
    first = begun(text)
    assert "the time is up after 0 steps" in first.run(max_seconds=0).message
    assert (
        "before the rows were compared on held-out lessons; the rows are those of the reading" in first.run(0.0).message
    )
    done = begun(text, resume=True).run(max_seconds=4).progress
    assert done.seconds >= 4
    again = begun(text, resume=True)
    assert again.progress == done
    assert again.run(max_seconds=4).progress.step == done.step
    assert again.run(max_seconds=6).progress.step > done.step


def test_loss_that_is_not_finite_ends_the_study_and_keeps_the_checkpoint(text):
    """Catches rows that are no numbers in a checkpoint."""
    study = begun(text)
    study.run(max_steps=2)
    study.rows.put({i: change * math.nan for i, change in study.rows.changes.items()})
    with pytest.raises(NonFiniteLossError, match="the loss of step 2 is nan, .* start over with a lower learning rate"):
        study.run(max_steps=4)
    assert begun(text, resume=True).progress.step == 2


@pytest.mark.filterwarnings("always")  # which are errors in these tests, and are not for a user
def test_what_does_not_fit_the_study_is_refused(text):
    """Catches a study that continues another text, other options or another model, and one that is damaged."""
    made = make_study_model()
    begun(text, made=made).run(max_steps=2)
    with pytest.raises(TransformerFamError, match=r"has seed = 0, given is 1; resume it with the same options"):
        begun(text, made=made, resume=True, options=StudyOptions(**OPTIONS, num_held_out=2, warmup_steps=2, seed=1))
    (text.parent / "other.txt").write_text("The sky is blue. " + TEXT)
    with pytest.raises(StateMismatchError, match=r"s.reading is a reading of another text; resume the study with the"):
        begun(text.parent / "other.txt", made=made, resume=True)
    with pytest.raises(StateMismatchError, match="fam_length"):
        begun(text, made=make_study_model(fam_length=4), resume=True)
    other = make_study_model()
    other[0].model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    with pytest.raises(StateMismatchError, match="weights.* a study is resumed with the model that it was begun with"):
        begun(text, made=other, resume=True)
    with pytest.raises(TransformerFamError, match="there is no study to resume: .*x.reading is missing; start without"):
        begun(text, "x", made=made, resume=True)
    path = text.parent / "s.study"
    tensors, metadata = load_tensors(path, "study", 1)
    progress = metadata["progress"]
    for changed, values, message in (
        ({"best.0": None}, {}, "s.study lacks the tensor best.0; resume from a whole copy of it, or start over"),
        ({"best.9": tensors["best.0"]}, {}, "holds the tensor best.9"),
        (
            {"best.0": tensors["best.0"][:1]},
            {},
            r"best.0 as torch.float32 \(1, 16\), required is torch.float32 \(3, ",
        ),
        ({"best.0": tensors["best.0"] * math.inf}, {}, "not finite"),
        ({}, {"progress": progress | {"step": -1}}, "metadata of another form .*step is -1"),
        ({}, {"progress": progress | {"seconds": math.inf}}, "seconds is inf"),
        ({}, {"progress": progress | {"more": 1}}, "progress has"),
    ):
        kept = {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}
        save_tensors(path, kept, metadata | values)
        with pytest.raises(TransformerFamError, match=message):
            begun(text, made=made, resume=True)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptFileError, match=r"s.study"):
        begun(text, made=made, resume=True)


def test_text_or_model_that_cannot_be_studied_is_refused(text, tmp_path):
    """Catches an error deep in the loop in place of one before the reading."""
    path = tmp_path / "t.txt"
    for content, message in (
        ("The grass is green.", r"has \d+ tokens, required are at least those of a block, 64: rows hold whole blocks"),
        ("12 34 5 " * 99, "has no sentence"),
        ("Use option verbose to print more. " * 99, "of the tokens of .* are words that the tokenizer does not know"),
    ):
        path.write_text(content)
        with pytest.raises(TransformerFamError, match=message):
            begun(path)
    bare = make_passkey_model()[0].fam_config.without_fam(block_size=64)
    made = make_study_model(**{name: value for name, value in bare.to_dict().items() if name.startswith("fam_")})
    with pytest.raises(TransformerFamError, match="the model has no rows to study with"):
        begun(text, made=made)
    with pytest.raises(TransformerFamError, match="a lesson of the kind .*--piece-tokens"):
        begun(text, options=StudyOptions(piece_tokens=40, answer_tokens=6))
    for name, value in (("lr", 0.0), ("piece_tokens", 3), ("patience", 0), ("temperature", math.inf), ("seed", True)):
        with pytest.raises(TransformerFamError, match=name):
            StudyOptions(**{name: value})
    assert not list(tmp_path.glob("s.*"))


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(*make_study_model(), folder)
    return folder


def command(studied, text, *more):
    options = ("--piece-tokens", 16, "--answer-tokens", 6, "--pieces-per-step", 2)
    return ("study", text, "--model", studied, "--save", text.parent / "s", *options, *more)


def test_command_studies_saves_resumes_and_does_not_overwrite(studied, text, monkeypatch):
    """Catches a command that loses the state that is there, or the rows of which it has said that they are better."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    said = run(*command(studied, text, "--steps", 11, "--lr", 0.1))
    done = r"all steps are done after 11 steps in \d\.\d minutes; on the held-out lessons the rows of step 10 are"
    assert re.search(done, said)
    assert "step 10, loss" in said  # progress without a terminal
    assert re.search(r"ETA 0:0\d:\d\d", said)
    state = load_tensors(text.parent / "s", "state", STATE_FORMAT_VERSION)[0]
    answer = run("generate", "The pass key is", "--model", studied, "--state", text.parent / "s", "--max-new-tokens", 3)
    assert answer
    assert "s holds a state already; add --overwrite to replace it" in run(*command(studied, text), status=2)
    assert "give one of them" in run(*command(studied, text, "--resume", "--overwrite"), status=2)
    (text.parent / "s").unlink()
    assert "s.study holds a study already; add --resume" in run(*command(studied, text), status=2)
    assert "all steps are done after 11" in run(*command(studied, text, "--steps", 11, "--lr", 0.1, "--resume"))
    again = load_tensors(text.parent / "s", "state", STATE_FORMAT_VERSION)[0]
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    assert "after 12 steps" in run(*command(studied, text, "--steps", 12, "--lr", 0.1, "--resume"))
    assert "after 1 steps" in run(*command(studied, text, "--steps", 1, "--overwrite"))
    assert len((text.parent / "s.study.jsonl").read_text().splitlines()) == 1
    run("generate", "The sky", "--model", studied, "--state", text.parent / "s", "--max-new-tokens", 1)


def test_command_keeps_the_reading_where_the_study_has_no_time(studied, text):
    """Catches a command that ends without a state because its time was up at once."""
    said = run(*command(studied, text, "--minutes", 0))
    assert "the time is up after 0 steps in 0.0 minutes, before the rows were compared on held-out lessons" in said
    model, _ = load_model(studied)
    run("read", text, "--model", studied, "--save", text.parent / "plain")
    plain, state = (FamState.load(text.parent / name, model) for name in ("plain", "s"))
    assert state.row_lengths == plain.row_lengths
    torch.testing.assert_close(state.fams, plain.fams, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_command_that_is_ended_keeps_all_of_it(studied, text, monkeypatch, number):
    """Catches a signal that costs the minutes since the last checkpoint, or leaves a state of half a study."""
    plain = study_module.Study._step

    def step(self):
        if self.progress.step == 5:
            signal.raise_signal(number)
        return plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(study_module.Study, "_step", step)
        said = run(*command(studied, text, "--steps", 9, "--lr", 0.1), status=130)
    assert "interrupted after 6 steps" in said
    model, _ = load_model(studied)
    assert FamState.load(text.parent / "s", model).num_tokens_read > 3 * STUDY_BLOCK
    again = shlex.split(said.partition("resume with: fam ")[2])
    assert again[-1] == "--resume"
    run(*again)
    parts = load_tensors(text.parent / "s.study", "study", 1)[0]
    run(*command(studied, text, "--steps", 9, "--lr", 0.1, "--overwrite"))
    whole = load_tensors(text.parent / "s.study", "study", 1)[0]
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_reading_that_is_ended_is_taken_up_again(studied, text, monkeypatch):
    """Catches a long reading that begins again because the study was not begun yet."""
    read = []

    def bar(_):
        def update(done, total, state):
            read.append(done)
            if read == [STUDY_BLOCK]:
                signal.raise_signal(signal.SIGTERM)

        return study_module.contextlib.nullcontext(update)

    monkeypatch.setattr(cli_study, "tokens_bar", bar)
    said = run(*command(studied, text, "--steps", 1), status=130)
    assert "interrupted while reading; " in said
    assert "s.reading keeps what was read; resume with: fam study" in said
    assert not (text.parent / "s").exists()
    run(*command(studied, text, "--steps", 1, "--resume"))
    assert read == [STUDY_BLOCK, 2 * STUDY_BLOCK, 3 * STUDY_BLOCK]


KILLED = """
import os, signal, sys
from transformerfam.cli.app import app
from transformerfam.study import study
plain = study.Study._step
def step(self):
    if self.progress.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self)
study.Study._step = step
study.CHECKPOINT_SECONDS = 0.0
app(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_command_resumes_to_the_last_bit(studied, text):
    """Catches a checkpoint that is half written, or one that does not hold all that the next step depends on."""
    words = [str(word) for word in command(studied, text, "--steps", 7)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    model, _ = load_model(studied)
    assert FamState.load(text.parent / "s", model).num_tokens_read > 3 * STUDY_BLOCK
    assert load_tensors(text.parent / "s.study", "study", 1)[1]["progress"]["step"] == 4
    run(*command(studied, text, "--steps", 7, "--resume"))
    parts = load_tensors(text.parent / "s.study", "study", 1)[0]
    run(*command(studied, text, "--steps", 7, "--overwrite"))
    whole = load_tensors(text.parent / "s.study", "study", 1)[0]
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_command_refuses_what_it_cannot_read_twice_and_another_model(studied, text, tmp_path):
    """Catches a pipe that is empty when a study is resumed, and rows of one model that another one studies."""
    said = run("study", "-", "--model", studied, "--save", tmp_path / "s", status=2, stdin=TEXT)
    assert "a text is read again when a study is resumed; give a file, not a pipe" in said
    run(*command(studied, text, "--steps", 1))
    save_model(*make_study_model(fam_length=5), tmp_path / "other")
    said = run(*command(tmp_path / "other", text, "--steps", 2, "--resume"), status=2)
    assert "fam_length" in said
    assert "unexpected" not in said
