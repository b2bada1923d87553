"""A drawing at the size, in the place and with the pen of those that networks are trained on."""

import numpy as np
from PIL import Image, ImageFilter

SHARE = 0.6
"""Of the side, the longer one of a drawing; about the median of Omniglot's."""

PEN = 0.055
"""Of the side, the width of strokes; about the median of Omniglot's."""

FINER = 4
"""Times finer than the result is what strokes are made thicker or thinner in."""

SPECKS = 0.005
"""Of the strokes, what may lie beyond a side of the drawing: dust."""


def place_of(strokes: np.ndarray) -> tuple[float, float, float]:
    """The square that has a drawing of 255 on 0 in its middle: its left, top and side.

    As large as `SHARE` says, so that it may go beyond the picture.
    """
    on = strokes > 127
    (top, bottom), (left, right) = (_extent(on.sum(axis)) for axis in (1, 0))
    side = max(bottom - top, right - left) / SHARE
    return (left + right - side) / 2, (top + bottom - side) / 2, side


def redrawn(strokes: np.ndarray, size: int) -> np.ndarray:
    """Strokes `[side, side]` of 255 on 0 at `[size, size]`, with a pen such as `PEN`.

    Thin strokes are made as thick as that, thick ones half as much thinner, lest strokes of uneven
    width break.
    """
    side = FINER * size
    square = Image.fromarray(strokes).resize((side, side), Image.Resampling.LANCZOS)
    square = _with_pen(_stretched(square), PEN * side)
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def _extent(counts: np.ndarray) -> tuple[int, int]:
    """Where strokes begin and end, by how many of their pixels are in each row or column."""
    share = np.cumsum(counts) / counts.sum()
    first, last = np.searchsorted(share, (SPECKS, 1 - SPECKS))
    return int(first), int(last) + 1


def _stretched(strokes: Image.Image) -> Image.Image:
    """With most of the strokes at 255, of which thin ones fall short as they are made smaller."""
    levels = np.asarray(strokes, np.float32)
    full = np.quantile(levels[levels > levels.max() / 10], 0.75)
    return Image.fromarray((levels * (255 / full)).clip(0, 255).astype(np.uint8))


def _with_pen(strokes: Image.Image, pen: float) -> Image.Image:
    while _pen_of(strokes) < pen - 1:  # measured anew, as a thin line may be dotted at first
        strokes = strokes.filter(ImageFilter.MaxFilter(3))
    excess = max((_pen_of(strokes) - pen) / 2, 0)  # on either side
    return strokes.filter(ImageFilter.MinFilter(2 * round(excess / 2) + 1))


def _pen_of(strokes: Image.Image) -> float:
    """The mean width of strokes, from their area and the length of what edges they have."""
    on = np.asarray(strokes) > 127
    edges = (on[1:] != on[:-1]).sum() + (on[:, 1:] != on[:, :-1]).sum()
    # A line in a random direction crosses 4 / pi times as many sides of pixels as it is long.
    return min(2 * on.sum() / max(edges * np.pi / 4, 1), len(on))
