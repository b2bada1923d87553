"""A run's folder: what is written there, whole or not at all, and how it is read back."""

import contextlib
import contextvars
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import jax
import numpy as np

from fomaml_jax import named_arrays, options, processes
from fomaml_jax.checkpoints import CheckpointError, flush
from fomaml_jax.types import Params

CONFIG = "config.json"
PARAMETERS = "parameters.npz"
METRICS = "metrics.jsonl"
LOCK = ".lock"
PLAN = "plan.json"
"""What `--tune` measured, and what it chose."""

DATA = "data.json"
"""Which data: their digest, and the classes of each split by name."""

DIVERGED = "diverged.json"
"""Where and why a run has diverged."""

RESULT = "result.json"
PER_TASK = "per_task.npy"
"""The metric of every unseen task after the last step."""

CHECKPOINTS = "checkpoints"
"""A folder, of the newest ones."""

FOLDERS = (CHECKPOINTS, "tensorboard")
_BEGUN = (METRICS, DATA, LOCK)
"""What is there of a run while it is trained, and not of a network that is handed on."""

PICTURES = ("learning_curve.png", "episodes.png", "adaptation.png")
FILES = (*PICTURES, METRICS, PLAN, DATA, DIVERGED, PER_TASK, RESULT, PARAMETERS, CONFIG)
"""What a run writes, its configuration last."""


def check_new(folder: Path, *, overwrite: bool = False) -> None:
    """Refuses a folder that holds something already; with `overwrite`, something else than a run.

    Raises:
        ValueError: naming the folder.
    """
    if not processes.is_first():  # of several of one run the first has looked, and may have begun
        return
    if overwrite and (folder / CONFIG).is_file():
        options.from_json(read_config(folder))  # refuses what is no run
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; pass --out with a folder, new or empty")
    if (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} holds a run; go on with --resume {shlex.quote(str(folder))}, replace it "
            "with --overwrite, or pass another --out"
        )
    if folder.is_dir() and any(not _left_over(path) for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty; pass --out with a folder, new or empty")


def _left_over(path: Path) -> bool:
    """Whether it is of a run that died before it had a configuration."""
    return path.name == LOCK or path.name.startswith(f".{CONFIG}.")


_HELD: contextvars.ContextVar[frozenset[Path]] = contextvars.ContextVar("held", default=frozenset())


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps everybody else from training in a folder, which is made if need be.

    Who holds it may ask again; of several processes of one run the first holds it for all. The
    operating system lets go of it however the process ends; where the file system knows no locks,
    nothing is kept.

    Raises:
        ValueError: where somebody else trains there, or it cannot be written.
    """
    whole = folder.resolve()
    if whole in _HELD.get() or not processes.is_first():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _lock(folder, stack)
        except BlockingIOError:
            raise InUseError(
                f"another process trains in {folder}; wait for it, or stop it"
            ) from None
        except OSError as error:
            raise ValueError(f"cannot write a run to {folder}: {error.strerror or error}") from None
        token = _HELD.set(_HELD.get() | {whole})
        stack.callback(_HELD.reset, token)
        yield


class InUseError(ValueError):
    """Somebody else trains in the folder."""


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    path = folder / LOCK
    while True:
        file = stack.enter_context(path.open("a"))
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:  # a file system without locks
                pass
        # Whoever had it before took the file away: then this is no longer the one to hold.
        if _is_at(path, file):
            break
    stack.callback(_let_go, path, file)


def _let_go(path: Path, file: IO[Any]) -> None:
    if _is_at(path, file):
        with contextlib.suppress(PermissionError):  # Windows removes no file that is open
            path.unlink(missing_ok=True)


def _is_at(path: Path, file: IO[Any]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def clear(folder: Path) -> None:
    """Takes away the run in a folder that `check_new` let pass and that is held alone.

    What no run writes stays. The configuration goes last: until then it is a run, to be cleared.
    """
    if not processes.is_first():
        return
    for name in (*FOLDERS, *FILES):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that takes its place once the block has succeeded.

    Of several processes of one run the first alone puts anything there.
    """
    if not processes.is_first():
        with tempfile.TemporaryDirectory() as elsewhere:
            yield Path(elsewhere) / path.name
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        flush(temporary)  # else the power may fail between the two
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, indented, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_without_nan(value), indent=2) + "\n")


