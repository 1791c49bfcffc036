"""What all figures of accuracy against length have in common: black on white, every line named at its end."""

import contextlib
import importlib.util
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformerfam.errors import MissingPackageError, TransformerFamError
from transformerfam.files.writing import make_folder, require_regular, require_writable, write_bytes

MARK = "transformerfam"
MARKS = {
    ".svg": (b"<?xml", b"<dc:title>transformerfam</dc:title>"),
    ".png": (b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x17tEXtSoftware\x00transformerfam"),
    ".pdf": (b"%PDF", b"/Creator (transformerfam)"),
    ".gif": (b"GIF8", b"!\xfe\x0etransformerfam\x00;"),
}
"""What marks a figure of each format as one of this package: its first bytes, and the creator that it names."""

FIGURE_SUFFIXES = (".svg", ".png", ".pdf")
LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "x")
GREYS = ("#000000", "#595959", "#303030", "#7a7a7a", "#484848", "#666666")
DPI = 200
FONTS = ["DejaVu Sans", "Verdana"]
"""Matplotlib's own, then the one that it was made from: a viewer without both takes its own."""
LABEL_GAP = 0.055
"""Least distance of two labels, in accuracy, on axes of `LABEL_HEIGHT` inches."""
LABEL_HEIGHT = 3.6
GUIDE = {"color": "#999999", "linewidth": 0.8, "linestyle": (0, (2, 2)), "zorder": 0}
"""How a line is drawn that is no curve: a length of training, chance."""
SAMPLE_WIDTH = 26.0
"""Length of the piece of line in front of a label, in points."""


@contextlib.contextmanager
def new_figure(
    path: str | Path | None, size: tuple[float, float], num_rows: int = 1, num_columns: int = 1
) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Begin a figure.

    Args:
        path: file that it is for; None where it becomes part of a film.
        size: inches.
        num_rows: of axes.
        num_columns: of axes.

    Yields:
        The figure and its axes, row by row.

    Raises:
        MissingPackageError: matplotlib is not installed.
        TransformerFamError: no figure can be written there, see `require_figure`.
    """
    if path is None:
        _require_matplotlib()
    else:
        require_figure(path)
    import matplotlib
    import matplotlib.figure

    with matplotlib.rc_context(
        {"svg.hashsalt": "transformerfam", "svg.fonttype": "none", "font.size": 9} | {"font.sans-serif": FONTS}
    ):
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        yield figure, list(figure.subplots(num_rows, num_columns, squeeze=False).flat)


def _require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError(
            "a figure needs the package matplotlib, which is not installed; install it with: "
            "pip install 'transformerfam[plots]'"
        )


def require_figure(path: str | Path, suffixes: Sequence[str] = FIGURE_SUFFIXES) -> None:
    """Check before the work that a figure can be drawn and written; its folder is made.

    Args:
        path: file to write.
        suffixes: what its name may end in.

    Raises:
        MissingPackageError: matplotlib is not installed.
        TransformerFamError: it ends in something else, it cannot be written, or there is something else than a figure
            of this package.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise TransformerFamError(
            f"figure {str(path)!r} ends in {path.suffix!r}, required is one of {', '.join(suffixes)}; rename it"
        )
    _require_matplotlib()
    require_regular(path)
    make_folder(path.parent)
    require_writable(path)
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise TransformerFamError(f"could not write {path}: {error.strerror}; choose another file") from error
    if content and not is_marked(content, path.suffix):
        raise TransformerFamError(
            f"could not write {path}: it is not a {path.suffix} figure of this package; choose another file, or "
            "move that one away"
        )


def is_marked(content: bytes, suffix: str) -> bool:
    """Return whether a file is a figure of this package, in the format of its name's suffix."""
    begins, mark = MARKS[suffix]
    return content.startswith(begins) and mark in content


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure, the same bytes for the same picture.

    Raises:
        TransformerFamError: it cannot be written, or the file is no figure of this package.
    """
    require_figure(path)  # the file may have come since
    path = Path(path)
    metadata: dict[str, Any] = {"Software" if path.suffix == ".png" else "Creator": MARK}
    if path.suffix == ".svg":
        metadata["Date"] = None
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=DPI, metadata=metadata)
    write_figure(_SMALLER.get(path.suffix, bytes)(drawn.getvalue()), path)


def smaller_svg(content: bytes) -> bytes:
    """Return a picture in a fifth fewer bytes: places to a hundredth of a point, and no indentation."""

    def shorter(attribute: re.Match[bytes]) -> bytes:
        rounded = re.sub(rb"-?\d+\.\d{3,}", lambda number: b"%g" % (round(float(number[0]), 2) + 0.0), attribute[2])
        return b' %s="%s"' % (attribute[1], b" ".join(rounded.split()))

    return re.sub(rb"\n +", b"\n", re.sub(rb' (d|x|y)="([^"]*)"', shorter, content))


def smaller_png(content: bytes) -> bytes:
    """Return a picture in half as many bytes where it is grey, which it then says: one byte a pixel, not four."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    with Image.open(io.BytesIO(content)) as picture:
        colors = picture.convert("RGB")
        grey = picture.convert("L")
    if grey.convert("RGB").tobytes() != colors.tobytes():
        return content
    software, smaller = PngInfo(), io.BytesIO()
    software.add_text("Software", MARK)
    grey.save(smaller, "PNG", optimize=True, pnginfo=software, dpi=(DPI, DPI))
    return smaller.getvalue()


