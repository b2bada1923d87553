"""`fomaml-jax evaluate RUN --shift`: how far from its training a run is of use."""

from pathlib import Path
from typing import Any

from fomaml_jax import experiment, options, pictures, problems, robustness, runs, shift_suite
from fomaml_jax import shift_pictures as shown
from fomaml_jax.classifiers import Classifier
from fomaml_jax.commands.endings import plain_warnings, refusing, say
from fomaml_jax.commands.tables import STATISTICS
from fomaml_jax.commands.words import check_folder, check_outside
from fomaml_jax.datasets import Splits
from fomaml_jax.robustness import ADAPTED, FEATURES, PIXELS
from fomaml_jax.wording import caveat, counted

TASKS = 200
"""Tasks of a condition: intervals of about a point, in a few minutes on two cores."""

JSON, PICTURE = "shift.json", "shift.png"


def report(
    run: Path,
    chosen: options.Options,
    problem: problems.Problem,
    params: Any,
    *,
    out: Path,
    num_tasks: int,
) -> None:
    """Measures a run under every shift, prints a table and writes it with a picture of it."""
    with refusing():
        if isinstance(chosen, options.Folder):
            check_outside(out, chosen.path)
        suite = shift_suite.suite(chosen, problem.splits)
        check_folder(out)
        if (out / JSON).exists():
            raise ValueError(f"{out} holds a report; pass --out with another folder")
        out.mkdir(parents=True, exist_ok=True)
    result = measured(run, chosen, problem, params, suite, num_tasks)
    with refusing(), plain_warnings():
        runs.write_json(out / JSON, result)
        pictures.save(shown.draw(result["rows"]), out / PICTURE)
    print(table(result))
    print(f"\nThe report is in {out}: {JSON} and {PICTURE}.")


def measured(
    run: Path,
    chosen: options.Options,
    problem: problems.Problem,
    params: Any,
    suite: shift_suite.Suite,
    num_tasks: int,
) -> dict[str, Any]:
    """The report as plain JSON."""
    assert isinstance(chosen, options.ImageOptions)
    assert isinstance(problem.splits, Splits)
    classifier = Classifier(chosen, params, problem.splits.test.images.shape[2:])
    key = experiment.Keys.of(chosen.seed).test
    measuring = robustness.measure(
        classifier,
        suite.pools,
        suite.conditions,
        key,
        queries=chosen.queries,
        num_tasks=num_tasks,
        say=say,
    )
    rows = list(measuring)
    return {
        "run": str(run),
        "dataset": options.name_of(chosen),
        "statistics": problem.statistics,
        "inner_steps": chosen.adaptation_steps,
        "queries": chosen.queries,
        "num_tasks": num_tasks,
        "seed": chosen.seed,
        "rows": rows,
        "left_out": suite.left_out,
        "conclusions": shown.conclusions(rows),
        "versions": runs.versions(),
    }


def table(result: dict[str, Any]) -> str:
    """The report as lines for people, shift by shift."""
    steps = result["inner_steps"]
    lines = [
        "",
        f"accuracy in percent on {result['num_tasks']} unseen tasks a condition, "
        f"{STATISTICS[result['statistics']]}",
        "",
        f"  {'':<32}{'adapted,':>16}{'class means,':>16}{'class means,':>16}{'adapted -':>16}",
        f"  {'':<32}{counted(steps, 'step'):>16}{'features':>16}{'pixels':>16}{'features':>16}",
    ]
    for shift, rows in shown.by_shift(result["rows"]).items():
        lines += ["", shift, *map(_line, rows)]
    foot = "± is a 95 % interval over tasks" + caveat(result["num_tasks"])
    lines += ["", foot, "", *result["conclusions"]]
    return "\n".join([*lines, *(f"Left out: {line}." for line in result["left_out"])])


def _line(row: Any) -> str:
    found = [row[name] for name in (ADAPTED, FEATURES, PIXELS)]
    cells = [f"{100 * one['mean']:.1f} ± {100 * one['ci95']:.1f}" for one in found]
    ahead = row["ahead"][FEATURES]
    cells.append(f"{100 * ahead['mean']:+.1f} ± {100 * ahead['ci95']:.1f}")
    return f"  {row['label']:<32}" + "".join(f"{cell:>16}" for cell in cells)
