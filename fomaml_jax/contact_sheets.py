"""What was recognised in one picture: every query picture with its class and probability."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fomaml_jax.pictures import ACCENT, INK, RIGHT, WRONG
from fomaml_jax.wording import plain

COLUMNS = 10
MOST = 300
"""Query pictures on a sheet."""

LONGEST = 16
"""Letters of a name below a picture."""

_CELL = 0.85, 1.12
"""Inches."""


class Cell(NamedTuple):
    """A picture with what is said of it.

    Attributes:
        image: `[height, width, channels]` uint8, as the network sees it.
        lines: of text below it.
        colour: of its frame and text.
    """

    image: np.ndarray
    lines: tuple[str, ...]
    colour: str


def colour_of(said: str, is_right: bool | None, none: str) -> str:
    """The frame's: right or wrong where that is known, else whether it is one of the classes."""
    if is_right is None:
        return ACCENT if said == none else INK
    return RIGHT if is_right else WRONG


def contact_sheet(
    support: Sequence[Cell], queries: Sequence[Cell], *, of_strokes: bool = False
) -> Figure:
    """The classes by an example each, then the query pictures, row by row.

    Light strokes on dark are shown as ink on paper.
    """
    first = f"the first {MOST} of " if len(queries) > MOST else ""
    meanings = {RIGHT: "green is right", WRONG: "red is wrong", ACCENT: "orange is none of these"}
    colours = {cell.colour for cell in queries[:MOST]}
    meant = "".join(f", {text}" for colour, text in meanings.items() if colour in colours)
    parts = [
        ("the classes, one example of each", support),
        (f"{first}{len(queries)} pictures{meant}", queries[:MOST]),
    ]
    rows = [-(-len(cells) // COLUMNS) for _, cells in parts]
    height = sum(rows) + 0.3 * len(parts)  # in cells, a heading being a part of one
    figure = Figure(figsize=(COLUMNS * _CELL[0], height * _CELL[1]))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    top = 0.0
    for (heading, cells), count in zip(parts, rows, strict=True):
        axes.text(0.1, top + 0.2, heading, fontsize=9, color=INK, va="center")
        for place, cell in enumerate(cells):
            _show(axes, cell, place % COLUMNS, top + 0.3 + place // COLUMNS, of_strokes)
        top += count + 0.3
    axes.set(xlim=(0, COLUMNS), ylim=(height, 0), aspect=_CELL[1] / _CELL[0])
    return figure


def _show(axes: Axes, cell: Cell, left: float, top: float, of_strokes: bool) -> None:
    """A square picture in the upper part of its cell, its text below."""
    side = 0.82
    down = side * _CELL[0] / _CELL[1]
    left, top = left + (1 - side) / 2, top + 0.04
    grey = cell.image.shape[-1] == 1
    tones = {"cmap": "gray_r" if of_strokes else "gray", "vmin": 0, "vmax": 255}
    shown: dict[str, Any] = tones if grey else {}
    axes.imshow(
        cell.image[..., 0] if grey else cell.image,
        extent=(left, left + side, top + down, top),
        aspect="auto",
        **shown,
    )
    frame = {"fill": False, "edgecolor": cell.colour, "linewidth": 1.5}
    axes.add_patch(Rectangle((left, top), side, down, **frame))
    text = "\n".join(map(_shortened, cell.lines))
    middle = left + side / 2
    axes.text(middle, top + down + 0.04, text, fontsize=6, color=cell.colour, ha="center", va="top")


def _shortened(text: str) -> str:
    return plain(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")