_SMALLER = {".svg": smaller_svg, ".png": smaller_png}


def write_figure(content: bytes, path: Path) -> None:
    """Write a figure that is drawn; errors are those of `save_figure`."""
    assert is_marked(content, path.suffix), "a figure without its mark"
    require_figure(path, tuple(MARKS))
    write_bytes(path, content)


def length_axis(
    axes: Any,
    lengths: Sequence[int],
    along: str = "filler between key and question (tokens)",
    share: str = "keys recalled",
) -> None:
    """Let axes run from 0 to 1 in a share, and over lengths, in short form, by powers of two.

    Args:
        axes: both axes of a plot.
        lengths: tokens, in order.
        along: what the lengths are of.
        share: what is shared.
    """
    import matplotlib.ticker

    least = min((length for length in lengths if length > 0), default=1)
    axes.set_xscale("symlog", base=2, linthresh=least)
    axes.set_xlim(0 if lengths[0] == 0 else least * 0.9, lengths[-1] * 1.1 + 1)
    axes.set_xticks(lengths)
    axes.xaxis.set_major_formatter(lambda value, _: short_length(value))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_ylim(-0.04, 1.06)
    axes.set_xlabel(along)
    axes.set_ylabel(share)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def short_length(num_tokens: float) -> str:
    """Write a length short: 8192 as 8k, 1000000 as 1.0M."""
    if num_tokens >= 1_000_000:
        return f"{num_tokens / 1_000_000:.1f}M"
    return f"{num_tokens / 1024:.3g}k" if num_tokens >= 1024 else f"{num_tokens:g}"


def label_ends(
    axes: Any, lines: Sequence[tuple[Any, str]], limits: tuple[float, float] = (0.0, 1.0), font_size: float = 9
) -> None:
    """Name lines to the right of the last point of all, each name after a sample of its line.

    Labels are moved apart where lines end together, in the order in which the lines came there; a line that ends below
    the limits has its label at the lower one.

    Args:
        axes: whose lines they are.
        lines: every line, a `matplotlib.lines.Line2D`, and its name.
        limits: of the vertical axis.
        font_size: of the labels.
    """
    if not lines:
        return
    from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea

    num_rows = axes.get_subplotspec().get_gridspec().nrows
    extent = limits[1] - limits[0]
    gap = LABEL_GAP * LABEL_HEIGHT * num_rows / axes.figure.get_figheight() * extent * font_size / 9
    right = max(line.get_xdata()[-1] for line, _ in lines)
    by_end = sorted(lines, key=lambda named: list(reversed(named[0].get_ydata())))
    heights: list[float] = []
    for line, _ in by_end:
        end = max(limits[0], float(line.get_ydata()[-1]))
        heights.append(end if not heights else max(end, heights[-1] + gap))
    excess = max(0.0, heights[-1] - limits[1] - 0.04 * extent)
    for (line, label), height in zip(by_end, heights, strict=True):
        named = HPacker(
            children=[_sample(line, font_size), TextArea(label, textprops={"fontsize": font_size})],
            align="center",
            pad=0,
            sep=4,
        )
        axes.add_artist(
            AnnotationBbox(
                named,
                (right, height - excess),
                xybox=(10, 0),
                boxcoords="offset points",
                box_alignment=(0, 0.5),
                frameon=False,
                pad=0,
                annotation_clip=False,
            )
        )


def _sample(line: Any, font_size: float) -> Any:
    """Return a short piece of a line, as a legend has it: dashes, and a marker in the middle."""
    from matplotlib.lines import Line2D
    from matplotlib.offsetbox import DrawingArea

    width = SAMPLE_WIDTH * font_size / 9
    area = DrawingArea(width, font_size)
    sample = Line2D([0, width / 2, width], [font_size / 2] * 3, markevery=[1])
    sample.update_from(line)
    sample.set(clip_on=False, markevery=[1], transform=area.get_transform())
    area.add_artist(sample)
    return area
