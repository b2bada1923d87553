"""Which pictures belong to which class, and which classes to which split."""

import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

EXPECTED = "one folder a class with its images, or train/ and test/ with such folders"

_LITTER = {"__MACOSX", "Thumbs.db", "desktop.ini"}  # hidden where they come from

Files = Mapping[str, Sequence[Path]]
"""The image files of each class."""


def list_classes(folder: Path, expected: str = EXPECTED) -> Files:
    """The image files of every class folder in `folder`, sorted by name."""
    folders = [entry for entry in visible(folder) if entry.is_dir()]
    if not folders:
        raise FileNotFoundError(f"{folder} holds no class folders, expected {expected}")
    return {class_folder.name: _image_files(class_folder, expected) for class_folder in folders}


def _image_files(class_folder: Path, expected: str) -> list[Path]:
    entries = visible(class_folder)
    if not entries:
        raise FileNotFoundError(f"{class_folder} is empty, expected the images of a class")
    for entry in entries:
        if entry.is_dir():
            raise ValueError(
                f"{class_folder} holds the folder {entry.name} where images should be, expected"
                f" {expected}"
            )
    return entries


def visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name, without what is hidden."""
    return sorted(e for e in folder.iterdir() if e.name[0] != "." and e.name not in _LITTER)


def given_splits(folder: Path, validation: float, seed: int) -> list[Files] | None:
    """The splits as the folders `train` and `test` say, where `folder` holds both."""
    names = {entry.name for entry in visible(folder) if entry.is_dir()}
    if not names >= {"train", "test"}:
        return None
    others = sorted(names - {"train", "test"})
    if others not in ([], ["val"], ["validation"]):
        raise ValueError(
            f"{folder} holds {', '.join(others)} beside train and test, expected no other folder"
            " than validation or val"
        )
    parts = {name: list_classes(folder / name) for name in ["train", "test", *others]}
    for name, classes in parts.items():
        _check_count(folder / name, classes, 2, "a task needs two")
    _check_apart(folder, *parts.values())
    train, test, *rest = parts.values()
    chosen, train = (rest[0], train) if rest else _deal(train, [_share(train, validation)], seed)
    return [train, chosen, test]


def dealt_splits(folder: Path, validation: float, test: float, seed: int) -> list[Files]:
    """Whole classes at random; see `image_folder` for how many."""
    classes = list_classes(folder)
    if test:
        _check_count(folder, classes, 4, "two to train on and two others to test on")
    else:
        _check_count(folder, classes, 2, "a task needs two")
    tested = _share(classes, test)
    chosen = _share(classes, validation, taken=tested)
    for_validation, for_test, for_training = _deal(classes, [chosen, tested], seed)
    return [for_training, for_validation, for_test]


def _share(classes: Files, fraction: float, *, taken: int = 0) -> int:
    """How many classes are a `fraction`: at least two, and leaving two, or else none."""
    share = max(2, round(fraction * len(classes))) if fraction else 0
    possible = min(share, len(classes) - taken - 2)
    return possible if possible >= 2 else 0


def _deal(classes: Files, counts: Sequence[int], seed: int) -> list[Files]:
    """Parts of `counts` classes drawn at random, then the part that is left."""
    names = list(classes)
    order = np.random.default_rng(seed).permutation(len(names))
    parts = np.split(order, np.cumsum(counts))
    return [{names[c]: classes[names[c]] for c in sorted(part.tolist())} for part in parts]


def _check_count(folder: Path, classes: Files, needed: int, reason: str) -> None:
    if len(classes) < needed:
        raise ValueError(
            f"{folder} holds too few class folders ({', '.join(classes)}), expected at least"
            f" {needed}: {reason}"
        )


def _plain(name: str) -> str:
    """The name whatever its case, and however its accents are stored."""
    return unicodedata.normalize("NFC", name.casefold())


def _check_apart(folder: Path, *splits: Files) -> None:
    for one, other in itertools.combinations(splits, 2):
        others = set(map(_plain, other))
        for name in sorted(name for name in one if _plain(name) in others):
            raise ValueError(
                f"{folder} holds the class {name} in two splits, expected every class in one: keep"
                " all class folders in one folder and pass that, to have whole classes dealt out"
            )
