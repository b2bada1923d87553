"""Seconds and tasks to 90, 95 and 97 % on Omniglot, 5-way 1-shot: ours and a PyTorch loop.

Both learn the same problem: 20-way 1-shot training episodes, 5 queries a class, 2 inner steps, 4
tasks a meta-batch, strides, 64 channels, batch statistics over each batch, a head that starts at
zero in every task, Adam with a cosine decay, classes turned by 90 degrees as classes of their own.
They are judged alike, on episodes of unseen characters, each turned at random; judging is not
timed, nor is compilation, which has a column of its own, and with it the first report's steps of
ours. They run one after the other, one seed each: where a curve is flat, the time to a mark is
uncertain.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

from fomaml_jax import datasets, experiment, options, problems
from fomaml_jax.devices import use_every_core

MARKS = (0.90, 0.95, 0.97)


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500, help="outer steps, at most")
    parser.add_argument("--width", type=int, default=64, help="channels (default: %(default)s)")
    parser.add_argument("--eval-tasks", type=int, default=600)
    parser.add_argument("--data", choices=["omniglot", "glyphs"], default="omniglot")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with torch")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/ unless given")
    asked = parser.parse_args()
    use_every_core()
    kind = {"omniglot": options.Omniglot, "glyphs": options.Glyphs}[asked.data]
    chosen = kind(
        steps=asked.steps, eval_tasks=asked.eval_tasks, width=asked.width, inner_steps=2, shift=0
    )
    problem = problems.build(chosen)
    rows = [
        row("fomaml_jax", ours(chosen, problem)),
        row("PyTorch loop", torch(chosen, problem, asked.torch_python)),
    ]
    rows = [found for found in rows if found["curve"]]
    print(common.table(COLUMNS, rows))
    common.write("time_to_accuracy", rows, asked.out)


def reached(mark: float) -> Callable[[dict[str, Any]], str]:
    """A cell: when this accuracy was first seen."""

    def show(row):
        found = row["reached"][f"{mark:.2f}"]
        return f"{found['seconds']:.0f} s, {found['tasks']} tasks" if found else "not reached"

    return show


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "library": lambda row: row["library"],
    **{f"to {mark:.0%}": reached(mark) for mark in MARKS},
    "at the end": lambda row: f"{row['curve'][-1]['accuracy']:.1%}",
    "seconds in all": lambda row: f"{row['curve'][-1]['seconds']:.0f}",
    "start-up, s": lambda row: f"{row['start_up_seconds']:.0f}",
}

Point = dict[str, float]


def row(library: str, points: Iterator[Point]) -> dict[str, Any]:
    """One row, from points of tasks, seconds and accuracy; the first is the start-up."""
    curve = list(points)
    start_up = curve.pop(0)["seconds"] if curve else 0.0
    first = {
        f"{mark:.2f}": next((point for point in curve if point["accuracy"] >= mark), None)
        for mark in MARKS
    }
    return {"library": library, "start_up_seconds": start_up, "reached": first, "curve": curve}


def ours(chosen: options.ImageOptions, problem: problems.Problem) -> Iterator[Point]:
    """Training as the command line does it, judged about fifty times."""
    judge = problems.judge_of(
        problem, problem.test, num_steps=chosen.inner_steps, num_tasks=chosen.eval_tasks
    )
    keys = experiment.Keys.of(chosen.seed)
    points: list[Point] = []
    seconds, since = 0.0, time.perf_counter()

    def follow(row: dict[str, Any], params: Any) -> None:
        nonlocal seconds, since
        seconds += time.perf_counter() - since
        if not points:  # with compilation: the first stretch of steps is not counted
            points.append({"tasks": 0, "seconds": seconds, "accuracy": 0.0})
            seconds = 0.0
        elif len(points) * 2 <= 100 * row["step"] // chosen.steps or row["step"] == chosen.steps:
            accuracy = float(judge(params, keys.test).mean[-1])
            print(f"fomaml_jax {row['tasks']} tasks {seconds:.1f} s {accuracy:.3f}", flush=True)
            points.append({"tasks": row["tasks"], "seconds": seconds, "accuracy": accuracy})
        since = time.perf_counter()

    experiment.training_of(chosen, problem, keys.train, on_report=follow)
    return iter(points)


def torch(chosen: options.ImageOptions, problem: problems.Problem, python: str) -> Iterator[Point]:
    """The same in a process of its own; nothing where there is no PyTorch."""
    assert isinstance(problem.splits, datasets.Splits)
    setting = {
        "rate": chosen.rate,
        "inner_rate": chosen.inner_rate,
        "head_rate": chosen.head_rate,
        "steps": chosen.steps,
        "inner_steps": chosen.inner_steps,
        "tasks_per_step": chosen.tasks_per_step,
        "train_ways": problems.training_ways(chosen, problem.splits.train),
        "ways": chosen.ways,
        "queries": chosen.queries,
        "width": chosen.width,
        "eval_tasks": chosen.eval_tasks,
        "turned": isinstance(chosen, options.Omniglot),
        "judge_every": max(1, math.ceil(chosen.steps / 50)),
        "threads": os.cpu_count(),
    }
    script = Path(__file__).with_name("torch_training.py")
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures.npz"
        np.savez(
            pictures,
            train=np.asarray(problem.splits.train.images),
            test=np.asarray(problem.splits.test.images),
        )
        run = subprocess.Popen(
            [python, str(script), json.dumps(setting), str(pictures)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert run.stdout
        for line in run.stdout:
            point = json.loads(line)
            print(f"PyTorch {point}", flush=True)
            yield point
        if run.wait():
            warnings.warn(f"no PyTorch from {python}", stacklevel=2)


if __name__ == "__main__":
    main()
