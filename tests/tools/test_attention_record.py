"""Attention maps: what is recorded is what the model did, and the pictures can be drawn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_families import make_tiny
from tiny_llama import make_tiny_llama, random_ids
from typer.testing import CliRunner

from transformerfam import FamConfig, convert
from transformerfam.cli.app import app
from transformerfam.errors import TransformerFamError
from transformerfam.fam.piece import Piece
from transformerfam.reports.rows import read_rows
from transformerfam.tasks.passkey import PasskeyText
from transformerfam.tools.attention_pictures import (
    draw_map,
    memory_rows,
    plot_film,
    plot_maps,
    plot_memory,
    plot_writing,
)
from transformerfam.tools.attention_record import record_attention
from transformerfam.training.tiny import build_tiny_tokenizer


def converted(**fields: Any) -> Any:
    config = {"block_size": 8, "fam_length": 3, "num_memory_segments": 1, "fam_key_bias": 0.0, "num_sink_tokens": 2}
    return convert(make_tiny_llama(3), FamConfig(**config | fields))


def test_recording_changes_nothing_and_shares_sum_to_one() -> None:
    """Catches a recording that reads another text than the model, or keys counted to the wrong part."""
    model, ids = converted(), random_ids(1, 45)
    records = list(record_attention(model, ids, layers=[1]))
    assert [(r.block_idx, r.layer_idx) for r in records] == [(b, i) for b in range(5) for i in range(3)]
    state = model.read(ids[:, :40])
    for record in records:
        assert record.to_memory + record.to_fam + record.to_block == pytest.approx(1, abs=1e-5)
        assert (record.weights_HRS is not None) == (record.layer_idx == 1)
    last = records[-3:]
    assert [record.num_memory for record in last] == [10] * 3  # two sinks and one segment of 8
    assert [record.num_fam for record in last] == [3] * 3
    norms = state.fams[:, 0].pow(2).mean(-1).sqrt().mean(-1)
    torch.testing.assert_close(torch.tensor([record.fam_norm for record in last]), norms, atol=1e-5, rtol=1e-5)
    assert model.config._attn_implementation == "fam"
    assert records[0].num_memory == 0
    weights = records[4].weights_HRS
    assert weights is not None
    assert weights.shape == (4, 3 + 8, 8 + 3 + 8)  # no sinks yet: they are in the segment
    assert weights[:, :3, :8].max() == 0  # FAM rows see no memory segment
    assert weights[:, 3:, -1][:, :-1].max() == 0  # and no token sees a later one


@pytest.mark.parametrize(
    ("preset", "changes"), [("gated", {}), ("gated_rows", {}), ("gated_rows", {"fam_query": "previous"})]
)
def test_recorded_share_is_that_by_which_rows_moved(
    preset: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a share of other rows or keys, and a recording by dense weights that moves the FAM otherwise."""
    shape = {"block_size": 8, "fam_length": 3, "num_sink_tokens": 2}
    model: Any = convert(make_tiny_llama(3), FamConfig.preset(preset, **shape | changes))
    ids, shares = random_ids(1, 40), []
    records = list(record_attention(model, ids))
    note_weights = Piece.note_weights

    def note(piece: Piece, layer: Any, weights: Any) -> None:
        note_weights(piece, layer, weights)
        if layer.share is not None:
            share_F = layer.share[0] if layer.share.dim() == 2 else layer.share[0].mean(-1)  # over key/value heads
            shares.append(share_F.tolist())

    monkeypatch.setattr(Piece, "note_weights", note)
    state = model.read(ids)
    assert len(shares) == len(records) == 15
    for record, share in zip(records, shares, strict=True):
        assert record.to_block_of_rows == pytest.approx(share, abs=1e-5)
    assert 0.05 < min(map(min, shares)) < max(map(max, shares)) < 1
    norms = state.fams[:, 0].pow(2).mean(-1).sqrt().mean(-1)
    torch.testing.assert_close(torch.tensor([r.fam_norm for r in records[-3:]]), norms, atol=1e-5, rtol=1e-5)


def test_without_fam_there_is_no_norm() -> None:
    """Catches numbers of a memory that is not there."""
    records = list(record_attention(converted(fam_length=0), random_ids(1, 16)))
    assert all(record.fam_norm is None and record.to_fam == 0 for record in records)


def test_bad_requests_are_refused() -> None:
    """Catches pictures of what was not recorded."""
    model = converted()
    with pytest.raises(TransformerFamError, match="there is no layer 3, the model has layers 0 to 2"):
        list(record_attention(model, random_ids(1, 16), layers=[3]))
    with pytest.raises(TransformerFamError, match="the text has 7 tokens, required is a whole block of 8"):
        list(record_attention(model, random_ids(1, 7)))
    eager = convert(make_tiny("gpt_oss"), FamConfig(block_size=8, fam_length=2))
    with pytest.raises(TransformerFamError, match="cannot be recorded"):
        list(record_attention(eager, random_ids(1, 16)))
    records = list(record_attention(model, random_ids(1, 16), layers=[0]))
    with pytest.raises(TransformerFamError, match="there is no head 4, the model has heads 0 to 3"):
        plot_maps(records, [4], "x.png")
    with pytest.raises(TransformerFamError, match="no record has weights"):
        plot_maps([record for record in records if record.layer_idx], [0], "x.png")
    with pytest.raises(TransformerFamError, match=r"figure 'x.mp4' ends in '.mp4'"):
        plot_film(records, 0, "x.mp4")


