"""A run's checkpoints: there as a whole or not at all, and read only if no byte has changed."""

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fomaml_jax import named_arrays

MANIFEST = "manifest.json"
"""Names the leaves and the digest of every file: what a checkpoint is checked against."""

FORMAT = 1
KEEP = 2
"""Checkpoints on disk: the newest, and one to fall back on."""

OVERHEAD = 2**20
"""Bytes that a checkpoint may take beside those of its arrays, which files and names need."""


class Checkpoint(NamedTuple):
    """What was saved.

    Attributes:
        step: outer steps taken.
        tree: a pytree of arrays.
        notes: what goes with it, as plain JSON.
    """

    step: int
    tree: Any
    notes: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint under `folder`, and removes all but the newest.

    It is written under another name, with everything flushed to the disk, and renamed at the end:
    whenever the process dies, every checkpoint that is there is whole.

    Returns:
        Its folder, named by its step.

    Raises:
        OSError: where it cannot be written; what was there before is still there.
    """
    final = folder / f"{checkpoint.step:010d}"
    temporary = _hidden(final)
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".*"):  # by a process that died
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        _write(temporary, checkpoint)
        if final.exists():  # damaged: this step was reached again from an older checkpoint
            _remove(final)
        temporary.rename(final)
        flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # Those of later steps are damaged: the run went on from an older one.
    steps = _steps(folder)
    later = [path for path in steps if int(path.name) > checkpoint.step]
    for path in [*later, *steps[len(later) + KEEP :]]:
        _remove(path)
    return final


def forget_after(folder: Path, step: int) -> None:
    """Removes the checkpoints of later steps."""
    for path in _steps(folder):
        if int(path.name) > step:
            _remove(path)


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, read or not; None where there is none."""
    return max((int(path.name) for path in _steps(folder)), default=None)


def newest(
    folder: Path, like: Any, check: Callable[[dict[str, Any]], None] = lambda notes: None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that can be read, in the structure of `like`.

    Its notes are given to `check`, which may refuse it, before its arrays are looked at.

    Returns:
        The checkpoint, `None` where there are none, and a line on each newer one that is damaged.

    Raises:
        CheckpointError: where all are damaged, or the newest intact one does not fit `like`.
    """
    damaged: list[str] = []
    for path in _steps(folder):
        try:
            manifest, found = _read(path)
        except _DamagedError as error:
            damaged.append(f"the checkpoint {path} is damaged and was left out: {error}")
            continue
        check(manifest["notes"])
        saved = {
            name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype, shape in manifest["leaves"]
        }
        try:
            named_arrays.check_like(saved, like)
        except ValueError as error:
            raise CheckpointError(f"{path} is of another problem: {error}") from None
        tree = named_arrays.in_structure(found, like)
        return Checkpoint(manifest["step"], tree, manifest["notes"]), damaged
    if damaged:
        raise CheckpointError("no checkpoint can be read: " + "; ".join(damaged))
    return None, []


def arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one checkpoint by their names.

    Raises:
        CheckpointError: where it is damaged.
    """
    try:
        return _read(path)[1]
    except _DamagedError as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from None


class CheckpointError(ValueError):
    """Why a run cannot go on from its checkpoints."""


class _DamagedError(Exception):
    pass


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    # Under numbers, not under names: a name may be anything, and so may the file system.
    leaves = named_arrays.by_name(checkpoint.tree).items()
    # Orbax's threads would print a traceback each.
    needed = OVERHEAD + sum(leaf.nbytes for _, leaf in leaves)
    if shutil.disk_usage(folder.parent).free < needed:
        raise OSError(
            f"cannot write the checkpoint {folder}: the disk is full, {needed:,} bytes are needed"
        )
    folder.mkdir()
    with _checkpointer() as orbax:
        # Empty arrays are refused by Orbax, and need no saving.
        numbered = {f"{i:05d}": leaf for i, (_, leaf) in enumerate(leaves) if leaf.size}
        try:
            orbax.save((folder / "arrays").absolute(), numbered)
        except Exception as error:  # Orbax has its own for a full disk, among others
            said = (str(error).strip() or repr(error)).splitlines()[0]
            raise OSError(f"cannot write the checkpoint {folder}: {said}") from error
    manifest = {
        "format": FORMAT,
        "step": checkpoint.step,
        "notes": checkpoint.notes,
        "leaves": [[name, str(leaf.dtype), list(leaf.shape)] for name, leaf in leaves],
        "files": {
            str(path.relative_to(folder)): _digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }
    with (folder / MANIFEST).open("w") as file:
        json.dump(manifest | {"digest": _digest_of(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest, and the arrays by their names."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, digest = manifest["format"], manifest.pop("digest")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _DamagedError(f"{MANIFEST} cannot be read") from None
    if _digest_of(manifest) != digest:
        raise _DamagedError(f"{MANIFEST} is not what was written")
    if version != FORMAT:
        raise CheckpointError(f"{folder} was written by another version of fomaml_jax ({version})")
    if f"{manifest['step']:010d}" != folder.name:
        raise _DamagedError(f"{MANIFEST} is that of step {manifest['step']}")
    for name, digest in manifest["files"].items():
        try:
            found = _digest(folder / name)
        except OSError:
            raise _DamagedError(f"{name} cannot be read") from None
        if found != digest:
            raise _DamagedError(f"{name} is not what was written")
    with _checkpointer() as orbax:
        found = orbax.restore((folder / "arrays").absolute())

    def array(i: int, dtype: str, shape: list[int]) -> np.ndarray:
        numbered = f"{i:05d}"
        return np.asarray(found[numbered]) if numbered in found else np.zeros(shape, dtype)

    kinds = enumerate(manifest["leaves"])
    return manifest, {name: array(i, dtype, shape) for i, (name, dtype, shape) in kinds}


def check_possible() -> None:
    """Refuses where what writes checkpoints is not installed.

    Raises:
        ImportError: saying how to get it.
    """
    try:
        found = importlib.util.find_spec("orbax.checkpoint")
    except ModuleNotFoundError:  # not even what it is a part of
        found = None
    if found is None:
        raise ImportError('checkpoints need orbax: pip install "fomaml-jax[cli]"')


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    import orbax.checkpoint as ocp  # takes a second to import, and only runs with a folder need it

    absl, before = logging.getLogger("absl"), logging.getLogger("absl").level
    absl.setLevel(logging.CRITICAL)  # what goes wrong is raised, too
    me = jax.process_index()  # it reads and writes by itself, whatever other processes do
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            yield checkpointer
    finally:
        absl.setLevel(before)


def _steps(folder: Path) -> list[Path]:
    """The checkpoints there, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.name.isdigit()), reverse=True)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def _remove(path: Path) -> None:
    """Removes a checkpoint as a whole: it never looks like a damaged one."""
    hidden = path.rename(path.with_name(f".old-{path.name}"))
    shutil.rmtree(hidden, ignore_errors=True)


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    if sys.platform == "win32":  # flushes nothing that is open to read, and opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
