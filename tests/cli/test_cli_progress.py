"""Progress: a bar on a terminal, else a line every half minute, and neither where a command is quiet."""

import io
import re
import sys
import time
from types import SimpleNamespace

import pytest
from rich.table import Table

from transformerfam.cli import progress
from transformerfam.cli.progress import follow, parts_bar, runs_bar, study_bar, tokens_bar, training_bar
from transformerfam.cli.verbosity import LEVEL, Verbosity


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Let a test say what time it is, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def shown_by(monkeypatch, stream, *columns):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", *columns or ["80"])
    return stream


def test_line_every_half_minute_without_a_terminal(monkeypatch, clock):
    """Catches a log that is silent for hours, one of a line a block, and rates that count what was done before."""
    stream = shown_by(monkeypatch, io.StringIO())
    with tokens_bar("reading") as update:
        for second in range(0, 100, 5):
            update(50_000 + 100 * second, 100_000, SimpleNamespace(num_bytes=1_500_000))
            clock[0] += 5
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == "reading: 53,000/100,000 tokens, ETA 0:07:50, 100 tokens/s, state 1.5 MB"


def test_length_that_is_not_known_has_no_time_left(monkeypatch, clock):
    """Catches a division by what is not known, for standard input."""
    stream = shown_by(monkeypatch, io.StringIO())
    with follow("reading", "tokens") as move:
        move(0, None, "")
        clock[0] += 40
        move(80, None, "")
    assert stream.getvalue() == "reading: 80 tokens, 2 tokens/s\n"


@pytest.mark.parametrize(("bar", "row", "words"), [
    (
        lambda: training_bar(100),
        {"step": 50, "stage": 1, "loss": 2.5, "key_accuracy": None, "tokens_per_second": 1234.0},
        "training: 51/100 steps, ETA 0:00:41, loss 2.500, 1,234 tokens/s, stage 1",
    ),
    (
        lambda: study_bar(100.0, None),
        {"step": 9, "seconds": 50.0, "loss": 2.5, "held_out_loss": 1.25},
        "studying: 50 %, ETA 0:00:41, step 10, loss 2.500, held out 1.250",
    ),
])  # fmt: skip
def test_trainings_and_studies_have_the_same_lines(monkeypatch, clock, bar, row, words):
    """Catches a long command whose log says nothing."""
    stream = shown_by(monkeypatch, io.StringIO())
    with bar() as update:
        update(row | {"step": 0, "seconds": 0.0})
        clock[0] += 41.5
        update(row)
    assert words in stream.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_bar_on_a_terminal_is_there_once_and_fits(monkeypatch, clock, width):
    """Catches a bar that is drawn once more on every line, and a narrow terminal that cuts the time left."""
    stream = shown_by(monkeypatch, Terminal(), str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    with tokens_bar("passkey, [fam]") as update:
        for done in (1, 500, 1000):
            clock[0] += 10
            update(done, 1999, SimpleNamespace(num_bytes=1_500_000))
    text = stream.getvalue()
    assert text.count("\n") <= 2
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").strip().splitlines()[-1]
    assert len(last) <= width
    assert "1,000/1,999 tokens, ETA 0:00:20" in last
    assert ("50 tokens/s" in last) is (width > 40)
    assert ("state 1.5 MB" in last) is (width == 200)
    assert ("passkey, [fam]:" in last) is (width >= 80)


def test_dumb_terminal_has_lines(monkeypatch, clock):
    """Catches control codes in an editor's shell."""
    stream = shown_by(monkeypatch, Terminal())
    monkeypatch.setenv("TERM", "dumb")
    with follow("reading", "tokens", 10) as move:
        clock[0] += 31
        move(1, 10, "")
    assert stream.getvalue() == "reading: 1/10 tokens\n"


def test_quiet_and_further_processes_show_nothing(monkeypatch, clock):
    """Catches a bar for each of eight processes, and one in spite of `-q`."""
    stream = shown_by(monkeypatch, Terminal())

    def go():
        with follow("reading", "tokens", 10) as move, runs_bar(Table):
            clock[0] += 31
            move(5, 10, "")

    with LEVEL.set_to(Verbosity.QUIET):
        go()
    monkeypatch.setenv("RANK", "1")
    with follow("reading", "tokens", 10) as move:
        move(5, 10, "")
    assert stream.getvalue() == ""


def test_parts_follow_one_another(monkeypatch, clock):
    """Catches the rate of a training that is counted on in its evaluation."""
    stream = shown_by(monkeypatch, io.StringIO())
    with parts_bar("fam-0") as update:
        for part in ("train", "ask"):
            update(part, 0, 10)
            clock[0] += 31
            update(part, 5, 10)
    lines = stream.getvalue().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["fam-0: train: 5/10 steps", "fam-0: ask: 5/10 steps"]


def test_table_of_runs_is_a_line_without_a_terminal(monkeypatch):
    """Catches a comparison of days whose log is empty, and the whole table in it again and again."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    stream = shown_by(monkeypatch, io.StringIO())
    with runs_bar(lambda: Table(title="comparison x", caption="1 done, 2 waiting")):
        begin = time.monotonic()
        while not stream.getvalue() and time.monotonic() - begin < 60:
            pass
    assert stream.getvalue().splitlines()[0] == "comparison x: 1 done, 2 waiting"
