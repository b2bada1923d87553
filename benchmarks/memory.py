"""Memory of a meta-gradient against inner steps and against tasks, first and second order.

From the compiled program (what XLA plans, all devices together) and from the operating system (how
far the peak of a fresh process rises while the compiled program runs once).
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import optax
from common import INNER_RATE, Setting

import fomaml_jax as fj

BASE = Setting(5, 1, 5, 16, 1)
ORDERS = {"first": fj.fomaml, "second": fj.maml}


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20])
    parser.add_argument("--tasks", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/ unless given")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.probe:
        print(json.dumps(probe(**json.loads(asked.probe))))
        return
    settings = [dataclasses.replace(BASE, steps=steps) for steps in asked.steps]
    settings += [dataclasses.replace(BASE, tasks=tasks) for tasks in asked.tasks]
    rows = []
    for setting in dict.fromkeys(settings):
        at_once = ("auto", None) if setting.steps == 1 else ("auto",)
        for order in ORDERS:
            rows.extend(fresh_process(order, size, setting) for size in at_once)
            print(common.table(COLUMNS, rows[-1:]), flush=True)
    print("\n" + common.table(COLUMNS, rows))
    common.write("memory", rows, asked.out)


def mebibytes(name: str) -> Callable[[dict[str, Any]], str]:
    """A cell."""
    return lambda row: f"{row[name] / 2**20:.1f}"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "order": lambda row: row["order"],
    "tasks at once": lambda row: "all" if row["tasks_at_once"] is None else row["tasks_at_once"],
    "tasks": lambda row: str(row["tasks"]),
    "inner steps": lambda row: str(row["steps"]),
    "planned, MiB": mebibytes("temp_bytes"),
    "peak rise, MiB": mebibytes("peak_rise_bytes"),
}


def fresh_process(order: str, tasks_at_once: Any, setting: Setting) -> dict[str, Any]:
    """One row, measured where nothing ran before."""
    words = {"order": order, "tasks_at_once": tasks_at_once, "shapes": vars(setting)}
    command = [sys.executable, __file__, "--probe", json.dumps(words)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"the probe of {words} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def probe(order: str, tasks_at_once: Any, shapes: dict[str, Any]) -> dict[str, Any]:
    """Compiles and runs one meta-gradient."""
    setting = Setting(**shapes)
    loss, params, tasks = common.image_problem(setting)
    per_task = ORDERS[order](fj.matmul_convolutions(loss), optax.sgd(INNER_RATE), setting.steps)
    run = jax.jit(fj.over_tasks(per_task, tasks_at_once=tasks_at_once))
    program = run.lower(params, tasks).compile()
    planned = program.memory_analysis()
    before = peak()
    jax.block_until_ready(program(params, tasks))
    return {
        "order": order,
        "tasks_at_once": tasks_at_once,
        "tasks": setting.tasks,
        "steps": setting.steps,
        "temp_bytes": planned.temp_size_in_bytes if planned else 0,
        "peak_rise_bytes": peak() - before,
    }


def peak() -> int:
    """The largest resident size of this process so far, in bytes; the device's, if it tells."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


if __name__ == "__main__":
    main()
