"""Rows on disk, and the tables and figures that follow from them."""

import json
import sys

import pytest
from rich.console import Console

from transformerfam.comparison.figures import line_style
from transformerfam.errors import CorruptFileError, MissingPackageError, TransformerFamError
from transformerfam.reports.accuracy import accuracy_by_length, wilson_interval
from transformerfam.reports.figure import label_ends, new_figure, save_figure
from transformerfam.reports.next_token import next_token_table
from transformerfam.reports.passkey import passkey_table, plot_passkey
from transformerfam.reports.rows import RowFile, read_rows
from transformerfam.reports.telling import Telling


def passkey_rows(system="fam", model="tiny", lengths=(512, 8192), num_keys=20, num_wrong=1, **fields):
    return [
        {
            "task": "passkey",
            "system": system,
            "model": model,
            "filler": "sentences",
            "filler_tokens": length,
            "key": 10_000 + key,
            "correct": key >= num_wrong,
            "max_training_filler_tokens": 512,
        }
        | fields
        for length in lengths
        for key in range(num_keys)
    ]


def render(table):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    console.file.close()
    return console.export_text()


@pytest.mark.parametrize(
    ("num_correct", "num_questions", "low", "high"),
    [(20, 20, 0.8389, 1.0), (0, 20, 0.0, 0.1611), (15, 20, 0.5313, 0.8881), (1, 1, 0.2065, 1.0)],
)
def test_wilson_interval_against_published_values(num_correct, num_questions, low, high):
    """Would catch a normal interval, which is empty at 20 of 20."""
    assert wilson_interval(num_correct, num_questions) == pytest.approx((low, high), abs=1e-4)


def test_accuracy_counts_whole_keys_by_length_and_keeps_series_apart():
    """Would catch systems, models, fillers or places of the key pooled into one curve."""
    rows = passkey_rows() + passkey_rows("bswa", num_wrong=20) + passkey_rows(filler="book.txt") + [{"task": "other"}]
    rows += [row | {"prefix_tokens": 9} for row in passkey_rows()]
    rows += [row | {"prefix_tokens": 9, "old_key": 12345} for row in passkey_rows()]
    for change in ({"placing": "uniform"}, {"num_digits": 6}, {"num_mentions": 2}, {"wording": "w"}):
        rows += [row | change for row in passkey_rows()]
    curves = accuracy_by_length(rows)
    assert [(*series[:3], tuple(series.telling)) for series in curves] == [
        ("tiny", "bswa", "sentences", (0, False, False, 5, 1, "paper")),
        ("tiny", "fam", "book.txt", (0, False, False, 5, 1, "paper")),
        ("tiny", "fam", "sentences", (0, False, False, 5, 1, "paper")),
        ("tiny", "fam", "sentences", (0, False, False, 5, 1, "w")),
        ("tiny", "fam", "sentences", (0, False, False, 5, 2, "paper")),
        ("tiny", "fam", "sentences", (0, False, False, 6, 1, "paper")),
        ("tiny", "fam", "sentences", (0, False, True, 5, 1, "paper")),
        ("tiny", "fam", "sentences", (9, False, False, 5, 1, "paper")),
        ("tiny", "fam", "sentences", (9, True, False, 5, 1, "paper")),
    ]
    labels = [series.label(curves) for series in curves if series.filler == "sentences" and series.system == "fam"]
    places = ["0 after the start"] * 4 + ["anywhere after the start", "9 after the start", "9 after another key"]
    ways = ["5 digits, given 1 times, worded paper"] * 7
    ways[1:4] = [
        *("5 digits, given 1 times, worded w", "5 digits, given 2 times, worded paper"),
        "6 digits, given 1 times, worded paper",
    ]
    assert labels == [f"fam (sentences) {place}, {way}" for place, way in zip(places, ways, strict=True)]
    point = curves["tiny", "fam", "sentences", Telling()][1]
    assert (point.filler_tokens, point.num_correct, point.num_questions, point.share) == (8192, 19, 20, 0.95)


