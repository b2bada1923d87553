"""What runs came to, side by side: one page that needs no other file, and its pictures."""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fomaml_jax import options, runs
from fomaml_jax.wording import caveat, decimals, plain

COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#0e7490", "#a16207", "#be185d", "#222222")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
.missing { color: #777; }
"""


REQUIRED = {"mean", "ci95", "per_step"}
STEP = {"inner_steps", "mean", "ci95"}


class Finished(NamedTuple):
    """What is in a run's folder; the result is `None` where it has not come to its end."""

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any] | None
    per_task: np.ndarray | None
    diverged: bool


def read(folder: Path) -> Finished:
    """Reads a run.

    Raises:
        ValueError: where the folder is not a run, or its files are damaged.
    """
    config = runs.read_config(folder)
    options.from_json(config)
    result_path, tasks_path = folder / runs.RESULT, folder / runs.PER_TASK
    try:
        result = json.loads(result_path.read_text()) if result_path.exists() else None
        per_task = np.load(tasks_path, allow_pickle=False) if tasks_path.exists() else None
        if result is not None and not result.keys() >= REQUIRED:
            raise ValueError(f"{runs.RESULT} lacks {', '.join(sorted(REQUIRED - result.keys()))}")
        if result is not None and not all(row.keys() >= STEP for row in result["per_step"]):
            raise ValueError(f"{runs.RESULT} has a step without {', '.join(sorted(STEP))}")
    except (ValueError, TypeError, EOFError, AttributeError) as error:
        raise ValueError(f"the run in {folder} is damaged: {error}") from None
    diverged = (folder / runs.DIVERGED).exists()
    return Finished(
        folder.resolve().name, config, runs.read_metrics(folder), result, per_task, diverged
    )


def write(folders: Sequence[Path], out: Path) -> Path:
    """Writes `report.html` and the pictures in it as PNG files into a folder.

    Returns:
        The page.

    Raises:
        ValueError: as `read`, and for runs whose metrics cannot be compared.
        OSError: where it cannot be written.
    """
    found = [read(folder) for folder in folders]
    kinds = {metric(run) for run in found}
    if len(kinds) > 1:
        raise ValueError(f"runs of different metrics in one report: {', '.join(sorted(kinds))}")
    names = [run.name for run in found]
    if len(set(names)) < len(names):  # folders of the same name in different places
        found = [run._replace(name=str(path)) for run, path in zip(found, folders, strict=True)]
    figures = {
        "learning_curves": learning_curves(found),
        "accuracy_per_step": after_each_step(found),
        "tasks": per_task_histogram(found),
    }
    out.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, figure in figures.items():
        if figure is not None:
            content = io.BytesIO()
            figure.savefig(content, dpi=120, bbox_inches="tight", format="png")
            pictures[name] = content.getvalue()
            with runs.replacing(out / f"{name}.png") as temporary:
                temporary.write_bytes(pictures[name])
    with runs.replacing(out / "report.html") as temporary:
        temporary.write_text(page(found, pictures), encoding="utf-8", errors="backslashreplace")
    return out / "report.html"


def metric(run: Finished) -> str:
    """What the run is judged by."""
    return options.metric_of(options.from_json(run.config))


def page(found: Sequence[Finished], pictures: dict[str, bytes]) -> str:
    """The page, its pictures inside."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_text(titled(found))}</title>",
        f"<style>{STYLE}</style><h1>{_text(titled(found))}</h1>",
        _table(
            list(RESULT_COLUMNS), [[show(run) for show in RESULT_COLUMNS.values()] for run in found]
        ),
        f"<p>± is a 95 % interval over tasks{_caveat(found)}</p>",
    ]
    for name, content in pictures.items():
        encoded = base64.b64encode(content).decode()
        caption = CAPTIONS[name]
        parts.append(f"<h2>{_text(caption)}</h2>")
        parts.append(f'<img alt="{_text(caption)}" src="data:image/png;base64,{encoded}">')
    differing = [
        name
        for name in dict.fromkeys(name for run in found for name in run.config)
        if name not in options.UNSHOWN
        and len({json.dumps(run.config.get(name)) for run in found}) > 1
    ]
    title = "What they differ in" if len(found) > 1 else "Options"
    shown = differing if len(found) > 1 else list(found[0].config)
    if shown:
        rows = [[name, *(str(run.config.get(name, "")) for run in found)] for name in shown]
        parts.append(f"<h2>{title}</h2>")
        parts.append(_table(["option", *(run.name for run in found)], rows))
    return "\n".join(parts) + "\n"


def titled(found: Sequence[Finished]) -> str:
    """The page's title."""
    return found[0].name if len(found) == 1 else f"{len(found)} runs"


def _scored(run: Finished) -> str:
    if run.result is None:
        return "diverged" if run.diverged else "not finished"
    if None in (run.result["mean"], run.result["ci95"]):
        return "not finite"
    mean, ci95 = run.result["mean"], run.result["ci95"]
    if metric(run) == options.ACCURACY:
        return f"{100 * mean:.2f} ± {100 * ci95:.2f} %"
    places = decimals([abs(mean)])
    return f"{mean:.{places}f} ± {ci95:.{places}f}"


