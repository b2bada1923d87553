"""`--help` of the commands lists what there is, with its default."""

import dataclasses
import os
import re
import subprocess
import sys
from importlib import metadata
from unittest.mock import Mock

import pytest
from command_line import call

from fomaml_jax import cli, options


@pytest.mark.parametrize("words", ["", "-h", "--help"])
def test_help_lists_the_commands(words):
    run = call(*words.split())
    assert (run.code, run.out, run.err) == (0, cli.USAGE + "\n", "")


@pytest.mark.parametrize("words", ["train --help", "train -h"])
def test_help_of_training_lists_the_data_sets_and_the_options_of_the_default_one(words):
    run = call(*words.split())
    of_glyphs = call("train", "glyphs", "--help").out
    assert (run.code, run.out) == (0, f"{cli.USAGE}\n\nWithout DATA:\n\n{of_glyphs}")


@pytest.mark.parametrize("name", options.DATA_SETS)
def test_help_of_a_data_set_lists_every_option_with_its_default(name):
    run = call("train", name, "--help")
    assert (run.code, run.err) == (0, "")
    entries = re.split(r" (?=--(?!no-))", " ".join(run.out.split()))
    for field in dataclasses.fields(options.DATA_SETS[name]):
        option = "--" + field.name.replace("_", "-")
        (entry,) = (entry for entry in entries if re.match(rf"{option}[ ,]", entry))
        required = field.default is dataclasses.MISSING
        assert ("(required)" if required else f"(default: {field.default})") in entry


def test_an_interruption_of_the_imports_is_one_line():
    code = """
import sys

class Interrupted:
    def find_spec(self, name, path, target=None):
        if name == "fomaml_jax.commands":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted())
import fomaml_jax.cli
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "fomaml-jax: interrupted\n")


def test_the_version():
    run = call("--version")
    assert (run.code, run.out, run.err) == (0, f"{metadata.version('fomaml_jax')}\n", "")


def test_help_of_evaluate_lists_its_options():
    run = call("evaluate", "--help")
    assert run.code == 0
    for option in ("--eval-tasks", "--eval-steps", "--seed", "--path"):
        assert option in run.out


@pytest.mark.parametrize("words", ["-h", "--help", "run --file a.csv --help"])
def test_help_of_predict_is_of_pictures_and_of_tables(words):
    run = call("predict", *words.split())
    assert (run.code, run.err) == (0, "")
    for option in ("--query", "--unreadable", "--file", "--overwrite"):
        assert option in run.out


def test_an_interruption_ends_without_what_crashes_at_pythons_end(monkeypatch, capsys):
    """XLA does, if it was compiling: the shell saw a segmentation fault."""
    monkeypatch.setattr(sys, "argv", ["fomaml-jax", "train"])
    monkeypatch.setitem(cli.COMMANDS, "train", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(os, "_exit", Mock(side_effect=SystemExit("at once")))
    with pytest.raises(SystemExit, match="at once"):
        cli.main()
    os._exit.assert_called_once_with(130)
    assert capsys.readouterr().err == "fomaml-jax: interrupted\n"
