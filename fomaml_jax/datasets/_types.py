"""What every data set is: images by class or rows by group, in three splits that never meet."""

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


class Groups(NamedTuple):
    """The rows of groups, as one array that goes to the device whole.

    Attributes:
        values: `[groups, rows, 1 + features]` float32, standardised: the target, then the features.
            The rows of a group are in the order of time.
        counts: `[groups]` int32: the first `counts[g]` rows of group `g` are real, the rest zero
            padding.
        names: one a group, all different.
    """

    values: np.ndarray
    counts: np.ndarray
    names: tuple[str, ...]

    @property
    def features(self) -> np.ndarray:
        """`[groups, rows, features]`."""
        return self.values[..., 1:]

    @property
    def targets(self) -> np.ndarray:
        """`[groups, rows]`."""
        return self.values[..., 0]


class GroupSplits(NamedTuple):
    """The groups to train on, to choose by, and to report on; no group is in two of them."""

    train: Groups
    validation: Groups
    test: Groups


def digest(splits: Splits | GroupSplits) -> str:
    """A fingerprint of all data, classes and splits: with other data, it is another one.

    Args:
        splits: the data.

    Returns:
        The SHA-256 of names, counts and pixels or values, as hexadecimal digits.

    Example:
        >>> import fomaml_jax as fj
        >>> len(fj.datasets.digest(fj.datasets.glyphs()))
        64
    """
    found = hashlib.sha256()
    for values, counts, names in splits:
        kind = [list(values.shape), str(values.dtype), counts.tolist(), list(names)]
        found.update(json.dumps(kind).encode())
        found.update(np.ascontiguousarray(values).data)
    return found.hexdigest()


def select(images: np.ndarray, names: Sequence[str], classes: np.ndarray) -> ImageClasses:
    """The chosen `classes` of `images`, in which every example is real."""
    counts = np.full(len(classes), images.shape[1], np.int32)
    return ImageClasses(images[classes], counts, tuple(names[int(c)] for c in classes))
