"""Figures in fewer bytes show the same."""

import io
import re

import numpy as np
import pytest

from transformerfam.reports.figure import MARK, is_marked, new_figure, smaller_png, smaller_svg

matplotlib = pytest.importorskip("matplotlib")


def drawn(suffix, color):
    with new_figure(None, (3, 2)) as (figure, (axes,)):
        axes.plot([0, 1, 2], [0.123456, -4.5, 3], color=color, marker="o")
        axes.set_title('0.123456 and x="0.123456"')
        content = io.BytesIO()
        figure.savefig(content, format=suffix, metadata={"Creator" if suffix == "svg" else "Software": MARK})
    return content.getvalue()


def test_places_are_rounded_and_texts_are_not():
    """Would catch numbers of a label that are rounded, and points that are moved by what can be seen."""
    before = drawn("svg", "black")
    after = smaller_svg(before)
    assert len(after) < 0.95 * len(before)
    assert is_marked(after, ".svg")
    assert b"0.123456 and x=" in after
    attributes = [b" ".join(re.findall(rb' (?:d|x|y)="([^"]*)"', svg)) for svg in (before, after)]
    places = [[float(number) for number in re.findall(rb"-?\d+\.?\d*", text)] for text in attributes]
    assert len(places[0]) == len(places[1]) > 50
    assert np.abs(np.subtract(*places)).max() <= 0.00501
    assert smaller_svg(after) == after


@pytest.mark.parametrize(("color", "mode"), [("black", "L"), ("red", "RGBA")])
def test_grey_pictures_take_a_byte_a_pixel_and_show_the_same(color, mode):
    """Would catch a figure that loses its colours or its mark."""
    from PIL import Image

    before = drawn("png", color)
    after = smaller_png(before)
    assert is_marked(after, ".png")
    pictures = [Image.open(io.BytesIO(content)) for content in (before, after)]
    assert pictures[1].mode == mode
    assert pictures[0].convert("RGB").tobytes() == pictures[1].convert("RGB").tobytes()
    assert len(after) < len(before) if mode == "L" else after == before
