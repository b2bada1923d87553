"""An adapted classifier in one file, which needs neither the run nor the support folder."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fomaml_jax import named_arrays, options, runs
from fomaml_jax.classifiers import initial_params
from fomaml_jax.heads import HEAD
from fomaml_jax.recognition import AdaptedClassifier
from fomaml_jax.thresholds import Calibration

ABOUT = "about"
KIND, VERSION = "adapted classifier", "1"
"""What such a file says it is; the number goes up when it comes to hold other things."""

_EXPECTED = "expected what fomaml-jax adapt --save or fj.save_adapted has written"


def save_adapted(adapted: AdaptedClassifier, path: str | os.PathLike[str]) -> None:
    """Writes an adapted classifier, whole or not at all, over what was there.

    The support pictures go along: each later picture is normalised beside them.

    Args:
        adapted: what `fj.adapt_classifier` returned.
        path: the file, in NumPy's format of many arrays.

    Raises:
        OSError: where it cannot be written.

    Example:
        >>> import pathlib, tempfile, numpy as np, fomaml_jax as fj
        >>> classifier = fj.load_classifier("pretrained:omniglot")
        >>> pictures = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1), np.uint8)
        >>> adapted = fj.adapt_classifier(classifier, (pictures, np.arange(2)), names=("a", "b"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fj.save_adapted(adapted, pathlib.Path(folder, "mine.npz"))
        ...     fj.load_adapted(pathlib.Path(folder, "mine.npz")).names
        ('a', 'b')
    """
    about = {
        "kind": f"{KIND}, {VERSION}",
        "config": options.to_json(adapted.chosen),
        "picture": adapted.picture,
        "names": adapted.names,
        "background": adapted.background,
    }
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with runs.replacing(path) as temporary, temporary.open("wb") as file:
        arrays: dict[str, Any] = {k: _plain(x) for k, x in named_arrays.by_name(adapted).items()}
        np.savez(file, **{ABOUT: np.asarray(json.dumps(about))}, **arrays)


def _plain(x: np.ndarray) -> np.ndarray:
    """Float32 in place of float64, which JAX computes in where it is asked to."""
    return x.astype(np.float32) if x.dtype == np.float64 else x


def load_adapted(path: str | os.PathLike[str]) -> AdaptedClassifier:
    """Reads what `save_adapted` wrote.

    Args:
        path: the file.

    Raises:
        ValueError: where it is missing, damaged, of another kind or another version.

    Example:
        >>> import fomaml_jax as fj
        >>> fj.load_adapted("nowhere.npz")
        Traceback (most recent call last):
        ...
        ValueError: nowhere.npz is not a file, expected what fomaml-jax adapt --save or
        fj.save_adapted has written
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path} is not a file, {_EXPECTED}")
    try:
        saved = runs.read_arrays(path)
    except ValueError:
        raise ValueError(f"{path} is damaged, or of another kind: {_EXPECTED}") from None
    another = f"{path} is of another kind: {_EXPECTED}"
    try:
        about = json.loads(str(saved.pop(ABOUT)))
        kind, version = about["kind"].rsplit(", ", 1)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(another) from None
    if kind != KIND:
        raise ValueError(another)
    if version != VERSION:
        raise ValueError(f"{path} was written by another version of fomaml_jax, as {version}")
    try:
        return runs.fitted(path, saved, _like(about, saved))
    except (KeyError, TypeError, AttributeError, IndexError):  # it lacks something
        raise ValueError(another) from None
    except ValueError as error:
        raise ValueError(f"{another} ({error})") from None


def _like(about: dict[str, Any], saved: dict[str, np.ndarray]) -> Any:
    """What is expected of the file, in shapes and dtypes."""
    chosen = options.from_json(about["config"])
    if not isinstance(chosen, options.ImageOptions):
        raise ValueError("a network without classes")
    picture, names = tuple(about["picture"]), tuple(about["names"])
    ways = chosen.ways if chosen.head == "learned" else len(names)
    params = jax.eval_shape(lambda: initial_params(chosen, ways, picture))
    features = params["params"][HEAD]["kernel"].shape[0]
    pictures, labels = (saved[f".support[{i}]"] for i in range(2))

    def array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    return AdaptedClassifier(
        chosen,
        picture,
        names,
        params,
        (array((len(labels), *picture), pictures.dtype), array(labels.shape, labels.dtype)),
        array((len(names), features)),  # type: ignore[arg-type]
        Calibration(*[array(())] * 3),  # type: ignore[arg-type]
        about["background"],
    )
