"""Every algorithm on Omniglot, 20-way 1-shot, from the same tasks: accuracy, seconds, memory.

The network has four convolutions (strides, batch statistics) and a meta-learned head over features
of fixed norm. Each algorithm takes as many inner steps on the very same training tasks, with the
same outer optimizer (Adam, cosine decay) and seed, and chooses the scale of its inner rates from
the same list by validation accuracy after a tenth of the outer steps. Reptile, which has no query
loss, adapts to support and query examples together while training. Seconds are of training alone,
without compilation; memory is what XLA plans for one outer step beside its arguments, on all
devices together. The queries of a test task are normalised together (transductive).
"""

import argparse
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
from fomaml_jax.devices import mesh_for, use_every_core

INNER_STEPS, TASKS_PER_STEP, QUERIES = 3, 8, 5
BODY_RATE, HEAD_RATE, OUTER_RATE = 0.1, 3.0, 5e-3
FACTORS = (0.1, 0.3, 1.0, 3.0)
"""Of the inner rates, to choose from."""

PROTOTYPE_SCALE = 0.1
"""Of ProtoMAML's first head: features of norm sqrt(128) alone would saturate the softmax."""


class Algorithm(NamedTuple):
    """An algorithm in the parts that differ.

    Attributes:
        meta_gradient: `(rates, outer step, outer steps) -> MetaGradient` for one task.
        adapt: `(shared, support, rates) -> adapted parameters`.
        shared: `(params, rates) -> what is meta-learned`.
        task: what a training task becomes first.
    """

    meta_gradient: Callable[[Any, jax.Array, int], fj.MetaGradient]
    adapt: Callable[[Any, fj.Batch, Any], fj.Params]
    shared: Callable[[fj.Params, Any], Any] = lambda params, rates: params
    task: Callable[[fj.Task], fj.Task] = lambda task: task


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algorithms", nargs="+", help="names; all unless given")
    parser.add_argument("--steps", type=int, default=1500, help="outer steps (%(default)s)")
    parser.add_argument("--ways", type=int, default=20)
    parser.add_argument("--width", type=int, default=32, help="channels (%(default)s)")
    parser.add_argument("--eval-tasks", type=int, default=1000)
    parser.add_argument("--data", choices=["omniglot", "glyphs"], default="omniglot")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/ unless given")
    asked = parser.parse_args()
    use_every_core()
    problem = Problem(asked)
    known = algorithms(problem)
    unknown = set(asked.algorithms or ()) - set(known)
    if unknown:
        parser.error(f"--algorithms: there are {', '.join(known)}; not {', '.join(unknown)}")
    rows = []
    for name in asked.algorithms or known:
        rows.append({"algorithm": name} | run(known[name], problem, asked))
        print(common.table(COLUMNS, rows[-1:]), flush=True)
    print("\n" + common.table(COLUMNS, rows))
    common.write("algorithms", rows, asked.out)


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "algorithm": lambda row: row["algorithm"],
    "accuracy": lambda row: f"{100 * row['accuracy']:.1f} ± {100 * row['ci95']:.1f} %",
    "training tasks": lambda row: f"{row['tasks']:,}",
    "seconds": lambda row: f"{row['seconds']:.0f}",
    "memory, MiB": lambda row: f"{row['temp_bytes'] / 2**20:.0f}",
    "inner rates times": lambda row: f"{row['factor']:g}",
}


