"""Read any picture that Pillow opens as a small square of 8-bit pixels."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import Image, ImageOps

from fomaml_jax.datasets._framing import place_of, redrawn

Background = Literal["auto", "light", "dark"]
"""Of a drawing: what its border is nearer to, the lightest or the darkest of it, or one of them."""

_DIM = 2**12
"""Of 16 bits: no camera's full range, as 12 bits in 16 are."""

LARGEST = 89_478_485
"""Pixels of a picture, from which on Pillow warns of bombs: unpacked it has a quarter of a GB."""

SMALLEST = 8
"""Pixels of the shorter side of a picture from which anything can be told."""

FAINTEST = 16
"""Grey levels of 255 between a drawing's strokes and its ground."""

_MODES = {1: "L", 3: "RGB"}


@contextlib.contextmanager
def without_bomb_warnings() -> Iterator[None]:
    """Pillow's own, of pictures that are refused here; outside of threads, which share filters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def read_image(file: Path, size: int, channels: int) -> tuple[np.ndarray, bytes]:
    """The middle square of the upright picture, `[size, size, channels]` uint8; what was read.

    Raises:
        ValueError: for what is no picture.
        OSError: where the file cannot be read, which says nothing about what it is.
    """
    if not file.is_file():  # and not to be opened: a pipe would be waited for
        raise ValueError(f"{file} is not a file, expected a picture: remove or replace it")
    content = file.read_bytes()
    image = _flat(_upright(content, file, 2 * size), file, _MODES[channels])
    square = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(square).reshape(size, size, channels), content


def read_strokes(file: Path, size: int, background: Background) -> tuple[np.ndarray, bool]:
    """A drawing as its strokes, 255 on 0, `[size, size, 1]` uint8; whether they were the darker.

    The ground is the median of the border. It and the strongest stroke become 0 and 255, as far as
    they are apart by shade of paper or pen; then the drawing is framed.

    Raises:
        ValueError: for what is no picture, a tiny or an all too large one, or one without strokes.
        OSError: where the file cannot be read, which says nothing about what it is.
    """
    grey = _flat(_upright(file.read_bytes(), file), file, "L")
    if round(size * min(grey.size) / max(grey.size)) < 1:
        raise ValueError(f"{file} is a strip of pixels: cut it nearer to a square")
    levels = _without_grain(grey, size)
    border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    ground, darkest, lightest = float(np.median(border)), levels.min(), levels.max()
    is_light = background == "light" or (background == "auto" and 2 * ground > darkest + lightest)
    strongest = darkest if is_light else lightest
    if abs(strongest - ground) < FAINTEST:
        kind = "" if background == "auto" else f" on a {background} ground"
        raise ValueError(
            f"{file} shows no strokes{kind}: its grey levels go from {darkest:.0f} to "
            f"{lightest:.0f}, its border is at {ground:.0f}; expected a drawing on a plain ground"
        )
    try:
        found = _part_with_drawing(grey, size, ground, is_light)
        strokes = _strokes(_without_grain(found, size), ground, is_light)
    except _GrainError:
        raise ValueError(
            f"{file} shows no strokes, only grain: expected a drawing on a plain ground"
        ) from None
    return redrawn(strokes, size)[..., None], bool(is_light)


class _GrainError(Exception):
    """What looked like strokes is not there any more, once seen from nearer by."""


def _part_with_drawing(grey: Image.Image, size: int, ground: float, is_light: bool) -> Image.Image:
    """The square around the drawing, in which what is beyond the picture is ground."""
    part, left, top = grey, 0, 0
    for _ in range(2):  # in the whole picture made smaller, then more exactly where it is
        levels = _without_grain(part, size)
        scale = part.width / levels.shape[1]
        x, y, side = (round(scale * x) for x in place_of(_strokes(levels, ground, is_light)))
        left, top = left + x, top + y
        part = Image.new("L", (side, side), round(ground))
        part.paste(grey, (-left, -top))
    return part


def _without_grain(grey: Image.Image, size: int) -> np.ndarray:
    """Grey levels at several times the size, in which a photograph's grain is evened out."""
    return np.asarray(grey.reduce(max(1, min(grey.size) // (8 * size))), np.float32)


def _strokes(levels: np.ndarray, ground: float, is_light: bool) -> np.ndarray:
    """From 0, the ground, to 255, the strongest stroke, of a light or a dark ground."""
    strength = ground - levels if is_light else levels - ground
    if strength.max() <= 0:
        raise _GrainError
    return (strength.clip(0) * (255 / strength.max())).round().astype(np.uint8)


def check_readable(file: Path) -> None:
    """Refuses what is no picture by its first bytes, a tiny one, and one too large to unpack.

    Raises:
        ValueError: naming the file.
    """
    if not file.is_file():  # and not to be opened: a pipe would be waited for
        raise ValueError(f"{file} is not a file, expected a picture: remove or replace it")
    with file.open("rb") as content, _opened(content, file) as image:
        width, height = image.size
    if min(width, height) < SMALLEST:
        raise ValueError(
            f"{file} is a picture of {width} x {height} pixels, expected at least {SMALLEST} x "
            f"{SMALLEST}"
        )


def _upright(content: bytes, file: Path, enough: int | None = None) -> Image.Image:
    """The picture turned as its EXIF orientation says; its sides need be `enough` pixels."""
    with _opened(io.BytesIO(content), file) as image:
        if enough:  # only JPEG minds: it decodes a large photograph straight to about that
            image.draft(None, (enough, enough))
        return ImageOps.exif_transpose(image)


@contextlib.contextmanager
def _opened(content: IO[bytes], file: Path) -> Iterator[Image.Image]:
    """A picture, not unpacked yet; what Pillow has to say against it names the file."""
    try:
        with Image.open(content) as image:
            if image.width * image.height > LARGEST:
                raise Image.DecompressionBombError
            yield image
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        raise ValueError(f"{file} has more than {LARGEST:,} pixels: save it smaller") from None
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file} cannot be read as an image ({type(error).__name__}), expected a picture that"
        " Pillow opens: remove or replace the file"
    )


def _flat(image: Image.Image, file: Path, mode: str) -> Image.Image:
    """The picture in 8 bits and a mode, transparency over white."""
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image, file).convert(mode)
    try:
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert(mode)
    except ValueError as error:  # a mode that nothing is known to convert, such as LAB
        raise _unreadable(file, error) from error


def _eight_bits(image: Image.Image, file: Path) -> Image.Image:
    levels = np.asarray(image)
    if levels.dtype.kind == "f" or levels.min() < 0 or levels.max() >= 2**16:
        raise ValueError(
            f"{file} has pixels from {levels.min()} to {levels.max()} in mode {image.mode!r},"
            " expected 8 or 16 bits: save it as PNG"
        )
    if levels.max() < _DIM:
        warnings.warn(
            f"{file} has 16 bits, of which it uses the lower 12 or fewer: it is read as nearly "
            "black; save pictures with their full range",
            stacklevel=2,
        )
    return Image.fromarray((levels >> 8).astype(np.uint8))
