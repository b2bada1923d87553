"""More devices and more tasks: what each costs, and how many devices a mean over tasks can use.

An outer step draws its tasks, adapts on each, joins the gradients, and takes a step of Adam; a call
takes several of few tasks, as `fj.train` does.

Devices: the same step on one device, and on all. Each has a core to itself: the process of one
device is pinned to one core, with one thread (on other devices than CPUs nothing is pinned). Weak
scaling gives a device the same tasks however many there are, strong scaling shares out as many.
Efficiency is the time of one device over that of all, both measured in turn, times the work
done. "Apart" is what the machine allows: as many processes of one device as there are cores, at
the same time, with nothing to say to each other. "Beside" is what XLA allows: as many devices of
one process, each with a step of its own, at the same time, with nothing to say to each other
either. Between these two lies what the threads of XLA's executor lose, which serve all devices of
a process; only what is below "beside" is due to taking one mean over all.

Tasks: the time of a task, and the temporary memory that XLA plans, as a step takes more tasks, on
one device (of CPUs; else on all).

Model: up to how many devices at least 90% of the time is computation, from the measured time of a
task on one core here, and the bytes of the gradient. The time of a task is what one more adds to a
step: the step of Adam, which every device takes for itself, is not counted as computation. An
all-reduce of B bytes over n devices takes the least of a ring's 2 (n - 1) / n B / bandwidth +
2 (n - 1) latency and a tree's 2 B / bandwidth + 2 log2(n) latency; it begins when the slowest
device has ended, all devices being equally fast, and nothing overlaps it. Bandwidths are nominal,
in one direction, per device. "Speed" is how many times faster a device is than one core here: for
another machine, measure its tasks with this script.
"""

import argparse
import concurrent.futures
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import INNER_RATE, OUTER_RATE, SETTINGS
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fomaml_jax as fj


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="rounds (%(default)s)")
    parser.add_argument(
        "--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), help="(all)"
    )
    parser.add_argument(
        "--most-tasks", type=int, default=4096, help="in one step, from 8 on (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/ unless given")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(**json.loads(asked.worker))
        return
    rows = []
    for name in asked.problems:
        if PROBLEMS[name].tasks > 1:
            rows += devices(name, asked.repeats)
            rows += tasks(name, asked.repeats, asked.most_tasks)
            print("\n\n".join(page(rows)) + "\n", flush=True)
        else:
            rows += alone(name, asked.repeats)
    rows += [row for name in asked.problems for row in model(name, rows)]
    print("\n" + "\n\n".join(page(rows)))
    common.write("scaling", rows, asked.out)


# What is measured.


class Problem(NamedTuple):
    """A loss, where it starts, its tasks, and how an outer step takes them."""

    make: Callable[[], tuple[fj.LossFn, fj.Params, fj.tasks.TaskDistribution]]
    about: str
    steps: int
    tasks: int  # a device
    tasks_at_once: int


def images(name: str):
    """Pictures at random, and the network of the other benchmarks."""
    setting = SETTINGS[name]
    loss, params, _ = common.image_problem(setting)
    shape = (100, setting.shots + setting.queries, setting.size, setting.size, setting.channels)
    pictures = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    sample = fj.tasks.episodes(
        pictures, ways=setting.ways, shots=setting.shots, queries=setting.queries
    )
    return fj.matmul_convolutions(loss), params, sample


def sine_waves():
    """The paper's regression, on two layers of 40."""
    net = fj.models.mlp()
    params = net.init(jax.random.key(0), jnp.zeros((1, 1)))
    return squared_error(net.apply), params, fj.tasks.sinusoid(shots=10, queries=10)


def large():
    """A hundred million parameters in three layers."""
    width = 5760
    net = fj.models.mlp(hidden=(width, width, width))
    params = net.init(jax.random.key(0), jnp.zeros((1, width)))

    def sample(key):
        x, y = jax.random.normal(key, (2, 10, width))
        y = y[:, :1]
        return fj.Task((x[:5], y[:5]), (x[5:], y[5:]))

    return squared_error(net.apply), params, sample