def test_rows_survive_and_grow_when_the_file_is_opened_again(tmp_path):
    """Would catch a resumed run that overwrites the rows of the first."""
    path = tmp_path / "new" / "rows.jsonl"
    with RowFile(path) as rows:
        rows.append({"task": "a", "n": 1})
        assert path.read_text() == '{"task": "a", "n": 1}\n'  # flushed, not only buffered
    with RowFile(path) as rows:
        assert rows.rows == [{"task": "a", "n": 1}]
        rows.append({"task": "b"})
    assert [row["task"] for row in read_rows([path])] == ["a", "b"]


def test_line_cut_by_a_killed_run_is_dropped(tmp_path):
    """Would catch a file that cannot be resumed, or two rows on one line, after SIGKILL or a full disk."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"task": "a"}\n{"task": "b", "k')
    with RowFile(path) as rows:
        rows.append({"task": "c"})
    assert [json.loads(line)["task"] for line in path.read_text().splitlines()] == ["a", "c"]


@pytest.mark.parametrize("content", ["no json\n", "[1]\n", '{"x": 1}\n'])
def test_file_that_holds_no_rows_is_refused_and_left_alone(tmp_path, content):
    """Would catch rows appended to somebody's other file."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"task": "a"}\n' + content)
    for use in (RowFile, lambda p: read_rows([p])):
        with pytest.raises(CorruptFileError, match="line 2 of .*rows.jsonl is not a result row.*field task"):
            use(path)
    assert path.read_text().endswith(content)


def test_missing_file_and_folder_that_cannot_be_written_are_named(tmp_path):
    """Would catch a bare OSError."""
    with pytest.raises(CorruptFileError, match="cannot read .*none.jsonl .*check the path"):
        read_rows([tmp_path / "none.jsonl"])
    (tmp_path / "file").write_text("")
    with pytest.raises(TransformerFamError, match="could not write .*free space or choose another file"):
        RowFile(tmp_path / "file" / "rows.jsonl")


def test_full_disk_keeps_the_rows_before(tmp_path, monkeypatch):
    """Would catch a run whose rows are lost when the disk fills up."""
    path = tmp_path / "rows.jsonl"
    with RowFile(path) as rows:
        rows.append({"task": "a"})

        class Full:
            def __getattr__(self, name):
                return getattr(inner, name)

            def flush(self):
                raise OSError(28, "No space left on device")

        inner = rows._file
        monkeypatch.setattr(rows, "_file", Full())
        with pytest.raises(TransformerFamError, match="No space left on device; rows before are kept"):
            rows.append({"task": "b"})
    assert [row["task"] for row in read_rows([path])] == ["a"]


def test_table_shows_share_interval_and_what_tells_the_columns_apart():
    """Would catch columns that cannot be distinguished, or an accuracy without its interval."""
    text = render(passkey_table(passkey_rows() + passkey_rows("bswa", num_wrong=20, lengths=(512,))))
    assert "0.95 [0.76, 0.99]" in text
    assert "8,192" in text
    assert "bswa" in text
    assert "20 keys at every length" in text
    assert "-" in text  # bswa was not evaluated at 8,192
    both = render(passkey_table(passkey_rows() + passkey_rows(model="smollm2") + passkey_rows(filler="b.txt")))
    assert "smollm2 fam" in both
    assert "(b.txt)" in both


def test_tables_are_none_without_rows_of_their_task():
    """Would catch empty tables in a report."""
    assert passkey_table([{"task": "next-token"}]) is None
    assert next_token_table(passkey_rows()) is None


def test_next_token_table_shows_loss():
    """Would catch a segment that looks like the whole text."""
    row = {"task": "next-token", "model": "tiny", "system": "fam", "file": "b.txt", "first_token": 500}
    text = render(next_token_table([row | {"num_tokens": 250, "loss": 3.14159, "accuracy": 0.5}]))
    assert "500 to 750" in text
    assert "3.1416" in text


def test_figure_is_the_same_bytes_for_the_same_rows_and_names_its_lines(tmp_path):
    """Would catch a figure that changes in the repository with every run, and lines without names."""
    rows = passkey_rows() + passkey_rows("bswa", num_wrong=20) + passkey_rows("fam_memory_zeroed", num_wrong=20)
    for name in ("a.svg", "b.svg", "c.png"):
        plot_passkey(rows, tmp_path / "figures" / name)
    text = (tmp_path / "figures" / "a.svg").read_text()
    assert text == (tmp_path / "figures" / "b.svg").read_text()
    for label in (">fam<", ">bswa<", ">fam_memory_zeroed<", ">longest in training<", ">8k<"):
        assert label in text
    assert (tmp_path / "figures" / "c.png").read_bytes().startswith(b"\x89PNG")


