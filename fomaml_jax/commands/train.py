"""`fomaml-jax train`: a run, new or resumed, in one process or several."""

import contextlib
import itertools
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from fomaml_jax import (
    experiment,
    option_checks,
    options,
    problems,
    processes,
    recipes,
    refusals,
    runs,
)
from fomaml_jax.checkpoints import CheckpointError
from fomaml_jax.commands.endings import (
    DIVERGED,
    INTERRUPTED,
    REFUSED,
    TerminatedError,
    plain_warnings,
    refusing,
    say,
    stop,
    terminable,
)
from fomaml_jax.commands.tables import read_table, table
from fomaml_jax.commands.words import check_outside, parse, saying_what_moved, taken
from fomaml_jax.devices import every_device, keep_compiled_programs
from fomaml_jax.training import DivergedError


def main(words: list[str]) -> None:
    """Trains, as the words after `train` say."""
    # Options without a name are the default data set's.
    words, join = _without_processes(words)
    words, resumed = taken(words, "--resume", "the folder of a run")
    resumed = None if resumed is None else Path(resumed).expanduser()
    name, rest = (words[0], words[1:]) if words and words[0][:1] != "-" else (None, words)
    for before, word in itertools.pairwise(rest if name is None else []):
        if word in options.DATA_SETS and before[:1] != "-":
            stop(f"the data set comes first: fomaml-jax train {word} ...", REFUSED)
    if name is not None and name not in options.DATA_SETS:
        stop(f"unknown data set {name!r}; there are {', '.join(options.DATA_SETS)}", REFUSED)
    if resumed is None:
        chosen, folder = _new_run(name or "glyphs", rest)
    else:
        chosen, folder = _run_to_resume(name, rest, resumed), resumed
    if resumed is not None and (result := _finished(resumed, chosen)) is not None:
        with refusing():
            shown = read_table(resumed, result)
        if join is None or join["process"] in (None, 0):
            print(shown)
            print(f"\nThe run in {resumed} was finished before.")
        return
    with refusing():
        option_checks.check(chosen)
        if resumed is None:  # before any process can have begun
            runs.check_new(folder, overwrite=chosen.overwrite)
        if join is not None:
            _join(join, chosen, resumed)
        keep_compiled_programs(chosen.compilation_cache)
        moved = saying_what_moved(chosen) if resumed else contextlib.nullcontext()
        with plain_warnings(), moved:
            problem = problems.build(chosen)
    with contextlib.ExitStack() as stack:
        with refusing(), processes.first_goes_ahead():
            stack.enter_context(runs.alone(folder))
            if resumed is None:
                runs.check_new(folder, overwrite=chosen.overwrite)  # it may have filled meanwhile
                runs.clear(folder)
        _run(options.anywhere(chosen), problem, folder, resume=resumed is not None)


def _run(chosen: options.Options, problem: problems.Problem, folder: Path, *, resume: bool) -> None:
    """Trains in a folder that is held alone, and says what came of it."""
    going = f"resumed in {folder}" if resume else f"into {folder}"
    if processes.is_first():
        print(f"{options.name_of(chosen)}, {chosen.setting}, {going}", file=sys.stderr)
    resume_with = f"fomaml-jax train --resume {shlex.quote(str(folder))}"
    try:
        with terminable(), plain_warnings():
            result = experiment.train(chosen, problem, folder, say=say, resume=resume)
    except experiment.StoppedError as stopped:
        code = INTERRUPTED if stopped.why == "interrupted" else 0
        which = "all steps are saved"
        if stopped.saved < stopped.step:
            which = f"most tasks of the last ones were left out, {stopped.saved} are saved"
        message = f"{stopped}; {which} in {folder}, go on with: {resume_with}"
        stop(message, code, in_step=True)
    except DivergedError as error:
        saved = f"{folder} holds the parameters before that"
        stop(f"{error}; {saved}", DIVERGED, in_step=True)
    except (CheckpointError, processes.RefusedError) as error:
        stop(" ".join(str(error).split()), REFUSED)
    except OSError as error:
        said = " ".join(str(error.strerror or error).split())
        begun = f"; go on with: {resume_with}" if (folder / runs.CONFIG).exists() else ""
        stop(f"cannot write to {folder}: {said}{begun}", REFUSED)
    except (KeyboardInterrupt, TerminatedError) as ended:  # while judging, or twice
        code = INTERRUPTED if isinstance(ended, KeyboardInterrupt) else 0
        stop(f"interrupted; go on with: {resume_with}", code)
    if processes.is_first():
        print(table(result))
        print(f"\nThe run is in {folder}: result.json, learning_curve.png and more.")
        if result["stopped"] == "out of time":
            steps = result["tasks_seen"] // chosen.tasks_per_step
            print(f"Time was up after {steps} of {chosen.steps} steps; for more of them:")
            print(f"{resume_with} --minutes {_more(chosen.minutes or 1, result['seconds']):g}")
        if isinstance(chosen, options.Table):
            print(f"For other groups: fomaml-jax predict {shlex.quote(str(folder))} --file FILE")


