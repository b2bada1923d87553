"""The user's own pictures: one folder a class."""

import contextlib
import hashlib
import itertools
import logging
import numbers
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from fomaml_jax import host_memory
from fomaml_jax.datasets._checks import (
    check_choice,
    check_folder,
    cli_extra,
    whole_number,
)
from fomaml_jax.datasets._class_folders import EXPECTED, Files, dealt_splits, given_splits
from fomaml_jax.datasets._types import ImageClasses, Splits

_log = logging.getLogger(__name__)


def image_folder(
    path: str | os.PathLike[str],
    *,
    size: int = 84,
    channels: Literal[1, 3] = 3,
    validation: float = 0.15,
    test: float = 0.2,
    seed: int = 0,
    unreadable: Literal["refuse", "skip"] = "refuse",
    duplicates: Literal["refuse", "keep"] = "refuse",
) -> Splits:
    """Your own pictures, one folder a class, in any format that Pillow opens.

    Where `path` holds the folders `train` and `test`, and perhaps `validation` or `val`, with the
    class folders in them, those are the splits. Otherwise `path` holds the class folders, and whole
    classes are dealt out at random. A task needs two classes, so no split has only one: `test` gets
    two at least, `train` keeps two at least, and `validation` gets two at least where they can be
    spared, else none: so of six classes each split gets two, of four only `train` and `test`.

    Pictures are turned upright as their EXIF orientation says, put on white where transparent,
    reduced to 8 bits, resized with Pillow's LANCZOS until the shorter side is `size`, and cropped
    to the middle square. Hidden files are ignored, and so are files beside the class folders. The
    arrays are as long as the largest class of their split, zero after the end of the others.

    Args:
        path: the folder.
        size: height and width of the images.
        channels: 3 for colour or 1 for grey.
        validation: fraction of all classes to validate on; of the classes of `train/` where `path`
            holds that, but no validation folder. Zero for none.
        test: fraction of all classes to test on, unless `path` holds `test/`. Zero for none.
        seed: of the deal.
        unreadable: what to do about a file that is no picture: "refuse" names the first, "skip"
            leaves all such files out, and warns.
        duplicates: what to do about the same file twice. In two splits, a model would be judged on
            what it was trained on; in one class, an episode may give it as an example and ask for
            it, too. "refuse" names the first, "keep" does not look.

    Returns:
        Images `[classes, examples, size, size, channels]` uint8. Classes are named as their
        folders and sorted by name; their examples are sorted by file name.

    Raises:
        ImportError: Pillow is missing.
        FileNotFoundError: a missing or empty folder, or no class folder.
        NotADirectoryError: `path` is a file.
        TypeError: `size` or `seed` is no whole number.
        ValueError: too few classes, a class in two splits, a picture twice, a file that is no
            image, a folder where an image should be, more than fits into memory, or an option out
            of range.

    Warns:
        UserWarning: for files that were left out.

    Example:
        >>> import pathlib, tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ["bee", "cat", "dog", "elk", "fox", "gnu", "owl"]:
        ...         pathlib.Path(folder, name).mkdir()
        ...         picture = Image.new("RGB", (120, 90), (ord(name[0]), 0, 0))
        ...         picture.save(pathlib.Path(folder, name, "1.png"))
        ...     train, validation, test = image_folder(folder, size=32)
        >>> train.images.shape, train.names
        ((3, 1, 32, 32, 3), ('bee', 'cat', 'gnu'))
        >>> validation.names, test.names
        (('dog', 'fox'), ('elk', 'owl'))
    """
    check_choice("channels", channels, (1, 3))
    check_choice("unreadable", unreadable, ("refuse", "skip"))
    check_choice("duplicates", duplicates, ("refuse", "keep"))
    size = whole_number("size", size, at_least=1)
    seed = whole_number("seed", seed, at_least=0)
    _check_fractions(validation=validation, test=test)
    folder = Path(path).expanduser()
    check_folder(folder, EXPECTED)
    splits = given_splits(folder, validation, seed) or dealt_splits(folder, validation, test, seed)
    _check_fits(splits, size, channels)
    found = [_read_classes(files, size, channels, unreadable == "skip") for files in splits]
    left_out = [error for classes in found for error in classes.left_out]
    if left_out:
        more = f", and {len(left_out) - 1} more files" if len(left_out) > 1 else ""
        warnings.warn(f"left out: {left_out[0]}{more}", stacklevel=2)
        for error in left_out:
            _log.info("left out: %s", error)
    if duplicates == "refuse":
        _check_no_duplicates([classes.digests for classes in found])
    return Splits(*(classes.images for classes in found))


class _Read(NamedTuple):
    """A split, the digest of every picture in it, and what was left out."""

    images: ImageClasses
    digests: dict[str, list[Path]]
    left_out: list[ValueError]