class Problem:
    """Tasks, a network, and its loss."""

    def __init__(self, asked: argparse.Namespace) -> None:
        turned = asked.data == "omniglot"
        splits = getattr(fj.datasets, asked.data)()
        train = splits.train.images
        episode = {"ways": asked.ways, "shots": 1, "queries": QUERIES}
        self.train = fj.tasks.episodes(
            fj.tasks.rotated_classes(train) if turned else train,
            counts=np.tile(splits.train.counts, 4 if turned else 1),
            augment=fj.tasks.random_shift(2),
            **episode,
        )
        self.validation, self.test = (
            fj.tasks.episodes(split.images, counts=split.counts, rotations=turned, **episode)
            for split in (splits.validation, splits.test)
        )
        self.ways, self.width = asked.ways, asked.width
        example = jnp.zeros((1, *train.shape[2:]))
        self.params = self.network(self.ways).init(jax.random.key(0), example)
        head = self.params["params"]["head"]
        random = jax.nn.initializers.lecun_normal()(jax.random.key(1), head["kernel"].shape)
        self.params["params"]["head"] = {**head, "kernel": random}

    def network(self, outputs: int) -> Any:
        """The network with so many outputs."""
        return fj.models.conv4(outputs, width=self.width, features="scaled")

    def logits(self, params: fj.Params, x: jax.Array) -> jax.Array:
        """The network's predictions."""
        outputs = params["params"]["head"]["kernel"].shape[-1]
        network = fj.matmul_convolutions(self.network(outputs).apply)
        return cast(jax.Array, network(params, x))

    def loss(self, params: fj.Params, batch: fj.Batch) -> jax.Array:
        """The mean cross-entropy."""
        x, y = batch
        logits = self.logits(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def accuracy(self, params: fj.Params, batch: fj.Batch) -> jax.Array:
        """The share of right answers."""
        x, y = batch
        return jnp.mean(self.logits(params, x).argmax(-1) == y)

    def features(self, params: fj.Params, x: jax.Array) -> jax.Array:
        """What the head sees: the outputs of a head that changes nothing."""
        size = params["params"]["head"]["kernel"].shape[0]
        identity = {"kernel": jnp.eye(size), "bias": jnp.zeros(size)}
        return self.logits({"params": {**params["params"], "head": identity}}, x)

    def rates(self, factor: jax.Array) -> Any:
        """An inner rate for every tensor."""

        def rate(path, x):
            head = "head" in jax.tree_util.keystr(path)
            return jnp.full((), HEAD_RATE if head else BODY_RATE, x.dtype) * factor

        return jax.tree.map_with_path(rate, self.params)


def algorithms(problem: Problem) -> dict[str, Algorithm]:
    """Each in a few lines."""
    loss = problem.loss

    def adapting(trainable: Any = None, start: Any = lambda params, support: params):
        def adapt(params, support, rates):
            sgd = fj.rates.scale_by_rates(rates)
            first = start(params, support)
            return fj.adapt(loss, first, support, sgd, INNER_STEPS, trainable=trainable)[0]

        return adapt

    def plain(algorithm: Any, trainable: Any = None, **parts: Any) -> Algorithm:
        def meta_gradient(rates, step, steps):
            del step, steps
            sgd = fj.rates.scale_by_rates(rates)
            return algorithm(loss, sgd, INNER_STEPS, trainable=trainable)

        return Algorithm(meta_gradient, adapting(trainable), **parts)

    def learned(weights: Any = lambda step, steps: None, **shape: Any) -> Algorithm:
        """Learned rates, by their logarithms: they stay positive, and scales do not matter."""
        per_step = "num_steps" in shape

        def inner(logs):
            return fj.rates.scale_by_rates(jax.tree.map(jnp.exp, logs), per_step=per_step)

        def meta_gradient(rates, step, steps):
            del rates
            of_steps = weights(step, steps)
            return fj.learned_rates(loss, inner, INNER_STEPS, step_weights=of_steps)

        def shared(params, rates):
            ones = fj.rates.like(params, 1.0, **shape)
            return fj.WithRates(params, jax.tree.map(lambda r, x: jnp.log(r * x), rates, ones))

        def adapt(shared, support, rates):
            del rates
            return fj.adapt(loss, shared.params, support, inner(shared.rates), INNER_STEPS)[0]

        return Algorithm(meta_gradient, adapt, shared)

    def first_head(params, support):
        x, y = support
        kernel, bias = fj.prototype_head(problem.features(params, x), y, problem.ways)
        head = {"kernel": PROTOTYPE_SCALE * kernel, "bias": PROTOTYPE_SCALE * bias}
        return {"params": {**params["params"], "head": head}}

    def proto_maml(rates, step, steps):
        del step, steps
        sgd = fj.rates.scale_by_rates(rates)
        return fj.starting_from(first_head, fj.fomaml(loss, sgd, INNER_STEPS))

    def in_head(path):
        return "head" in path

    def all_examples(task):
        return fj.Task(jax.tree.map(lambda *x: jnp.concatenate(x), *task), task.query)

    return {
        "FOMAML": plain(fj.fomaml),
        "MAML, second order": plain(fj.maml),
        "Reptile": plain(fj.reptile, task=all_examples),
        "ANIL": plain(fj.fomaml, in_head),
        "BOIL": plain(fj.fomaml, lambda path: not in_head(path)),
        "Meta-SGD": learned(per="element"),
        "LSLR, multi-step loss": learned(
            lambda step, steps: fj.schedules.multi_step_weights(INNER_STEPS, step, -(-steps // 2)),
            num_steps=INNER_STEPS,
        ),
        "ProtoMAML": Algorithm(proto_maml, adapting(start=first_head)),
    }


def run(algorithm: Algorithm, problem: Problem, asked: argparse.Namespace) -> dict[str, Any]:
    """Chooses the rates, trains, and judges."""

    def judge(shared, factor, tasks, num_tasks):
        return fj.evaluate(
            lambda shared, support: algorithm.adapt(shared, support, problem.rates(factor)),
            problem.accuracy,
            shared,
            tasks,
            jax.random.key(2),
            num_tasks=num_tasks,
        )

    validate = jax.jit(lambda shared, f: judge(shared, f, problem.validation, 200).mean)
    test = jax.jit(lambda shared, f: judge(shared, f, problem.test, asked.eval_tasks))

    short = max(1, asked.steps // 10)
    trial = trainer(algorithm, problem, short)
    tried = {f: float(validate(trial(f)[0], f)) for f in map(np.float32, FACTORS)}
    factor = max(tried, key=lambda f: tried[f])
    shared, seconds, temp_bytes = trainer(algorithm, problem, asked.steps)(factor)
    found = test(shared, factor)
    return {
        "accuracy": float(found.mean),
        "ci95": float(found.ci95),
        "seconds": seconds,
        "temp_bytes": temp_bytes,
        "factor": float(factor),
        "validation": {f"{float(f):g}": accuracy for f, accuracy in tried.items()},
        "tasks": asked.steps * TASKS_PER_STEP,
        "shapes": vars(asked) | {"out": None, "inner_steps": INNER_STEPS, "queries": QUERIES},
    }


def trainer(
    algorithm: Algorithm, problem: Problem, steps: int
) -> Callable[[Any], tuple[Any, float, int]]:
    """Training at a factor of the inner rates: what was learned, seconds, and planned memory."""
    mesh = mesh_for(TASKS_PER_STEP)
    optimizer = optax.adam(optax.cosine_decay_schedule(OUTER_RATE, steps, alpha=0.01))

    def at(factor: Any):
        def meta_gradient(step):
            of_task = algorithm.meta_gradient(problem.rates(factor), step, steps)

            def of_key(shared, key):
                return of_task(shared, algorithm.task(problem.train(key)))

            return fj.over_tasks(of_key, mesh=mesh)

        return fj.scheduled_learner(meta_gradient, optimizer)

    def train(factor):
        state = at(factor).init(algorithm.shared(problem.params, problem.rates(factor)))

        def step(_, state):
            keys = fj.tasks.task_keys(jax.random.key(3), state.step, TASKS_PER_STEP)
            return at(factor).step(state, keys)[0]

        return jax.lax.fori_loop(0, steps, step, state)

    program = jax.jit(train).lower(np.float32(1)).compile()
    planned = program.memory_analysis()

    def run_at(factor):
        started = time.perf_counter()
        state = jax.block_until_ready(program(factor))
        seconds = time.perf_counter() - started
        return state.params, seconds, planned.temp_size_in_bytes if planned else 0

    return run_at


if __name__ == "__main__":
    main()
