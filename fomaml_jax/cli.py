"""The command line: which command is meant; a refusal is one line and exit code 2."""

import importlib.metadata
import io
import sys
from collections.abc import Sequence

try:
    from fomaml_jax.commands import adapt, endings, evaluate, predict, report, train
    from fomaml_jax.devices import use_every_core
except ModuleNotFoundError as missing:
    sys.exit(f'fomaml-jax needs {missing.name}: pip install "fomaml-jax[cli]"')
except KeyboardInterrupt:  # imports take some seconds
    print("fomaml-jax: interrupted", file=sys.stderr)
    sys.exit(130)

USAGE = """usage: fomaml-jax train [glyphs|omniglot|sinusoid|folder|table] [options]
       fomaml-jax train --resume RUN
       fomaml-jax train ... --distributed [--coordinator HOST:PORT --processes N --process I]
       fomaml-jax evaluate RUN [--against OTHER | --shift [--out FOLDER]] [options]
       fomaml-jax report RUN [RUN ...] [--out FOLDER]
       fomaml-jax adapt RUN --support FOLDER [--query FOLDER] [--save FILE] [options]
       fomaml-jax predict FILE --query FOLDER [options]
       fomaml-jax predict RUN --file FILE [--out FILE]

Learns an initialisation from many small tasks, and adapts it to new ones from a few examples.

  train      meta-trains on a data set (glyphs, which needs no download, unless named), evaluates
             on tasks never seen, and writes a folder of parameters, metrics, pictures and result;
             with --resume it goes on with a run that was stopped or killed, to the same numbers;
             with --distributed this is one of several processes that train together, which find
             each other by SLURM, Open MPI, Kubernetes, TPU or the options after it; where one is
             not heard of for a minute (--lost-after SECONDS) the others end, with 134 or 4
  evaluate   adapts a trained run to unseen tasks again, and compares it with another run;
             pretrained:omniglot is one that comes with the package; with --shift it reports how
             far from its training it is of use, and where adaptation adds nothing, in a folder
  report     draws runs, side by side, into one page that needs no other file, and PNG pictures
  adapt      adapts a trained run, or pretrained:omniglot, to your own classes from one picture of
             each or a few, one folder a class, and recognises them, or none of them, in others;
             pretrained:omniglot knows drawings and symbols on a plain ground, not photographs
  predict    does so again with what adapt --save has kept; or, with the run of a table, fills in
             the target of new groups' rows where it is empty, from the rows where it is known

`fomaml-jax train DATA --help`, `fomaml-jax evaluate --help` and so on list every other option;
`fomaml-jax --version` says which version this is.
Exit codes: 0 done, or terminated with everything saved; 1 a fault of the program (one line says
which, and where its traceback is); 2 refused (one line says why); 3 diverged (the state before that
is saved); 4, or 134 from JAX itself, another process was lost (start all again with --resume); 130
interrupted (everything is saved; with a second Ctrl-C all but the last second or so)."""

COMMANDS = {
    "train": train.main,
    "evaluate": evaluate.main,
    "report": report.main,
    "adapt": adapt.main,
    "predict": predict.main,
}

HELP = ["-h"], ["--help"]


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
    except KeyboardInterrupt:
        endings.stop("interrupted", endings.INTERRUPTED, at_once=arguments is None)
    except BrokenPipeError:  # who was reading has had enough
        endings.let_go_of_the_output()
    except OSError as error:  # such as a full disk behind the standard output
        endings.let_go_of_the_output()
        endings.stop(" ".join(str(error).split()), endings.REFUSED)
    except Exception as error:
        endings.fail(error)


def _command(arguments: Sequence[str] | None) -> None:
    use_every_core()
    command, *words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if [command] in HELP:
        print(USAGE)
    elif command == "train" and words[:1] in HELP:  # about all data sets, and the default one
        print(f"{USAGE}\n\nWithout DATA:\n")
        train.main(["glyphs", "--help"])
    elif command == "--version":
        print(importlib.metadata.version("fomaml_jax"))
    elif command in COMMANDS:
        COMMANDS[command](words)
    else:
        *names, last = COMMANDS
        known = f"{', '.join(names)} and {last}"
        endings.stop(f"unknown command {command!r}; there are {known}", endings.REFUSED)
