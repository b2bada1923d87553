"""A folder of a few pictures, as a trained network was shown its own."""

import os
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from fomaml_jax.datasets._checks import check_choice, check_folder, cli_extra, whole_number
from fomaml_jax.datasets._class_folders import list_classes, visible
from fomaml_jax.wording import counted

_EXPECTED = "a folder of pictures, or of one folder a class"


class Pictures(NamedTuple):
    """Pictures of a folder.

    Attributes:
        images: `[n, size, size, channels]` uint8.
        files: where each comes from.
        labels: `[n]` int32, the class of each, or None of a flat folder.
        names: of the classes, sorted; accents in composed form (Unicode's NFC), however stored.
        inverted: how many had dark strokes on a light ground.
        skipped: how many files were left out, as no pictures.
    """

    images: np.ndarray
    files: tuple[Path, ...]
    labels: np.ndarray | None
    names: tuple[str, ...]
    inverted: int
    skipped: int


def few_pictures(
    path: str | os.PathLike[str],
    *,
    size: int = 28,
    channels: Literal[1, 3] = 1,
    background: Literal["auto", "light", "dark", "as is"] = "auto",
    unreadable: Literal["refuse", "skip"] = "refuse",
) -> Pictures:
    """Reads a flat folder of pictures, or one of class folders, in any format that Pillow opens.

    Drawings become strokes of 255 on 0, as in Omniglot and the glyphs: the ground is found at the
    border, light or dark; ground and strongest stroke are stretched to the full range; and the
    drawing is put in the middle of a square, at the size and with strokes of about the width that
    Omniglot's have, wherever it was on the paper. With a background "as is", pictures are read as
    `image_folder` reads them, in colour too.

    Args:
        path: the folder. Hidden files are ignored.
        size: height and width of the images.
        channels: 1 for grey, or 3 for colour, which is read as it is.
        background: of drawings: "light", "dark", or found for each picture ("auto"); or "as is".
        unreadable: what to do about a file that is no picture, or none of a drawing, or that lies
            beside class folders: "refuse" names the first, "skip" leaves all such out.

    Returns:
        `Pictures`, sorted by class and file name.

    Raises:
        ImportError: Pillow is missing.
        FileNotFoundError: a missing folder, one without pictures, or an empty class folder.
        NotADirectoryError: `path` is a file.
        ValueError: pictures beside class folders; a file that is no picture, a picture of fewer
            than 8 x 8 pixels or too many to unpack, one without strokes; a class without any that
            can be read; an option out of range.

    Warns:
        UserWarning: for files that are skipped.

    Example:
        >>> import pathlib, tempfile
        >>> from PIL import Image, ImageDraw
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     drawing = Image.new("L", (80, 60), "white")
        ...     ImageDraw.Draw(drawing).line((20, 30, 60, 30), "black", 5)
        ...     drawing.save(pathlib.Path(folder, "dash.png"))
        ...     found = few_pictures(folder)
        >>> found.images.shape, found.inverted
        ((1, 28, 28, 1), 1)
    """
    check_choice("channels", channels, (1, 3))
    check_choice("background", background, ("auto", "light", "dark", "as is"))
    check_choice("unreadable", unreadable, ("refuse", "skip"))
    size = whole_number("size", size, at_least=1)
    if channels == 3 and background != "as is":
        raise ValueError(f"background={background!r} is of drawings in grey: pass 'as is'")
    folder = Path(path).expanduser()
    check_folder(folder, _EXPECTED)
    skipped = [
        f"{folder} holds the file {stray.name} beside class folders, expected {_EXPECTED}"
        for stray in _beside_class_folders(folder)
    ]
    if skipped and unreadable == "refuse":
        raise ValueError(skipped[0])
    classes = _classes_in(folder)
    with cli_extra("few_pictures()"):
        from fomaml_jax.datasets import _image_file

    def read(file: Path) -> tuple[np.ndarray, bool]:
        with _image_file.without_bomb_warnings():
            _image_file.check_readable(file)
            if background == "as is":
                return _image_file.read_image(file, size, channels)[0], False
            return _image_file.read_strokes(file, size, background)

    found: list[tuple[int, Path, np.ndarray, bool]] = []
    for label, (name, examples) in enumerate(classes.items()):
        of_class, unread = _readable(examples, read, raises=unreadable == "refuse")
        skipped += unread
        if not of_class:
            where = folder / name if name else folder
            raise ValueError(f"no file in {where} can be read as a picture, such as: {skipped[-1]}")
        found += [(label, *each) for each in of_class]
    if skipped:
        warnings.warn(
            f"{counted(len(skipped), 'file')} left out, such as: {skipped[0]}",
            stacklevel=2,
        )
    labels, files, images, inverted = zip(*found, strict=True)
    return Pictures(
        np.stack(images),
        files,
        None if "" in classes else np.array(labels, np.int32),
        tuple(filter(None, classes)),
        sum(inverted),
        len(skipped),
    )


def _readable(
    files: list[Path], read: Callable[[Path], tuple[np.ndarray, bool]], *, raises: bool
) -> tuple[list[tuple[Path, np.ndarray, bool]], list[str]]:
    """What can be read of the files, and what is to be said of the others unless it raises."""
    found, unread = [], []
    for file in files:
        try:
            found.append((file, *read(file)))
        except ValueError as error:
            if raises:
                raise
            unread.append(str(error))
    return found, unread


def _beside_class_folders(folder: Path) -> list[Path]:
    """Files that lie beside class folders; none of a flat folder's."""
    there = visible(folder)
    strays = [entry for entry in there if not entry.is_dir()]
    return strays if len(strays) < len(there) else []


def _classes_in(folder: Path) -> dict[str, list[Path]]:
    """The files of each class, or of a flat folder those of the class without a name."""
    there = visible(folder)
    if not there:
        raise FileNotFoundError(f"{folder} holds no pictures, expected {_EXPECTED}")
    if not any(entry.is_dir() for entry in there):
        return {"": there}
    classes: dict[str, list[Path]] = {}
    for stored, examples in list_classes(folder, _EXPECTED).items():
        name = unicodedata.normalize("NFC", stored)  # as another folder may store it
        if name in classes:
            raise ValueError(
                f"{folder} holds the class {name} twice, its accents stored differently; put its "
                "pictures together"
            )
        classes[name] = list(examples)
    return classes
