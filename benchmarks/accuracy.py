"""Omniglot by the recipes of `fomaml-jax train omniglot --recipe`, judged on unseen characters.

Each recipe is trained with several seeds; its best network serves all ways and shots, the paper's
has one for each. How many steps a network adapts by, one to three (or up to as many as in training,
where those are more), is chosen on validation characters; nothing is chosen on test characters,
each of which is turned at random. Transductive: the queries of a task are normalised together, as
many a class as there are shots, which is what the MAML authors' code does, or five; alone: each
beside the support set, in fewer tasks. An interval is that of the mean over the tasks of all seeds,
the extremes of the seeds are in brackets. The published numbers are transductive. Minutes are of
training, with its compilation and validations, seeds 0 to 2 on one core each beside other work. A
third table is of the paper's recipe after a tenth of its steps (`--recipe paper --steps 6000`), on
two cores beside other work: its outer rate is constant, so that a whole run passes the same point.
The second is of half of its steps (`--steps 30000`) when it had an inner rate of 0.1 for twenty
ways, in place of 0.4.
A fourth is of one more seed of the best, 3, on two cores with nothing else to do, for its minutes.
Columns of tasks are of all seeds together: a seed was judged on 2,500 to 3,750 (the paper's on
10,000).
What was trained before, in the folder of `--runs`, is gone on with.
"""

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np

from fomaml_jax import experiment, options, problems, recipes, runs
from fomaml_jax.batch_statistics import ONE_AT_A_TIME, TRANSDUCTIVE
from fomaml_jax.devices import use_every_core
from fomaml_jax.training import Trained

MOST_STEPS = 3
"""Of adaptation, to choose from, unless training takes more."""

JUDGED = "eval_tasks", "eval_steps"
"""Options that training does not depend on."""

PUBLISHED = {
    "FOMAML, published": {"5w1s": 98.3, "5w5s": 99.2, "20w1s": 89.4, "20w5s": 97.9},
    "MAML, published": {"5w1s": 98.7, "5w5s": 99.9, "20w1s": 95.8, "20w5s": 98.9},
}
"""In percent: Nichol et al. 2018, https://arxiv.org/abs/1803.02999, and Finn et al. 2017,
https://arxiv.org/abs/1703.03400."""


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=["quick", "paper", "best"], default="best")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=["5w1s", "5w5s", "20w1s", "20w5s"])
    parser.add_argument("--steps", type=int, help="outer steps; the recipe's unless given")
    parser.add_argument("--width", type=int, help="channels; the recipe's unless given")
    parser.add_argument("--eval-tasks", type=int, default=10_000)
    parser.add_argument("--validation-tasks", type=int, default=300)
    parser.add_argument("--alone-tasks", type=int, default=1000, help="with each query alone")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/ unless given")
    asked = parser.parse_args()
    use_every_core()
    platform = jax.devices()[0].platform
    out = asked.out or common.RESULTS / f"accuracy-{platform}.json"
    for seed in asked.seeds:
        for setting in asked.settings:
            ways, shots = (int(n) for n in setting.removesuffix("s").split("w"))
            found = row(asked, ways, shots, seed)
            print(common.table(COLUMNS, summarised([found])), flush=True)
            common.write("accuracy", [*common.others(out, found, _which), found], out)


def row(asked: argparse.Namespace, ways: int, shots: int, seed: int) -> dict[str, Any]:
    """Trains, unless that was done before, chooses the inner steps, and judges."""
    recipe = recipes.omniglot(options.Omniglot(recipe=asked.recipe, ways=ways, shots=shots))
    changes = {"steps": asked.steps, "width": asked.width, "eval_tasks": asked.eval_tasks}
    changes = {name: value for name, value in changes.items() if value is not None}
    chosen = dataclasses.replace(recipe, seed=seed, **changes)
    params, tasks, seconds = trained(chosen, asked.runs)

    problem = problems.build(chosen)
    keys = experiment.Keys.of(seed)
    most = max(MOST_STEPS, chosen.inner_steps)
    judge = problems.judge_of(
        problem, problem.validation, num_steps=most, num_tasks=asked.validation_tasks
    )
    validation = [float(x) for x in judge(params, keys.validation).mean]
    steps = max(range(1, most + 1), key=lambda k: validation[k])

    def judged(statistics: str, queries: int, num_tasks: int) -> dict[str, float]:
        problem = problems.build(dataclasses.replace(chosen, queries=queries))
        tasks = problem.otherwise.get(statistics, problem.test)
        judge = problems.judge_of(
            problem, tasks, num_steps=steps, num_tasks=num_tasks, every_step=False
        )
        found = judge(params, keys.test)
        per_task = np.asarray(found.per_task[-1], np.float64)
        return {
            "mean": per_task.mean(),
            "variance": per_task.var(ddof=1),
            "tasks": num_tasks,
        }

    as_published = judged(TRANSDUCTIVE, shots, asked.eval_tasks)
    five = as_published if shots == 5 else judged(TRANSDUCTIVE, 5, asked.eval_tasks)
    return {
        "recipe": asked.recipe,
        "setting": f"{ways}w{shots}s",
        "seed": seed,
        "tasks": tasks,
        "seconds": seconds,
        "validation": validation,
        "inner_steps": steps,
        "transductive": as_published,
        "five queries": five,
        "alone": judged(ONE_AT_A_TIME, 1, asked.alone_tasks),  # others would not help it
        "learning curve": curve_of(run_of(chosen, asked.runs)),
        "config": options.to_json(chosen),
    }


