"""Attention maps, a film of them over blocks, and what becomes of the FAM: pictures of `attention_record`.

Source: figures 4 and 11 of arXiv 2404.09173.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from transformerfam.errors import MissingPackageError, TransformerFamError
from transformerfam.reports.figure import (
    LINES,
    MARKERS,
    MARKS,
    label_ends,
    new_figure,
    require_figure,
    save_figure,
    write_figure,
)
from transformerfam.tools.attention_record import BlockRecord

FILM_SUFFIXES = (".gif", ".png", ".svg", ".pdf")
MAX_CELLS = 128
"""Rows or keys of a map that are drawn; longer ones are drawn in steps, each the largest weight in it."""
FRAME_MILLISECONDS = 600
MIN_FAM_SHARE = 0.12
"""Of a map's height and width, how much the FAM's rows and keys take at least, so that they can be seen."""


def plot_maps(
    records: Sequence[BlockRecord], heads: Sequence[int], path: str | Path, marks: Mapping[int, str] | None = None
) -> None:
    """Draw the maps of chosen layers and heads in one block: dark where a row looks, FAM marked on both sides.

    Args:
        records: of the layers to draw, with weights, all of one block.
        heads: numbers of the heads.
        path: file to write.
        marks: names of single tokens, by their place in the text.

    Raises:
        TransformerFamError: there are no weights, or no such head.
        MissingPackageError: matplotlib is not installed.
    """
    records = _with_weights(records, heads)
    size = (2.3 * len(heads) + 0.4, 2.2 * len(records) + 0.5)
    with new_figure(path, size, len(records), len(heads)) as (figure, all_axes):
        for number, axes in enumerate(all_axes):
            record, head = records[number // len(heads)], heads[number % len(heads)]
            draw_map(axes, record, head, marks)
            axes.set_title(f"layer {record.layer_idx}, head {head}", fontsize=8)
        figure.suptitle(
            f"attention in block {records[0].block_idx}: rows look at keys; FAM between the lines", fontsize=9
        )
        save_figure(figure, path)


def plot_film(
    records: Sequence[BlockRecord], head: int, path: str | Path, marks: Mapping[int, str] | None = None
) -> None:
    """Draw one head's maps block after block: a GIF, or a strip in one picture.

    Args:
        records: of one layer, with weights, in the order of blocks.
        head: number of the head.
        path: file to write, .gif for a film.
        marks: names of single tokens, by their place in the text.

    Raises:
        TransformerFamError: there are no weights, no such head, or the suffix is another one.
        MissingPackageError: matplotlib or Pillow is not installed.
    """
    path = Path(path)
    require_figure(path, FILM_SUFFIXES)
    records = _with_weights(records, [head])
    if path.suffix != ".gif":
        with new_figure(path, (1.9 * len(records), 2.3), 1, len(records)) as (figure, all_axes):
            for axes, record in zip(all_axes, records, strict=True):
                draw_map(axes, record, head, marks)
                axes.set_title(f"block {record.block_idx}", fontsize=8)
            save_figure(figure, path)
        return
    with new_figure(None, (3.4, 3.4)) as (figure, (axes,)), tempfile.TemporaryDirectory() as folder:
        from matplotlib.animation import FuncAnimation

        def frame(number: int) -> list[Any]:
            axes.clear()
            draw_map(axes, records[number], head, marks)
            axes.set_title(f"layer {records[0].layer_idx}, head {head}, block {records[number].block_idx}", fontsize=8)
            return []

        film = FuncAnimation(figure, frame, frames=len(records), interval=FRAME_MILLISECONDS)
        drawn = Path(folder) / "film.gif"
        try:
            film.save(drawn, writer="pillow", dpi=110)
        except ImportError as error:
            raise MissingPackageError("a film needs the package pillow: pip install pillow") from error
        write_figure(drawn.read_bytes().removesuffix(b";") + MARKS[".gif"][1], path)


def draw_map(axes: Any, record: BlockRecord, head: int, marks: Mapping[int, str] | None = None) -> None:
    """Draw one map, keys from left to right, rows from top to bottom; the FAM's are drawn larger where they are few.

    Args:
        axes: where to.
        record: with weights.
        head: number of the head.
        marks: names of single tokens, by their place in the text; a name is written once.
    """
    assert record.weights_HRS is not None
    weights_RS = record.weights_HRS[head].float().cpu()
    num_rows, num_keys = weights_RS.shape
    first, last = record.num_memory, record.num_memory + record.num_fam
    rows, keys = _Scale(num_rows, 0, record.num_fam_rows), _Scale(num_keys, first, last)
    for dim, scale in enumerate((rows, keys)):  # the largest weight of each step, so that a single key stays in sight
        weights_RS = torch.stack([part.amax(dim) for part in weights_RS.split(scale.steps, dim=dim)], dim=dim)
    axes.pcolormesh(
        keys.edges,
        rows.edges,
        weights_RS.sqrt().numpy(),  # weights spread over many keys are seen too
        cmap="Greys",
        vmin=0,
        vmax=1,
        rasterized=True,
    )
    axes.set_xlim(0, keys.at(num_keys))
    axes.set_ylim(rows.at(num_rows), 0)
    for place in sorted({first, last} - {0}):
        axes.axvline(keys.at(place), color="black", linewidth=0.7, linestyle=":")
    if record.num_fam_rows:
        axes.axhline(rows.at(record.num_fam_rows), color="black", linewidth=0.7, linestyle=":")
    spans = [("memory", 0, first), ("FAM", first, last), ("block", last, num_keys)]
    ticks = [((keys.at(start) + keys.at(end)) / 2, name) for name, start, end in spans if end > start]
    axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=6)
    ticks = [(rows.at(record.num_fam_rows) / 2, "FAM")] if record.num_fam_rows else []
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=6, rotation=90, va="center")
    axes.tick_params(length=0)
    _mark_tokens(axes, [(keys.at(last + place), name) for place, name in _marks_of(record, num_keys - last, marks)])


class _Scale:
    """Where rows, or keys, are drawn: in steps where there are many, the FAM's wide enough to be seen."""

    def __init__(self, length: int, first: int, last: int) -> None:
        num_fam, others = last - first, length - (last - first)
        self.steps: list[int] = []
        for span, number in ((first, others), (num_fam, num_fam), (length - last, others)):
            step = max(1, -(-number // MAX_CELLS))
            self.steps += [step] * (span // step) + [span % step] * (span % step > 0)
        wanted = MIN_FAM_SHARE / (1 - MIN_FAM_SHARE) * others
        self.first, self.last, self.width = first, last, max(1.0, wanted / num_fam) if num_fam else 1.0
        places = [sum(self.steps[:number]) for number in range(len(self.steps) + 1)]
        self.edges = [self.at(place) for place in places]

    def at(self, place: float) -> float:
        """Return where a row or key begins in the picture."""
        inside = min(max(place - self.first, 0), self.last - self.first)
        return place + inside * (self.width - 1)


def _marks_of(record: BlockRecord, block_size: int, marks: Mapping[int, str] | None) -> list[tuple[float, str]]:
    """Return the marked tokens of a block, by their place in it; the first of each name carries it."""
    start, found = record.block_idx * block_size, []
    named: set[str] = set()
    for place, name in sorted((marks or {}).items()):
        if start <= place < start + block_size:
            found.append((place - start + 0.5, "" if name in named else name))
            named.add(name)
    return found


def _mark_tokens(axes: Any, places: Sequence[tuple[float, str]]) -> None:
    for place, name in places:
        axes.plot([place], [0], marker="v", markersize=2.5, color="black", clip_on=False, linestyle="")
        if name:
            axes.text(place, 0, f" {name}", fontsize=5, rotation=90, ha="center", va="bottom")


def plot_memory(records: Sequence[BlockRecord], path: str | Path) -> None:
    """Draw, over blocks and for every layer: the FAM's norm, its change per block, and what tokens give to it.

    Args:
        records: of all blocks and layers.
        path: file to write.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    by_layer: dict[int, list[BlockRecord]] = {}
    for record in records:
        by_layer.setdefault(record.layer_idx, []).append(record)
    panels: Sequence[tuple[str, str]] = (
        ("norm of the FAM (RMS)", "fam_norm"),
        ("change per block (of the FAM's length)", "fam_change"),
        ("share of attention to the FAM", "to_fam"),
        ("share of attention to memory segments", "to_memory"),
        ("share of attention to the own block", "to_block"),
    )
    panels = [(title, name) for title, name in panels if any(getattr(record, name) for record in records)]
    with new_figure(path, (6.4, 1.9 * len(panels)), len(panels)) as (figure, all_axes):
        for axes, (title, name) in zip(all_axes, panels, strict=True):
            lines: list[tuple[Any, str]] = []
            for number, (layer_idx, own) in enumerate(by_layer.items()):
                values = [(record.block_idx, getattr(record, name)) for record in own]
                values = [(block, value) for block, value in values if value is not None]
                if not values:
                    continue
                (line,) = axes.plot(
                    *zip(*values, strict=True),
                    color="black",
                    linewidth=0.9,
                    linestyle=LINES[number % len(LINES)],
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=3,
                    markerfacecolor="white",
                    markevery=max(1, len(values) // 12),
                )
                lines.append((line, f"layer {layer_idx}"))
            label_ends(axes, lines, axes.get_ylim(), 6)
            axes.set_title(title, loc="left", fontsize=8)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        all_axes[-1].set_xlabel("block")
        save_figure(figure, path)


def plot_writing(records: Sequence[BlockRecord], path: str | Path) -> None:
    """Draw what each FAM row wrote, block by block: dark where its attention fell on the block, not on the FAM.

    Layers are stacked, the lowest at the bottom, each with its rows.

    Args:
        records: of all blocks and layers, of a model with FAM.
        path: file to write.

    Raises:
        TransformerFamError: no layer has FAM.
        MissingPackageError: matplotlib is not installed.
    """
    by_layer: dict[int, list[tuple[float, ...]]] = {}
    for record in records:
        if record.to_block_of_rows:
            by_layer.setdefault(record.layer_idx, []).append(record.to_block_of_rows)
    if not by_layer:
        raise TransformerFamError("no layer has FAM, so no row writes; required is fam_length of at least 1")
    shares_RN = torch.cat([torch.tensor(own).T for _, own in sorted(by_layer.items())])
    num_rows, num_blocks = shares_RN.shape
    length = num_rows // len(by_layer)
    with new_figure(path, (6.4, 1.2 + min(9.0, 0.06 * num_rows + 0.12 * len(by_layer)))) as (figure, (axes,)):
        image = axes.pcolormesh(shares_RN.numpy(), cmap="Greys", vmin=0, vmax=1, rasterized=True)
        for number in range(1, len(by_layer)):
            axes.axhline(number * length, color="black", linewidth=0.5)
        axes.set_yticks([(number + 0.5) * length for number in range(len(by_layer))], sorted(by_layer), fontsize=6)
        axes.set_xlim(0, num_blocks)
        axes.set_xlabel("block")
        axes.set_ylabel("layer, and its FAM rows")
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, label="share of a row's attention on the block", fraction=0.05)
        save_figure(figure, path)


def memory_rows(records: Sequence[BlockRecord]) -> list[dict[str, Any]]:
    """Return the numbers of all records as result rows."""
    names = ("block_idx", "layer_idx", "to_memory", "to_fam", "to_block", "fam_norm", "fam_change", "to_block_of_rows")
    return [{"task": "attention"} | {name: getattr(record, name) for name in names} for record in records]


def _with_weights(records: Sequence[BlockRecord], heads: Sequence[int]) -> list[BlockRecord]:
    kept = [record for record in records if record.weights_HRS is not None]
    if not kept:
        raise TransformerFamError(
            "no record has weights, required is at least one; name layers, and blocks of the text"
        )
    assert kept[0].weights_HRS is not None
    require_heads(heads, kept[0].weights_HRS.shape[0])
    return kept


def require_heads(heads: Sequence[int], num_heads: int) -> None:
    """Refuse heads that a model does not have.

    Raises:
        TransformerFamError: a number is negative, or `num_heads` or more.
    """
    for head in heads:
        if not 0 <= head < num_heads:
            raise TransformerFamError(f"there is no head {head}, the model has heads 0 to {num_heads - 1}")
