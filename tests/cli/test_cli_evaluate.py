"""`fam evaluate`: rows of passkeys and next-token loss, appended, and resumed where they ended."""

import pytest
import tiny_models
from command_line import run, run_passkey

from transformerfam.reports.rows import RowFile, read_rows
from transformerfam.weights.models import save_model


def test_passkey_writes_rows_of_every_system(folder, tmp_path):
    """Would catch systems that share a model but not a row, and notes of the training that are lost."""
    output = tmp_path / "rows.jsonl"
    text = run_passkey(folder, output, "--system", "fam,fam_memory_zeroed,bswa,fam_untrained")
    rows = read_rows([output])
    assert len(rows) == 2 * 2 * 4
    assert {row["system"] for row in rows} == {"fam", "fam_memory_zeroed", "bswa", "fam_untrained"}
    assert {row["model"] for row in rows} == {str(folder)}
    assert {row["max_training_filler_tokens"] for row in rows if row["system"] == "fam"} == {512}
    assert "2 keys at every length" in text


def test_passkey_goes_on_where_a_killed_run_stopped(folder, tmp_path):
    """Would catch hours of questions evaluated again."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run_passkey(folder, whole)
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:2]) + lines[2][:20])
    run_passkey(folder, cut)
    assert cut.read_text() == whole.read_text()
    run_passkey(folder, cut)
    assert cut.read_text() == whole.read_text()


def test_passkey_stopped_by_ctrl_c_keeps_its_rows_and_says_so(folder, tmp_path, monkeypatch):
    """Would catch an interrupted evaluation that leaves the user without a way on."""
    output = tmp_path / "rows.jsonl"
    append = RowFile.append

    def impatient(self, row):
        append(self, row)
        if len(self.rows) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "append", impatient)
        text = run_passkey(folder, output, status=130)
    assert "keeps 3 rows; run the same command again to continue" in text
    assert len(read_rows([output])) == 3
    run_passkey(folder, output)
    assert len(read_rows([output])) == 4


def test_passkey_is_told_as_the_options_say(folder, tmp_path):
    """Would catch an option that is taken and not handed on."""
    output, wording = tmp_path / "rows.jsonl", tmp_path / "mine.toml"
    wording.write_text('intro = " The sky is {key}."\nquestion = " What is the sky?"\nanswer = " The sky is {key}"\n')
    told = ("--prefix-tokens", "uniform", "--digits", 3, "--mentions", 2, "--wording", wording)
    fixed = ("--model", folder, "--filler-tokens", "200,300", "--num-keys", 2, "--output", output)
    run("evaluate", "passkey", *fixed, *told, "--system", "fam,fam_memory_swapped,fam_memory_initial")
    rows = read_rows([output])
    assert len(rows) == 2 * 2 * 3
    assert {row["placing"] for row in rows} == {"uniform"}
    assert {(len(str(row["key"])), row["num_mentions"], row["wording"]) for row in rows} == {(3, 2, "mine")}
    assert list(tmp_path.glob("*.reading.safetensors")) == []
    text = run("evaluate", "passkey", *fixed, "--prefix-tokens", "somewhere", status=2)
    assert "--prefix-tokens has 'somewhere', required are whole numbers" in text


def test_rows_of_a_gated_memory_say_so(tmp_path):
    """Would catch a gated memory counted among the paper's."""
    plain, gated = tmp_path / "plain", tmp_path / "gated"
    for folder, update in ((plain, "paper"), (gated, "gated")):
        save_model(*tiny_models.make_passkey_model(update=update), folder)
    for folder, asked, name in (
        (plain, (), "fam"),
        (gated, (), "fam_gated"),
        (gated, ("--system", "fam"), "fam_gated"),
    ):
        output = tmp_path / f"{folder.name}-{len(asked)}.jsonl"
        run_passkey(folder, output, *asked)
        assert {row["system"] for row in read_rows([output])} == {name}
    text = run_passkey(plain, tmp_path / "none.jsonl", "--system", "fam_gated", status=2)
    assert "the model's memory is not gated; take fam" in text


def test_passkey_takes_a_book(folder, tmp_path, book):
    """Would catch a filler option that takes the paper's sentences alone."""
    run_passkey(folder, tmp_path / "rows.jsonl", "--filler", book)
    assert {row["filler"] for row in read_rows([tmp_path / "rows.jsonl"])} == {"book.txt"}


def test_next_token_shows_a_table_and_appends_rows(folder, tmp_path, book):
    """Would catch a change of configuration that does not reach the model."""
    output = tmp_path / "rows.jsonl"
    options = ("--model", folder, "--num-tokens", 50, "--output", output)
    assert "0 to 50" in run("evaluate", "next-token", book, *options, "--system", "fam,bswa")
    run("evaluate", "next-token", book, *options, "--system", "bswa", "--set", "num_memory_segments=2")
    rows = list(read_rows([output]))
    assert len({row["loss"] for row in rows}) == 3
    assert [row["model"] for row in rows] == [str(folder), str(folder), f"{folder} num_memory_segments=2"]


@pytest.mark.parametrize("systems", ["fam_memory_zeroed", "fam,fam_memory_zeroed", "bswa,fam_memory_swapped"])
def test_next_token_refuses_a_control_before_anything_is_read(folder, tmp_path, book, systems):
    """Would catch a control that is left out of the rows without a word, or refused when the others are measured."""
    output = tmp_path / "rows.jsonl"
    text = run("evaluate", "next-token", book, "--model", folder, "--system", systems, "--output", output, status=2)
    assert f"system '{systems.split(',')[-1]}' belongs to the passkey task; take fam or bswa" in text
    assert not output.exists()


def test_passkey_takes_a_changed_configuration_under_its_own_name(folder, tmp_path):
    """Would catch an ablation whose rows pass for those of the shipped memory, or that changes nothing."""
    output = tmp_path / "rows.jsonl"
    run_passkey(folder, output)
    run_passkey(folder, output, "--set", "block_size=4")
    plain, changed = (
        [row for row in read_rows([output]) if ("block_size=4" in row["model"]) == is_changed]
        for is_changed in (False, True)
    )
    assert len(plain) == len(changed) == 4
    assert all(a["num_blocks"] < b["num_blocks"] for a, b in zip(plain, changed, strict=True))


def test_next_token_takes_a_folder_and_standard_input_as_the_file(folder, tmp_path, book):
    """Would catch texts that are measured in one way as a file and in another as a stream."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(book.read_bytes())
    output = tmp_path / "rows.jsonl"
    options = ("--model", folder, "--system", "fam", "--output", output)
    run("evaluate", "next-token", book, *options)
    run("evaluate", "next-token", tmp_path / "texts", *options)
    run("evaluate", "next-token", "-", *options, stdin=book.read_bytes())
    rows = read_rows([output])
    assert len(rows) == 3
    assert len({(row["loss"], row["num_tokens"]) for row in rows}) == 1
    again = run("evaluate", "next-token", "-", "--model", folder, "--system", "fam,bswa", status=2, stdin=b"text")
    assert "standard input can be read once" in again
