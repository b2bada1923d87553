"""What the benchmarks share: settings, a network, interleaved timing, and results as JSON."""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import fomaml_jax as fj
from fomaml_jax.devices import mesh_for
from fomaml_jax.runs import versions

RESULTS = Path(__file__).with_name("results")
INNER_RATE = 0.1
OUTER_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Setting:
    """A few-shot problem and a meta-batch of it."""

    ways: int
    shots: int
    queries: int
    tasks: int
    steps: int
    pooling: Literal["stride", "max"] = "stride"
    size: int = 28
    channels: int = 1
    width: int = 64

    @property
    def name(self) -> str:
        """The setting in a few letters."""
        pooling = ", max-pool" if self.pooling == "max" else ""
        size = f", {self.size} x {self.size} x {self.channels}" if self.size != 28 else ""
        return (
            f"{self.ways}-way {self.shots}-shot, {self.queries} queries, {self.tasks} tasks, "
            f"{self.steps} step{'s' * (self.steps > 1)}{pooling}{size}"
        )

    def layers(self) -> list[tuple[int, int, int]]:
        """Of each convolution: output positions of an image, inputs a position, output channels."""
        layers, size, channels = [], self.size, self.channels
        for _ in range(4):
            outputs = size if self.pooling == "max" else -(-size // 2)
            layers.append((outputs**2, 9 * channels, self.width))
            size, channels = outputs // 2 if self.pooling == "max" else outputs, self.width
        return layers

    def flops(self) -> int:
        """Of the convolutions of one meta-gradient; the first layer needs no input gradient."""
        forward = [2 * positions * inputs * outputs for positions, inputs, outputs in self.layers()]
        images = self.ways * (self.shots * self.steps + self.queries)
        return self.tasks * images * (3 * sum(forward) - forward[0])


SETTINGS = {
    "5w1s": Setting(5, 1, 1, 32, 1),
    "5w1s-q15": Setting(5, 1, 15, 32, 1),
    "20w1s": Setting(20, 1, 1, 16, 5),
    "pool": Setting(5, 1, 1, 32, 1, "max"),
    "84px": Setting(5, 1, 15, 2, 5, "max", 84, 3, 32),
}


class Network(nn.Module):
    """Four blocks of convolution, batch statistics and ReLU, as a user would write them in Flax."""

    ways: int
    pooling: str
    width: int

    @nn.compact
    def __call__(self, x):
        """`[images, height, width, channels] -> [images, ways]`."""
        for _ in range(4):
            x = nn.Conv(self.width, (3, 3), strides=2 if self.pooling == "stride" else 1)(x)
            mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
            x = nn.relu((x - mean) * jax.lax.rsqrt(variance + 1e-3))
            if self.pooling == "max":
                x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(self.ways)(x.reshape(x.shape[0], -1))


def image_problem(setting: Setting, seed: int = 0) -> tuple[fj.LossFn, fj.Params, fj.Task]:
    """A loss with native convolutions, parameters, and a meta-batch of random pictures."""
    rng = np.random.default_rng(seed)

    def batch(per_class):
        shape = (setting.tasks, setting.ways * per_class, setting.size, setting.size)
        x = rng.random((*shape, setting.channels), np.float32)
        y = np.tile(np.repeat(np.arange(setting.ways), per_class), (setting.tasks, 1))
        return jnp.asarray(x), jnp.asarray(y)

    tasks = fj.Task(batch(setting.shots), batch(setting.queries))
    net = Network(setting.ways, setting.pooling, setting.width)
    params = jax.jit(net.init)(jax.random.key(seed), tasks.support[0][0])

    def loss(params, batch):
        x, y = batch
        logits = cast(jax.Array, net.apply(params, x))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss, params, tasks


def argument_parser(
    about: str | None, *, settings: list[str], repeats: int, choices: Iterable[str] = SETTINGS
) -> argparse.ArgumentParser:
    """The options that scripts over settings share."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--settings", nargs="+", choices=list(choices), default=settings)
    parser.add_argument("--tasks", type=int, help="tasks in a meta-batch, for all image settings")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/ unless given")
    return parser


def setting_of(name: str, asked: argparse.Namespace) -> Setting:
    """The setting of that name, with the number of tasks asked for."""
    changes = {"tasks": asked.tasks} if asked.tasks else {}
    return dataclasses.replace(SETTINGS[name], **changes)


def over_devices(
    meta_gradient: fj.MetaGradient, params: fj.Params, tasks: Any, **kwargs: Any
) -> Callable[[], Any]:
    """The compiled meta-gradient over sharded tasks, ready to be called."""
    mesh = mesh_for(jax.tree.leaves(tasks)[0].shape[0])
    tasks = jax.device_put(tasks, NamedSharding(mesh, PartitionSpec("tasks")))
    return compiled(fj.over_tasks(meta_gradient, mesh=mesh, **kwargs), params, tasks)


def steps_over_devices(
    meta_gradient: fj.MetaGradient, params: fj.Params, tasks: Any, steps: int
) -> Callable[[], float]:
    """So many outer steps in one compiled call, as training takes them: seconds a step."""
    mesh = mesh_for(jax.tree.leaves(tasks)[0].shape[0])
    tasks = jax.device_put(tasks, NamedSharding(mesh, PartitionSpec("tasks")))
    over_tasks = fj.over_tasks(meta_gradient, mesh=mesh)

    def step(_, params):
        grads, _ = over_tasks(params, tasks)
        return jax.tree.map(lambda p, g: p - OUTER_RATE * g, params, grads)

    call = compiled(lambda params: jax.lax.fori_loop(0, steps, step, params), params)

    def seconds() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) / steps

    return seconds


def compiled(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A call of the compiled function that waits for its result."""
    program = jax.jit(fn).lower(*args).compile()
    return lambda: jax.block_until_ready(program(*args))


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Times the calls in turn, `repeats` rounds of all of them, after one round to warm up.

    A call may return its own seconds (a float), as one to another process does.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            told = call()
            seconds = told if isinstance(told, float) else time.perf_counter() - start
            if round_:
                times[name].append(seconds)
    return {name: summary(seconds) for name, seconds in times.items()}


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all of them, in seconds."""
    return {
        "median": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "all": list(seconds),
    }


def ratio(slow: dict[str, Any], fast: dict[str, Any]) -> float:
    """How many times faster: the median of the ratios within a round."""
    return statistics.median(s / f for s, f in zip(slow["all"], fast["all"], strict=True))


def environment() -> dict[str, Any]:
    """Device, versions and commit behind a result."""
    device = jax.devices()[0]
    return {
        "device": f"{_processor()}, {os.cpu_count()} cores"
        if device.platform == "cpu"
        else f"{len(jax.devices())} x {device.device_kind}",
        "platform": device.platform,
        "devices": len(jax.devices()),
        "matmul_precision": jax.config.values["jax_default_matmul_precision"] or "default",
        "versions": versions(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        here = Path(__file__).parent
        run = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=10"]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(name: str, rows: list[dict[str, Any]], out: Path | None) -> None:
    """Writes `{environment, rows}` to `out`, or to `results/<name>-<platform>.json`."""
    result = {"benchmark": name, "environment": environment(), "rows": rows}
    path = out or RESULTS / f"{name}-{jax.devices()[0].platform}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(f"\nwritten to {path}")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What `write` has written there; nothing, if it has not."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def others(
    path: Path, new: dict[str, Any], which: Callable[[dict[str, Any]], Any]
) -> list[dict[str, Any]]:
    """The rows that were written before, but for the one that is made again."""
    return [row for row in rows_of(path) if which(row) != which(new)]


def table(columns: dict[str, Callable[[dict[str, Any]], str]], rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown, which reads well on a screen too."""
    cells = [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]

    def line(words):
        first, *rest = zip(words, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(w.rjust(n) for w, n in rest)]) + " |"

    rule = ["-" * widths[0], *("-" * (n - 1) + ":" for n in widths[1:])]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def milliseconds(timed: dict[str, Any] | None) -> str:
    """A median, with the extremes."""
    if timed is None:
        return "-"
    low, middle, high = (1e3 * timed[key] for key in ("least", "median", "most"))
    digits = 2 if middle < 10 else 0 if middle >= 100 else 1
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def times(value: float | None) -> str:
    """A ratio."""
    return "-" if value is None else f"{value:.2f}"
