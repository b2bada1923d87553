"""The benchmark scripts in their short form, and the page that is written from their results."""

import dataclasses
import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from fomaml_jax import options, runs
from fomaml_jax.training import Trained

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

SHORT = {
    "meta_step": ["--settings", "5w1s", "--tasks", "2", "--repeats", "1"],
    "time_shares": ["--settings", "5w1s", "--repeats", "1"],
    "peers": ["--settings", "5w1s", "sinusoid", "--tasks", "2", "--repeats", "1"],
    "frameworks": ["--settings", "5w1s", "--tasks", "2", "--repeats", "1"],
    "memory": ["--steps", "1", "--tasks", "16"],  # one setting, that of both series
    "scaling": ["--problems", "conv4", "--repeats", "1", "--most-tasks", "8"],
    "kills": ["--data", "glyphs", "--kills", "3", "--steps", "120", "--width", "4"],
    "arrivals": ["--arrivals", "40", "--parts", "2", "--capacity", "10"],
    "algorithm_costs": [
        *("--settings", "5w1s", "--tasks", "2", "--repeats", "1"),
        *("--algorithms", "Reptile", "MAML, second order"),
    ],
    "defaults": ["--commands", "train sinusoid", "--options=--steps 3 --eval-tasks 4"],
    "algorithms": [
        *("--data", "glyphs", "--steps", "5", "--ways", "3", "--eval-tasks", "2", "--width", "4"),
        *("--algorithms", "FOMAML", "LSLR, multi-step loss", "ProtoMAML"),
    ],
    "accuracy": [
        *("--seeds", "0", "--settings", "5w1s", "--steps", "4", "--width", "4"),
        *("--eval-tasks", "4", "--alone-tasks", "2", "--validation-tasks", "3"),
    ],
    "ablations": [
        *("--changes", "multi-step loss", "--seeds", "0", "--tasks", "8", "--width", "4"),
        *("--eval-tasks", "4"),
    ],
    "protocols": [
        *("--splits", "vinyals", "--settings", "20w1s", "--eval-tasks", "2", "--alone-tasks", "2"),
    ],
    "sinusoid": [
        *("--steps", "3", "--seeds", "2", "--eval-tasks", "4"),
        *("--algorithms", "FOMAML, learned rates", "joint pre-training"),
    ],
    "shift": ["--shifts", "class imbalance", "--eval-tasks", "2"],
    "rare_objects": ["--shots", "2", "--tasks", "2", "--characters", "10", "--parts", "tasks"],
    "time_to_accuracy": ["--data", "glyphs", "--steps", "4", "--width", "4", "--eval-tasks", "2"],
}


def run(name, *words):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *words]
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_short_form(name, tmp_path, request):
    out = tmp_path / "result.json"
    words = [*SHORT[name], "--out", str(out)]
    if name in ("accuracy", "ablations", "protocols", "shift", "rare_objects"):
        request.getfixturevalue("omniglot_folder")
    if name == "accuracy":
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


def test_accuracies_over_seeds(monkeypatch):
    """Against the spread of the mean of two seeds in draws of them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import accuracy

    rng = np.random.default_rng(0)
    draws = [rng.normal(0.9, 0.1, (2000, 50)), rng.normal(0.8, 0.3, (2000, 200))]
    found = [
        {"mean": x[0].mean(), "variance": x.var(1, ddof=1).mean(), "tasks": x.shape[1]}
        for x in draws
    ]
    summary = accuracy.over_seeds(found)
    means = np.mean([x.mean(1) for x in draws], axis=0)
    assert summary["ci95"] == pytest.approx(1.96 * means.std(), rel=0.1)
    assert summary["mean"] == pytest.approx(means[0])
    assert (summary["least"], summary["most"]) == (draws[1][0].mean(), draws[0][0].mean())


def test_accuracies_of_other_options_are_not_mixed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import accuracy
    import common

    def row(seed, **config):
        return {
            "recipe": "best",
            "setting": "5w1s",
            "seed": seed,
            "config": {"seed": seed} | config,
        }

    with pytest.raises(ValueError, match="seeds of other options"):
        accuracy.summarised([row(0, steps=3), row(1, steps=4)])
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": [row(0, steps=3), row(1, steps=3)]}))
    written = common.others(path, row(1, steps=4), accuracy._which)
    assert written == [row(0, steps=3)]
    chosen = options.Omniglot(recipe="best", ways=20, steps=7)
    run = tmp_path / "best-0"
    run.mkdir()
    runs.write_json(run / runs.CONFIG, options.to_json(chosen))
    monkeypatch.setattr(accuracy.problems, "build", lambda chosen: None)
    with pytest.raises(SystemExit, match="is of another recipe"):
        accuracy.trained(dataclasses.replace(chosen, steps=8), tmp_path)


def test_ablations_are_compared_seed_by_seed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablations

    def row(about, change, seed, mean, tasks=100, width=16):
        found = {"mean": mean, "variance": 0.04, "tasks": 400, "inner_steps": 1 + seed}
        which = {"about": about, "change": change, "seed": seed, "tasks": tasks}
        return which | {"found": found, "config": {"width": width}}

    whole = [row("", "none", 0, 0.80), row("", "none", 1, 0.84)]
    other = [row("schedule", "constant", 1, 0.83), row("schedule", "constant", 0, 0.77)]
    one = row("outer rate", "0.001, a tenth", 1, 0.74)
    _, schedule, rate = ablations.summarised([one, *other, *whole])
    assert schedule["difference"] == pytest.approx(-0.02)
    assert schedule["differences"] == pytest.approx([-0.01, -0.03])
    assert schedule["ci95"] == pytest.approx(1.96 * (4 * 0.04 / 400 / 4) ** 0.5)
    assert schedule["inner_steps"] == [1, 2]
    assert rate["difference"] == pytest.approx(-0.10)  # to the first row of its own seed
    with pytest.raises(ValueError, match="rows of other --tasks"):
        ablations.summarised([*whole, row("schedule", "constant", 0, 0.8, tasks=200)])
    with pytest.raises(ValueError, match="rows of other --width"):
        ablations.summarised([whole[0], row("", "none", 1, 0.8, width=8)])


def test_what_was_told_to_stop_is_no_result(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import accuracy

    none = None, None, None, []
    accuracy.check_ended(Trained(*none, "finished", 1.0))
    with pytest.raises(SystemExit, match="training was terminated: there is nothing to judge"):
        accuracy.check_ended(Trained(*none, "terminated", 1.0))


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
        (report.PROJECT, ["algorithms", "accuracy"]),
        (report.EXAMPLES, ["shift", "rare_objects"]),
        (report.MODEL, ["accuracy"]),
    ):
        page = path.read_text()
        assert all(f"<!-- {name} -->\n\n|" in page for name in marked)
        assert page == report.with_tables(path)
