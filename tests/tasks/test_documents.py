"""Losses on documents: where stretches begin, what a name is, what each number averages, and intervals."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from transformerfam.cli.app import app
from transformerfam.errors import TransformerFamError
from transformerfam.reports.losses import FAR, LOSS, columns_of, difference, documents_tables, mean_loss
from transformerfam.reports.rows import read_rows
from transformerfam.tasks import document_losses, next_token
from transformerfam.tasks.document_losses import DocumentLosses, finished_parts
from transformerfam.tasks.documents import names_in, read_documents

LINE = "The grass is green. The sky is blue. Here we go again. What is the pass key? 12345 is it.\n"


def word_tokenizer(text: str) -> PreTrainedTokenizerFast:
    words = {"<unk>": 0} | {word: number for number, word in enumerate(dict.fromkeys(text.split()), start=1)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return tiny_models.make_passkey_model()


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(LINE * 20)
    return path


def test_names_are_words_that_are_never_written_small() -> None:
    """Catches first words of sentences that count as names, and lemmas that do not."""
    text = "Anne saw the sea. The sea was calm, said Anne to Mary. by (REAL_ADD_SYM) and Is it? it is"
    assert [name for name, *_ in names_in(text)] == ["Anne", "Anne", "Mary", "REAL_ADD_SYM"]


def test_gap_of_a_name_is_the_tokens_since_it_was_last_seen(tmp_path: Path) -> None:
    """Catches gaps that are counted from the start of the file, from the first mention, or on other tokens."""
    words = [f"w{number}" for number in range(40)]
    words[3] = words[9] = words[30] = "Anne"
    words[12] = "Mary"
    text = " ".join(words)
    (tmp_path / "book.txt").write_text(text)
    (document,) = read_documents(tmp_path / "book.txt", word_tokenizer(text), 1, 40)
    expected = torch.zeros(40, dtype=torch.long)
    expected[9], expected[30] = 5, 20
    assert torch.equal(document.gap_T, expected)


def test_documents_are_spread_over_all_long_files_from_starts_of_lines(tmp_path: Path) -> None:
    """Catches stretches that leave out the end of a text, run over its end, or begin in the middle of a line."""
    lines = [" ".join(f"n{line}w{word}" for word in range(7)) for line in range(30)]
    (tmp_path / "a.txt").write_text("\n".join(lines[:20]))
    (tmp_path / "b.txt").write_text("\n".join(lines[20:]))
    (tmp_path / "short.txt").write_text(lines[0])
    tokenizer = word_tokenizer(" ".join(lines))
    documents = read_documents(tmp_path, tokenizer, 8, 21)
    assert {len(document.ids_T) for document in documents} == {21}
    starts = [tokenizer.decode(document.ids_T[:1]) for document in documents]
    assert all(start.endswith("w0") for start in starts)
    assert {document.source.partition(":")[0] for document in documents} == {"a.txt", "b.txt"}
    assert len(set(starts)) == 8
    assert [document.source for document in read_documents(tmp_path, tokenizer, 8, 21)] == [
        document.source for document in documents
    ]


def test_losses_are_those_of_one_pass_parted_by_place_block_and_name(pair: Any, book: Path, monkeypatch: Any) -> None:
    """Catches a token at the seam of two pieces or parts that is lost or counted twice, and shifted masks."""
    model, tokenizer = pair
    monkeypatch.setattr(next_token, "PIECE_TOKENS", 7)
    monkeypatch.setattr(document_losses, "BLOCK_START", 3)
    size = tiny_models.BLOCK_SIZE
    losses = DocumentLosses(
        path=book, num_documents=3, document_tokens=50, places=(0, 20, 33), far_tokens=10, batch_size=2
    )
    rows = list(losses.rows(model, tokenizer))
    assert [(row["document"], row["first_token"]) for row in rows] == [(n, p) for n in range(3) for p in (0, 20, 33)]
    for number, document in enumerate(losses.documents(tokenizer)):
        with torch.no_grad():
            logits = model(document.ids_T[None]).logits[0, :-1]
        loss_T = F.cross_entropy(logits, document.ids_T[1:], reduction="none")
        own = [row for row in rows if row["document"] == number]
        for row, (begin, end) in zip(own, ((0, 20), (20, 33), (33, 50)), strict=True):
            here = [place for place in range(1, 50) if begin <= place < end]
            starts = [place for place in here if place >= size and place % size < 3]
            far = [place for place in here if document.gap_T[place] >= 10]
            for places, loss, num in (
                (here, "loss", "num_predicted"),
                (starts, "block_start_loss", "num_block_start"),
                (far, "far_loss", "num_far"),
            ):
                assert row[num] == len(places)
                if places:
                    mean = loss_T[[place - 1 for place in places]].mean().item()
                    assert row[loss] == pytest.approx(mean, abs=1e-5)
                else:
                    assert row[loss] is None
    assert any(row["num_far"] for row in rows)


def test_parts_that_rows_have_are_not_measured_again(pair: Any, book: Path) -> None:
    """Catches documents that are read twice, and rows of another text or setting that count."""
    model, tokenizer = pair
    options: dict[str, Any] = {"path": book, "num_documents": 3, "document_tokens": 40, "places": (0, 20)}
    rows = list(DocumentLosses(**options).rows(model, tokenizer))
    losses = DocumentLosses(**options)
    losses.finished = finished_parts(rows[:3], losses)
    assert [(row["document"], row["first_token"]) for row in losses.rows(model, tokenizer)] == [
        (row["document"], row["first_token"]) for row in rows[3:]
    ]
    for change in ({"far_tokens": 9}, {"system": "bswa"}, {"places": (0, 21)}):
        assert not finished_parts(rows, DocumentLosses(**options | change))
    book.write_text(LINE * 21)
    assert not finished_parts(rows, DocumentLosses(**options))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"document_tokens": 5000}, "the longest file of .* tokens, required are 5,002 for 3 documents of 5,000"),
        ({"num_documents": 0}, "num_documents is 0, required is at least 1"),
        ({"places": (20, 0)}, r"places is \[20, 0\], required are numbers from 0 to 38, smallest first"),
        ({"places": (0, 39)}, r"places is \[0, 39\], required are numbers from 0 to 38"),
        ({"places": ()}, r"places is \[\], required"),
        ({"far_tokens": 0}, "far_tokens is 0, required is at least 1"),
        ({"batch_size": 0}, "batch_size is 0, required is at least 1"),
        ({"path": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_numbers_that_no_document_can_have_are_refused(pair: Any, book: Path, change: Any, match: str) -> None:
    """Catches a traceback, or a table without a word of why it is empty."""
    options = {"path": book, "num_documents": 3, "document_tokens": 40, "places": (0, 20)} | change
    with pytest.raises(TransformerFamError, match=match):
        list(DocumentLosses(**options).rows(*pair))


def row(document: int, loss: float | None, num: int, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {"document": document, "seed": seed, "loss": loss, "num_predicted": num, "first_token": 0} | more


def test_means_weigh_tokens_and_intervals_come_from_documents() -> None:
    """Catches means of means, and an interval that takes tokens of one document for many."""
    found = mean_loss([row(0, 1.0, 30), row(1, 4.0, 10), row(2, None, 0)], LOSS)
    assert found is not None
    assert found.mean == pytest.approx(1.75)
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(4.0))
    assert mean_loss([row(0, None, 0)], LOSS) is None
    assert mean_loss([], LOSS) is None


def test_differences_are_taken_document_by_document() -> None:
    """Catches intervals as wide as documents are different, and documents that one side alone has read."""
    own = [row(n, 3.0 + n, 10, seed) for n in range(6) for seed in (0, 1)]
    others = [row(n, 2.9 + n, 10, seed) for n in range(6) for seed in (0, 1)]
    found = difference([*own, row(9, 100.0, 10)], others, LOSS)
    assert found is not None
    assert [round(value, 6) for value in found] == [0.1, 0.1, 0.1]
    assert difference(own, [row(7, 1.0, 10)], LOSS) is None


def test_columns_are_the_parts_then_starts_of_blocks_and_far_names() -> None:
    """Catches a column over the wrong parts."""
    columns = columns_of((0, 10), 30, 5)
    assert [column.title for column in columns] == ["0 to 10", "10 to 30", "block start", "names after 5"]
    assert columns[1].of([row(0, 1.0, 3), row(0, 1.0, 3, first_token=10)])[0]["first_token"] == 10
    assert columns[3].part == FAR


def test_command_measures_once_and_compares_with_bswa(folder: Path, book: Path, tmp_path: Path) -> None:
    """Catches a command that appends the same rows twice, a table without differences, and controls that pass."""
    output = tmp_path / "rows.jsonl"
    command = ["evaluate", "documents", str(book), "--model", str(folder), "--output", str(output), "--documents", "2"]
    command += ["--document-tokens", "60", "--places", "0,30", "--far-tokens", "12"]
    for _ in range(2):
        done = CliRunner().invoke(app, [*command, "--system", "fam,bswa,full_context"])
        assert done.exit_code == 0, done.output
        assert len(read_rows([output])) == 12
    assert "minus bswa" in done.output
    assert {row["system"] for row in read_rows([output])} == {"fam", "bswa", "full_context"}
    tables = documents_tables(read_rows([output]))
    assert [table.row_count for table in tables] == [3, 2]
    refused = CliRunner().invoke(app, [*command, "--system", "fam_memory_zeroed"])
    assert refused.exit_code != 0
    assert "control of questions" in refused.output


def test_texts_of_one_name_have_tables_of_their_own(pair: Any, book: Path) -> None:
    """Catches means over two texts, or over a text before and after it was changed."""
    model, tokenizer = pair
    options: dict[str, Any] = {"path": book, "num_documents": 2, "document_tokens": 40, "places": (0, 20)}
    rows = list(DocumentLosses(**options).rows(model, tokenizer))
    book.write_text(LINE * 3 + "12345 is it. " * 30)
    rows += DocumentLosses(**options).rows(model, tokenizer)
    tables = documents_tables(rows)
    assert len(tables) == 2
    assert len({str(table.title) for table in tables}) == 2


def test_blocks_of_another_size_can_be_measured(pair: Any, book: Path) -> None:
    """Catches full attention whose block starts are those of no other system."""
    model, tokenizer = pair
    options: dict[str, Any] = {"path": book, "num_documents": 1, "document_tokens": 40, "places": (0,)}
    (row,) = DocumentLosses(**options, block_size=30).rows(model, tokenizer)
    assert row["num_block_start"] == 10


def test_stride_gives_every_token_as_many_before_it_and_no_more(pair: Any, book: Path) -> None:
    """Catches tokens at the seam of two stretches that are lost, counted twice or predicted from too little."""
    model, tokenizer = pair
    losses = DocumentLosses(path=book, num_documents=2, document_tokens=50, places=(0, 20), stride=15)
    rows = list(losses.rows(model, tokenizer))
    for number, document in enumerate(losses.documents(tokenizer)):
        expected = []
        for place in range(1, 50):
            begin = place - place % 15
            with torch.no_grad():
                logits = model(document.ids_T[None, max(0, begin - 15) : place]).logits[0, -1]
            expected.append(F.cross_entropy(logits, document.ids_T[place]).item())
        own = [row for row in rows if row["document"] == number]
        assert own[0]["loss"] == pytest.approx(sum(expected[:19]) / 19, abs=1e-5)
        assert own[1]["loss"] == pytest.approx(sum(expected[19:]) / 30, abs=1e-5)
    assert not finished_parts(rows, DocumentLosses(path=book, num_documents=2, document_tokens=50, places=(0, 20)))