def test_lines_that_end_together_are_named_behind_samples_in_their_order(tmp_path):
    """Would catch labels one upon another, and names that fit any of the lines which end at the same point."""
    with new_figure(tmp_path / "figure.svg", (6.4, 3.6)) as (figure, (axes,)):
        styles = {"late": ("--", "s"), "early": (":", "^"), "high": ("-", "o")}
        heights = {"late": [1.0, 0.8, 0.0], "early": [1.0, 0.1, 0.0], "high": [1.0, 1.0, 1.0]}
        lines = [
            axes.plot([1, 2, 4], heights[name], linestyle=line, marker=marker, color="#123456")[0]
            for name, (line, marker) in styles.items()
        ]
        label_ends(axes, list(zip(lines, styles, strict=True)))
        save_figure(figure, tmp_path / "figure.svg")
        boxes = sorted(axes.artists, key=lambda box: box.xy[1])
        named = [box.offsetbox.get_children() for box in boxes]
        assert [text.get_text() for _, text in named] == ["early", "late", "high"]
        assert boxes[1].xy[1] - boxes[0].xy[1] > 0.05
        for area, text in named:
            (sample,) = area.get_children()
            assert (sample.get_linestyle(), sample.get_marker()) == styles[text.get_text()]
            assert sample.get_color() == "#123456"


def test_no_two_lines_of_a_panel_look_alike():
    """Would catch FAM and the seventh system of a panel in one style, indistinguishable."""
    styles = [line_style(system, number) for number, system in enumerate(["fam", *"abcdefghijklmnop"])]
    assert len({(style["linestyle"], style["marker"]) for style in styles}) == len(styles)
    assert {style["linewidth"] for style in styles[1:]} < {style["linewidth"] for style in styles}


def test_line_that_ends_below_the_limits_is_named_at_the_lower_one(tmp_path):
    """Would catch a name far below its axes, upon those of the next row."""
    with new_figure(tmp_path / "figure.svg", (6.4, 3.6)) as (_, (axes,)):
        lines = [axes.plot([1, 2], heights)[0] for heights in ([1.0, -600.0], [1.0, 1.0])]
        label_ends(axes, list(zip(lines, ("low", "high"), strict=True)))
        assert [box.xy[1] for box in axes.artists] == [0.0, 1.0]


def test_figure_takes_a_length_of_zero_and_a_million(tmp_path):
    """Would catch a logarithmic axis that loses the first point."""
    plot_passkey(passkey_rows(lengths=(0, 64, 1_000_000)), tmp_path / "f.svg")
    assert ">1.0M<" in (tmp_path / "f.svg").read_text()


def test_figure_of_another_kind_or_of_nothing_is_refused(tmp_path):
    """Would catch an empty picture."""
    with pytest.raises(TransformerFamError, match=r"ends in '.gif', required is one of .svg, .png, .pdf"):
        plot_passkey(passkey_rows(), tmp_path / "f.gif")
    with pytest.raises(TransformerFamError, match="there are 0 passkey rows"):
        plot_passkey([{"task": "next-token"}], tmp_path / "f.svg")


def test_figure_without_matplotlib_says_how_to_install_it(tmp_path, monkeypatch):
    """Would catch an ImportError for an optional package."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        MissingPackageError, match=r"needs the package matplotlib.*pip install 'transformerfam\[plots\]'"
    ):
        plot_passkey(passkey_rows(), tmp_path / "f.svg")


def test_row_that_is_in_two_files_is_refused(tmp_path):
    """Would catch a copy under a glob, by which the interval is narrower than the questions make it."""
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in passkey_rows()))
    with pytest.raises(CorruptFileError, match=r"b.jsonl has a row that .*a.jsonl has, too"):
        read_rows([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    with pytest.raises(CorruptFileError, match="give each row once"):
        read_rows([tmp_path / "a.jsonl"] * 2)
