"""What every data set is: images by class, in three splits whose classes never meet."""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class ImageClasses(NamedTuple):
    """Images by class, as one array that goes to the device whole.

    Attributes:
        images: `[classes, examples, height, width, channels]` uint8.
        counts: `[classes]` int32: the first `counts[c]` examples of class `c` are real, the rest
            zero padding.
        names: one a class, all different.
    """

    images: np.ndarray
    counts: np.ndarray
    names: tuple[str, ...]


class Splits(NamedTuple):
    """The classes to train on, to choose by, and to report on; no class is in two of them."""

    train: ImageClasses
    validation: ImageClasses
    test: ImageClasses


def digest(splits: Splits) -> str:
    """A fingerprint of all pictures, classes and splits: with other data, it is another one.

    Args:
        splits: the data.

    Returns:
        The SHA-256 of names, counts and pixels, as hexadecimal digits.

    Example:
        >>> import fomaml_jax as fj
        >>> len(fj.datasets.digest(fj.datasets.glyphs()))
        64
    """
    found = hashlib.sha256()
    for images, counts, names in splits:
        kind = [list(images.shape), str(images.dtype), counts.tolist(), list(names)]
        found.update(json.dumps(kind).encode())
        found.update(np.ascontiguousarray(images).data)
    return found.hexdigest()


def select(images: np.ndarray, names: Sequence[str], classes: np.ndarray) -> ImageClasses:
    """The chosen `classes` of `images`, in which every example is real."""
    counts = np.full(len(classes), images.shape[1], np.int32)
    return ImageClasses(images[classes], counts, tuple(names[int(c)] for c in classes))
