"""`fam read`: whatever ends it, and wherever its output goes, the reading is saved and can be resumed."""

import os
import signal
import subprocess
import sys

import pytest
from command_line import run
from tiny_models import PASSKEY_TEXT
from typer.testing import CliRunner

from transformerfam import FamState, processes
from transformerfam.cli import read as cli_read
from transformerfam.cli.app import app
from transformerfam.errors import ReadInterrupted, TransformerFamError
from transformerfam.processes import ends_as_ctrl_c, ends_noted, uninterrupted
from transformerfam.tasks import passkey_evaluation
from transformerfam.tasks.passkey_evaluation import evaluate_passkey
from transformerfam.tasks.reading import read_text_stream
from transformerfam.tasks.text import decode_utf8, encode, list_files, stream_token_ids
from transformerfam.weights.models import load_model


def fam(*arguments, **streams):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-m", "transformerfam", *map(str, arguments)], env=environment, **streams)


def loaded(folder, path):
    return FamState.load(path, load_model(folder)[0])


def resumed(text):
    """Run the command to resume that a message gives."""
    command = text[text.index("resume with: fam ") :].split()[3:]
    assert command[0] == "read"
    return command


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full; there it always runs")
def test_reading_is_saved_wherever_its_output_goes(folder, book, tmp_path):
    """Would catch a reading lost to `| true`, a full disk, or closed streams."""
    broken_in, broken_out = os.pipe()
    os.close(broken_in)
    with open("/dev/full", "w") as full:
        process = fam("read", book, "--model", folder, "--save", tmp_path / "s", stdout=broken_out, stderr=full)
        assert process.wait() == 0
    os.close(broken_out)
    assert loaded(folder, tmp_path / "s").num_tokens_read == len(encode(load_model(folder)[1], PASSKEY_TEXT))


def test_bar_and_messages_leave_standard_output_to_results(folder, book, tmp_path):
    """Would catch a bar in what a pipe hands on."""
    result = CliRunner().invoke(app, ["read", str(book), "--model", str(folder), "--save", str(tmp_path / "s")])
    assert result.stdout == ""
    assert "read" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_reading_that_is_ended_is_kept(folder, book, tmp_path, monkeypatch, number):
    """Would catch SIGTERM of a scheduler, or a closed terminal, that throws hours of reading away."""
    plain = cli_read.read_text_stream

    def read(*arguments, progress, **options):
        def update(done, moved):
            if done > 100:
                signal.raise_signal(number)
            progress(done, moved)

        return plain(*arguments, progress=update, **options)

    save = tmp_path / "part"
    with monkeypatch.context() as patch:
        patch.setattr(cli_read, "read_text_stream", read)
        before = signal.getsignal(number)
        text = run("read", book, "--model", folder, "--save", save, status=130)
        assert signal.getsignal(number) is before
    assert "interrupted after" in text
    run(*resumed(text))
    run("read", book, "--model", folder, "--save", tmp_path / "whole")
    part, whole = loaded(folder, save), loaded(folder, tmp_path / "whole")
    assert part.row_lengths == whole.row_lengths
    assert (part.fams - whole.fams).abs().max() < 1e-5


def test_signal_waits_for_the_piece_at_hand(folder):
    """Would catch a state whose lower layers have read a block that the upper ones have not."""
    model, tokenizer = load_model(folder)
    ids = encode(tokenizer, PASSKEY_TEXT)[:96]
    begun = model.init_state().detach()
    layer = model.get_decoder().layers[1]
    hook = layer.register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(ReadInterrupted) as caught:
        model.read(ids, begun)
    hook.remove()
    state, done = caught.value.state, caught.value.num_tokens_done
    assert done == state.num_tokens_read == model.fam_config.block_size
    assert (model.read(ids[done:], state).fams - model.read(ids).fams).abs().max() < 1e-6


