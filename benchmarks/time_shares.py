"""Where a meta-gradient's time goes on CPU: products, patches and layout, sums, elementwise passes.

From a trace of what XLA runs for a few tasks, one after another, on one JAX device with one core to
itself, so that nothing overlaps. Products are what the floor of meta_step.py counts. The rest is
memory traffic between them: patches and layout copies for the convolutions, and the passes of batch
statistics and activations, which XLA:CPU writes to memory wherever two others read them. Operations
that are fused count as their last one.
"""

import dataclasses
import gzip
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import optax
from common import INNER_RATE, SETTINGS, Setting

import fomaml_jax as fj

KINDS = {
    "products": ("dot_general", "conv_general_dilated"),
    "patches and layout": (
        "concatenate",
        "copy",
        "dynamic_slice",
        "dynamic_update_slice",
        "gather",
        "pad",
        "reshape",
        "slice",
        "transpose",
    ),
    "sums": ("reduce_sum", "reduce_max"),
}
REST = "elementwise"

MOST_TASKS = 4

# They hold the other instructions, whose time is their own.
CONTAINERS = ("while", "conditional", "call")


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = common.argument_parser(__doc__, settings=list(SETTINGS), repeats=5)
    asked = parser.parse_args()
    # One core, so that XLA's threads do not share an instruction.
    if hasattr(os, "sched_setaffinity"):  # on Linux
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows = []
    for name in asked.settings:
        setting = common.setting_of(name, asked)
        setting = dataclasses.replace(setting, tasks=min(setting.tasks, MOST_TASKS))
        rows.append(measure(setting, asked.repeats))
        print(common.table(COLUMNS, rows[-1:]), flush=True)
    print("\n" + common.table(COLUMNS, rows))
    common.write("time_shares", rows, asked.out)


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "setting": lambda row: row["setting"],
    "core-ms a task": lambda row: f"{1e3 * row['seconds_per_task']:.2f}",
    **{kind: lambda row, kind=kind: f"{row['shares'][kind]:.0%}" for kind in (*KINDS, REST)},
}


def measure(setting: Setting, repeats: int) -> dict[str, Any]:
    """One row."""
    loss, params, tasks = common.image_problem(setting)
    per_task = fj.fomaml(fj.matmul_convolutions(loss), optax.sgd(INNER_RATE), setting.steps)
    program = jax.jit(fj.over_tasks(per_task, tasks_at_once=1)).lower(params, tasks).compile()
    jax.block_until_ready(program(params, tasks))
    kinds = kinds_of_instructions(program.as_text() or "")
    totals = dict.fromkeys((*KINDS, REST), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for _ in range(repeats):
                jax.block_until_ready(program(params, tasks))
        for name, seconds in events(Path(folder)):
            if name in kinds:
                totals[kinds[name]] += seconds
    whole = sum(totals.values())
    return {
        "setting": setting.name,
        "shapes": vars(setting),
        "seconds_per_task": whole / repeats / setting.tasks,
        "shares": {kind: seconds / (whole or 1.0) for kind, seconds in totals.items()},
    }


def kinds_of_instructions(program: str) -> dict[str, str]:
    """The kind of every instruction of a compiled program, by its name."""
    kinds = {}
    for name, opcode, rest in re.findall(r"%([\w.\-]+) = \S+ ([\w\-]+)\((.*)", program):
        if opcode in CONTAINERS:
            continue
        path = re.search(r'op_name="([^"]*)"', rest)
        last = path[1].rsplit("/", 1)[-1] if path else opcode
        kinds[name] = next((kind for kind, names in KINDS.items() if last in names), REST)
    return kinds


def events(folder: Path) -> list[tuple[str, float]]:
    """Name and seconds of everything in a trace."""
    (path,) = folder.rglob("perfetto_trace.json.gz")
    trace = json.loads(gzip.decompress(path.read_bytes()))
    found = trace["traceEvents"] if isinstance(trace, dict) else trace
    return [(e["name"], e["dur"] / 1e6) for e in found if e.get("ph") == "X"]


if __name__ == "__main__":
    main()