def versions() -> dict[str, str]:
    """The versions and the device behind a result."""
    names = ("fomaml-jax", "jax", "jaxlib", "optax", "flax", "numpy")
    found = {name: _version(name) for name in names}
    device = jax.devices()[0]
    return found | {"python": platform.python_version(), "device": str(device.device_kind)}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # used from its sources
        return "unknown"


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """Adds one JSON object, on a line of its own, to the metrics file."""
    if not processes.is_first():
        return
    with (folder / METRICS).open("a") as file:
        file.write(_line(row))


def digest_of_metrics(rows: list[dict[str, Any]]) -> str:
    """By which it is noticed that rows are missing, or others."""
    return hashlib.sha256("".join(map(_line, rows)).encode()).hexdigest()


def flush_metrics(folder: Path) -> None:
    """Waits until the rows are on the disk."""
    path = folder / METRICS
    if path.exists():
        with path.open("a") as file:
            os.fsync(file.fileno())


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_without_nan(row)) + "\n"


def cut_metrics(folder: Path, step: int) -> list[dict[str, Any]]:
    """Takes away the rows after a step, which is to be taken again; returns those that stay."""
    kept = [row for row in read_metrics(folder) if row["step"] <= step]
    with replacing(folder / METRICS) as temporary:
        temporary.write_text("".join(map(_line, kept)))
    return kept


def _without_nan(value: Any) -> Any:
    """The value with null for the numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


ROW: dict[str, Any] = {"step": int, "tasks": int, "left_out": int}
ROW |= dict.fromkeys(("loss", "grad_norm"), float | int | None)
"""What every row of metrics has."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of the metrics file; half a line, of a process that died, is no row.

    Raises:
        CheckpointError: for a line that is damaged.
    """
    path = folder / METRICS
    try:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        rows = [json.loads(line) for line in lines]
        for row in rows:
            for name, kind in ROW.items():
                if not isinstance(row.get(name, ""), kind):
                    raise ValueError(f"a row without a number for {name}")
        # What JSON had no word for.
        return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def check_data(folder: Path, now: dict[str, Any]) -> None:
    """Compares the data that are there now with those of the run.

    Raises:
        ValueError: where classes that it was trained on, or chosen by, would now be its test, or
            a table would be standardised by other numbers.

    Warns:
        UserWarning: where other things differ.
    """
    try:
        before = json.loads((folder / DATA).read_text())
        classes = {name: set(before["classes"][name]) for name in now["classes"]}
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / DATA} is not what was written") from None
    # Earlier runs did not write all of it.
    alike = all(before[name] == now.get(name) for name in ("standard", "columns") if name in before)
    if alike and before.get("digest") == now["digest"]:
        return
    known = classes["train"] | classes["validation"]
    if seen := sorted(known.intersection(now["classes"]["test"])):
        raise ValueError(
            f"the data, or how they are split, are not those of the run in {folder}: of what it "
            f"would be tested on, {len(seen)} served to train or to validate it, such as {seen[0]};"
            " restore the data, give a folder train/ and test/ folders, a table its old --shots"
        )
    if not alike:
        raise ValueError(
            f"the table is not that of the run in {folder}: its training groups have other rows, "
            "by which values are standardised; restore the file"
        )
    warnings.warn(f"the data are not those that the run in {folder} had", stacklevel=2)


def check_unchanged(folder: Path, now: dict[str, Any]) -> None:
    """Refuses to go on with a run on other data than it had.

    Raises:
        CheckpointError: where they differ.
    """
    try:
        before = json.loads((folder / DATA).read_text()).get("digest")
    except (OSError, ValueError, AttributeError):
        raise CheckpointError(f"{folder / DATA} is not what was written") from None
    if before not in (None, now["digest"]):
        raise CheckpointError(
            f"the data are not those that the run in {folder} has been trained on; restore them, "
            "say where they are now (--path, --file), or start another run"
        )


def judged(folder: Path) -> dict[str, Any] | None:
    """The result of a run, if it has come to one."""
    try:
        result = json.loads((folder / RESULT).read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(result, dict) and {"per_step", "otherwise", "metric"} <= result.keys()
    return result if whole else None


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of a run that has no more steps to take, if it is that."""
    result = judged(folder)
    return result if result and result.get("stopped") in ("finished", "no improvement") else None


