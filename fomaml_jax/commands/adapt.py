"""`fomaml-jax adapt`: a trained network on classes of the user's own, from a few pictures."""

import dataclasses
import shlex
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from tyro.conf import Positional

from fomaml_jax.adapted_files import save_adapted
from fomaml_jax.classifiers import Classifier, load_classifier
from fomaml_jax.commands.endings import plain_warnings, refusing
from fomaml_jax.commands.recognised import how_read
from fomaml_jax.commands.recognising import Recognise, check_out, read, recognise
from fomaml_jax.commands.words import check_file, check_outside, parse
from fomaml_jax.datasets import Pictures
from fomaml_jax.devices import keep_compiled_programs
from fomaml_jax.recognition import (
    NONE,
    AdaptedClassifier,
    Background,
    adapt_classifier,
    background_of,
)
from fomaml_jax.wording import counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapt(Recognise):
    """Adapts a trained network to your own classes, and recognises them in other pictures."""

    run: Positional[Path]
    """The folder that training wrote, or pretrained:omniglot, which knows drawings and symbols on a
    plain ground, not photographs."""
    support: Path
    """Folder with one folder a class, each with one picture or more."""
    query: Path | None = None
    """Folder of the pictures to be recognised, or of class folders, for the accuracy to be told."""
    save: Path | None = None
    """File for the adapted classifier, for fomaml-jax predict."""
    background: Literal["auto", "light", "dark"] | None = None
    """Of drawings: light (they are inverted), dark, or found at the border of each picture, as it
    is unless given."""


def main(words: list[str]) -> None:
    """Adapts, as the words after `adapt` say."""
    asked = parse(Adapt, "fomaml-jax adapt", words)
    with refusing(), plain_warnings():
        folder = asked.folder
        _check_places(asked, folder)
        keep_compiled_programs(asked.compilation_cache)
        classifier = load_classifier(asked.run)
        background = asked.background or background_of(classifier)
        read_as = classifier.chosen, background, asked.unreadable
        support = _support(asked.support, read(asked.support, *read_as))
        query = None if asked.query is None else read(asked.query, *read_as)
        adapted = _adapted(classifier, support, background)
        print(_shown(support, background))
        if asked.save is not None:
            save_adapted(adapted, asked.save)
            print(f"The adapted classifier is in {asked.save}; to use it:")
            print(f"fomaml-jax predict {shlex.quote(str(asked.save))} --query FOLDER")
        if query is not None and asked.query is not None:
            recognise(adapted, query, asked.query, asked, folder)


def _check_places(asked: Adapt, folder: Path) -> None:
    """Refuses what could not be written in the end."""
    if asked.query is None and asked.save is None:
        raise ValueError("pass --query with pictures to recognise, --save with a file, or both")
    if asked.query is None and (asked.out is not None or asked.format != "csv"):
        raise ValueError("--out and --format are of predictions; pass --query with pictures too")
    pictures_in = [asked.support] if asked.query is None else [asked.support, asked.query]
    if asked.query is not None:
        check_out(folder, overwrite=asked.overwrite, apart=pictures_in)
    if asked.save is None:
        return
    check_file(asked.save, "--save")
    for data in pictures_in:
        check_outside(asked.save, data, "--save")
    if asked.query and asked.save.resolve().parent == folder.resolve():
        raise ValueError(f"{asked.save} would be among the predictions; pass --save with another")
    if asked.save.exists() and not asked.overwrite:
        raise ValueError(f"{asked.save} is there already; pass another --save, or --overwrite")


def _support(folder: Path, found: Pictures) -> Pictures:
    """The labelled pictures, if they can be that."""
    if found.labels is None:
        raise ValueError(
            f"{folder} holds pictures and no class folders: put those of each class into a folder "
            "of its name"
        )
    if NONE in found.names:
        raise ValueError(f'{folder} has a class called "{NONE}", which is found out without one')
    first: dict[bytes, Path] = {}
    for file, image in zip(found.files, found.images, strict=True):
        if (other := first.setdefault(image.tobytes(), file)) is not file:
            # A copy that is held out would be known by its twin, and put the threshold too high.
            size = " x ".join(map(str, image.shape[:2]))
            same = (
                "the same picture"
                if other.read_bytes() == file.read_bytes()
                else f"the same at {size} pixels, drawings without their place and size on paper"
            )
            raise ValueError(f"{other} and {file} are {same}: remove one of them")
    return found


def _adapted(
    classifier: Classifier, support: Pictures, background: Background
) -> AdaptedClassifier:
    def adapt(x: np.ndarray, y: np.ndarray) -> AdaptedClassifier:
        return adapt_classifier(classifier, (x, y), names=support.names, background=background)

    assert support.labels is not None
    adapted = jax.block_until_ready(jax.jit(adapt)(support.images, support.labels))
    found = adapted.params, adapted.means, adapted.calibration.threshold
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)):
        raise ValueError(
            "adaptation diverged; train the network with a smaller --inner-rate or --head-rate"
        )
    return adapted


def _shown(support: Pictures, background: Background) -> str:
    counts = np.bincount(np.asarray(support.labels))
    few, many = int(counts.min()), int(counts.max())
    each = f"{few} to " * (few < many) + counted(many, "example")
    return f"{len(support.names)} classes by {each} each ({how_read(support, background)})"
