"""Against PyTorch, naive JAX and second order: the same network, data and algorithm, in turn.

Ours is a user's unchanged Flax network, its loss wrapped in `matmul_convolutions`, tasks sharded
over one JAX device a core, five outer steps a call, as `fj.train` takes them; its time is that of
one. PyTorch runs in processes of its own with as many threads as there are cores (`pip install
torch`, into this environment or the one of --torch-python), several of them in turn: one may take
half as long again as another, for as long as it lives. Naive JAX is `vmap` of the same network with
native convolutions, as JAX runs it by itself: on the first of the devices. PyTorch and naive JAX
take meta-gradients, without an outer update. A ratio is the median of those within a round; above 1
ours is faster.
"""

import functools
import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import optax
from common import INNER_RATE, SETTINGS, Setting

import fomaml_jax as fj
from fomaml_jax.devices import use_every_core

# Of PyTorch, for every form.
PROCESSES = 3

# Outer steps in one call of ours: what it needs in memory is there once for all of them.
STEPS = 5

SINE = {"tasks": 25, "points": 10, "steps": 5}


def main() -> None:
    """Runs the benchmark from the command line."""
    choices = [*SETTINGS, "sinusoid"]
    parser = common.argument_parser(__doc__, settings=choices, repeats=9, choices=choices)
    parser.add_argument(
        "--torch-python", default=sys.executable, help="a Python with torch (default: this one)"
    )
    parser.add_argument(
        "--naive",
        nargs="*",
        choices=list(SETTINGS),
        default=["5w1s", "5w1s-q15", "20w1s", "pool"],
        help="settings to run naively too (some take minutes)",
    )
    asked = parser.parse_args()
    use_every_core()
    rows = []
    for name in asked.settings:
        if name == "sinusoid":
            rows.append(sine_row(asked.repeats, asked.torch_python))
        else:
            setting = common.setting_of(name, asked)
            naive = name in asked.naive
            rows.append(image_row(setting, asked.repeats, asked.torch_python, naive))
        print(common.table(COLUMNS, rows[-1:]), flush=True)
    print("\n" + common.table(COLUMNS, rows))
    common.write("peers", rows, asked.out)


PEERS = {
    "PyTorch loop": "torch loop",
    "torch.func": "torch vmap",
    "PyTorch, second order": "torch second",
    "naive JAX": "naive JAX",
    "our second order": "second order",
}

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "setting": lambda row: row["setting"],
    "ours, ms": lambda row: common.milliseconds(row["ours"]),
    **{
        f"{title}, times": lambda row, name=name: common.times(row["ratios"].get(name))
        for title, name in PEERS.items()
    },
}


def image_row(setting: Setting, repeats: int, python: str, naive: bool) -> dict[str, Any]:
    """One row for pictures."""
    loss, params, tasks = common.image_problem(setting)
    ours = fj.matmul_convolutions(loss)
    inner = optax.sgd(INNER_RATE)
    steps = functools.partial(common.steps_over_devices, params=params, tasks=tasks, steps=STEPS)
    calls: dict[str, Callable[[], Any]] = {
        "ours": steps(fj.fomaml(ours, inner, setting.steps)),
        "second order": steps(fj.maml(ours, inner, setting.steps)),
    }
    if naive:
        per_task = jax.vmap(fj.fomaml(loss, inner, setting.steps), (None, 0))
        calls["naive JAX"] = common.compiled(
            lambda params, tasks: jax.tree.map(lambda g: g.mean(0), per_task(params, tasks)[0]),
            params,
            tasks,
        )
    forms = ("loop", "second") if setting.pooling == "max" else ("loop", "vmap", "second")
    return row(setting.name, calls, forms, vars(setting), repeats, python)


def sine_row(repeats: int, python: str) -> dict[str, Any]:
    """One row for the MAML paper's regression: the whole outer step, from sampling to update."""
    net = fj.models.mlp()

    def loss(params, batch):
        return jnp.mean((net.apply(params, batch[0]) - batch[1]) ** 2)

    sample = fj.tasks.sinusoid(shots=SINE["points"], queries=SINE["points"])
    per_task = fj.fomaml(loss, optax.sgd(INNER_RATE / 10), SINE["steps"])
    learner = fj.meta_learner(
        fj.over_tasks(lambda params, key: per_task(params, sample(key)), tasks_at_once=None),
        optax.adam(1e-3),
    )
    key, steps = jax.random.key(0), 100

    @functools.partial(jax.jit, donate_argnums=0)
    def many_steps(state):
        def body(_, state):
            return learner.step(state, fj.tasks.task_keys(key, state.step, SINE["tasks"]))[0]

        return jax.lax.fori_loop(0, steps, body, state)

    state = learner.init(net.init(key, jnp.zeros((1, 1))))

    def call() -> float:
        nonlocal state
        start = time.perf_counter()
        state = jax.block_until_ready(many_steps(state))
        return (time.perf_counter() - start) / steps

    name = f"sinusoid, whole step, {SINE['tasks']} tasks, {SINE['steps']} steps"
    return row(name, {"ours": call}, ("loop", "vmap"), SINE, repeats, python)


def row(
    name: str,
    calls: dict[str, Callable[[], Any]],
    forms: tuple[str, ...],
    shapes: dict[str, Any],
    repeats: int,
    python: str,
) -> dict[str, Any]:
    """Times our calls and PyTorch's in turn."""
    peers = [(form, TorchPeer.start(python, form, shapes)) for form in forms]
    running = {f"torch {form}": peer for form, peer in peers if peer}
    try:
        timed = common.interleaved(calls | running, repeats)
    finally:
        for peer in running.values():
            peer.close()
    ours = timed.pop("ours")
    return {
        "setting": name,
        "shapes": shapes,
        "torch": next((peer.about for peer in running.values()), None),
        "ours": ours,
        "others": timed,
        "ratios": {other: common.ratio(seconds, ours) for other, seconds in timed.items()},
    }


class TorchPeer:
    """Processes that run PyTorch in turn when called, and tell their seconds."""

    def __init__(self, about: dict[str, Any], processes: list[subprocess.Popen[str]], calls: int):
        self.about, self._processes, self._calls = about, processes, calls
        self._turns = itertools.cycle(processes)

    @classmethod
    def start(cls, python: str, form: str, shapes: dict[str, Any]) -> "TorchPeer | None":
        """The peer, warmed up; `None` where there is no PyTorch."""
        started = []
        for _ in range(PROCESSES):
            if (process := cls._start_one(python, form, shapes)) is None:
                return None
            started.append(process)
        abouts, processes = zip(*started, strict=True)
        about = {**abouts[0], "processes": PROCESSES}
        return cls(about, list(processes), 10 if "points" in shapes else 1)

    @staticmethod
    def _start_one(python, form, shapes):
        script = Path(__file__).with_name("torch_peer.py")
        threads = os.cpu_count()
        words = [python, str(script), json.dumps({**shapes, "form": form, "threads": threads})]
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert process.stdout
        assert process.stderr
        if not (line := process.stdout.readline()):
            reason = (process.stderr.read().strip().splitlines() or ["it ended"])[-1]
            warnings.warn(f"no PyTorch {form} from {python}: {reason}", stacklevel=2)
            return None
        return json.loads(line), process

    def __call__(self) -> float:
        """Seconds for one meta-gradient."""
        process = next(self._turns)
        assert process.stdin
        assert process.stdout
        process.stdin.write(f"{self._calls}\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            assert process.stdin
            process.stdin.close()
            process.wait()


if __name__ == "__main__":
    main()