def _read_classes(files: Files, size: int, channels: int, skip: bool) -> _Read:
    with cli_extra("image_folder()"):
        from fomaml_jax.datasets._image_file import read_image, without_bomb_warnings

    counts = np.array([len(examples) for examples in files.values()], np.int32)
    images = np.zeros([len(counts), counts.max(initial=0), size, size, channels], np.uint8)
    is_read = np.zeros(images.shape[:2], bool)

    def read(place: tuple[int, int], file: Path) -> tuple[str, Path] | ValueError:
        try:
            images[place], content = read_image(file, size, channels)
        except ValueError as error:
            if not skip:
                raise
            return error
        is_read[place] = True
        return hashlib.sha256(content).hexdigest(), file

    places = [(c, e) for c, count in enumerate(counts) for e in range(count)]
    # Pillow decodes and resizes without the interpreter's lock.
    with _warning_once(), without_bomb_warnings(), ThreadPoolExecutor() as pool:
        found = list(pool.map(read, places, itertools.chain(*files.values())))
    left_out = [one for one in found if isinstance(one, ValueError)]
    if left_out:
        images, counts = _closed_up(images, is_read, files)
    digests: dict[str, list[Path]] = {}
    for digest, file in (one for one in found if not isinstance(one, ValueError)):
        digests.setdefault(digest, []).append(file)
    return _Read(ImageClasses(images, counts, tuple(files)), digests, left_out)


@contextlib.contextmanager
def _warning_once() -> Iterator[None]:
    """Of many files that are warned of, one is named, and the others counted."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        yield
    messages = sorted(str(warning.message) for warning in said)
    if messages:
        more = f" (and {len(messages) - 1} more such files)" if len(messages) > 1 else ""
        warnings.warn(messages[0] + more, stacklevel=4)


def _closed_up(
    images: np.ndarray, is_read: np.ndarray, files: Files
) -> tuple[np.ndarray, np.ndarray]:
    """The pictures that were read, first in their class, and how many there are."""
    counts = is_read.sum(1, dtype=np.int32)
    for c, examples in enumerate(files.values()):
        if counts[c] == 0:
            raise ValueError(
                f"{examples[0].parent} holds no picture that can be read: remove the folder"
            )
        images[c, : counts[c]] = images[c, is_read[c]]
        images[c, counts[c] :] = 0
    return images[:, : counts.max()], counts


def _check_no_duplicates(splits: Sequence[Mapping[str, Sequence[Path]]]) -> None:
    """Refuses the same picture, byte for byte, in two splits, or twice in a class."""
    across = [
        (one[digest][0], other[digest][0])
        for one, other in itertools.combinations(splits, 2)
        for digest in one.keys() & other.keys()
    ]
    of_one_class = [
        (one, other)
        for split in splits
        for files in split.values()
        for one, other in itertools.pairwise(files)  # class after class
        if one.parent == other.parent
    ]
    for pairs, where, harm in (
        (across, " in two splits", "a model would be judged on what it was trained on"),
        (of_one_class, "", "an episode may give it as an example and ask for it, too"),
    ):
        if pairs:
            one, other = min(pairs)
            raise ValueError(
                f"{one} and {other} are the same picture{where} ({len(pairs)} such in all), so "
                f"that {harm}: remove one of each, or keep them (duplicates='keep', --duplicates "
                "keep)"
            )


def _check_fits(splits: Sequence[Files], size: int, channels: int) -> None:
    """Refuses what this machine's memory cannot hold, each split as long as its largest class."""
    most = [max(map(len, files.values()), default=0) for files in splits]
    rows = sum(len(files) * count for files, count in zip(splits, most, strict=True))
    needed, there = rows * size * size * channels, host_memory.most()
    if needed > there:
        largest = max(itertools.chain(*(f.items() for f in splits)), key=lambda item: len(item[1]))
        raise ValueError(
            f"pictures of {size} x {size} x {channels} bytes, for every class as many as the "
            f"largest of its split has, need {needed / 1e9:.0f} GB, and there are "
            f"{there / 1e9:.0f}: pass a smaller size, or keep fewer pictures of large classes (in "
            f"{largest[0]} there are {len(largest[1])})"
        )


def _check_fractions(**fractions: float) -> None:
    for name, value in fractions.items():
        if not isinstance(value, numbers.Real) or not 0 <= value < 1:
            raise ValueError(f"{name}={value!r} must be a fraction from 0 to below 1")
    if sum(fractions.values()) >= 1:
        both = " and ".join(f"{name}={value}" for name, value in fractions.items())
        raise ValueError(f"{both} leave nothing to train on: together they must be below 1")
