"""What each choice of the best Omniglot recipe is worth: it is trained again without, shorter.

Every row changes one thing, but for one that says two; the first changes none. All networks are
half as wide as the recipe's and see as many tasks, a few, with an outer rate that falls over these
(unless either is the change). They are judged on 20-way 1-shot tasks, transductively, five queries
a class, of validation characters: test characters choose nothing here either. The steps of
adaptation, one to three, are chosen on other tasks. A difference is to the recipe with the same
seeds (the first row is the mean of all), in points; its interval is over tasks, not paired, and the
seeds' differences are in brackets: what differs less than these do says nothing. What helps in so
short a training need not help in a long one.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import accuracy
import common
import flax.linen as nn
import jax
import numpy as np

from fomaml_jax import experiment, models, options, problems, recipes
from fomaml_jax.devices import use_every_core

CHOOSING = 200
"""Tasks that the steps of adaptation are chosen on."""


class EachPicture(nn.Module):
    """Normalises each channel of each picture by itself, then scales and shifts."""

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array | None = None) -> jax.Array:
        """`[pictures, height, width, channels]`, as `models.BatchStatistics`."""
        return nn.InstanceNorm(epsilon=1e-3)(x)


class NoNormalisation(nn.Module):
    """Scales and shifts each channel, and that is all."""

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array | None = None) -> jax.Array:
        """`[pictures, height, width, channels]`, as `models.BatchStatistics`."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return x * scale + self.param("shift", nn.initializers.zeros, x.shape[-1:])


@dataclasses.dataclass(frozen=True)
class Ablation:
    """One change to the recipe.

    Attributes:
        about: what it is a change of.
        change: what is otherwise, in a few words.
        options: the options of `fomaml-jax train omniglot` that differ.
        instead: what has no option: `(module, name)` and what stands there instead.
    """

    about: str
    change: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    instead: Mapping[tuple[Any, str], Any] = dataclasses.field(default_factory=dict)


EVERY_STEP = functools.partial(problems.learned_rates, step_weights=np.full(3, 1 / 3, np.float32))

ABLATIONS = [
    Ablation("", "none"),
    Ablation("network", "strides instead of max-pooling", {"pooling": "stride"}),
    Ablation("network", "no more channels in the late blocks", {"widening": False}),
    Ablation("network", "half as wide again", {"width": 8}),
    # In the last block a picture is one pixel: flattened and averaged are the same.
    Ablation("features", "of any norm", {"features": "flat"}, {(models, "LINEAR"): {"flat"}}),
    Ablation("features", "after a last ReLU", {}, {(models, "LINEAR"): ()}),
    Ablation("features", "of any norm, after a last ReLU", {"features": "flat"}),
    Ablation("network", "a learned head, for 20 ways", {"head": "learned"}),
    Ablation("inner steps", "2", {"inner_steps": 2}),
    Ablation("inner steps", "3", {"inner_steps": 3}),
    Ablation(
        "multi-step loss",
        "3 steps, the query loss after each",
        {"inner_steps": 3},
        {(problems, "learned_rates"): EVERY_STEP},
    ),
    Ablation("learned rates", "fixed", {"learned_rates": False}),
    Ablation("queries a class", "1", {"queries": 1}),
    Ablation("queries a class", "10", {"queries": 10}),
    Ablation("training episode", "5 ways", {"train_ways": 5}),
    Ablation("training episode", "5 shots", {"train_shots": 5}),
    Ablation("tasks a step", "16, a quarter of the steps", {"tasks_per_step": 16}),
    Ablation("schedule", "constant", {"schedule": "constant"}),
    Ablation("outer rate", "0.001, a tenth", {"rate": 1e-3}),
    Ablation(
        "normalisation", "of each picture alone", {}, {(models, "BatchStatistics"): EachPicture}
    ),
    Ablation("normalisation", "none", {}, {(models, "BatchStatistics"): NoNormalisation}),
    Ablation("augmentation", "no mirrored classes", {"mirror": False}),
    Ablation("augmentation", "turns drawn, not classes", {"turns": "drawn"}),
    Ablation("augmentation", "no shifts", {"shift": 0}),
    Ablation("augmentation", "shifts of up to 2 pixels", {"shift": 2}),
]


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", nargs="+", help="of these alone: what they are changes of")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tasks", type=int, default=1600, help="to train on (%(default)s)")
    parser.add_argument("--width", type=int, default=16, help="channels (%(default)s)")
    parser.add_argument("--eval-tasks", type=int, default=1000, help="%(default)s")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/ unless given")
    asked = parser.parse_args()
    use_every_core()
    out = asked.out or common.RESULTS / f"ablations-{jax.devices()[0].platform}.json"
    rows: list[dict[str, Any]] = []
    for seed in asked.seeds:
        for ablation in ABLATIONS:
            if ablation.about and asked.changes and ablation.about not in asked.changes:
                continue
            with contextlib.ExitStack() as stack:
                # To follow so short a training would take longer than the training itself.
                stack.enter_context(mock.patch.object(experiment, "VALIDATION_TASKS", 2))
                for (module, name), there in ablation.instead.items():
                    stack.enter_context(mock.patch.object(module, name, there))
                found = row(asked, ablation, seed)
            common.write("ablations", [*common.others(out, found, _which), found], out)
            rows.append(found)
            mean = 100 * found["found"]["mean"]
            print(f"{ablation.about}: {ablation.change}, seed {seed}: {mean:.2f} %", flush=True)
    print(common.table(COLUMNS, summarised(rows)), flush=True)


