"""The benchmark scripts in their short form, and the page that is written from their results."""

import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

SHORT = {
    "meta_step": ["--settings", "5w1s", "--tasks", "2", "--repeats", "1"],
    "time_shares": ["--settings", "5w1s", "--repeats", "1"],
    "peers": ["--settings", "5w1s", "sinusoid", "--tasks", "2", "--repeats", "1"],
    "frameworks": ["--settings", "5w1s", "--tasks", "2", "--repeats", "1"],
    "memory": ["--steps", "1", "--tasks", "16"],  # one setting, that of both series
    "scaling": ["--problems", "conv4", "--repeats", "1", "--most-tasks", "8"],
    "kills": ["--data", "glyphs", "--kills", "3", "--steps", "120", "--width", "4"],
    "algorithm_costs": [
        *("--settings", "5w1s", "--tasks", "2", "--repeats", "1"),
        *("--algorithms", "Reptile", "MAML, second order"),
    ],
    "algorithms": [
        *("--data", "glyphs", "--steps", "5", "--ways", "3", "--eval-tasks", "2", "--width", "4"),
        *("--algorithms", "FOMAML", "LSLR, multi-step loss", "ProtoMAML"),
    ],
    "accuracy": [
        *("--seeds", "0", "--settings", "5w1s", "--steps", "4", "--width", "4"),
        *("--eval-tasks", "4", "--alone-tasks", "2", "--validation-tasks", "3"),
    ],
    "time_to_accuracy": ["--data", "glyphs", "--steps", "4", "--width", "4", "--eval-tasks", "2"],
}


def run(name, *words):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *words]
    quick = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=quick)


@pytest.mark.parametrize("name", SHORT)
def test_short_form(name, tmp_path, request):
    out = tmp_path / "result.json"
    words = [*SHORT[name], "--out", str(out)]
    if name == "accuracy":
        request.getfixturevalue("omniglot_folder")
        words += ["--runs", str(tmp_path / "runs")]
    done = run(name, *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["rows"]
    assert {"device", "versions", "commit", "date"} <= set(result["environment"])
    if name == "kills":
        assert len(result["rows"][0]["kills"]) == 3
    parts = groupby(done.stdout.splitlines(), key=lambda line: line.startswith("|"))
    tables = [list(lines) for of_a_table, lines in parts if of_a_table]
    assert tables
    for table in tables:
        assert len({line.count("|") for line in table}) == 1


def test_help():
    """Of every script, in one process: most of the time goes into imports."""
    program = (
        "import runpy, sys\n"
        "for path in sys.argv[1:]:\n"
        "    sys.argv = [path, '--help']\n"
        "    try:\n"
        "        runpy.run_path(path, run_name='__main__')\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code, path\n"
        "    else:\n"
        "        raise AssertionError(path)\n"
    )
    scripts = [str(BENCHMARKS / f"{name}.py") for name in [*SHORT, "report"]]
    command = [sys.executable, "-c", program, *scripts]
    quiet = os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(scripts)


def test_the_pages_are_what_the_results_say(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import report

    assert report.README.read_text() == report.render()
    for path, marked in (
        (report.PROJECT, ("algorithms", "accuracy")),
        (report.MODEL, ["accuracy"]),
    ):
        page = path.read_text()
        assert all(f"<!-- {name} -->\n\n|" in page for name in marked)
        assert page == report.with_tables(path)
