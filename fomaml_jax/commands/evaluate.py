"""`fomaml-jax evaluate`: a trained run on unseen tasks again, alone or against another."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from fomaml_jax import classifiers, experiment, option_checks, options, problems, runs
from fomaml_jax.batch_statistics import Statistics
from fomaml_jax.commands import shift
from fomaml_jax.commands.endings import plain_warnings, refusing
from fomaml_jax.commands.tables import table
from fomaml_jax.commands.words import parse, saying_what_moved
from fomaml_jax.devices import keep_compiled_programs

OF_TASKS = "ways", "shots", "queries", "statistics"
OF_DATA = "path", "file", "duplicates"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Adapts a trained run to unseen tasks."""

    run: Positional[Path]
    """The folder that training wrote, or pretrained:omniglot."""
    against: Path | None = None
    """Another run, to be compared with on the same tasks, task by task."""
    shift: bool = False
    """Report how accuracy falls as tasks move away from training, with the accuracy of class means
    that do not adapt beside it."""
    out: Path | None = None
    """Folder for shift.json and shift.png of --shift; shift unless given."""
    ways: int | None = None
    """Classes of a task; as in the run unless given."""
    shots: int | None = None
    """Examples to adapt on (a class); as in the run unless given."""
    queries: int | None = None
    """Examples to be judged on (a class); as in the run unless given."""
    statistics: Statistics | None = None
    """What a query picture is normalised with; as in the run unless given."""
    eval_tasks: int | None = None
    """Unseen tasks; as many as in the run unless given, with --shift 200 a condition."""
    eval_steps: int | None = None
    """Steps of adaptation, reported one by one; the run's unless given."""
    seed: int | None = None
    """Seed of the tasks; the run's, and so its very tasks, unless given."""
    path: Path | None = None
    """Where the data are now; where they were unless given."""
    file: Path | None = None
    """Where the table is now; where it was unless given."""
    duplicates: Literal["refuse", "keep"] | None = None
    """The same file in two splits or twice in a class; as in the run unless given."""
    offline: bool = False
    """Never download."""
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs, so that the next evaluation starts sooner."""


def main(words: list[str]) -> None:
    """Evaluates, as the words after `evaluate` say."""
    asked = parse(Evaluate, "fomaml-jax evaluate", words)
    with refusing():
        _check(asked)
        keep_compiled_programs(asked.compilation_cache)
        chosen, problem, params = _trained(asked.run, asked)
    if asked.shift:
        num_tasks = asked.eval_tasks or shift.TASKS
        out = asked.out or Path("shift")
        shift.report(asked.run, chosen, problem, params, out=out, num_tasks=num_tasks)
        return
    with refusing():
        against = None if asked.against is None else _trained(asked.against, asked)
        differences = {}
        if against is not None:
            option_checks.check_same_tasks(chosen, against[0])
            differences = experiment.difference(chosen, problem, params, *against)
    result = experiment.evaluate(chosen, problem, params) | {"against": differences}
    print(table(result))


def _check(asked: Evaluate) -> None:
    """Refuses options that do not go together."""
    if asked.out is not None and not asked.shift:
        raise ValueError("--out is the folder of --shift: give both, or neither")
    if asked.against is not None and asked.shift:
        raise ValueError("--against and --shift are two reports: give one of them")


def _trained(run: Path, asked: Evaluate) -> tuple[options.Options, problems.Problem, Any]:
    """A run's options, with the changes that were asked for, its problem and its parameters."""
    run = classifiers.folder_of(run)
    chosen = options.from_json(runs.read_config(run))
    changes = {
        name: value
        for name in (*OF_TASKS, "eval_tasks", "eval_steps", "seed", *OF_DATA)
        if (value := getattr(asked, name)) is not None
    }
    option_checks.check_judged_otherwise(chosen, changes)
    for name in OF_DATA:
        if name in changes and not hasattr(chosen, name):
            others = [f"--{other}" for other in OF_DATA if hasattr(chosen, other)]
            known = f", which have {' and '.join(others)}" * bool(others)
            raise ValueError(f"--{name} is no option of runs of {options.name_of(chosen)}{known}")
    if asked.offline and hasattr(chosen, "offline"):
        changes["offline"] = True
    with plain_warnings():
        with saying_what_moved(chosen):
            problem = problems.build(dataclasses.replace(chosen, **changes), trains=False)
        if problem.splits is not None:
            runs.check_data(run, experiment.described(problem))
        runs.warn_if_begun(run)
    params = runs.load_parameters(run, problem.params)
    return dataclasses.replace(chosen, **changes), problem, params