@pytest.mark.parametrize("ends", ["by Ctrl-C", "by an error", "whole"])
def test_second_ctrl_c_does_not_hide_where_the_reading_is(folder, book, tmp_path, monkeypatch, ends):
    """Would catch a held key that hides where hours of reading were saved, or whether they were."""
    plain_read, plain_save = cli_read.read_text_stream, cli_read.save_somewhere

    def read(*arguments, progress, **options):
        def update(done, moved):
            progress(done, moved)
            if done > 100 and ends == "by Ctrl-C":
                try:
                    signal.raise_signal(signal.SIGINT)
                finally:
                    signal.raise_signal(signal.SIGINT)  # while the first is on its way

        plain_read(*arguments, progress=update, **options)
        if ends == "by an error":
            raise RuntimeError("the machine is tired")

    def save_somewhere(*arguments):
        signal.raise_signal(signal.SIGINT)
        kept = plain_save(*arguments)
        signal.raise_signal(signal.SIGINT)
        return kept

    monkeypatch.setattr(cli_read, "read_text_stream", read)
    monkeypatch.setattr(cli_read, "save_somewhere", save_somewhere)
    save, status = tmp_path / "part", {"by Ctrl-C": 130, "by an error": 2, "whole": 0}[ends]
    text = run("read", book, "--model", folder, "--save", save, status=status)
    assert f"bytes in {save}" in text if ends == "whole" else f"kept in {save}; resume with: fam read" in text
    assert loaded(folder, save).num_tokens_read > 100


def test_ctrl_c_is_heard_again_once_it_has_settled(monkeypatch):
    """Would catch a command that can be interrupted but once."""
    monkeypatch.setattr(processes, "SETTLE_SECONDS", 0.0)
    with ends_as_ctrl_c():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


