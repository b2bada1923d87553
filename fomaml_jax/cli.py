"""The command line: reads options, runs, prints; a refusal is one line and exit code 2."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

try:
    import jax
    import tyro
    from tyro.conf import Positional

    from fomaml_jax import (
        classifiers,
        experiment,
        options,
        problems,
        processes,
        recipes,
        refusals,
        reports,
        runs,
    )
    from fomaml_jax.batch_statistics import ONE_AT_A_TIME, TRANSDUCTIVE
    from fomaml_jax.checkpoints import CheckpointError
    from fomaml_jax.devices import every_device, use_every_core
    from fomaml_jax.training import DivergedError
except ModuleNotFoundError as missing:
    sys.exit(f'fomaml-jax needs {missing.name}: pip install "fomaml-jax[cli]"')

FAILED, REFUSED, DIVERGED, LOST, INTERRUPTED = 1, 2, 3, 4, 130

STATISTICS = {
    TRANSDUCTIVE: "query batches normalised together (transductive)",
    ONE_AT_A_TIME: "each query normalised beside the support set alone",
}

OF_TASKS = "ways", "shots", "queries"

T = TypeVar("T")

USAGE = """usage: fomaml-jax train [glyphs|omniglot|sinusoid|folder] [options]
       fomaml-jax train --resume RUN
       fomaml-jax train ... --distributed [--coordinator HOST:PORT --processes N --process I]
       fomaml-jax evaluate RUN [--against OTHER] [options]
       fomaml-jax report RUN [RUN ...] [--out FOLDER]

Learns an initialisation from many small tasks, and adapts it to new ones from a few examples.

  train      meta-trains on a data set (glyphs, which needs no download, unless named), evaluates
             on tasks never seen, and writes a folder of parameters, metrics, pictures and result;
             with --resume it goes on with a run that was stopped or killed, to the same numbers;
             with --distributed this is one of several processes that train together, which find
             each other by SLURM, Open MPI, Kubernetes, TPU or the options after it; where one is
             not heard of for a minute (--lost-after SECONDS) the others end, with 134 or 4
  evaluate   adapts a trained run to unseen tasks again, and compares it with another run;
             pretrained:omniglot is one that comes with the package
  report     draws runs, side by side, into one page that needs no other file, and PNG pictures

