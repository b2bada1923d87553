"""Several processes of one run: how they meet, what they agree on, and which of them writes."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

LOST_AFTER = 60
"""Seconds after which a process that is not heard of is lost, unless told otherwise."""


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    lost_after: int | None = None,
) -> None:
    """Joins the processes of a run; before any computation.

    Once a process is not heard of for `lost_after` seconds, JAX ends the others (SIGABRT).

    What is `None` is found in the environment, as JAX does for SLURM, Open MPI, Kubernetes and
    Cloud TPU, or in its own `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.
    Under SLURM and Open MPI JAX gives each process one GPU: start one process a GPU.

    Raises:
        ValueError: where it is not to be found, or the others do not come.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            heartbeat_timeout_seconds=LOST_AFTER if lost_after is None else lost_after,
        )
    except (RuntimeError, ValueError) as error:
        said = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"--distributed: the processes of this run do not find each other ({said}); on SLURM, "
            "Open MPI, Kubernetes and TPU all is found in the environment, elsewhere pass "
            "--coordinator HOST:PORT, --processes and --process to each"
        ) from None


def are_several() -> bool:
    """Whether this is one of several processes; it does not start JAX to know."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes, and speaks, for all; a lone one does."""
    return not are_several() or jax.process_index() == 0


def greatest(numbers: Sequence[float]) -> list[float]:
    """Of each number the greatest of all processes, so that they decide alike."""
    if not are_several():
        return list(numbers)
    with jax.transfer_guard("allow"):
        gathered = multihost_utils.process_allgather(np.asarray(numbers, np.float32))
    return np.asarray(gathered).max(0).tolist()


def check_alike(what: str) -> None:
    """Compares what each process of a run is about to do.

    Raises:
        RefusedError: in all of them, where it is not the same.
    """
    # Few enough bits to pass through float32 as they are.
    mine = int(hashlib.sha256(what.encode()).hexdigest()[:5], 16)
    most, least = greatest([mine, -mine])
    if most != -least:
        raise RefusedError(
            "the processes of this run were not started alike; give all of them the same options"
        )


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
    """All do what is in the block, but the others when the first has done it.

    Raises:
        RefusedError: in the others, where it went wrong in the first.
    """
    if not are_several():
        yield
    elif is_first():
        failed = 1.0
        try:
            yield
            failed = 0.0
        finally:
            greatest([failed])
    else:
        (failed,) = greatest([0.0])
        if failed:
            raise RefusedError("the first process of this run has refused to go on, and says why")
        yield


class RefusedError(ValueError):
    """What processes of one run do not do together."""
