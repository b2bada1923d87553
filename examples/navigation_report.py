"""What `navigation.py` found: numbers over seeds, as JSON and a table, and a picture."""

import json
import math
import os
import platform
import statistics

import jax
import numpy as np

LABELS = "before", "after one step"
COLOURS = {"first-order MAML": "C0", "joint pre-training": "C1"}


def row(seed, found, curves):
    """A seed's numbers: of every method, moments of the returns over goals, after each step."""

    def moments(per_goal):
        x = np.asarray(per_goal, np.float64)
        return {
            "mean": x.mean(),
            "median": np.median(x),
            "variance": x.var(ddof=1),
            "goals": len(x),
        }

    returns = {name: [moments(x) for x in judged.per_task] for name, judged in found.items()}
    return {"seed": seed, "returns": returns, "curves": {k: thinned(v) for k, v in curves.items()}}


def thinned(curve, most=50):
    """Means over stretches of a curve, as many as can be drawn."""
    stretches = np.array_split(np.asarray(curve, np.float64), min(most, len(curve)))
    return [round(stretch.mean(), 3) for stretch in stretches]


def over_seeds(rows):
    """`{method: [of each step the mean, its 95% interval over goals, and the seeds' extremes]}`."""

    def pooled(found):
        means = [x["mean"] for x in found]
        # Of the mean of independent means, each with its own variance.
        variance = sum(x["variance"] / x["goals"] for x in found) / len(found) ** 2
        return {
            "mean": statistics.mean(means),
            "ci95": 1.96 * math.sqrt(variance),
            "least": min(means),
            "most": max(means),
            "median": statistics.mean(x["median"] for x in found),
        }

    every = [row["returns"] for row in rows]
    return {
        name: [pooled(step) for step in zip(*(found[name] for found in every), strict=True)]
        for name in every[0]
    }


def write(folder, rows, minutes):
    """Writes `navigation.json` into the folder; returns what is in it as a table."""
    summary = over_seeds(rows)
    result = {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "minutes": minutes,
        "seeds": [row["seed"] for row in rows],
        "returns": summary,
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "navigation.json").write_text(as_json(result) + "\n")
    return table(summary) + f"\nseeds {result['seeds']}, {minutes:.1f} minutes"


def as_json(result):
    """To three digits, with null for a mean over goals of which one led to no finite return."""
    plain = json.loads(
        json.dumps(result),
        parse_float=lambda digits: round(float(digits), 3),
        parse_constant=lambda not_finite: None,
    )
    return json.dumps(plain, indent=1, allow_nan=False)


def table(summary):
    """Mean returns with their intervals over goals, and the seeds' extremes, a method a line."""
    most = max(map(len, summary.values()))
    lines = ["return after inner steps" + "".join(f"{k:>28}" for k in range(most))]
    for name, found in summary.items():
        cells = (
            f"{x['mean']:.1f} ± {x['ci95']:.1f} ({x['least']:.1f} to {x['most']:.1f})"
            for x in found
        )
        lines.append(f"{name:24}" + "".join(f"  {cell:>26}" for cell in cells))
    return "\n".join(lines)


def draw(folder, rows, steps, goals):
    """Writes `navigation.png`: learning curves, and paths before and after one step.

    For each of `goals`: the goal, positions [2, paths, steps, 2], and whether an episode runs.
    """
    from matplotlib.figure import Figure

    goals = list(goals)
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    curves, *squares = figure.subplots(1, 1 + len(goals), width_ratios=[1.6] + [1] * len(goals))
    for name, colour in COLOURS.items():
        for row in rows:
            label = name if row is rows[0] else None
            curve = row["curves"][name]
            at = (np.arange(len(curve)) + 0.5) * steps / len(curve)
            curves.plot(at, curve, color=colour, linewidth=1, label=label)
    curves.set(xlabel="outer steps", ylabel="return", title="learning", ylim=(-80, 0))
    curves.legend(frameon=False)
    for square, (goal, *played) in zip(squares, goals, strict=True):
        for colour, label, paths, running in zip(("0.7", "C0"), LABELS, *played, strict=True):
            for n, (path, there) in enumerate(zip(paths, running, strict=True)):
                name = None if n else label
                square.plot(*path[there].T, color=colour, linewidth=1, label=name)
        square.plot(*goal, "*", color="C3", markersize=12, zorder=3)
        square.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", xticks=[], yticks=[])
    squares[0].legend(frameon=False, fontsize="small")
    figure.savefig(folder / "navigation.png", dpi=80)
