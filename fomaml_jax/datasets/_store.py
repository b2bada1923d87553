"""The compact cache: what took long to build, in one file for the next start."""

import hashlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fomaml_jax.datasets._types import ImageClasses, Splits

_FORMAT = 1  # raise it whenever the file's layout, or what a data set puts into it, changes

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`$FOMAML_JAX_CACHE` where set, else `fomaml_jax` in the user's cache folder."""
    chosen = os.environ.get("FOMAML_JAX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache", "fomaml_jax")


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a container may run under a user that nobody has heard of
        return Path(tempfile.gettempdir())


def cached(name: str, key: Mapping[str, Any], build: Callable[[], Splits]) -> Splits:
    """Returns `build()`, from the cache where it was built before.

    Args:
        name: of the data set; the file's name starts with it.
        key: everything that `build` depends on, as JSON can write it: options, versions, and the
            fingerprint of the source. Another key is another file.
        build: builds the arrays. What it raises is raised.

    Returns:
        The splits. A cache that cannot be read or written, or is damaged, costs time only.
    """
    text = json.dumps([_FORMAT, dict(key)], sort_keys=True)
    path = cache_folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
    splits = _read(path)
    if splits is None:
        splits = build()
        _write(path, splits)
    return splits


def fingerprint(files: list[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of the last change of each file, for a cache key."""
    status = [(str(file), file.stat()) for file in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in status]


def _read(path: Path) -> Splits | None:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return Splits(*(_unpack(arrays, split) for split in Splits._fields))
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged bytes make zipfile, zlib and numpy raise nearly anything
        _log.info("building again, because the cache %s cannot be read: %r", path, error)
        return None


def _write(path: Path, splits: Splits) -> None:
    # A name of its own, then a rename: no reader ever sees half a file, nor two writers each other.
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "xb") as file:
            np.savez_compressed(file, **_pack(splits))
        os.replace(unfinished, path)
    except OSError as error:
        _log.info("going on without the cache %s: %r", path, error)
    finally:
        _remove(unfinished)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        _log.info("cannot remove %s", path)


def _pack(splits: Splits) -> dict[str, Any]:
    arrays = {}
    for split, (images, counts, names) in zip(Splits._fields, splits, strict=True):
        arrays |= {f"{split}_images": images, f"{split}_counts": counts}
        arrays |= {f"{split}_names": np.array(names, dtype=str)}
    return arrays


def _unpack(arrays: Mapping[str, np.ndarray], split: str) -> ImageClasses:
    images, counts, names = (arrays[f"{split}_{field}"] for field in ImageClasses._fields)
    return ImageClasses(images, counts, tuple(names.tolist()))
