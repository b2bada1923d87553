"""Ten thousand arrivals at one online learner: do time and memory per arrival stay what they are?

Sine waves from a distribution that drifts and jumps arrive one by one, as they would from outside:
each is a call of one compiled step. Of every thousand arrivals: the median time of a step, by the
clock and of the processor (which other work on the machine disturbs less), the bytes of the state,
and the memory of the process.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import optax

import fomaml_jax as fj


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arrivals", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--parts", type=int, default=10, help="parts of them to report")
    parser.add_argument("--capacity", type=int, default=100, help="tasks remembered")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/ unless given")
    asked = parser.parse_args()
    rows = measure(asked.arrivals, asked.parts, asked.capacity)
    print(common.table(COLUMNS, rows))
    common.write("arrivals", rows, asked.out)


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "arrivals": lambda row: f"{row['first']:,}-{row['last']:,}",
    "step, ms": lambda row: f"{1e3 * row['median']:.2f}",
    "of the processor, ms": lambda row: f"{1e3 * row['processor']:.2f}",
    "state, bytes": lambda row: f"{row['state_bytes']:,}",
    "process, MiB": lambda row: f"{row['process_bytes'] / 2**20:.1f}",
}


def measure(arrivals: int, parts: int, capacity: int) -> list[dict[str, Any]]:
    """A row for each part of the arrivals."""
    sample_task, learner, params = problem(capacity)
    sample_task, step = jax.jit(sample_task), jax.jit(learner.step)
    state = learner.init(params, sample_task(0), jax.random.key(1))
    jax.block_until_ready(step(state, sample_task(0)))  # compiled
    rows, size = [], arrivals // parts
    for part in range(parts):
        seconds, processor = [], []
        for i in range(part * size, (part + 1) * size):
            task = jax.block_until_ready(sample_task(i))
            start, started = time.perf_counter(), time.process_time()
            state, _ = jax.block_until_ready(step(state, task))
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - started)
        rows.append(
            {
                "first": part * size,
                "last": (part + 1) * size - 1,
                "median": statistics.median(seconds),
                "processor": statistics.median(processor),
                "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
                "process_bytes": process_bytes(),
            }
        )
    return rows


def problem(capacity: int) -> tuple[Callable[..., fj.Task], fj.OnlineLearner, fj.Params]:
    """A stream, a learner, and where it starts."""
    low, high = fj.tasks.Waves(1.0, 0.0, 0.5, -2.0), fj.tasks.Waves(4.0, 6.0, 1.5, 2.0)
    stream = fj.tasks.drifting(
        fj.tasks.sine_waves(fj.tasks.Waves(0.5, 0.8, 0.0, 0.5), shots=5),
        fj.tasks.drift_and_jumps(low, high, drift=0.001, jump_every=150),
    )
    net = fj.models.mlp(hidden=(40, 40))

    def loss(params, batch):
        return jnp.mean((net.apply(params, batch[0]) - batch[1]) ** 2)

    inner = optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(0.02))
    meta_gradient = fj.over_tasks(fj.fomaml(loss, inner, num_steps=5), tasks_at_once=None)
    learner = fj.online(meta_gradient, optax.adam(1e-3), capacity=capacity)
    params = net.init(jax.random.key(2), jnp.zeros((1, 1)))
    return lambda i: stream(jax.random.key(0), i), learner, params


def process_bytes() -> int:
    """What of this process is in memory now."""
    fields = Path("/proc/self/status").read_text().split()
    return 1024 * int(fields[fields.index("VmRSS:") + 1])


if __name__ == "__main__":
    main()
