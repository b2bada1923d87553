"""What is written down runs: the README's example, the examples, and a docstring a public name."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import fomaml_jax as fj

ROOT = Path(__file__).parent.parent


def run(*words, **kwargs):
    return subprocess.run(words, capture_output=True, text=True, timeout=600, **kwargs)


@pytest.mark.slow
def test_the_readmes_python_runs_and_adapts():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 19
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    error, interval = map(float, done.stdout.split(" ± "))
    assert error + interval < 2.0  # 4.2 for the mean of all waves, which knows no task


def test_the_readmes_commands_are_the_packages():
    text = (ROOT / "README.md").read_text()
    assert "pip install '.[cli]' && fomaml-jax train\n" in text
    test = 'python -m pytest -n auto --dist loadfile -m "not slow"'
    assert f"pip install -e '.[test]' && {test}\n" in text


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_the_sinusoid_example():
    example = runpy.run_path(str(ROOT / "examples" / "sinusoid.py"))
    params, losses = example["train"](steps=400)
    assert losses[-40:].mean() < losses[:40].mean()
    errors = [example["error_after"](params, k, num_tasks=100).mean for k in (0, 5)]
    assert errors[1] < errors[0]


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_the_stream_example(tmp_path):
    example = runpy.run_path(str(ROOT / "examples" / "stream.py"))
    start = example["meta_trained"](jax.random.key(7), steps=30)
    ways = {}
    for name in ("online FOMAML", "static meta-learned start"):
        ways[name] = way = example["compared"](start, name, [0], [1], 40, 10)
        assert way["tuning"][str(way["rate"])] == min(way["tuning"].values())
        assert way["cumulative"][0][-1] == pytest.approx(40 * way["mean_loss"][0], abs=0.06)
    first, second = (way["cumulative"][0] for way in ways.values())
    assert first[-1] - first[0] < second[-1] - second[0]
    example["draw"]({"ways": ways, "jumps": [example["jumps_of"](0, 40)]}, tmp_path / "stream.png")
    assert (tmp_path / "stream.png").stat().st_size > 10_000


def test_the_stream_examples_result_has_meta_learning_ahead_on_every_stream():
    result = json.loads((ROOT / "examples" / "results" / "stream.json").read_text())
    online, _, *others = result["ways"].values()
    assert len(others) == 4
    for way in others:
        pairs = zip(online["mean_loss"], way["mean_loss"], strict=True)
        assert all(ours < theirs for ours, theirs in pairs)


@pytest.mark.slow
def test_the_omniglot_example(omniglot_folder):
    done = run(
        sys.executable,
        ROOT / "examples" / "omniglot.py",
        *("--data", omniglot_folder, "--steps", "25", "--tasks", "40"),
    )
    assert done.returncode == 0, done.stderr
    before, *_, after = map(float, re.findall(r"tasks\): ([\d.]+)", done.stdout))
    assert after > before + 10


@pytest.mark.slow
def test_the_best_recipe_in_plain_functions(omniglot_folder):
    done = run(
        sys.executable,
        ROOT / "examples" / "omniglot_best.py",
        *("--data", omniglot_folder, "--steps", "15", "--width", "4", "--tasks", "20"),
    )
    assert done.returncode == 0, done.stderr
    five, *_, twenty = map(float, re.findall(r"tasks: ([\d.]+)", done.stdout))
    assert five > 20 + 10
    assert twenty > 5 + 10


@pytest.mark.slow
def test_two_processes_on_this_machine(tmp_path):
    script = ROOT / "examples" / "distributed" / "local.sh"
    here = Path(sys.executable).parent
    programs = os.environ | {"PATH": f"{here}{os.pathsep}{os.environ['PATH']}"}
    short = ("--steps", "3", "--tasks-per-step", "4", "--eval-tasks", "4", "--eval-steps", "1")
    done = run("bash", script, tmp_path / "run", *short, env=programs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("after 1 step") == 1
    again = run("bash", script, tmp_path / "run", "--resume", env=programs)
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "guide", sorted((ROOT / "examples" / "frameworks").glob("*.py")), ids=lambda guide: guide.stem
)
def test_the_framework_guides(guide):
    assert len(guide.read_text().splitlines()) < 60
    done = run(sys.executable, guide, "60")
    assert done.returncode == 0, done.stderr
    (accuracy,) = map(float, re.findall(r"unseen scripts: ([\d.]+)", done.stdout))
    assert accuracy > 30  # chance is 20


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_population_of_learners():
    example = runpy.run_path(str(ROOT / "examples" / "composition" / "population.py"))
    losses = example["main"](steps=200)
    assert (losses[:, -20:].mean(1) < losses[:, :20].mean(1)).all()


@pytest.mark.slow
def test_your_own_shard_map_and_pmap():
    example = runpy.run_path(str(ROOT / "examples" / "composition" / "devices.py"))
    assert example["main"]() < 1e-5


@pytest.mark.slow
def test_parameters_that_need_not_fit_one_device():
    """In a process with eight devices: four parts of the parameters, and never the whole."""
    done = run(sys.executable, ROOT / "examples" / "composition" / "large_models.py")
    assert done.returncode == 0, done.stderr
    number = r"([\d.]+)"
    line = rf"2 x (\d) devices: each holds {number} MB .* plans {number} MB .* {number} -> {number}"
    (_, *whole), (_, *parts) = (map(float, found) for found in re.findall(line, done.stdout))
    everything = whole[0]  # parameters and Adam's two moments of them
    assert parts[0] + parts[1] < 0.52 * everything
    assert parts[2:] == pytest.approx(whole[2:], rel=1e-3)
    assert parts[3] < 0.9 * parts[2]


@pytest.mark.slow
def test_rare_objects(omniglot_folder, tmp_path):
    """What it keeps serves the command line too, on the folders that it writes."""
    out = tmp_path / "out"
    script = ROOT / "examples" / "rare_objects.py"
    done = run(sys.executable, script, "--data", omniglot_folder, "--out", out)
    assert done.returncode == 0, done.stderr
    (right,) = map(float, re.findall(r"right: ([\d.]+)", done.stdout))
    (known, strangers) = map(float, re.findall(r"([\d.]+) of (?:those|the others)", done.stdout))
    assert right > 0.8
    assert known < 0.5 < strangers
    words = ("--query", out / "query", "--out", out / "predictions")
    again = run(sys.executable, "-m", "fomaml_jax", "predict", out / "adapted.npz", *words)
    assert again.returncode == 0, again.stderr
    (accuracy,) = map(float, re.findall(r"accuracy ([\d.]+) %", again.stdout))
    assert accuracy == pytest.approx(100 * right, abs=0.6)


def test_rare_objects_are_not_mixed_with_those_of_an_earlier_run(tmp_path):
    (tmp_path / "support").mkdir()
    done = run(sys.executable, ROOT / "examples" / "rare_objects.py", "--out", tmp_path)
    assert done.returncode == 2
    assert "is not empty; remove it, or name another folder" in done.stderr


def public_functions():
    names = "tasks", "datasets", "models", "rates", "schedules", "shifts", "uneven"
    for module in (fj, *(getattr(fj, name) for name in names)):
        for name, thing in vars(module).items():
            ours = getattr(thing, "__module__", "").startswith("fomaml_jax")
            if ours and callable(thing) and not name.startswith("_"):
                yield pytest.param(thing, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("thing", list(public_functions()))
def test_every_public_function_has_a_docstring_with_an_example(thing):
    assert thing.__doc__
    if not isinstance(thing, type):
        assert ">>>" in thing.__doc__
