"""Sine waves from five points: the error after 1, 5 and 10 steps, by algorithm.

Two layers of 40, the MAML paper's waves, 25 a step, five inner steps, the very same training tasks
for all, every seed in one program (`jax.vmap` of training). Inner rates are 0.01, or learned: one
an element and step (Meta-SGD for every step), by their logarithms, with the query losses after all
five steps in the gradient, and for as many more steps as wanted at the rates of the last. Inner
gradients are clipped to norm 10, without which some tasks diverge. Joint pre-training sees all
points of as many tasks. For unseen tasks each algorithm's inner rates are multiplied by one of 0.1,
0.3, 1 and 3, which is chosen on validation tasks by the error after five steps. An interval is that
of the mean over the tasks of all seeds, the extremes of the seeds are in brackets. Seconds are of a
machine with other work. MAML's published figures are those of its paper's table,
https://arxiv.org/abs/1703.03400.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fomaml_jax as fj

TASKS, INNER_STEPS, RATE = 25, 5, 0.01
AFTER = (0, 1, 5, 10)
FACTORS = (0.1, 0.3, 1.0, 3.0)
PUBLISHED = {"MAML, published": {1: 0.67, 5: 0.38, 10: 0.35}}

net = fj.models.mlp(hidden=(40, 40), outputs=1)
waves = fj.tasks.sinusoid(shots=5, queries=10)
unseen = fj.tasks.sinusoid(shots=5, queries=100)


def loss_fn(params: fj.Params, batch: fj.Batch) -> jax.Array:
    """Mean squared error."""
    x, y = batch
    return jnp.mean((cast(jax.Array, net.apply(params, x)) - y) ** 2)


def clipped(descent: optax.GradientTransformation) -> optax.GradientTransformation:
    """Descent on gradients of bounded norm."""
    return optax.chain(optax.clip_by_global_norm(10.0), descent)


SGD = clipped(optax.sgd(RATE))


def at_learned(logarithms: Any) -> optax.GradientTransformation:
    """Descent at learned rates, one an element and step."""
    return clipped(fj.rates.scale_by_rates(jax.tree.map(jnp.exp, logarithms), per_step=True))


class Algorithm(NamedTuple):
    """A meta-gradient, what it learns, and how that adapts."""

    meta_gradient: fj.MetaGradient
    learns_rates: bool = False

    def shared(self, params: fj.Params) -> Any:
        """What is learned, before training."""
        if not self.learns_rates:
            return params
        first = fj.rates.like(params, RATE, per="element", num_steps=INNER_STEPS)
        return fj.WithRates(params, jax.tree.map(jnp.log, first))

    def outer(self, steps: int) -> optax.GradientTransformation:
        """Adam with a cosine decay, ten times as fast for logarithms of rates."""

        def adam(rate):
            return optax.adam(optax.cosine_decay_schedule(rate, steps))

        network = optax.chain(optax.clip_by_global_norm(10.0), adam(1e-3))
        if not self.learns_rates:
            return network
        labels = fj.WithRates("network", "rates")
        return optax.partition({"network": network, "rates": adam(1e-2)}, labels)

    def adapt(self, factor: float, num_steps: int, shared: Any, support: fj.Batch) -> fj.Params:
        """Parameters for a task."""
        params, inner = (
            (shared.params, at_learned(shared.rates)) if self.learns_rates else (shared, SGD)
        )
        inner = optax.chain(inner, optax.scale(factor))
        return fj.adapt(loss_fn, params, support, inner, num_steps)[0]


def on_all_points(params: fj.Params, task: fj.Task) -> tuple[fj.Params, fj.TaskInfo]:
    """The gradient of joint pre-training: of support and query points, without adaptation."""
    everything = jax.tree.map(lambda *x: jnp.concatenate(x), task.support, task.query)
    return fj.fomaml(loss_fn, optax.identity(), 0)(params, fj.Task(everything, everything))


ALGORITHMS = {
    "FOMAML": Algorithm(fj.fomaml(loss_fn, SGD, INNER_STEPS)),
    "FOMAML, learned rates": Algorithm(
        fj.learned_rates(
            loss_fn, at_learned, INNER_STEPS, step_weights=jnp.full(INNER_STEPS, 1 / INNER_STEPS)
        ),
        learns_rates=True,
    ),
    "MAML, second order": Algorithm(fj.maml(loss_fn, SGD, INNER_STEPS)),
    "Reptile": Algorithm(fj.reptile(loss_fn, SGD, INNER_STEPS)),
    "joint pre-training": Algorithm(on_all_points),
}


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--steps", type=int, default=70_000, help="outer steps (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="their number (%(default)s)")
    parser.add_argument("--eval-tasks", type=int, default=1000, help="a seed (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/ unless given")
    asked = parser.parse_args()
    out = asked.out or common.RESULTS / f"sinusoid-{jax.devices()[0].platform}.json"
    for name in asked.algorithms:
        found = row(name, asked)
        print(common.table(COLUMNS, [found]), flush=True)
        common.write("sinusoid", in_order([*common.others(out, found, _which), found]), out)


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the algorithms are listed, whichever was trained first."""
    return sorted(rows, key=lambda row: list(ALGORITHMS).index(_which(row)))