def _caveat(found: Sequence[Finished]) -> str:
    judged_on = [(run.result or {}).get("num_tasks") for run in found]
    return caveat(min((n for n in judged_on if n is not None), default=math.inf))


def _of_result(name: str) -> Any:
    def show(run: Finished) -> str:
        found = None if run.result is None else run.result.get(name)
        return "" if found is None else str(found)

    return show


RESULT_COLUMNS = {
    "run": lambda run: run.name,
    "data": lambda run: run.config["dataset"],
    "on unseen tasks": _scored,
    "their number": _of_result("num_tasks"),
    "queries normalised": _of_result("statistics"),
    "inner steps": _of_result("inner_steps"),
    "training tasks": _of_result("tasks_seen"),
    "seconds": _of_result("seconds"),
    "tasks left out": lambda run: str(sum(row["left_out"] for row in run.metrics)),
    "ended": lambda run: "" if run.result is None else run.result.get("stopped", ""),
}

LOSSES = {
    "support_loss_first": (":", "support, before the first inner step"),
    "support_loss_last": ("--", "support, before the last"),
    "loss": ("-", "query, after the last"),
}
"""The losses in the metrics, with the lines they are drawn in."""

CAPTIONS = {
    "learning_curves": "Learning curves",
    "accuracy_per_step": "Unseen tasks after each inner step",
    "tasks": "Unseen tasks one by one, after the last step",
}


def learning_curves(found: Sequence[Finished]) -> Figure | None:
    """Losses on training tasks and the metric on validation tasks, against tasks seen.

    The query loss is drawn through, the support loss before the first and before the last inner
    step dotted and dashed.
    """
    if not any(run.metrics for run in found):
        return None
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run, colour in _coloured(found):
        for name, (style, _) in LOSSES.items():
            rows = [row for row in run.metrics if row.get(name) is not None]
            points = [r["tasks"] for r in rows], [r[name] for r in rows]
            left.plot(*points, color=colour, lw=1, ls=style)
        rows = [row for row in run.metrics if row.get("validation") is not None]
        points = [r["tasks"] for r in rows], [r["validation"] for r in rows]
        right.plot(*points, color=colour, marker=".", label=plain(run.name))
    if any((row["loss"] or 0) > 0 for run in found for row in run.metrics):
        left.set_yscale("log")
    for style, label in LOSSES.values():
        left.plot([], [], color="#555555", lw=1, ls=style, label=label)
    left.legend(fontsize=8, frameon=False)
    left.set(xlabel="training tasks seen", ylabel="loss, training tasks")
    scored = plain(metric(found[0]))
    right.set(xlabel="training tasks seen", ylabel=f"{scored}, validation tasks")
    _finish(left, right)
    return figure


def after_each_step(found: Sequence[Finished]) -> Figure | None:
    """The metric after 0, 1, ... inner steps, with its interval."""
    with_result = [(run, colour) for run, colour in _coloured(found) if run.result]
    if not with_result:
        return None
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for run, colour in with_result:
        rows = [
            row for row in (run.result or {})["per_step"] if None not in (row["mean"], row["ci95"])
        ]
        axes.errorbar(
            [row["inner_steps"] for row in rows],
            [row["mean"] for row in rows],
            [row["ci95"] for row in rows],
            color=colour,
            marker="o",
            ms=4,
            capsize=3,
            label=plain(run.name),
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="inner steps", ylabel=plain(metric(found[0])))
    _finish(axes)
    return figure


def per_task_histogram(found: Sequence[Finished]) -> Figure | None:
    """How many unseen tasks ended where."""
    shown = [
        (run, run.per_task[np.isfinite(run.per_task)], colour)
        for run, colour in _coloured(found)
        if run.per_task is not None and np.isfinite(run.per_task).any()
    ]
    if not shown:
        return None
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    every = np.concatenate([values for _, values, _ in shown])
    bins = np.linspace(every.min(), every.max() + 1e-9, 26)
    for run, values, colour in shown:
        axes.hist(values, bins, histtype="step", color=colour, lw=1.5, label=plain(run.name))
    axes.set(xlabel=f"{plain(metric(found[0]))} of a task", ylabel="tasks")
    _finish(axes)
    return figure


def _coloured(found: Sequence[Finished]) -> list[tuple[Finished, str]]:
    return [(run, COLOURS[i % len(COLOURS)]) for i, run in enumerate(found)]


def _finish(*all_axes: Any) -> None:
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    if all_axes[-1].get_legend_handles_labels()[1]:
        all_axes[-1].legend(fontsize=8, frameon=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join(["<table>", line("th", head), *(line("td", row) for row in rows), "</table>"])


def _text(plain: str) -> str:
    return html.escape(str(plain))