def squared_error(apply: Callable[..., Any]) -> fj.LossFn:
    """The mean of it."""
    return lambda params, batch: jnp.mean((apply(params, batch[0]) - batch[1]) ** 2)


PROBLEMS = {
    "conv4": Problem(
        functools.partial(images, "5w1s"), "conv4, 5-way 1-shot, 1 query, 1 step", 1, 16, 1
    ),
    "conv4-q15": Problem(
        functools.partial(images, "5w1s-q15"), "conv4, 5-way 1-shot, 15 queries, 1 step", 1, 16, 1
    ),
    "sinusoid": Problem(sine_waves, "sinusoid, MLP of 40 and 40, 10 points, 5 steps", 5, 512, 8),
    "large": Problem(large, "MLP of 100 million, 5 points, 1 step", 1, 1, 1),
}


def outer_steps(name: str, chosen: Sequence[Any], num_tasks: int):
    """A call of a few outer steps on these devices, returning how many; what XLA plans."""
    problem = PROBLEMS[name]
    loss, params, sample = problem.make()
    per_task = fj.fomaml(loss, optax.sgd(INNER_RATE if "conv" in name else 1e-3), problem.steps)
    count = len(chosen)
    mesh = jax.make_mesh((count,), ("tasks",), (AxisType.Auto,), devices=chosen)
    at_once = problem.tasks_at_once if chosen[0].platform == "cpu" else num_tasks // count
    sampled = fj.over_tasks(
        lambda params, key: per_task(params, sample(key)), tasks_at_once=at_once, mesh=mesh
    )
    learner = fj.meta_learner(sampled, optax.adam(OUTER_RATE))
    key = jax.random.key(0)
    steps = max(1, 192 // num_tasks) if problem.tasks > 1 else 1  # a call has a cost of its own

    def step(_, state):
        keys = fj.tasks.task_keys(key, state.step, num_tasks)
        return learner.step(state, keys)[0]

    run = jax.jit(lambda state: jax.lax.fori_loop(0, steps, step, state), donate_argnums=0)
    whole = NamedSharding(mesh, PartitionSpec())
    state = jax.jit(lambda params: learner.init(params), out_shardings=whole)(params)
    program = run.lower(state).compile()
    planned = program.memory_analysis()

    def call():
        nonlocal state
        state = jax.block_until_ready(program(state))
        return steps

    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return call, {"parameters": size, "temp_bytes": planned.temp_size_in_bytes if planned else 0}


# Workers: processes with cores of their own, which answer every line with seconds a step.


def work(name: str, count: int, num_tasks: int, cores: list[int], beside: bool) -> None:
    """Answers until there are no more lines; "beside": every device takes steps of its own."""
    if cores:
        os.sched_setaffinity(0, cores)  # before XLA starts as many threads as it sees cores
        jax.config.update("jax_num_cpu_devices", count)
    chosen = jax.devices()[:count]
    steps = [
        outer_steps(name, each, num_tasks)
        for each in ([[d] for d in chosen] if beside else [chosen])
    ]
    calls = [call for call, _ in steps]
    for call in calls:
        call()
    print(json.dumps(steps[0][1]), flush=True)
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as threads:
        for _ in sys.stdin:
            print(max(threads.map(seconds_a_step, calls)), flush=True)


def seconds_a_step(call: Callable[[], int]) -> float:
    """Over half a second at least: after a pause the first calls are slower."""
    start, taken = time.perf_counter(), 0
    while taken == 0 or time.perf_counter() - start < 0.5:
        taken += call()
    return (time.perf_counter() - start) / taken


class Worker:
    """A process that times a step when it is told to."""

    def __init__(
        self, name: str, count: int, num_tasks: int, cores: list[int], beside: bool = False
    ):
        words = {"name": name, "count": count, "num_tasks": num_tasks}
        words |= {"cores": cores, "beside": beside}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(words)],
            stdin=pipe,
            stdout=pipe,
            text=True,
            # Several processes on one device must not each take all of its memory.
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        self.about = json.loads(self._line())

    def begin(self) -> None:
        """Tells it to."""
        print(file=self.process.stdin, flush=True)

    def seconds(self) -> float:
        """What it took."""
        return float(self._line())

    def __call__(self) -> float:
        """Both."""
        self.begin()
        return self.seconds()

    def close(self) -> None:
        """Lets it end."""
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a worker has failed; what it said is above")
        return line


