"""Read Omniglot's drawings from a zip archive or a folder, and check that they are all there."""

import contextlib
import io
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

_DRAWERS = 20
_SIDE = 105
_FILTERS = {"smooth": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}

_LARGEST = 2**20
"""Bytes of a drawing, which has some hundreds; what is larger is not unpacked any further."""
_MOST = 100_000
"""Members of an archive, which has some 20,000."""

_Read = Callable[[str], bytes]


def read_drawings(source: Path, names: Sequence[str], size: int, resample: str) -> np.ndarray:
    """Reads the drawings of the characters `names`, which must be all that `source` holds.

    Args:
        source: a zip archive or a folder, called as the folder that the drawings are in.
        names: the characters, as "alphabet/characterNN".
        size: height and width to resize to.
        resample: "smooth" or "nearest".

    Returns:
        `[len(names), 20, size, size, 1]` uint8, ink 255 on 0.

    Raises:
        ValueError: the archive is damaged, or a character, a drawing or a pixel is not as expected.
    """
    images = np.empty([len(names), _DRAWERS, size, size, 1], np.uint8)
    with _opened(source) as (members, read):
        drawings = _by_character(members, source.stem)
        _check_complete(source, drawings, names)
        for image, member in zip(
            images.reshape(-1, size, size),
            (member for name in names for member in drawings[name]),
            strict=True,
        ):
            image[:] = _ink(_decode(source, member, read), size, resample)
    return images


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[tuple[Iterable[str], _Read]]:
    """The names of all files, beginning with that of the set, and a function to read one."""
    if source.is_dir():
        files = (file.relative_to(source.parent) for file in source.glob("*/*/*.png"))
        yield map(Path.as_posix, files), lambda name: _start_of((source.parent / name).open("rb"))
        return
    try:
        archive = zipfile.ZipFile(source)
    except zipfile.BadZipFile as error:
        size = source.stat().st_size
        raise ValueError(
            f"{source} ({size} bytes) is no complete zip archive ({error}), expected Omniglot's"
            f" {source.name}: delete this copy and get it again"
        ) from error
    with archive:
        members = archive.namelist()
        if len(members) > _MOST:
            raise ValueError(
                f"{source} has {len(members)} members, expected Omniglot's {source.name}, which "
                f"has fewer than {_MOST}: get a new copy"
            )
        for name in members:
            if name.startswith("/") or ".." in name.split("/"):
                raise ValueError(
                    f"{source} has the member {name!r}, which leads out of it: get a new copy"
                )
        yield members, lambda name: _start_of(archive.open(name))


def _start_of(file: IO[bytes]) -> bytes:
    """The content, or of one that is too large a little more than is allowed."""
    with file:
        return file.read(_LARGEST + 1)


def _by_character(members: Iterable[str], folder: str) -> dict[str, list[str]]:
    """The drawings of each character in the order of the drawers; other files do not count."""
    pattern = re.compile(rf"{folder}/([^/]+/character\d\d)/\d+_(\d\d)\.png")
    drawings: dict[str, list[str]] = {}
    for match in filter(None, map(pattern.fullmatch, sorted(members))):
        drawings.setdefault(match[1], []).append(match[0])
    return drawings


def _check_complete(
    source: Path, drawings: Mapping[str, Sequence[str]], names: Sequence[str]
) -> None:
    missing = [name for name in names if name not in drawings]
    unknown = sorted(set(drawings) - set(names))
    if missing or unknown:
        example = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not Omniglot's"
        raise ValueError(
            f"{source} holds {len(drawings)} characters, expected {len(names)}: {example}"
        )
    for name in names:
        if len(drawings[name]) != _DRAWERS:
            raise ValueError(
                f"{source} holds {len(drawings[name])} drawings of {name}, expected {_DRAWERS}"
            )


def _decode(source: Path, member: str, read: _Read) -> Image.Image:
    try:
        content = read(member)
        image = Image.open(io.BytesIO(content), formats=["PNG"])
        as_expected = image.size == (_SIDE, _SIDE) and image.mode == "1"
        if as_expected and len(content) <= _LARGEST:
            image.load()
    except Exception as error:  # damaged bytes make zipfile, zlib and Pillow raise nearly anything
        raise ValueError(
            f"{member} in {source} cannot be read ({type(error).__name__}), expected a PNG of"
            f" {_SIDE} x {_SIDE} one-bit pixels: get a new copy"
        ) from error
    if not as_expected:
        raise ValueError(
            f"{member} in {source} is a picture of {image.width} x {image.height} pixels in mode"
            f" {image.mode!r}, expected {_SIDE} x {_SIDE} in mode '1'"
        )
    if len(content) > _LARGEST:
        raise ValueError(
            f"{member} in {source} has more than {_LARGEST} bytes, expected some hundred: get a"
            " new copy"
        )
    return image


def _ink(image: Image.Image, size: int, resample: str) -> np.ndarray:
    # Pillow resizes one-bit images by nearest neighbour whatever it is asked for, so: grey first.
    resized = image.convert("L").resize((size, size), _FILTERS[resample])
    return 255 - np.asarray(resized)