def _which(row: dict[str, Any]) -> str:
    return row["algorithm"]


def row(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Trains with all seeds at once, chooses the rates, and judges."""
    algorithm = ALGORITHMS[name]
    seeds = jnp.arange(asked.seeds)
    start = time.perf_counter()
    train = jax.jit(jax.vmap(functools.partial(trained, algorithm, asked.steps)))
    shared = jax.block_until_ready(train(seeds))
    seconds = time.perf_counter() - start

    def errors(factor: float, num_steps: int, stream: int, num_tasks: int) -> np.ndarray:
        """`[seeds, tasks]`, of the same tasks whatever the algorithm."""

        def judge(shared, seed):
            key = jax.random.fold_in(jax.random.key(seed), stream)
            adapt = functools.partial(algorithm.adapt, factor, num_steps)
            options = {"num_tasks": num_tasks, "tasks_at_once": None}
            return fj.evaluate(adapt, loss_fn, shared, unseen, key, **options).per_task

        return np.asarray(jax.jit(jax.vmap(judge))(shared, seeds), np.float64)

    factor = min(FACTORS, key=lambda factor: errors(factor, INNER_STEPS, 1, 300).mean())
    found = {after: errors(factor, after, 2, asked.eval_tasks) for after in AFTER}
    return {
        "algorithm": name,
        "steps": asked.steps,
        "seeds": asked.seeds,
        "training tasks": asked.steps * TASKS,
        "seconds": seconds,
        "factor": factor,
        "eval_tasks": asked.eval_tasks,
        "errors": {
            str(after): {
                "mean": of_tasks.mean(),
                "ci95": 1.96 * of_tasks.std(ddof=1) / math.sqrt(of_tasks.size),
                "least": of_tasks.mean(1).min(),
                "most": of_tasks.mean(1).max(),
            }
            for after, of_tasks in found.items()
        },
    }


def trained(algorithm: Algorithm, steps: int, seed: jax.Array) -> Any:
    """What an algorithm learns from `steps` meta-batches."""
    init_key, task_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0))
    meta_gradient = fj.over_tasks(algorithm.meta_gradient, tasks_at_once=None)
    learner = fj.meta_learner(meta_gradient, algorithm.outer(steps))

    def step(_, state):
        tasks = jax.vmap(waves)(fj.tasks.task_keys(task_key, state.step, TASKS))
        return learner.step(state, tasks)[0]

    state = learner.init(algorithm.shared(net.init(init_key, jnp.zeros((1, 1)))))
    return jax.lax.fori_loop(0, steps, step, state).params


def error(after: int) -> Callable[[dict[str, Any]], str]:
    """A cell: mean, interval, and the seeds' extremes."""

    def show(row):
        mean, ci95, least, most = (row["errors"][str(after)][k] for k in KEYS)
        return f"{mean:.3f} ± {ci95:.3f} ({least:.3f}-{most:.3f})"

    return show


KEYS = "mean", "ci95", "least", "most"

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "algorithm": lambda row: row["algorithm"],
    "before": lambda row: f"{row['errors']['0']['mean']:.2f}",
    **{f"after {n} step{'s' * (n > 1)}": error(n) for n in AFTER[1:]},
    "rates times": lambda row: f"{row['factor']:g}",
    "training tasks": lambda row: f"{row['training tasks']:,}",
    "test tasks": lambda row: f"{row['seeds'] * row['eval_tasks']:,}",
    "seeds": lambda row: str(row["seeds"]),
    "seconds, all seeds": lambda row: f"{row['seconds']:.0f}",
}


def page(rows: list[dict[str, Any]]) -> list[str]:
    """The table of the page, and what was published."""
    of_paper = ", ".join(f"{error} after {n}" for n, error in PUBLISHED["MAML, published"].items())
    return [common.table(COLUMNS, rows), f"MAML, as published: {of_paper}."]


if __name__ == "__main__":
    main()