def test_training_that_ends_itself_takes_a_held_key_for_one(monkeypatch):
    """Would catch a run that a second Ctrl-C kills before it has saved, milliseconds after the first."""
    with ends_as_ctrl_c(), ends_noted() as noted:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert len(noted) == 3
        monkeypatch.setattr(processes, "SETTLE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_body_that_is_not_interrupted_hears_the_signal_at_its_end():
    """Would catch a Ctrl-C that is lost."""
    steps = []

    def work():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            steps.append("done")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["done"]


def test_stream_with_a_bad_byte_at_its_end_is_kept_up_to_there(folder, tmp_path):
    """Would catch a day of a log thrown away for its last byte."""
    save = tmp_path / "part"
    content = PASSKEY_TEXT.encode()
    text = run("read", "-", "--model", folder, "--save", save, status=2, stdin=content + b"sky\xff")
    assert f"byte 0xff at position {len(content) + 3}" in text
    run(*resumed(text), stdin=(PASSKEY_TEXT + "sky is").encode())
    model, tokenizer = load_model(folder)
    whole = model.read(encode(tokenizer, PASSKEY_TEXT + "sky is"))
    part = FamState.load(save, model)
    assert part.row_lengths == whole.row_lengths
    assert (part.fams - whole.fams).abs().max() < 1e-5


def test_error_in_the_model_leaves_the_state_in_front_of_its_piece(folder):
    """Would catch a half moved state that is saved as if it were whole, after memory ran out."""
    model, tokenizer = load_model(folder)
    state = model.init_state().detach()
    before = state.fork()
    layer = model.get_decoder().layers[1]
    hook = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        read_text_stream(model, tokenizer, [PASSKEY_TEXT], state)
    hook.remove()
    assert state.row_lengths == before.row_lengths
    assert state.fams.equal(before.fams)


def test_target_is_checked_before_the_reading(folder, book, tmp_path, monkeypatch):
    """Would catch hours of reading in front of a folder that does not exist."""
    monkeypatch.setattr(cli_read, "read_text_stream", lambda *_, **__: pytest.fail("it was read"))
    assert "could not write" in run("read", book, "--model", folder, "--save", tmp_path / "no" / "s", status=2)


def test_reading_is_saved_elsewhere_if_its_folder_has_gone(folder, book, tmp_path, monkeypatch):
    """Would catch a whole reading lost because its folder was removed meanwhile."""
    gone, here = tmp_path / "gone", tmp_path / "here"
    gone.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    plain = cli_read.read_text_stream
    monkeypatch.setattr(cli_read, "read_text_stream", lambda *a, **b: (plain(*a, **b), gone.rmdir()))
    text = run("read", book, "--model", folder, "--save", gone / "s", status=2)
    (kept,) = here.glob("*/s")
    assert f"in {kept}" in text
    assert "could not write" in text
    assert loaded(folder, kept).num_tokens_read == len(encode(load_model(folder)[1], PASSKEY_TEXT))


# Texts that can be read once


def test_pipe_of_a_shell_is_read(folder, tmp_path):
    """Would catch `<(command)`, whose tokens were counted first and were gone then."""
    ends = os.pipe()
    os.write(ends[1], PASSKEY_TEXT.encode())
    os.close(ends[1])
    run("read", f"/dev/fd/{ends[0]}", "--model", folder, "--save", tmp_path / "s")
    os.close(ends[0])
    assert loaded(folder, tmp_path / "s").num_tokens_read == len(encode(load_model(folder)[1], PASSKEY_TEXT))


def test_named_pipe_is_refused(tmp_path):
    """Would catch a command that waits for ever for somebody to write."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TransformerFamError, match="it is a named pipe; read it from standard input"):
        list_files(tmp_path / "pipe")


def test_closed_standard_input_is_named(folder, tmp_path, monkeypatch):
    """Would catch a traceback in a service without standard input."""
    monkeypatch.setattr(sys, "stdin", None)
    from transformerfam.tasks.text import stream_text

    with pytest.raises(TransformerFamError, match="standard input is closed"):
        next(stream_text("-"))


def test_stream_that_breaks_off_gives_its_whole_words_first(folder):
    """Would catch thousands of tokens held back when a stream ends with an error, or half a word read as a whole."""
    tokenizer = load_model(folder)[1]

    def pieces():
        yield b"The sky is blue. The gra"
        raise TransformerFamError("cable pulled")

    found = []
    with pytest.raises(TransformerFamError, match="cable pulled"):
        found.extend(stream_token_ids(decode_utf8(pieces(), "cable"), tokenizer))
    assert [i for ids in found for i in ids] == encode(tokenizer, "The sky is blue. The")


# Readings of evaluations


def test_damaged_reading_of_an_evaluation_is_named(tmp_path, folder):
    """Would catch hours of a reading that is read again without a word."""
    model, tokenizer = load_model(folder)
    options = {"filler_lengths": [60], "checkpoint": tmp_path / "rows.jsonl", "num_keys": 2}
    evaluation = passkey_evaluation.PasskeyEvaluation(**options, checkpoint_seconds=0.0)
    rows = evaluation.rows(model, tokenizer)
    next(rows)
    (path,) = tmp_path.glob("*.reading.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="reading.safetensors .*truncated.*the text is read again from its beginning"):
        assert len(list(evaluate_passkey(model, tokenizer, **options))) == 2


def test_reading_of_an_evaluation_that_is_ended_is_kept(tmp_path, folder):
    """Would catch the minutes since the last save, or a first piece, lost to Ctrl-C; rows are at other places."""
    model, tokenizer = load_model(folder)
    options = {"filler_lengths": [300], "num_keys": 3, "checkpoint": tmp_path / "rows.jsonl"}
    whole = list(evaluate_passkey(model, tokenizer, filler_lengths=[300], num_keys=3))
    seen = []

    def interrupt(done, total, state):
        seen.append(state.num_tokens_read)
        if len(seen) == 9:
            raise KeyboardInterrupt

    with pytest.raises(ReadInterrupted):
        list(evaluate_passkey(model, tokenizer, **options, progress=interrupt))
    (path,) = tmp_path.glob("*.reading.safetensors")
    assert FamState.load(path, model).num_tokens_read == seen[-1]
    assert list(evaluate_passkey(model, tokenizer, **options, progress=interrupt)) == whole
    assert seen[9] > seen[8]
