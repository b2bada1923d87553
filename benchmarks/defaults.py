"""What `fomaml-jax train` comes to as it is typed, without a recipe or a choice.

Each command of the table in README runs in a process of its own, into a folder of its own, and its
`result.json` is read: 1,000 unseen tasks, mean and 95 % interval, before adaptation and after it,
and the baselines that the command line puts beside it. Accuracies are transductive. Seconds are the
command's own from end to end, baselines included, on a machine that may have had other work (a dash
where it was stopped in between, or ran on another machine than the others).
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import jax

from fomaml_jax.devices import use_every_core

COMMANDS = {
    "glyphs, unseen scripts, 5-way 1-shot": "train",
    "Omniglot, Vinyals test characters, 5-way 1-shot": "train omniglot",
    "the same, 5-way 5-shot": "train omniglot --shots 5",
    "sine waves, squared error after 10 steps on 5 points": "train sinusoid",
}


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", nargs="+", help="some of them; all unless given")
    parser.add_argument("--options", default="", help="more for every command, such as '--steps 9'")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/ unless given")
    asked = parser.parse_args()
    use_every_core()  # as the commands do
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # they need the GPU's memory
    out = asked.out or common.RESULTS / f"defaults-{jax.devices()[0].platform}.json"
    rows: list[dict[str, Any]] = []
    for tasks, command in COMMANDS.items():
        if command not in (asked.commands or [command]):
            continue
        row = {"unseen tasks": tasks, "command": command} | run(command, asked.options)
        rows = in_order([*common.others(out, row, lambda row: row["command"]), row])
        common.write("defaults", rows, out)
    print(common.table(COLUMNS, rows))


def run(command: str, options: str) -> dict[str, Any]:
    """What a command left, in the parts that are kept."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*shlex.split(command), *shlex.split(options), "--out", f"{folder}/run"]
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fomaml_jax", *words], check=True)
        seconds = time.perf_counter() - start
        result = json.loads(Path(folder, "run", "result.json").read_text())
    kept = ("metric", "mean", "ci95", "num_tasks", "inner_steps", "baselines", "tasks_seen")
    before = {key: result["per_step"][0][key] for key in ("mean", "ci95")}
    return {key: result[key] for key in kept} | {
        "before": before,
        "options": options,
        "seconds": round(seconds, 1),
        "versions": result["versions"],
    }


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As in the table, whichever was run first."""
    return sorted(rows, key=lambda row: list(COMMANDS.values()).index(row["command"]))


def beside(row: dict[str, Any], baseline: str) -> str:
    """A baseline, where there is that."""
    there = baseline in row["baselines"]
    return shown(row, row["baselines"][baseline]) if there else ""


def shown(row: dict[str, Any], found: dict[str, Any]) -> str:
    """A mean and its interval, in percent where it is an accuracy."""
    if row["metric"] == "accuracy":
        return f"{100 * found['mean']:.1f} ± {100 * found['ci95']:.1f} %"
    return f"{found['mean']:.2f} ± {found['ci95']:.2f}"


COLUMNS = {
    "unseen tasks": lambda row: row["unseen tasks"],
    "before": lambda row: shown(row, row["before"]),
    "first-order MAML": lambda row: shown(row, row),
    "nearest class mean on pixels": lambda row: beside(row, "nearest class mean on pixels"),
    "joint pre-training": lambda row: beside(row, "joint pre-training, fine-tuned"),
    "command": lambda row: f"`fomaml-jax {row['command']}`",
    "seconds": lambda row: "-" if row["seconds"] is None else f"{row['seconds']:.0f}",
}


def compact(rows: list[dict[str, Any]]) -> str:
    """Without the time."""
    columns = {name: show for name, show in COLUMNS.items() if name != "seconds"}
    return common.table(columns, rows)


if __name__ == "__main__":
    main()