def row(asked: argparse.Namespace, ablation: Ablation, seed: int) -> dict[str, Any]:
    """Trains the recipe with a change, and judges it."""
    recipe = recipes.omniglot(options.Omniglot(recipe="best", ways=20, shots=1))
    changes = {"width": asked.width} | dict(ablation.options)
    chosen = dataclasses.replace(recipe, seed=seed, **changes)
    chosen = dataclasses.replace(chosen, steps=max(1, asked.tasks // chosen.tasks_per_step))
    keys = experiment.Keys.of(seed)
    with tempfile.TemporaryDirectory() as run:
        problem = problems.build(chosen)
        trained = experiment.meta_train(chosen, problem, Path(run), keys, resume=False)
    accuracy.check_ended(trained)
    return {
        "about": ablation.about,
        "change": ablation.change,
        "seed": seed,
        "tasks": int(trained.state.step) * chosen.tasks_per_step,
        "seconds": trained.seconds,
        "found": judged(chosen, trained.state.params, asked.eval_tasks),
        "config": options.to_json(chosen),
    }


def judged(chosen: options.Omniglot, params: Any, num_tasks: int) -> dict[str, float]:
    """The accuracy on tasks of validation characters."""
    problem = problems.build(dataclasses.replace(chosen, queries=5))
    judge = problems.judge_of(
        problem, problem.validation, num_steps=accuracy.MOST_STEPS, num_tasks=num_tasks
    )
    found = judge(params, experiment.Keys.of(chosen.seed).test)
    per_task = np.asarray(found.per_task, np.float64)
    choosing = min(CHOOSING, num_tasks // 2)
    steps = 1 + int(per_task[1:, :choosing].mean(1).argmax())
    others = per_task[steps, choosing:]
    return {
        "inner_steps": steps,
        "mean": others.mean(),
        "variance": others.var(ddof=1),
        "tasks": len(others),
    }


def _which(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["about"], row["change"], row["seed"]


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a change, over its seeds, in the order of the changes."""
    whole = {row["seed"]: row for row in rows if not row["about"]}
    if len({(row["tasks"], row["found"]["tasks"]) for row in rows}) > 1:
        raise ValueError("rows of other --tasks or --eval-tasks: remove the file, or pass --out")
    if len({row["config"]["width"] for row in whole.values()}) > 1:
        raise ValueError("rows of other --width: remove the file, or pass --out")
    summary = []
    for ablation in ABLATIONS:
        of_change = [
            row
            for row in rows
            if (row["about"], row["change"]) == (ablation.about, ablation.change)
            and row["seed"] in whole
        ]
        if of_change:
            summary.append(_over_seeds(of_change, whole))
    return summary


def _over_seeds(rows: list[dict[str, Any]], whole: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """One change: the mean over its seeds, and the difference to the recipe as it is."""
    of_whole = [whole[row["seed"]] for row in rows]
    here, there = (accuracy.over_seeds([row["found"] for row in of]) for of in (rows, of_whole))
    differences = [
        row["found"]["mean"] - other["found"]["mean"]
        for row, other in zip(rows, of_whole, strict=True)
    ]
    return {
        "about": rows[0]["about"],
        "change": rows[0]["change"],
        "mean": here["mean"],
        "difference": here["mean"] - there["mean"],
        "ci95": math.hypot(here["ci95"], there["ci95"]),
        "differences": differences,
        "inner_steps": sorted({row["found"]["inner_steps"] for row in rows}),
        "tasks": rows[0]["tasks"],
    }


def difference(row: dict[str, Any]) -> str:
    """A cell: the difference to the recipe, its interval, and that of each seed, in points."""
    if not row["about"]:
        return ""
    seeds = ", ".join(f"{100 * found:+.1f}" for found in row["differences"])
    return f"{100 * row['difference']:+.1f} ± {100 * row['ci95']:.1f} ({seeds})"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "of": lambda row: row["about"] or "the recipe",
    "change": lambda row: row["change"],
    "20w1s, %": lambda row: f"{100 * row['mean']:.1f}",
    "difference": difference,
    "inner steps": lambda row: ", ".join(map(str, row["inner_steps"])),
    "training tasks": lambda row: f"{row['tasks']:,}",
}


def page(rows: list[dict[str, Any]]) -> list[str]:
    """The table of the page."""
    return [common.table(COLUMNS, summarised(rows))]


if __name__ == "__main__":
    main()
