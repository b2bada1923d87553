"""What every data set is: images by class, in three splits whose classes never meet."""

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


def select(images: np.ndarray, names: Sequence[str], classes: np.ndarray) -> ImageClasses:
    """The chosen `classes` of `images`, in which every example is real."""
    counts = np.full(len(classes), images.shape[1], np.int32)
    return ImageClasses(images[classes], counts, tuple(names[int(c)] for c in classes))
