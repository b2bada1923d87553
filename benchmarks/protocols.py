"""Omniglot's harder protocols: unseen alphabets, letters of one alphabet, another person's hand.

The best recipe on the split of the data's authors, whose 20 evaluation alphabets are unseen as a
whole, and the network in the package on the 12 test alphabets of Vinyals et al.'s. Every task is of
classes of many alphabets, or of one alphabet (`fj.tasks.episodes(..., groups=...)`), or is like a
run of the data authors' one-shot challenge: 20 letters of one alphabet, drawn by one person, to
name those drawn by another. The challenge's own 20 runs are lists that are not among the data, so
alphabet, letters and people are drawn at random here. No character is turned, where accuracy.py and
the MAML authors' code turn each at random: that tells classes apart, and is easier. Nothing was
chosen on these characters. Queries are normalised together (transductive) or, alone, each beside
the support set. The table took `--eval-tasks 1000 --alone-tasks 100`.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accuracy
import common
import jax
import jax.numpy as jnp
import numpy as np

import fomaml_jax as fj
from fomaml_jax import classifiers, experiment, options, problems, recipes, runs
from fomaml_jax.batch_statistics import beside_support
from fomaml_jax.datasets import ImageClasses, Splits
from fomaml_jax.devices import use_every_core
from fomaml_jax.tasks import TaskDistribution

SETTINGS = {"5w1s": (5, 1), "5w5s": (5, 5), "20w1s": (20, 1), "20w5s": (20, 5)}

ANY, ONE, CHALLENGE = "many alphabets", "one alphabet", "one alphabet, two people"


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", nargs="+", default=["vinyals", "background"])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="outer steps; the recipe's unless given")
    parser.add_argument("--eval-tasks", type=int, default=2000)
    parser.add_argument("--alone-tasks", type=int, default=200, help="with each query alone")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/ unless given")
    asked = parser.parse_args()
    use_every_core()
    out = asked.out or common.RESULTS / f"protocols-{jax.devices()[0].platform}.json"
    rows = []
    for split in asked.splits:
        rows += list(judged(asked, *network(asked, split)))
        print(common.table(COLUMNS, rows), flush=True)
    common.write("protocols", rows, out)


def network(asked: argparse.Namespace, split: str) -> tuple[options.Omniglot, Any, int]:
    """The options of a network, its parameters, and the tasks it has seen."""
    if split == "vinyals":
        folder = classifiers.folder_of("pretrained:omniglot")
        chosen = options.from_json(runs.read_config(folder))
        assert isinstance(chosen, options.Omniglot)
        params = runs.load_parameters(folder, problems.build(chosen).params)
        return chosen, params, chosen.steps * chosen.tasks_per_step
    recipe = recipes.omniglot(options.Omniglot(recipe="best", ways=20))
    steps = recipe.steps if asked.steps is None else asked.steps
    chosen = dataclasses.replace(recipe, split="background", steps=steps, seed=asked.seed)
    params, tasks, _ = accuracy.trained(chosen, asked.runs)
    return chosen, params, tasks


def judged(
    asked: argparse.Namespace, chosen: options.Omniglot, params: Any, seen: int
) -> Iterator[dict[str, Any]]:
    """A row for every protocol and setting."""
    for setting in asked.settings:
        ways, shots = SETTINGS[setting]
        problem = problems.build(dataclasses.replace(chosen, ways=ways, shots=shots))
        assert isinstance(problem.splits, Splits)
        classes = problem.splits.test
        protocols = {
            name: fj.tasks.episodes(
                classes.images, ways=ways, shots=shots, queries=shots, groups=groups
            )
            for name, groups in {ANY: None, ONE: alphabets(classes)}.items()
        }
        if setting == "20w1s":
            protocols[CHALLENGE] = two_people(classes, ways)
        for protocol, tasks in protocols.items():
            yield {
                "split": chosen.split,
                "protocol": protocol,
                "setting": setting,
                "training tasks": seen,
                **{
                    name: found(problem, params, distribution, num_tasks)
                    for name, distribution, num_tasks in (
                        ("transductive", tasks, asked.eval_tasks),
                        ("alone", beside_support(tasks), asked.alone_tasks),
                    )
                },
            }


def found(
    problem: problems.Problem, params: Any, tasks: TaskDistribution, num_tasks: int
) -> dict[str, float]:
    """Accuracy after the recipe's one step."""
    judge = problems.judge_of(problem, tasks, num_steps=1, num_tasks=num_tasks, every_step=False)
    judgement = judge(params, experiment.Keys.of(0).test)
    return {
        "mean": float(judgement.mean[-1]),
        "ci95": float(judgement.ci95[-1]),
        "tasks": num_tasks,
    }


def alphabets(classes: ImageClasses) -> np.ndarray:
    """The alphabet of each class, as a number."""
    return np.unique([name.split("/")[0] for name in classes.names], return_inverse=True)[1]


def two_people(classes: ImageClasses, ways: int) -> TaskDistribution:
    """Letters of one alphabet: the support set is one person's hand, the queries are another's."""
    # An example's place among those of its class is the person who drew it.
    by_person = jnp.asarray(classes.images)
    sample_letters = fj.tasks.episodes(
        np.arange(len(by_person))[:, None].repeat(2, 1),
        ways=ways,
        shots=1,
        queries=1,
        groups=alphabets(classes),
    )

    def sample_task(key: jax.Array) -> fj.Task:
        letters_key, people_key = jax.random.split(key)
        people = jax.random.choice(people_key, by_person.shape[1], (2,), replace=False)
        letters = sample_letters(letters_key)
        return fj.Task(
            *(
                (fj.tasks.as_float(by_person[letter, person]), label)
                for (letter, label), person in zip(letters, people, strict=True)
            )
        )

    return sample_task


def percent(name: str):
    """A cell with mean and interval."""
    return lambda row: f"{100 * row[name]['mean']:.2f} ± {100 * row[name]['ci95']:.2f}"


COLUMNS = {
    "split": lambda row: row["split"],
    "classes of a task": lambda row: row["protocol"],
    "setting": lambda row: row["setting"],
    "transductive, %": percent("transductive"),
    "each alone": percent("alone"),
    "test tasks, alone": lambda row: f"{row['transductive']['tasks']:,}, {row['alone']['tasks']:,}",
    "training tasks": lambda row: f"{row['training tasks']:,}",
}


if __name__ == "__main__":
    main()