`fomaml-jax train DATA --help` and `fomaml-jax evaluate --help` list every option.
Exit codes: 0 done, or terminated with everything saved; 1 a fault of the program (one line says
which, and where its traceback is); 2 refused (one line says why); 3 diverged (the state before that
is saved); 4, or 134 from JAX itself, another process was lost (start all again with --resume); 130
interrupted (everything is saved)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Adapts a trained run to unseen tasks."""

    run: Positional[Path]
    """The folder that training wrote, or pretrained:omniglot."""
    against: Path | None = None
    """Another run, to be compared with on the same tasks, task by task."""
    ways: int | None = None
    """Classes of a task; as in the run unless given."""
    shots: int | None = None
    """Examples to adapt on (a class); as in the run unless given."""
    queries: int | None = None
    """Examples to be judged on (a class); as in the run unless given."""
    eval_tasks: int | None = None
    """Unseen tasks; as many as in the run unless given."""
    eval_steps: int | None = None
    """Steps of adaptation, reported one by one; the run's unless given."""
    seed: int | None = None
    """Seed of the tasks; the run's, and so its very tasks, unless given."""
    path: Path | None = None
    """Where the data are now; where they were unless given."""
    duplicates: Literal["refuse", "keep"] | None = None
    """The same file in two splits; as in the run unless given."""
    offline: bool = False
    """Never download."""
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs, so that the next evaluation starts sooner."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Draws runs side by side, finished or not."""

    runs: Positional[tuple[Path, ...]]
    """Folders that training wrote."""
    out: Path = Path("report")
    """Folder for report.html and the pictures in it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `fomaml-jax`.

    Args:
        arguments: the words after the program's name; `sys.argv` unless given.

    Raises:
        SystemExit: with the exit codes that `fomaml-jax --help` lists.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where a terminal has no "±"
    try:
        _command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # who was reading has had enough
        _let_go_of_the_output()
    except OSError as error:  # such as a full disk behind the standard output
        _let_go_of_the_output()
        _stop(" ".join(str(error).split()), REFUSED)
    except Exception as error:
        _fail(error)


def _let_go_of_the_output() -> None:
    """What it still holds would fail again at the end, and change the exit code."""
    if sys.stdout is sys.__stdout__:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: Exception) -> NoReturn:
    """One line for the person, the traceback in a file for who mends it."""
    said = (str(error).strip() or "no message").splitlines()[0]
    if "RESOURCE_EXHAUSTED" in said:
        _stop(f"this does not fit in memory; ask for less at once ({said})", REFUSED)
    if processes.are_several() and isinstance(error, jax.errors.JaxRuntimeError):
        _stop(f"another process of this run was lost; start all again with --resume ({said})", LOST)
    with tempfile.NamedTemporaryFile(
        "w", prefix="fomaml-jax-", suffix=".txt", delete=False
    ) as file:
        traceback.print_exception(error, file=file)
    _stop(f"{type(error).__name__}: {said}; the traceback is in {file.name}", FAILED)


def _command(arguments: Sequence[str] | None) -> None:
    use_every_core()
    command, *words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
    elif command == "train":
        _train(words)
    elif command == "evaluate":
        _evaluate(words)
    elif command == "report":
        _report(words)
    else:
        _stop(f"unknown command {command!r}; there are train, evaluate and report", REFUSED)


def _keep_compiled_programs(folder: Path | None) -> None:
    """Turns on JAX's persistent compilation cache, for all that takes noticeable time."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _train(words: list[str]) -> None:
    # Options without a name are the default data set's; a lone --help is about all of them.
    if words[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    words, join = _without_processes(words)
    words, resumed = _taken(words, "--resume", "the folder of a run")
    resumed = None if resumed is None else Path(resumed)
    name, rest = (words[0], words[1:]) if words and words[0][:1] != "-" else (None, words)
    if name is not None and name not in options.DATA_SETS:
        _stop(f"unknown data set {name!r}; there are {', '.join(options.DATA_SETS)}", REFUSED)
    if resumed is None:
        chosen, folder = _new_run(name or "glyphs", rest)
    else:
        chosen, folder = _run_to_resume(name, rest, resumed), resumed
    if resumed is not None and (result := runs.finished(resumed)) is not None:
        with _refusing():
            shown = _read_table(resumed, result)
        print(shown)
        print(f"\nThe run in {resumed} was finished before.")
        return
    with _refusing():
        options.check(chosen)
        if resumed is None:  # before any process can have begun
            runs.check_new(folder, overwrite=chosen.overwrite)
        if join is not None:
            _join(join, chosen, resumed)
        _keep_compiled_programs(chosen.compilation_cache)
        with _plain_warnings():
            problem = problems.build(chosen)
    with contextlib.ExitStack() as stack:
        with _refusing(), processes.first_goes_ahead():
            stack.enter_context(runs.alone(folder))
            if resumed is None:
                runs.check_new(folder, overwrite=chosen.overwrite)  # it may have filled meanwhile
                runs.clear(folder)
        _run(chosen, problem, folder, resume=resumed is not None)


def _run(chosen: options.Options, problem: problems.Problem, folder: Path, *, resume: bool) -> None:
    """Trains in a folder that is held alone, and says what came of it."""
    going = f"resumed in {folder}" if resume else f"into {folder}"
    if processes.is_first():
        print(f"{options.name_of(chosen)}, {chosen.setting}, {going}", file=sys.stderr)
    resume_with = f"fomaml-jax train --resume {folder}"
    try:
        with _terminable(), _plain_warnings():
            result = experiment.train(chosen, problem, folder, say=_say, resume=resume)
    except experiment.StoppedError as stop:
        code = INTERRUPTED if stop.why == "interrupted" else 0
        message = f"{stop}; all steps are saved in {folder}, go on with: {resume_with}"
        _stop(message, code, in_step=True)
    except DivergedError as error:
        saved = f"{folder} holds the parameters before that"
        _stop(f"{error}; {saved}", DIVERGED, in_step=True)
    except (CheckpointError, processes.RefusedError) as error:
        _stop(" ".join(str(error).split()), REFUSED)
    except OSError as error:
        said = " ".join(str(error.strerror or error).split())
        begun = f"; go on with: {resume_with}" if (folder / runs.CONFIG).exists() else ""
        _stop(f"cannot write to {folder}: {said}{begun}", REFUSED)
    except (KeyboardInterrupt, _Terminated) as stop:  # while judging, all training being saved
        code = INTERRUPTED if isinstance(stop, KeyboardInterrupt) else 0
        _stop(f"interrupted; go on with: {resume_with}", code)
    if processes.is_first():
        print(table(result))
        print(f"\nThe run is in {folder}: result.json, learning_curve.png and more.")


def _new_run(name: str, words: list[str]) -> tuple[options.Options, Path]:
    kind, program = options.DATA_SETS[name], f"fomaml-jax train {name}"
    if kind is options.Omniglot:
        chosen = _with_recipe(program, words)
    else:
        chosen = _parse(kind, program, words)
    return chosen, chosen.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _with_recipe(program: str, words: list[str]) -> options.Omniglot:
    """What is given goes over what the recipe says, which depends on the ways and shots given."""
    _, recipe = _taken(words, "--recipe", "a name")
    known: dict[str, Any] = {"recipe": recipe} if recipe in recipes.NAMED else {}
    chosen = options.Omniglot(**known)
    for _ in range(2):  # the first time for ways and shots
        chosen = _parse(options.Omniglot, program, words, default=recipes.omniglot(chosen))
    return chosen


def _run_to_resume(name: str | None, words: list[str], folder: Path) -> options.Options:
    """The options of a run, which those on the command line may only repeat."""
    with _refusing():
        saved = options.from_json(runs.read_config(folder))
        found = options.name_of(saved)
        if name not in (None, found):
            raise ValueError(f"{folder} is a run of {found}, not of {name}")
    chosen = _parse(type(saved), f"fomaml-jax train {found}", words, default=saved)
    with _refusing():
        options.check_resumed(saved, chosen)
    return chosen


def _taken(words: list[str], option: str, what: str) -> tuple[list[str], str | None]:
    """The words without an option and its value, and the value."""
    for i, word in enumerate(words):
        if word == option:
            if i + 1 == len(words) or words[i + 1].startswith("-"):
                _stop(f"{option} needs {what}", REFUSED)
            return words[:i] + words[i + 2 :], words[i + 1]
        if word.startswith(f"{option}="):
            return words[:i] + words[i + 1 :], word.removeprefix(f"{option}=")
    return words, None


def _without_processes(words: list[str]) -> tuple[list[str], dict[str, Any] | None]:
    """The words without `--distributed` and what goes with it, and how to join the others."""
    words, coordinator = _taken(words, "--coordinator", "the first process's HOST:PORT")
    words, count = _taken(words, "--processes", "their number")
    words, index = _taken(words, "--process", "the number of this one")
    words, lost_after = _taken(words, "--lost-after", "seconds")
    given = {"coordinator": coordinator, "processes": count, "process": index}
    given |= {"lost_after": lost_after}
    if "--distributed" not in words:
        for name, value in given.items():
            if value is not None:
                _stop(f"--{name.replace('_', '-')} goes with --distributed", REFUSED)
        return words, None
    numbers: dict[str, Any] = {}
    for name in ("processes", "process", "lost_after"):
        value = given[name]
        least = 0 if name == "process" else 1
        if value is not None and not (value.isdecimal() and int(value) >= least):
            option = "--" + name.replace("_", "-")
            _stop(f"{option} must be a number of at least {least}, got {value!r}", REFUSED)
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
        _stop(str(error), REFUSED, in_step=True)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Shows a warning as a line, without the place in the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *args, **kwargs: _say(f"fomaml-jax: {message}")
        yield


class _Terminated(BaseException):
    """SIGTERM, outside of training."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM end what is not training by an exception, so that files are left whole."""

    def end(number: int, frame: object) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _evaluate(words: list[str]) -> None:
    asked = _parse(Evaluate, "fomaml-jax evaluate", words)
    with _refusing():
        _keep_compiled_programs(asked.compilation_cache)
        chosen, problem, params = _trained(asked.run, asked)
        against = None if asked.against is None else _trained(asked.against, asked)
        differences = {}
        if against is not None:
            options.check_same_tasks(chosen, against[0])
            differences = experiment.difference(chosen, problem, params, *against)
    try:
        result = experiment.evaluate(chosen, problem, params) | {"baselines": differences}
    except KeyboardInterrupt:
        _stop("interrupted", INTERRUPTED)
    print(table(result))


def _report(words: list[str]) -> None:
    asked = _parse(Report, "fomaml-jax report", words)
    with _refusing():
        if not asked.runs:
            raise ValueError("report needs at least one run")
        page = reports.write(asked.runs, asked.out)
    print(f"The report is in {page}, its pictures beside it.")


def _trained(run: Path, asked: Evaluate) -> tuple[options.Options, problems.Problem, Any]:
    """A run's options, with the changes that were asked for, its problem and its parameters."""
    run = classifiers.folder_of(run)
    chosen = options.from_json(runs.read_config(run))
    changes = {
        name: value
        for name in (*OF_TASKS, "eval_tasks", "eval_steps", "seed", "path", "duplicates")
        if (value := getattr(asked, name)) is not None
    }
    options.check_judged_otherwise(chosen, changes)
    for name in ("path", "duplicates"):
        if name in changes and not hasattr(chosen, name):
            raise ValueError(f"--{name}: {options.name_of(chosen)} has no data to look for")
    if asked.offline and hasattr(chosen, "offline"):
        changes["offline"] = True
    with _plain_warnings():
        problem = problems.build(dataclasses.replace(chosen, **changes))
        if problem.splits is not None:
            runs.check_data(run, experiment.described(problem.splits))
    params = runs.load_parameters(run, problem.params)
    return dataclasses.replace(chosen, **changes), problem, params


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def table(result: dict[str, Any]) -> str:
    """The result as lines for people: each step of adaptation, then the baselines."""
    percent = result["metric"] == "accuracy"
    rows = {_after(row["inner_steps"]): row for row in result["per_step"]}
    rows |= {f"the same, {name}": row for name, row in result["otherwise"].items()}
    rows |= result.get("baselines", {})

    def line(name: str, row: dict[str, float | None]) -> str:
        scale, digits, unit = (100, 2, " %") if percent else (1, 3, "")
        found = (row["mean"], row["ci95"])
        mean, ci95 = (math.nan if x is None else scale * x for x in found)
        return f"  {name:<34}{mean:7.{digits}f}{unit} ± {ci95:.{digits}f}"

    normalised = f", {STATISTICS[result['statistics']]}" if result["statistics"] else ""
    head = f"{result['metric']} on {result['num_tasks']} unseen tasks{normalised}"
    return "\n".join(["", head, "", *(line(*item) for item in rows.items())])


def _read_table(run: Path, result: dict[str, Any]) -> str:
    """The table of a result that was written before, and may have been damaged since."""
    try:
        return table(result)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{run / runs.RESULT} is not what was written") from None


def _after(steps: int) -> str:
    return f"after {steps} step{'s' * (steps > 1)}" if steps else "before adaptation"


def _parse(kind: Callable[..., T], program: str, words: list[str], default: T | None = None) -> T:
    """Reads the options; what the parser has to say against them becomes one line."""
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=program, args=words, **defaults)
    except SystemExit as stop:
        if stop.code:
            _stop(f"{_first_sentence(said.getvalue())} (see {program} --help)", REFUSED)
        raise


def _first_sentence(boxed: str) -> str:
    """The text below the box's title, up to the next rule, whatever the box is drawn with."""

    def is_rule(line: str) -> bool:
        return not line.strip("─-")

    plain = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    lines = [line.strip(" │╰╯") for line in plain.splitlines()[1:]]
    text = itertools.takewhile(lambda x: not is_rule(x), itertools.dropwhile(is_rule, lines))
    return " ".join(" ".join(text).split()) or " ".join(plain.split())


@contextlib.contextmanager
def _refusing():
    """Turns what is wrong with the input into one line."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        _stop(" ".join(str(error).split()), REFUSED)
    except KeyboardInterrupt:
        _stop("interrupted", INTERRUPTED)


def _stop(message: str, code: int, *, in_step: bool = False) -> NoReturn:
    """Ends with a line; `in_step` where all processes of a run end here, and the first says so."""
    if processes.is_first() or not in_step:
        print(f"fomaml-jax: {message}", file=sys.stderr, flush=True)
    if processes.are_several() and not in_step:
        os._exit(code)  # an orderly end would wait for the others, who wait for this one
    raise SystemExit(code)
