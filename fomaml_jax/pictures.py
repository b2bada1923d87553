"""What a run looks like: learning curve, example episodes, adaptation to sine waves or groups."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fomaml_jax import options, problems, runs
from fomaml_jax.batch_statistics import queries_of
from fomaml_jax.problems import Problem
from fomaml_jax.types import Params, Task
from fomaml_jax.wording import counted, plain

INK, ACCENT, RIGHT, WRONG = "#222222", "#c2410c", "#15803d", "#b91c1c"
BASELINE_STYLES = ("--", ":", "-.")


def draw_run(
    chosen: options.Options,
    problem: Problem,
    params: Params,
    key: jax.Array,
    folder: Path,
    result: dict[str, Any],
) -> None:
    """Draws a finished run into its folder."""
    save(learning_curve(folder, result), folder / "learning_curve.png")
    if isinstance(chosen, options.ImageOptions):
        save(episodes(chosen, problem, params, key), folder / "episodes.png")
    elif isinstance(chosen, options.Table):
        save(groups(chosen, problem, params), folder / "adaptation.png")
    else:
        save(sine_waves(chosen, problem, params, key), folder / "adaptation.png")


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    with runs.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight", format="png")


def learning_curve(folder: Path, result: dict[str, Any]) -> Figure:
    """Loss on training tasks and metric on validation tasks against tasks seen."""
    rows = runs.read_metrics(folder)
    validated = [row for row in rows if "validation" in row]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([r["tasks"] for r in rows], [r["loss"] for r in rows], color=INK, lw=1)
    scale = "log" if any((r["loss"] or 0) > 0 for r in rows) else "linear"  # all were left out
    left.set(xlabel="training tasks seen", ylabel="query loss", yscale=scale)
    right.plot(
        [r["tasks"] for r in validated],
        [r["validation"] for r in validated],
        color=INK,
        marker=".",
        label="validation tasks",
    )
    seen = result["tasks_seen"]
    right.errorbar(
        [seen], [result["mean"]], [result["ci95"]], fmt="o", color=ACCENT, label="unseen tasks"
    )
    for (name, found), style in zip(result["baselines"].items(), BASELINE_STYLES, strict=False):
        right.axhline(found["mean"], color="#777777", ls=style, lw=1, label=name)
    steps = f"{result['metric']} after {result['inner_steps']} steps"
    right.set(xlabel="training tasks seen", ylabel=plain(steps))
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def episodes(
    chosen: options.ImageOptions, problem: Problem, params: Params, key: jax.Array, count: int = 3
) -> Figure:
    """Unseen tasks: a column a class, its support examples over its queries, right or wrong."""
    ways, shown = min(chosen.ways, 10), min(chosen.queries, 4)
    adapt_fn, unseen = problems.adapt_path(problem, chosen.adaptation_steps), problem.test
    assert not isinstance(unseen, Task)

    @jax.jit
    def solve(index):
        task = unseen(jax.random.fold_in(key, index))
        adapted = jax.tree.map(lambda path: path[-1], adapt_fn(params, task.support))
        predicted = problem.predict(adapted, task.query[0]).argmax(-1)
        return task._replace(query=(queries_of(task.query[0]), task.query[1])), predicted

    rows = 1 + shown
    figure = Figure(figsize=(count * (0.62 * ways + 0.4), 0.72 * rows + 0.5))
    panels = figure.subfigures(1, count, squeeze=False)[0]
    for index, panel in enumerate(panels):
        task, predicted = jax.device_get(solve(index))
        axes = np.reshape(panel.subplots(rows, ways), (rows, ways))
        panel.suptitle(f"unseen task {index + 1}", fontsize=9)
        for way in range(ways):
            _show(axes[0, way], task.support[0][task.support[1] == way][0], INK, str(way + 1))
            mine = np.flatnonzero(task.query[1] == way)[:shown]
            for row, query in enumerate(mine, start=1):
                good = predicted[query] == way
                label = "" if good else f"said {predicted[query] + 1}"
                _show(axes[row, way], task.query[0][query], RIGHT if good else WRONG, label)
    return figure


def _show(axes: Any, image: np.ndarray, colour: str, title: str) -> None:
    grey = image.shape[-1] == 1
    axes.imshow(image[..., 0] if grey else image, cmap="gray_r" if grey else None, vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=7, color=colour, pad=2)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=1.5)


def sine_waves(
    chosen: options.Options, problem: Problem, params: Params, key: jax.Array, count: int = 3
) -> Figure:
    """The MAML paper's picture: a wave, a few of its points, the network before and after."""
    steps = sorted({0, min(1, chosen.adaptation_steps), chosen.adaptation_steps})
    adapt_fn, unseen = problems.adapt_path(problem, chosen.adaptation_steps), problem.test
    assert not isinstance(unseen, Task)
    grid = jnp.linspace(-5, 5, 201)[:, None]

    @jax.jit
    def solve(index):
        task = unseen(jax.random.fold_in(key, index))
        path = adapt_fn(params, task.support)
        return task, jax.lax.map(lambda p: problem.predict(p, grid), path)

    figure = Figure(figsize=(4 * count, 3.2), layout="constrained")
    for index, axes in enumerate(np.atleast_1d(figure.subplots(1, count, sharey=True))):
        task, curves = jax.device_get(solve(index))
        order = np.argsort(task.query[0][:, 0])
        axes.plot(*(part[order] for part in task.query), color=RIGHT, lw=2, label="the wave")
        for step, style in zip(steps, (":", "--", "-"), strict=False):
            label = f"after {counted(step, 'step')}" if step else "before adaptation"
            axes.plot(grid, curves[step], color=ACCENT, ls=style, lw=1.2, label=label)
        axes.plot(*task.support, "^", color=INK, ms=7, label="points given")
        axes.set_title(f"unseen task {index + 1}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        if index == 0:
            axes.legend(fontsize=7, frameon=False)
    return figure


def groups(
    chosen: options.Table, problem: Problem, params: Params, columns: int = 4, most: int = 8
) -> Figure:
    """Unseen groups: the rows given, the later ones, and what was predicted before and after."""
    tasks = problem.test
    assert isinstance(tasks, Task)
    assert problem.splits is not None
    adapt_fn = problems.adapt_path(problem, chosen.adaptation_steps)
    mean, scale = problem.standard

    @jax.jit
    def solve(params):
        def of_task(task):
            path = adapt_fn(params, task.support)
            (x, _), _ = task.query
            ends = jax.tree.map(lambda p: jnp.stack([p[0], p[-1]]), path)
            return jax.lax.map(lambda p: problem.predict(p, x), ends)

        return jax.vmap(of_task)(tasks)

    names = problem.splits.test.names[:most]
    predicted = mean + scale * np.asarray(solve(params))
    shape = -(-len(names) // columns), min(columns, len(names))
    figure = Figure(figsize=(3 * shape[1], 2.3 * shape[0]), layout="constrained")
    axes_of = np.ravel(figure.subplots(*shape, sharey=True, squeeze=False))
    (_, given), _ = tasks.support
    (_, later), weights = tasks.query
    for i, (name, axes) in enumerate(zip(names, axes_of, strict=False)):
        count, shots = int(weights[i].sum()), chosen.shots
        place = shots + 1 + np.arange(count)
        axes.plot(1 + np.arange(shots), mean + scale * given[i], "^", color=INK, ms=5)
        axes.plot(place, mean + scale * later[i, :count], ".", color=RIGHT, ms=3)
        for line, style in zip(predicted[i, :, :count], (":", "-"), strict=True):
            axes.plot(place, line, color=ACCENT, ls=style, lw=1.2)
        axes.set_title(plain(f"{chosen.group} {name}"), fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in axes_of[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel(
        "row, in order; triangles: given, dots: later, lines: predicted before (dotted) and after",
        fontsize=8,
    )
    figure.supylabel(plain(chosen.target), fontsize=9)
    return figure
