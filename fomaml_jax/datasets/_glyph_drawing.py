"""Draw characters as in a snapshot of print: each at its own size, tilt, slant and offset."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_EM = 80  # pixels to the em of the master drawings, about the largest that the canvas shows
_OVERSAMPLING = 4  # the canvas is drawn this many times larger, then averaged down
_FONT_SIZE = 0.75  # pixels to the em on the final image, as a fraction of its side
_SIZE_SPREAD = 0.25  # sizes are 1 +- this
_ANGLE = np.deg2rad(15.0)  # tilt and slant are at most this
_SHIFT = 2 / 28  # offsets are at most this fraction of the side: 2 pixels of 28
_MARGIN = 1 / 28  # left free of ink at every border, as a fraction of the side


def master_drawings(font_file: str, characters: Sequence[str]) -> list[Image.Image]:
    """Each character in large, cropped to its ink and a clear border of two pixels."""
    font = ImageFont.truetype(font_file, _EM, layout_engine=ImageFont.Layout.BASIC)
    return [_master_drawing(font, character) for character in characters]


def _master_drawing(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    page = Image.new("L", (3 * _EM, 3 * _EM))
    ImageDraw.Draw(page).text((_EM, 2 * _EM), character, fill=255, font=font, anchor="ls")
    ink = page.getbbox()
    if ink is None:
        raise ValueError(f"{font.path} draws nothing for U+{ord(character):04X}")
    # Without a clear border the interpolation would cut the ink's edge off, not fade it out.
    left, top, right, bottom = ink
    return page.crop((left - 2, top - 2, right + 2, bottom + 2))


def snapshots(masters: Sequence[Image.Image], size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws every master drawing once in its own pose.

    Args:
        masters: what to draw.
        size: side of the images in pixels.
        rng: where the poses come from.

    Returns:
        `[len(masters), size, size]` uint8, ink 255 on 0.
    """
    extents = np.array([master.size for master in masters], float)
    matrices, centres = _poses(extents, size * _OVERSAMPLING, rng)
    inverses = np.linalg.inv(matrices)
    # Pillow asks where in the master drawing each pixel of the canvas comes from.
    origins = extents / 2 - np.einsum("nij,nj->ni", inverses, centres)
    coefficients = np.concatenate([inverses, origins[:, :, None]], axis=2).reshape(-1, 6)
    return np.stack(
        [_warp(*drawing, size) for drawing in zip(masters, coefficients.tolist(), strict=True)]
    )


def _poses(
    extents: np.ndarray, side: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Matrices `[n, 2, 2]` and centres `[n, 2]` that keep boxes of `extents` on the canvas."""
    draws = rng.uniform(-1.0, 1.0, [len(extents), 5])
    scale = side * _FONT_SIZE / _EM * (1 + _SIZE_SPREAD * draws[:, 0])
    matrices = scale[:, None, None] * _tilted_and_slanted(*(_ANGLE * draws[:, 1:3].T))
    # A wide character that would not fit is drawn smaller, and moved only as far as there is room.
    reach = np.einsum("nij,nj->ni", np.abs(matrices), extents / 2)
    room = side * (0.5 - _MARGIN)
    shrink = np.minimum(1.0, room / reach.max(axis=1))
    slack = room - shrink[:, None] * reach
    shifts = np.clip(side * _SHIFT * draws[:, 3:], -slack, slack)
    return shrink[:, None, None] * matrices, side / 2 + shifts


def _tilted_and_slanted(tilt: np.ndarray, slant: np.ndarray) -> np.ndarray:
    cos, sin, tan = np.cos(tilt), np.sin(tilt), np.tan(slant)
    return np.array([[cos, cos * tan - sin], [sin, sin * tan + cos]]).transpose(2, 0, 1)


def _warp(master: Image.Image, coefficients: Sequence[float], size: int) -> np.ndarray:
    side = size * _OVERSAMPLING
    canvas = master.transform(
        (side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    return np.asarray(canvas.reduce(_OVERSAMPLING))
