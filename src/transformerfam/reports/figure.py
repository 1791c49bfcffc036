"""What all figures of accuracy against length have in common: black on white, every line named at its end."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformerfam.errors import MissingPackageError, TransformerFamError

FIGURE_SUFFIXES = (".svg", ".png", ".pdf")
LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "x")
GREYS = ("#000000", "#595959", "#303030", "#7a7a7a", "#484848", "#666666")
LABEL_GAP = 0.055
"""Least distance of two labels, in accuracy, on axes of `LABEL_HEIGHT` inches."""
LABEL_HEIGHT = 3.6


@contextlib.contextmanager
def new_figure(
    path: str | Path, size: tuple[float, float], num_rows: int = 1, num_columns: int = 1
) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Begin a figure.

    Args:
        path: file that it is for; its suffix must be one of `FIGURE_SUFFIXES`.
        size: inches.
        num_rows: of axes.
        num_columns: of axes.

    Yields:
        The figure and its axes, row by row.

    Raises:
        MissingPackageError: matplotlib is not installed.
        TransformerFamError: the suffix is another one.
    """
    if Path(path).suffix not in FIGURE_SUFFIXES:
        raise TransformerFamError(
            f"figure {str(path)!r} ends in {Path(path).suffix!r}, required is one of {', '.join(FIGURE_SUFFIXES)}; "
            "rename it"
        )
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise MissingPackageError(
            "a figure needs the package matplotlib, which is not installed; install it with: "
            "pip install 'transformerfam[plots]'"
        ) from error
    with matplotlib.rc_context({"svg.hashsalt": "transformerfam", "svg.fonttype": "none", "font.size": 9}):
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        yield figure, list(figure.subplots(num_rows, num_columns, squeeze=False).flat)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure, the same bytes for the same picture.

    Raises:
        TransformerFamError: it cannot be written.
    """
    path = Path(path)
    metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200, metadata=metadata)
    except OSError as error:
        raise TransformerFamError(f"could not write {path}: {error.strerror}; choose another file") from error


def length_axis(axes: Any, lengths: Sequence[int]) -> None:
    """Let axes go from 0 to 1 in keys recalled, and over lengths, which are written short, in powers of two."""
    import matplotlib.ticker

    least = min((length for length in lengths if length > 0), default=1)
    axes.set_xscale("symlog", base=2, linthresh=least)
    axes.set_xlim(0 if lengths[0] == 0 else least * 0.9, lengths[-1] * 1.1 + 1)
    axes.set_xticks(lengths)
    axes.xaxis.set_major_formatter(lambda value, _: short_length(value))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_ylim(-0.04, 1.06)
    axes.set_xlabel("filler between key and question (tokens)")
    axes.set_ylabel("keys recalled")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def short_length(num_tokens: float) -> str:
    """Write a length short: 8192 as 8k, 1000000 as 1.0M."""
    if num_tokens >= 1_000_000:
        return f"{num_tokens / 1_000_000:.1f}M"
    return f"{num_tokens / 1024:.3g}k" if num_tokens >= 1024 else f"{num_tokens:g}"


def label_ends(
    axes: Any, ends: Sequence[tuple[float, float, str]], limits: tuple[float, float] = (0.0, 1.0), font_size: float = 9
) -> None:
    """Name lines to the right of the last point of all, labels moved apart where lines end together.

    Args:
        axes: whose lines they are.
        ends: of every line where it ends, on both axes, and its name.
        limits: of the vertical axis.
        font_size: of the labels.
    """
    if not ends:
        return
    num_rows = axes.get_subplotspec().get_gridspec().nrows
    extent = limits[1] - limits[0]
    gap = LABEL_GAP * LABEL_HEIGHT * num_rows / axes.figure.get_figheight() * extent * font_size / 9
    right = max(length for length, _, _ in ends)
    by_height = sorted((height, label) for _, height, label in ends)
    heights: list[float] = []
    for height, _ in by_height:
        heights.append(height if not heights else max(height, heights[-1] + gap))
    excess = max(0.0, heights[-1] - limits[1] - 0.04 * extent)
    for (_, label), height in zip(by_height, heights, strict=True):
        axes.annotate(
            label,
            xy=(right, height - excess),
            xytext=(10, 0),
            textcoords="offset points",
            verticalalignment="center",
            annotation_clip=False,
            fontsize=font_size,
        )