def is_handed_on(folder: Path, first: Params) -> bool:
    """Whether there are parameters other than the first ones, and nothing of a run around them."""
    begun = any((folder / name).exists() for name in (CHECKPOINTS, METRICS, DATA))
    there = (folder / PARAMETERS).is_file()
    return there and not begun and not _holds(folder / PARAMETERS, named_arrays.by_name(first))


def warn_if_begun(folder: Path) -> None:
    """Says of a run without a result what its parameters are.

    Warns:
        UserWarning: where training was cut short, or goes on.
    """
    if (folder / RESULT).exists() or not any((folder / n).exists() for n in (*FOLDERS, *_BEGUN)):
        return
    saved = [row["step"] for row in read_metrics(folder) if "validation" in row]
    state = f"of step {saved[-1]} or later" if saved else "untrained, or of the first steps"
    if saved and read_config(folder).get("patience"):
        state = f"the best by validation until step {saved[-1]} or later"
    why = "not come to its end"
    if (folder / DIVERGED).exists():
        why, state = "diverged", "those before that"
    warnings.warn(f"the run in {folder} has {why}: its parameters are {state}", stacklevel=3)


def save_parameters(folder: Path, params: Params) -> None:
    """Saves a pytree of arrays, its key paths as names.

    What other parameters came to before goes, once these are written.
    """
    named = named_arrays.by_name(params)
    if _holds(folder / PARAMETERS, named):
        return
    with replacing(folder / PARAMETERS) as temporary:
        np.savez(temporary, **named)
        if processes.is_first():
            for name in (RESULT, PER_TASK):
                (folder / name).unlink(missing_ok=True)


def _holds(path: Path, named: dict[str, np.ndarray]) -> bool:
    """Whether a file has these very arrays."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return set(file) == set(named) and all(
                (file[name].dtype, file[name].shape, file[name].tobytes())
                == (array.dtype, array.shape, array.tobytes())
                for name, array in named.items()
            )
    except Exception:  # it is missing, or damaged in one of many ways
        return False


def load_parameters(folder: Path, like: Params) -> Params:
    """Loads what `save_parameters` saved into the structure of `like`.

    Raises:
        ValueError: where names, shapes or dtypes differ from those of `like`, or the file is
            damaged.
    """
    path = folder / PARAMETERS
    return fitted(path, read_arrays(path), like)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The named arrays in a file.

    Raises:
        ValueError: where it is damaged, missing, or of another kind.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:
        raise ValueError(f"cannot read the parameters in {path}: {error}") from None


def fitted(path: Path, saved: dict[str, np.ndarray], like: Params) -> Params:
    """The named arrays that were read from `path` in the structure of `like`.

    Raises:
        ValueError: where names, shapes or dtypes differ from those of `like`.
    """
    try:
        named_arrays.check_like(saved, like)
    except ValueError as error:
        raise ValueError(f"{path} does not fit its configuration: {error}") from None
    return named_arrays.in_structure(saved, like)


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a run.

    Raises:
        ValueError: where the folder is not a run.
    """
    path = folder / CONFIG
    if not path.is_file():
        why = f"it has no {CONFIG}" if folder.exists() else "it does not exist"
        raise ValueError(f"{folder} is not a run: {why}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a run's configuration: expected an object")
    return config
