"""The network that comes along, as its test tasks move away from what it was trained on.

What `fomaml-jax evaluate pretrained:omniglot --shift` measures, with the same tasks for the adapted
network, for the nearest class mean on its features without adaptation, and on pixels: accuracy in
percent with its 95 % interval over tasks. The same key gives the same classes and pictures under
every shift of one shape, so that differences are taken task by task: `ahead` of the features' class
means, and `lost` since the first line of the shift. Intervals are of one line each, not of all
together. Five query pictures a class, as many of every class; label noise and class imbalance are
in the support set alone, with 5 shots and with 3 a class on average. Alphabets and scripts of which
the network has seen a character by hand are left out of "one alphabet a task", not of print: of the
three printed scripts its training has handwritten Greek and a Georgian one.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax

import fomaml_jax as fj
from fomaml_jax import experiment, pictures, robustness, shift_pictures, shift_suite
from fomaml_jax.devices import use_every_core
from fomaml_jax.robustness import ADAPTED, FEATURES, PIXELS

NETWORK = "pretrained:omniglot"


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--eval-tasks", type=int, default=200, help="a condition (%(default)s)")
    parser.add_argument("--shifts", nargs="+", help="some of them, by name; all unless given")
    parser.add_argument("--eval-steps", type=int, help="of adaptation; the network's unless given")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/ unless given")
    asked = parser.parse_args()
    use_every_core()
    out = asked.out or common.RESULTS / f"shift-{jax.devices()[0].platform}.json"
    classifier = fj.load_classifier(NETWORK)
    chosen = dataclasses.replace(classifier.chosen, eval_steps=asked.eval_steps)
    classifier = dataclasses.replace(classifier, chosen=chosen)
    suite = shift_suite.suite(chosen, fj.datasets.omniglot(download=False))
    order = [(one.shift, one.label) for one in suite.conditions]
    about = {
        "network": NETWORK,
        "statistics": chosen.statistics,
        "inner_steps": chosen.adaptation_steps,
        "seed": asked.seed,
    }
    measuring = robustness.measure(
        classifier,
        suite.pools,
        [one for one in suite.conditions if one.shift in (asked.shifts or [one.shift])],
        experiment.Keys.of(asked.seed).test,
        queries=chosen.queries,
        num_tasks=asked.eval_tasks,
        say=lambda text: print(text, flush=True),
    )
    rows: list[dict[str, Any]] = []
    for row in measuring:
        rows = in_order(order, [*common.others(out, row, _which), about | row])
        common.write("shift", rows, out)
    print(common.table(COLUMNS, rows))
    print(*shift_pictures.conclusions(rows), sep="\n")
    pictures.save(shift_pictures.draw(rows), out.with_suffix(".png"))


def in_order(order: list[tuple[str, str]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the report has them, whichever was measured first."""
    return sorted(rows, key=lambda row: order.index(_which(row)))


def _which(row: dict[str, Any]) -> tuple[str, str]:
    return row["shift"], row["label"]


def percent(*path: str, sign: str = "") -> Callable[[dict[str, Any]], str]:
    """A cell: mean and interval."""

    def show(row):
        found: Any = row
        for name in path:
            found = None if found is None else found[name]
        if found is None:
            return "-"
        return f"{100 * found['mean']:{sign}.1f} ± {100 * found['ci95']:.1f}"

    return show


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "shift": lambda row: f"{row['shift']}: {row['label']}",
    "adapted": percent(ADAPTED),
    "class means, features": percent(FEATURES),
    "class means, pixels": percent(PIXELS),
    "ahead of features": percent("ahead", FEATURES, sign="+"),
    "ahead of pixels": percent("ahead", PIXELS, sign="+"),
    "lost": percent("lost"),
    "tasks": lambda row: str(row["num_tasks"]),
}

SHORT = ("shift", "adapted", "class means, features", "class means, pixels", "ahead of features")


def page(rows: list[dict[str, Any]]) -> list[str]:
    """Every condition, what follows, and the picture."""
    said = "\n".join(shift_pictures.conclusions(rows))
    drawn = "![Accuracy under every shift](results/shift-cpu.png)"
    return [common.table(COLUMNS, rows), said, drawn]


def compact(rows: list[dict[str, Any]]) -> str:
    """The tasks it was trained for, and of every shift the middle and the strongest."""
    chosen = [rows[0] | {"shift": "none"}]
    for shift in dict.fromkeys(row["shift"] for row in rows):
        found = [row for row in rows if row["shift"] == shift]
        chosen += [found[len(found) // 2], found[-1]]
    return common.table({name: COLUMNS[name] for name in SHORT}, chosen)


if __name__ == "__main__":
    main()