def _more(minutes: float, spent: float) -> float:
    """Twice the minutes, and again until that is well beyond the seconds a run has taken in all."""
    return 2 * minutes if 90 * minutes > spent else _more(2 * minutes, spent)


def _new_run(name: str, words: list[str]) -> tuple[options.Options, Path]:
    kind, program = options.DATA_SETS[name], f"fomaml-jax train {name}"
    if kind is options.Omniglot:
        chosen = _with_recipe(program, words)
    else:
        chosen = parse(kind, program, words)
    folder = chosen.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with refusing():
        if isinstance(chosen, options.Folder):
            check_outside(folder, chosen.path)
        kept = chosen.compilation_cache
        if kept is not None and kept.resolve().is_relative_to(folder.resolve()):  # not empty then
            raise ValueError(
                f"{kept} would be inside of {folder}; pass another --compilation-cache"
            )
    return chosen, folder


def _with_recipe(program: str, words: list[str]) -> options.Omniglot:
    """What is given goes over what the recipe says, which depends on the ways and shots given."""
    _, recipe = taken(words, "--recipe", "a name")
    known: dict[str, Any] = {"recipe": recipe} if recipe in recipes.NAMED else {}
    chosen = options.Omniglot(**known)
    for _ in range(2):  # the first time for ways and shots
        chosen = parse(options.Omniglot, program, words, default=recipes.omniglot(chosen))
    return chosen


def _run_to_resume(name: str | None, words: list[str], folder: Path) -> options.Options:
    """The options of a run, which those on the command line may only repeat."""
    with refusing():
        saved = options.from_json(runs.read_config(folder))
        found = options.name_of(saved)
        if name not in (None, found):
            raise ValueError(f"{folder} is a run of {found}, not of {name}")
    chosen = parse(type(saved), f"fomaml-jax train {found}", words, default=saved)
    with refusing():
        option_checks.check_resumed(saved, chosen)
    return chosen


def _finished(folder: Path, chosen: options.Options) -> dict[str, Any] | None:
    """The result of a run of which nothing more is asked than it holds."""
    result = runs.finished(folder)
    lacks_baselines = chosen.compare and not (result or {}).get("baselines")
    return None if lacks_baselines else result


def _without_processes(words: list[str]) -> tuple[list[str], dict[str, Any] | None]:
    """The words without `--distributed` and what goes with it, and how to join the others."""
    words, coordinator = taken(words, "--coordinator", "the first process's HOST:PORT")
    words, count = taken(words, "--processes", "their number")
    words, index = taken(words, "--process", "the number of this one")
    words, lost_after = taken(words, "--lost-after", "seconds")
    given = {"coordinator": coordinator, "processes": count, "process": index}
    given |= {"lost_after": lost_after}
    if "--distributed" not in words:
        for name, value in given.items():
            if value is not None:
                stop(f"{options.flag(name)} goes with --distributed", REFUSED)
        return words, None
    numbers: dict[str, Any] = {}
    for name in ("processes", "process", "lost_after"):
        value = given[name]
        least = 0 if name == "process" else 1
        if value is not None and not (value.isdecimal() and int(value) >= least):
            stop(
                f"{options.flag(name)} must be a number of at least {least}, got {value!r}", REFUSED
            )
        numbers[name] = None if value is None else int(value)
    return [word for word in words if word != "--distributed"], given | numbers


def _join(join: dict[str, Any], chosen: options.Options, resumed: Path | None) -> None:
    """Joins the processes of a run.

    Raises:
        ValueError: for what several cannot do.
    """
    if resumed is None and chosen.out is None:
        raise ValueError("--distributed needs --out, a folder that all processes see")
    if chosen.tune and not (resumed and (resumed / runs.PLAN).is_file()):
        raise ValueError("--tune measures one process; leave it out with --distributed")
    processes.join(**join)
    try:
        processes.check_alike(json.dumps(options.identity(chosen)))
        refusals.check_divides(chosen.tasks_per_step, every_device())
    except ValueError as error:  # in every process: an orderly end, for all of them
        stop(str(error), REFUSED, in_step=True)