def cores_of(device: int, count: int) -> list[int]:
    """Those of `count` devices from this one on; none to pin to where they are no CPUs."""
    return every_core()[device : device + count] if on_cpu() else []


def every_core() -> list[int]:
    """Those this process may use; where that cannot be said, nothing can be pinned either."""
    if not hasattr(os, "sched_getaffinity"):
        sys.exit("this system cannot pin a process to a core")
    return sorted(os.sched_getaffinity(0))


def on_cpu() -> bool:
    """Whether the devices are CPUs."""
    return jax.default_backend() == "cpu"


def devices(name: str, repeats: int) -> list[dict[str, Any]]:
    """Weak and strong scaling from one device to all."""
    count, each = len(every_core()) if on_cpu() else jax.device_count(), PROBLEMS[name].tasks
    if count == 1:
        print("one device: nothing to scale to")
        return []
    together = cores_of(0, count)
    one, one_of_all, every, beside = (
        Worker(name, 1, each, cores_of(0, 1)),
        Worker(name, 1, each * count, cores_of(0, 1)),
        Worker(name, count, each * count, together),
        Worker(name, count, each, together, beside=True),
    )
    calls = {"one": one, "all tasks on one": one_of_all, "all": every, "beside": beside}
    crowd = [Worker(name, 1, each, cores_of(i, 1)) for i in range(count)] if on_cpu() else []

    def apart() -> float:
        for worker in crowd:
            worker.begin()
        return max([worker.seconds() for worker in crowd])

    timed = common.interleaved(calls | ({"apart": apart} if crowd else {}), repeats)
    for worker in (*calls.values(), *crowd):
        worker.close()
    about = {"table": "devices", "problem": name, "devices": count, **one.about}
    limits = {
        "apart": common.ratio(timed["one"], timed["apart"]) if crowd else None,
        "beside": common.ratio(timed["one"], timed["beside"]),
    }
    return [
        about
        | {"scaling": "weak", "tasks": f"{each} -> {each * count}", "one": timed["one"]}
        | {"one_tasks": each}
        | {"all": timed["all"], "efficiency": common.ratio(timed["one"], timed["all"])}
        | limits,
        about
        | {"scaling": "strong", "tasks": f"{each * count}", "one": timed["all tasks on one"]}
        | {"one_tasks": each * count}
        | {"all": timed["all"], **limits}
        | {"efficiency": common.ratio(timed["all tasks on one"], timed["all"]) / count},
    ]


