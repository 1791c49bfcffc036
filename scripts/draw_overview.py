"""Draw the README's picture, light and dark, from committed rows: bytes carried and keys recalled, by length.

python scripts/draw_overview.py
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformerfam.reports.accuracy import accuracy_by_length
from transformerfam.reports.figure import label_ends, length_axis, new_figure, save_figure, short_length
from transformerfam.reports.rows import Row, read_rows

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "results" / "compare_passkey.jsonl.gz"
PICTURES = {
    "light": ROOT / "docs" / "results" / "overview.svg",
    "dark": ROOT / "docs" / "results" / "overview_dark.svg",
}

# Okabe and Ito's colours, which readers with any colour vision tell apart; each line has its style and marker, too.
SYSTEMS = {
    "fam_gated": ("FAM, gated (ours)", {"light": "#0072B2", "dark": "#56B4E9"}, "-", "o"),
    "fam": ("FAM, the paper's", {"light": "#B8860B", "dark": "#E69F00"}, "--", "s"),
    "bswa_m3": ("window of 4 blocks", {"light": "#777777", "dark": "#AAAAAA"}, ":", "D"),
    "full": ("key/value cache", {"light": "#C0460A", "dark": "#F0803C"}, "-.", "^"),
}
INK = {"light": "#1f2328", "dark": "#e6edf3"}
FROM_LENGTH = 1024
"""Tokens at which both panels begin."""


def carried_bytes(rows: Sequence[Row], system: str) -> dict[int, int]:
    """Return bytes that are carried after so many tokens."""
    found = [row for row in rows if row["task"] == "comparison-bytes" and row["system"] == system]
    return {row["num_tokens"]: row["bytes_carried"] for row in found}


def continued(measured: Mapping[int, int], length: int) -> int:
    """Return the bytes at a length that was not measured: a straight line through what was, constant for a state."""
    (first, least), (last, most) = min(measured.items()), max(measured.items())
    return round(most + (most - least) / (last - first) * (length - last))


def short_bytes(value: float) -> str:
    """Write bytes short: 331776 as 0.33 MB."""
    return f"{value / 1e9:.2g} GB" if value >= 1e9 else f"{value / 1e6:.2g} MB"


def draw_bytes(axes: Any, rows: Sequence[Row], mode: str, lengths: Sequence[int]) -> None:
    """Draw what every system carries; beyond what was measured the line is thin."""
    for system, (_, colors, style, marker) in SYSTEMS.items():
        measured = carried_bytes(rows, system)
        whole = {length: measured.get(length, continued(measured, length)) for length in lengths}
        look = {"color": colors[mode], "linestyle": style, "linewidth": 2}
        beyond = {length: value for length, value in whole.items() if length >= max(measured)}
        axes.plot(list(beyond), list(beyond.values()), **(look | {"linewidth": 1}))
        axes.plot(list(measured), list(measured.values()), marker=marker, markersize=5, **look)
        if system in ("fam_gated", "full"):
            axes.annotate(
                f"{short_bytes(whole[lengths[-1]])} at {short_length(lengths[-1])}",
                (lengths[-1], whole[lengths[-1]]),
                xytext=(-4, 9) if system == "fam_gated" else (-34, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                color=colors[mode],
                weight="bold",
            )
    axes.set_yscale("log")
    axes.set_ylim(1e5, 2.5e9)
    axes.set_yticks([1e5, 1e6, 1e7, 1e8, 1e9], ["0.1 MB", "1 MB", "10 MB", "100 MB", "1 GB"])
    axes.minorticks_off()
    axes.set_title("State to carry", loc="left", weight="bold")


def draw_recall(axes: Any, rows: Sequence[Row], mode: str) -> None:
    """Draw the share of keys recalled, over all seeds."""
    curves = {series.system: points for series, points in accuracy_by_length(rows).items()}
    lines = []
    for system, (label, colors, style, marker) in SYSTEMS.items():
        points = [point for point in curves[system] if point.filler_tokens >= FROM_LENGTH]
        (line,) = axes.plot(
            [point.filler_tokens for point in points],
            [point.share for point in points],
            color=colors[mode],
            linestyle=style,
            marker=marker,
            markersize=5,
            linewidth=2,
            clip_on=False,
        )
        lines.append((line, label))
    axes.set_title("Keys recalled", loc="left", weight="bold")
    label_ends(axes, lines)


def draw(rows: Sequence[Row], path: Path, mode: str) -> None:
    """Draw both panels for a light or a dark page, on a transparent ground."""
    import matplotlib

    ink = INK[mode]
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    with (
        matplotlib.rc_context(colors | {"savefig.transparent": True}),
        new_figure(path, (9.0, 3.3), num_columns=2) as (figure, (left, right)),
    ):
        lengths = sorted({row["filler_tokens"] for row in rows if row.get("filler_tokens", 0) >= FROM_LENGTH})
        length_axis(right, lengths, "tokens between key and question", "")
        length_axis(left, lengths, "tokens read", "")
        draw_bytes(left, rows, mode, lengths)
        draw_recall(right, rows, mode)
        right.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        save_figure(figure, path)


if __name__ == "__main__":
    committed = [row for row in read_rows([ROWS]) if row["system"] in SYSTEMS]
    for mode, path in PICTURES.items():
        draw(committed, path, mode)