def test_pictures_are_drawn(tmp_path: Path) -> None:
    """Catches a film without its frames, and maps longer than what is drawn of them."""
    model = converted(block_size=300)
    records = list(record_attention(model, random_ids(1, 900), layers=[0, 2]))
    plot_maps([r for r in records if r.block_idx == 1], [0, 3], tmp_path / "maps.svg")
    assert (tmp_path / "maps.svg").read_text().count("layer 2, head 3") == 1
    plot_film([r for r in records if r.layer_idx == 2], 1, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3  # type: ignore[attr-defined]
    plot_memory(records, tmp_path / "memory.svg")
    assert (tmp_path / "memory.svg").read_text().count("norm of the FAM") == 1
    assert len(memory_rows(records)) == 9
    plot_writing(records, tmp_path / "writing.svg")
    assert "share of a row" in (tmp_path / "writing.svg").read_text()
    with pytest.raises(TransformerFamError, match="no layer has FAM"):
        plot_writing([r for r in records if not r.to_block_of_rows], tmp_path / "none.svg")


class Canvas:
    """Axes that keep what is drawn."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[Any, ...]]] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: self.calls.setdefault(name, []).append(arguments)


def test_few_fam_rows_and_marked_tokens_are_seen() -> None:
    """Catches FAM rows that vanish among many tokens or are merged, and a mark next to its token."""
    records = list(record_attention(converted(block_size=600), random_ids(1, 1800), layers=[0]))
    record = next(r for r in records if r.block_idx == 1 and r.layer_idx == 0)
    canvas = Canvas()
    draw_map(canvas, record, 0, {599: "before", 600: "key", 601: "key", 1200: "behind"})
    ((keys, rows, weights),) = canvas.calls["pcolormesh"]
    assert weights.shape == (len(rows) - 1, len(keys) - 1)
    assert rows[3] / rows[-1] == pytest.approx(0.12, abs=0.01)  # three rows, each by itself
    lines = sorted(line for (line,) in canvas.calls["axvline"])
    assert (lines[1] - lines[0]) / keys[-1] == pytest.approx(0.12, abs=0.01)
    assert keys.index(lines[1]) - keys.index(lines[0]) == 3
    assert record.weights_HRS is not None
    assert weights.max() ** 2 == pytest.approx(float(record.weights_HRS[0].max()), abs=1e-6)
    assert [text[2].strip() for text in canvas.calls["text"]] == ["key"]  # other blocks have the others
    assert [call[0][0] - lines[1] for call in canvas.calls["plot"]] == [0.5, 1.5]


def test_places_of_the_key() -> None:
    """Catches marks next to the key's digits."""
    tokenizer = build_tiny_tokenizer()
    text = PasskeyText(tokenizer)
    ids, places = text.intro_ids(73914), text.key_places(73914)
    assert tokenizer.decode([ids[place] for place in places]).split() == ["73914", "73914"]


def test_report_attention_command(tmp_path: Path) -> None:
    """Catches a command that draws less than it says or adds its rows to those of older pictures, and `fam report ROWS`
    that no longer works with it."""
    runner = CliRunner()
    command = ["report", "attention", "--output", str(tmp_path / "maps"), "--blocks", "2", "--layers", "1,3"]
    for _ in range(2):
        result = runner.invoke(app, [*command, "--heads", "0,2", "--key", "73914", "--block", "0"])
        assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "maps").iterdir()}
    assert names == {"maps.png", "film.gif", "film.png", "memory.svg", "writing.svg", "attention.jsonl"}
    assert len(read_rows([tmp_path / "maps" / "attention.jsonl"])) == 2 * 4
    wrong = runner.invoke(app, ["report", str(tmp_path / "maps" / "attention.jsonl")])
    assert wrong.exit_code == 2
    assert "none is of a task that is reported" in " ".join(wrong.output.split())
    late = runner.invoke(app, [*command, "--block", "2"])
    assert "--block is 2, the text has blocks 0 to 1" in " ".join(late.output.split())
    beyond = runner.invoke(app, [*command, "--blocks", str(10**9), "--heads", "0,99"])  # before a block is read
    assert "there is no head 99, the model has heads 0 to 3" in " ".join(beyond.output.split())
    bad = runner.invoke(app, [*command, "--heads", "a"])
    assert bad.exit_code == 2
    assert "--heads has 'a', required are whole numbers" in " ".join(bad.output.split())