def tasks(name: str, repeats: int, most: int) -> list[dict[str, Any]]:
    """The time of a task, as a step takes more of them."""
    count = 1 if on_cpu() else jax.device_count()
    least = max(8, count * PROBLEMS[name].tasks_at_once)
    numbers = [n for n in (least * 4**i for i in range(10)) if n < most] + [most]
    workers = {n: Worker(name, count, n, cores_of(0, count)) for n in numbers}
    timed = common.interleaved({str(n): w for n, w in workers.items()}, max(repeats // 3, 1))
    rows = []
    for n, worker in workers.items():
        worker.close()
        about = {"table": "tasks", "problem": name, "devices": count, **worker.about}
        a_task = {"a_task": timed[str(n)]["median"] / n}
        against = common.ratio(timed[str(n)], timed[str(most)]) * most / n
        rows.append(about | a_task | {"tasks": n, "against_most": against, "step": timed[str(n)]})
    return rows


def alone(name: str, repeats: int) -> list[dict[str, Any]]:
    """Steps of one task and of three on one device, for the model."""
    workers = {str(n): Worker(name, 1, n, cores_of(0, 1)) for n in (1, 3)}
    timed = common.interleaved({**workers}, max(repeats // 3, 1))
    rows = []
    for n, worker in workers.items():
        worker.close()
        about = {"table": "alone", "problem": name, **worker.about}
        rows.append(about | {"one_tasks": int(n), "one": timed[n]})
    return rows


# The model.


class Link(NamedTuple):
    """Between devices."""

    name: str
    bytes_per_second: float
    latency: float  # seconds, from one device to the next


LINKS = [
    Link("Ethernet, 10 Gb/s", 1.25e9, 30e-6),
    Link("InfiniBand, 100 Gb/s", 12.5e9, 5e-6),
    Link("InfiniBand, 400 Gb/s", 50e9, 5e-6),
    Link("NVLink, 450 GB/s", 450e9, 3e-6),
]
SPEEDS = (1, 100, 1000)
WANTED = 0.9
SOME = 1024


def all_reduce(size: float, count: int, link: Link) -> float:
    """Seconds, for so many bytes and devices."""
    ring = 2 * (count - 1) / count * size / link.bytes_per_second + 2 * (count - 1) * link.latency
    tree = 2 * size / link.bytes_per_second + 2 * math.log2(count) * link.latency
    return min(ring, tree)


def model(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every speed of a device and every link."""
    found = [row for row in rows if row["problem"] == name and "one" in row]
    if not found or name == "sinusoid":
        return []
    few, many = found
    more = many["one_tasks"] - few["one_tasks"]
    each, a_task = 16, (many["one"]["median"] - few["one"]["median"]) / more
    size = 4 * few["parameters"]
    return [
        {
            "table": "model",
            "problem": name,
            "bytes": size,
            "a_task": a_task,
            "speed": speed,
            "link": link.name,
            "most_devices": most_devices(each * a_task / speed, size, link),
            "least_tasks": math.ceil(
                WANTED / (1 - WANTED) * all_reduce(size, SOME, link) / (a_task / speed)
            ),
        }
        for speed in SPEEDS
        for link in LINKS
    ]


def most_devices(computing: float, size: float, link: Link) -> int:
    """A power of two up to a million, 1 if two are too many."""
    counts = [2**i for i in range(1, 21)]
    keep = [n for n in counts if computing >= WANTED * (computing + all_reduce(size, n, link))]
    return max(keep, default=1)


# How it is shown.


def about(row: dict[str, Any]) -> str:
    """What was run."""
    return PROBLEMS[row["problem"]].about


def percent(value: float | None) -> str:
    """A share."""
    return "-" if value is None else f"{value:.0%}"


Columns = dict[str, Callable[[dict[str, Any]], str]]
DEVICES: Columns = {
    "problem": about,
    "scaling": lambda row: row["scaling"],
    "tasks": lambda row: row["tasks"],
    "one device, ms": lambda row: common.milliseconds(row["one"]),
    "all, ms": lambda row: common.milliseconds(row["all"]),
    "devices": lambda row: str(row["devices"]),
    "efficiency": lambda row: percent(row["efficiency"]),
    "apart": lambda row: percent(row["apart"]),
    "beside": lambda row: percent(row["beside"]),
}
TASKS: Columns = {
    "problem": about,
    "tasks in a step": lambda row: f"{row['tasks']:,}",
    "a task, ms": lambda row: f"{1e3 * row['a_task']:.3f}",
    "against the most": lambda row: common.times(row["against_most"]),
    "planned, MiB": lambda row: f"{row['temp_bytes'] / 2**20:.1f}",
}
MODEL: Columns = {
    "problem": about,
    "all-reduce, MB": lambda row: f"{row['bytes'] / 1e6:.1f}",
    "a task here, ms": lambda row: f"{1e3 * row['a_task']:.2f}",
    "speed": lambda row: f"{row['speed']} x",
    "link": lambda row: row["link"],
    "most devices, 16 tasks each": lambda row: (
        "any" if row["most_devices"] == 2**20 else f"{row['most_devices']:,}"
    ),
    f"least tasks each, {SOME:,} devices": lambda row: f"{row['least_tasks']:,}",
}


def page(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each kind of row that there is."""
    kinds = {"devices": DEVICES, "tasks": TASKS, "model": MODEL}
    chosen = {kind: [row for row in rows if row["table"] == kind] for kind in kinds}
    return [common.table(kinds[kind], found) for kind, found in chosen.items() if found]


if __name__ == "__main__":
    main()
