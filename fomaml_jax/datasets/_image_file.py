"""Read any picture that Pillow opens as a small square of 8-bit pixels."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_MODES = {1: "L", 3: "RGB"}


def read_image(file: Path, size: int, channels: int) -> tuple[np.ndarray, bytes]:
    """The middle square of the upright picture, `[size, size, channels]` uint8; what was read.

    Raises:
        ValueError: for what is no picture.
        OSError: where the file cannot be read, which says nothing about what it is.
    """
    if not file.is_file():  # and not to be opened: a pipe would be waited for
        raise ValueError(f"{file} is not a file, expected a picture: remove or replace it")
    content = file.read_bytes()
    image = _flat(_upright(content, file, size), file).convert(_MODES[channels])
    square = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(square).reshape(size, size, channels), content


def _upright(content: bytes, file: Path, size: int) -> Image.Image:
    """The picture turned as its EXIF orientation says."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            # Only JPEG minds: it decodes a large photograph straight to a few times what is needed.
            image.draft(None, (2 * size, 2 * size))
            return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
        raise ValueError(
            f"{file} cannot be read as an image ({type(error).__name__}), expected a picture that"
            " Pillow opens: remove or replace the file"
        ) from error


def _flat(image: Image.Image, file: Path) -> Image.Image:
    """The picture in 8 bits, transparency over white."""
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image, file)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA"))
    return image


def _eight_bits(image: Image.Image, file: Path) -> Image.Image:
    levels = np.asarray(image)
    if levels.dtype.kind == "f" or levels.min() < 0 or levels.max() >= 2**16:
        raise ValueError(
            f"{file} has pixels from {levels.min()} to {levels.max()} in mode {image.mode!r},"
            " expected 8 or 16 bits: save it as PNG"
        )
    return Image.fromarray((levels >> 8).astype(np.uint8))
