"""Kills a run with `kill -9` at random moments and resumes it each time: is the end the same?

An uninterrupted run and a killed one of the same options are compared at the end: parameters,
optimizer state, metrics and result, bit for bit. A kill may hit the start, a step, or a checkpoint
that is being written; the first and the last show in what is left behind, and are counted.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

from fomaml_jax import checkpoints


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=["omniglot", "glyphs"], default="omniglot")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3500, help="outer steps (%(default)s)")
    parser.add_argument("--width", type=int, default=32, help="channels (%(default)s)")
    parser.add_argument("--checkpoint-every", default="5", help="(%(default)s steps)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/ unless given")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        rows = [measure(asked, Path(home))]
    print(common.table(COLUMNS, rows))
    common.write("kills", rows, asked.out)
    if not all(rows[0]["same"].values()):
        raise SystemExit(1)
    if len(rows[0]["kills"]) < asked.kills:
        raise SystemExit("the run came to its end before the last kill: pass more --steps")


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "run": lambda row: f"{row['data']}, {row['steps']} outer steps",
    "kills": lambda row: str(len(row["kills"])),
    "before its first checkpoint": lambda row: str(sum(k["step"] == 0 for k in row["kills"])),
    "while saving": lambda row: str(sum(k["while_saving"] for k in row["kills"])),
    **{
        name: lambda row, name=name: "bitwise the same" if row["same"][name] else "DIFFERENT"
        for name in ("parameters", "state", "metrics", "result")
    },
}


def measure(asked: argparse.Namespace, home: Path) -> dict[str, Any]:
    """A row: the uninterrupted run, the killed one, and whether they are the same."""
    whole, cut = home / "whole", home / "cut"
    words = [asked.data, "--steps", str(asked.steps), "--width", str(asked.width)]
    words += ["--checkpoint-every", asked.checkpoint_every, "--no-compare", "--eval-tasks", "100"]
    words += ["--compilation-cache", str(home / "compiled")]
    started = time.monotonic()
    process = start(*words, "--out", str(whole))
    while not (whole / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.1)
    first_row = time.monotonic() - started
    finish(process)

    moments, kills = random.Random(asked.seed), []
    process = start(*words, "--out", str(cut))
    while len(kills) < asked.kills:
        # Of a resumed run, with its programs compiled, half the time is start-up.
        alive = moments.uniform(0.2, 1.1) * first_row
        try:
            process.wait(alive)
            break  # it has come to its end
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        kills.append({"seconds": round(alive, 2), **state_of(cut)})
        print(kills[-1], flush=True)
        resumable = (cut / "config.json").exists()
        process = start("--resume", str(cut)) if resumable else start(*words, "--out", str(cut))
    finish(process)
    return {
        "data": asked.data,
        "steps": asked.steps,
        "checkpoint_every": asked.checkpoint_every,
        "kills": kills,
        "same": {
            "parameters": same_arrays(*(dict(np.load(f / "parameters.npz")) for f in (whole, cut))),
            "state": same_arrays(*(last_checkpoint(f) for f in (whole, cut))),
            "metrics": len({(f / "metrics.jsonl").read_bytes() for f in (whole, cut)}) == 1,
            "result": results(whole) == results(cut),
        },
    }


def start(*words: str) -> subprocess.Popen:
    """`fomaml-jax train` in a process of its own."""
    command = [sys.executable, "-m", "fomaml_jax", "train", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    """Waits for its end, which must be a good one."""
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}:\n{said.decode()[-3000:]}")


def state_of(run: Path) -> dict[str, Any]:
    """The last checkpoint of a killed run, and whether another was being written."""
    names = [path.name for path in (run / "checkpoints").glob("*")]
    done = max((int(name) for name in names if name.isdigit()), default=0)
    return {"step": done, "while_saving": any(name.startswith(".") for name in names)}


def last_checkpoint(run: Path) -> dict[str, np.ndarray]:
    """The arrays of the newest checkpoint."""
    return checkpoints.arrays(max((run / "checkpoints").iterdir()))


def same_arrays(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether all are there in both, bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].tobytes() == other[name].tobytes() for name in one
    )


def results(run: Path) -> dict[str, Any]:
    """What came out, without the time that it took."""
    result = json.loads((run / "result.json").read_text())
    return {name: result[name] for name in ("per_step", "otherwise", "tasks_seen", "stopped")}


if __name__ == "__main__":
    main()