def serves_all(chosen: options.Omniglot) -> bool:
    """Whether one network of the recipe serves all ways and shots."""
    return chosen.recipe != "paper"


def run_of(chosen: options.Omniglot, folder: Path) -> Path:
    """Where a recipe's run is, below a folder of runs."""
    setting = "" if serves_all(chosen) else f"-{chosen.ways}w{chosen.shots}s"
    split = "" if chosen.split == "vinyals" else f"-{chosen.split}"
    return folder / f"{chosen.recipe}{setting}{split}-{chosen.seed}"


def curve_of(run: Path) -> list[tuple[int, float]]:
    """Steps, and the accuracy on the validation tasks that follow training."""
    rows = runs.read_metrics(run)
    return [(row["step"], round(row["validation"], 4)) for row in rows if "validation" in row]


def trained(chosen: options.Omniglot, folder: Path) -> tuple[Any, int, float]:
    """The parameters of a recipe, the tasks they have seen, and the seconds they took."""
    run = run_of(chosen, folder)
    if serves_all(chosen):
        chosen = dataclasses.replace(chosen, ways=20, shots=1)
    problem = problems.build(chosen)
    if (run / runs.CONFIG).exists():
        saved = options.from_json(runs.read_config(run))
        before, now = (
            {k: v for k, v in options.identity(one).items() if k not in JUDGED}
            for one in (saved, chosen)
        )
        if before != now:
            raise SystemExit(f"{run} is of another recipe: {before} is not {now}")
        assert isinstance(saved, options.Omniglot)
        chosen = saved
    keys = experiment.Keys.of(chosen.seed)
    found = experiment.meta_train(chosen, problem, run, keys, resume=True)
    check_ended(found)
    return found.state.params, int(found.state.step) * chosen.tasks_per_step, found.seconds


def check_ended(found: Trained) -> None:
    """Ends the benchmark where training was told to stop: what it has learned is not the result."""
    if found.stopped in ("interrupted", "terminated"):
        raise SystemExit(f"training was {found.stopped}: there is nothing to judge yet")


def _which(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["recipe"], row["setting"], row["seed"]


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a recipe and setting, over its seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        group = groups.setdefault((row["recipe"], row["setting"]), [])
        group.append(row)
        first, other = (_trained_by(one["config"]) for one in (group[0], row))
        if first != other:
            raise ValueError(f"seeds of other options: {first}, {other}")
    return [
        {
            "recipe": recipe,
            "setting": setting,
            "seeds": len(group),
            "tasks": group[0]["tasks"],
            "minutes": statistics.mean(row["seconds"] for row in group) / 60,
            "inner_steps": sorted({row["inner_steps"] for row in group}),
            **{
                name: over_seeds([row[name] for row in group])
                for name in ("transductive", "five queries", "alone")
            },
        }
        for (recipe, setting), group in groups.items()
    ]


def _trained_by(config: dict[str, Any]) -> dict[str, Any]:
    """What the seeds of a recipe have in common."""
    return {name: value for name, value in config.items() if name not in (*JUDGED, "seed")}


def over_seeds(found: list[dict[str, float]]) -> dict[str, float]:
    """Mean and interval over the tasks of all seeds, and the extremes of the seeds."""
    means = [of_seed["mean"] for of_seed in found]
    # Of the mean of independent means, each with its own variance.
    variance = sum(of_seed["variance"] / of_seed["tasks"] for of_seed in found) / len(found) ** 2
    return {
        "mean": statistics.mean(means),
        "ci95": 1.96 * math.sqrt(variance),
        "tasks": sum(of_seed["tasks"] for of_seed in found),
        "least": min(means),
        "most": max(means),
    }


def accuracy(name: str) -> Callable[[dict[str, Any]], str]:
    """A cell: mean, interval, and the seeds' extremes, in percent."""

    def show(row):
        mean, ci95, least, most = (100 * row[name][k] for k in ("mean", "ci95", "least", "most"))
        spread = f" ({least:.2f}-{most:.2f})" if row["seeds"] > 1 else ""
        return f"{mean:.2f} ± {ci95:.2f}{spread}"

    return show


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "recipe": lambda row: row["recipe"],
    "setting": lambda row: row["setting"],
    "transductive, %": accuracy("transductive"),
    "5 queries a class": accuracy("five queries"),
    "each alone": accuracy("alone"),
    **{
        name: lambda row, found=found: f"{found.get(row['setting'], math.nan):.1f}"
        for name, found in PUBLISHED.items()
    },
    "test tasks, alone": lambda row: (
        f"{row['transductive']['tasks']:,.0f}, {row['alone']['tasks']:,.0f}"
    ),
    "inner steps": lambda row: ", ".join(map(str, row["inner_steps"])),
    "training tasks": lambda row: f"{row['tasks']:,}",
    "minutes": lambda row: f"{row['minutes']:.0f}",
    "seeds": lambda row: str(row["seeds"]),
}


SHORT = ("recipe", "setting", "transductive, %", "each alone", *PUBLISHED, "training tasks")


def page(rows: list[dict[str, Any]]) -> list[str]:
    """The table of the page."""
    return [common.table(COLUMNS, summarised(rows))]


def compact(rows: list[dict[str, Any]]) -> str:
    """What it comes to, beside what is published."""
    return common.table({name: COLUMNS[name] for name in SHORT}, summarised(rows))


if __name__ == "__main__":
    main()
