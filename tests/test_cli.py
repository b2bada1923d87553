"""The command line from end to end: what a run leaves, and what is done with it.

In this process a small network learns small pictures, so that a run takes seconds. One run in a
process of its own is what a user types: the real network, on glyphs drawn afresh.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from command_line import (
    FILES,
    SMALL_FOLDER,
    SMALL_GLYPHS,
    TINY,
    call,
    everything,
    has_moved,
    is_picture,
    paint_classes,
    rows_of,
    trained,
)
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from fomaml_jax import experiment, option_checks, options, problems, runs

pytestmark = pytest.mark.usefixtures("small_world")

RESULT_KEYS = {
    *("dataset", "ways", "shots", "metric", "mean", "ci95", "num_tasks", "transductive"),
    *("statistics", "otherwise"),
    *("inner_steps", "before_adaptation", "baselines", "tasks_seen", "seconds", "config"),
    *("versions", "per_step", "stopped"),
}


# What a run leaves.


def test_a_run_fills_its_folder(glyphs, sinusoid):
    for run, picture in ((glyphs, "episodes.png"), (sinusoid, "adaptation.png")):
        of_data = {"data.json"} if run is glyphs else set()
        assert {path.name for path in run.folder.iterdir()} == FILES | of_data | {picture}
        assert is_picture(run.folder / picture)
        assert is_picture(run.folder / "learning_curve.png")


def test_without_names_the_run_is_of_glyphs_and_goes_to_a_folder_of_this_moment(glyphs):
    assert re.fullmatch(r"glyphs-\d{8}-\d{6}", glyphs.folder.name)
    assert glyphs.err.startswith(f"glyphs, 3-way 1-shot, into runs/{glyphs.folder.name}\n")
    assert glyphs.out.endswith(
        f"The run is in runs/{glyphs.folder.name}: result.json, learning_curve.png and more.\n"
    )


def test_the_result_of_pictures(glyphs):
    result = glyphs.result
    assert result.keys() == RESULT_KEYS
    expected = {
        "dataset": "glyphs",
        "ways": 3,
        "shots": 1,
        "metric": "accuracy",
        "num_tasks": 4,
        "transductive": True,
        "statistics": "transductive",
        "inner_steps": 1,
        "before_adaptation": pytest.approx(1 / 3),
        "tasks_seen": 6,
        "config": json.loads((glyphs.folder / "config.json").read_text()),
    }
    assert {name: result[name] for name in expected} == expected
    assert result["config"]["steps"] == 3
    assert result["versions"]["jax"] == jax.__version__
    assert 0 < result["mean"] <= 1
    assert set(result["otherwise"]) == {"one-at-a-time"}
    assert set(result["baselines"]) == {
        "nearest class mean on pixels",
        "joint pre-training, fine-tuned",
    }


@pytest.mark.slow
def test_queries_one_at_a_time(glyphs, tmp_path):
    words = ("--statistics", "one-at-a-time", "--no-compare")
    run = trained(tmp_path / "run", "glyphs", *SMALL_GLYPHS, *words)
    assert run.result["statistics"] == "one-at-a-time"
    assert run.result["transductive"] is False
    assert set(run.result["otherwise"]) == {"transductive"}
    assert run.out.splitlines()[1] == (
        "accuracy on 4 unseen tasks, each query normalised beside the support set alone"
    )
    assert is_picture(run.folder / "episodes.png")
    assert run.metrics[-1]["loss"] != glyphs.metrics[-1]["loss"]  # training is different too


@pytest.mark.slow
def test_what_is_reported_beside_is_what_the_other_choice_reports(glyphs):
    chosen = options.from_json(glyphs.result["config"])
    found = {}
    for statistics in ("transductive", "one-at-a-time"):
        asked = dataclasses.replace(chosen, statistics=statistics, eval_tasks=50)
        problem = problems.build(asked)
        params = runs.load_parameters(glyphs.folder, problem.params)
        found[statistics] = experiment.evaluate(asked, problem, params)
    together, separate = found["transductive"], found["one-at-a-time"]
    assert together["otherwise"]["one-at-a-time"]["mean"] == separate["mean"]
    assert separate["otherwise"]["transductive"]["mean"] == together["mean"]
    assert together["mean"] != separate["mean"]


def test_the_result_of_sine_waves(sinusoid):
    result = sinusoid.result
    assert result.keys() == RESULT_KEYS
    expected = {"dataset": "sinusoid", "ways": None, "shots": 5, "transductive": None}
    expected |= {"statistics": None, "otherwise": {}}
    expected |= {"metric": "mean squared error", "inner_steps": 2, "baselines": {}}
    assert {name: result[name] for name in expected} == expected
    assert [row["inner_steps"] for row in result["per_step"]] == [0, 1, 2]
    assert result["before_adaptation"] == result["per_step"][0]["mean"]
    assert result["mean"] == result["per_step"][-1]["mean"]
    assert result["ci95"] == result["per_step"][-1]["ci95"]


def test_the_result_is_of_the_saved_parameters_on_unseen_tasks(glyphs):
    problem = problems.build(options.from_json(glyphs.result["config"]))
    params = runs.load_parameters(glyphs.folder, problem.params)
    judge = problems.judge_of(problem, problem.test, num_steps=1, num_tasks=4)
    judged = judge(params, experiment.Keys.of(0).test)
    np.testing.assert_allclose(
        [(row["mean"], row["ci95"]) for row in glyphs.result["per_step"]],
        np.stack([judged.mean, judged.ci95], 1),
        rtol=1e-5,
    )


def test_the_metrics_follow_the_training(glyphs, sinusoid):
    for run in (glyphs, sinusoid):
        assert [row["step"] for row in run.metrics] == [1, 2, 3]
        assert [row["tasks"] for row in run.metrics] == [2, 4, 6]
        for row in run.metrics:
            losses = {"loss", "support_loss_first", "support_loss_last"}
            assert losses | {"grad_norm", "left_out", "validation"} <= row.keys()
            assert row["loss"] > 0


def test_the_parameters_that_are_saved_are_the_trained_ones(glyphs, sinusoid):
    assert has_moved(glyphs.folder)
    assert has_moved(sinusoid.folder)


def test_the_progress_shows_loss_and_speed(sinusoid):
    line = r"meta-training 100%: 6 of 6 tasks in \d+:\d\d, .* tasks/s, loss \d"
    assert re.search(line, sinusoid.err.splitlines()[-1])


# The table.


def test_the_table_of_pictures_is_the_result_in_percent(glyphs):
    result = glyphs.result
    otherwise = result["otherwise"]["one-at-a-time"]
    rows = [*result["per_step"], otherwise, *result["baselines"].values()]
    names = ["before adaptation", "after 1 step", "the same, one-at-a-time"]
    names += result["baselines"]
    assert rows_of(glyphs.out) == [
        (name, round(100 * row["mean"], 2), round(100 * row["ci95"], 2))
        for name, row in zip(names, rows, strict=True)
    ]
    assert glyphs.out.splitlines()[1] == (
        "accuracy on 4 unseen tasks, query batches normalised together (transductive)"
    )


def test_the_table_of_sine_waves_is_the_result(sinusoid):
    names = ["before adaptation", "after 1 step", "after 2 steps"]
    assert rows_of(sinusoid.out) == [
        (name, round(row["mean"], 3), round(row["ci95"], 3))
        for name, row in zip(names, sinusoid.result["per_step"], strict=True)
    ]
    assert sinusoid.out.splitlines()[1] == "mean squared error on 4 unseen tasks"


# Again.


def test_the_same_seed_gives_the_same_numbers_and_no_compare_only_leaves_out_baselines(
    glyphs, tmp_path
):
    again = trained(tmp_path / "again", "glyphs", *SMALL_GLYPHS, "--no-compare")
    assert again.result["per_step"] == glyphs.result["per_step"]
    assert again.metrics == glyphs.metrics
    assert again.result["baselines"] == {}
    assert rows_of(again.out) == rows_of(glyphs.out)[:3]


@pytest.mark.slow
def test_tune_says_what_it_saw_and_trains_the_same(glyphs, tmp_path):
    run = trained(tmp_path / "run", *SMALL_GLYPHS, "--no-compare", "--tune")
    plan = json.loads((run.folder / "plan.json").read_text())
    chosen = [
        trial
        for trial in plan["trials"]
        if (trial["variant"], trial["tasks_at_once"]) == (plan["variant"], plan["tasks_at_once"])
    ]
    assert len(chosen) == 1
    assert chosen[0]["seconds"] > 0
    assert f"> {plan['variant']}" in run.err
    np.testing.assert_allclose(run.result["mean"], glyphs.result["mean"], rtol=1e-4)


@pytest.mark.slow
def test_bfloat16_is_another_computation_with_much_the_same_result(glyphs, tmp_path):
    run = trained(tmp_path / "run", *SMALL_GLYPHS, "--no-compare", "--compute", "bfloat16")
    half, full = (float(trained.metrics[0]["loss"]) for trained in (run, glyphs))
    assert half != full
    np.testing.assert_allclose(half, full, rtol=0.02)


@pytest.mark.slow
def test_compiled_programs_are_kept_if_asked(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    cache = tmp_path / "compiled"
    try:
        compilation_cache.reset_cache()
        words = (*SMALL_GLYPHS, "--no-compare", "--seed", "5", "--compilation-cache", cache)
        trained(tmp_path / "run", *words)
        assert any(cache.iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def test_evaluate_repeats_the_evaluation_of_the_run(glyphs):
    before = {path: path.stat().st_mtime_ns for path in glyphs.folder.iterdir()}
    again = call("evaluate", glyphs.folder, "--eval-tasks", "4")
    assert again.code == 0
    assert rows_of(again.out) == rows_of(glyphs.out)[:3]
    assert {path: path.stat().st_mtime_ns for path in glyphs.folder.iterdir()} == before


def test_evaluate_takes_other_tasks_and_steps(sinusoid):
    longer = call("evaluate", sinusoid.folder, "--eval-tasks", "6", "--eval-steps", "3")
    assert "on 6 unseen tasks" in longer.out
    assert [name for name, *_ in rows_of(longer.out)][-1] == "after 3 steps"
    other = call("evaluate", sinusoid.folder, "--eval-tasks", "4", "--seed", "8")
    assert rows_of(other.out)[0] != rows_of(sinusoid.out)[0]


@pytest.mark.slow
def test_evaluate_compares_two_runs_task_by_task(sinusoid, tmp_path):
    other = trained(tmp_path, "sinusoid", *TINY, "--eval-steps", "2", "--rate", "0.1")
    found = call("evaluate", sinusoid.folder, "--against", other.folder, "--eval-tasks", "50")
    assert found.code == 0, found.err
    rows = {name: (mean, ci95) for name, mean, ci95 in rows_of(found.out.replace(" -", "  "))}
    alone = call("evaluate", other.folder, "--eval-tasks", "50")
    other = "the other run, after 2 steps"
    assert rows[other] == rows_of(alone.out)[-1][1:]
    here, there = rows["after 2 steps"], rows[other]
    gap, ci95 = rows["this run minus the other"]
    assert "better than this" not in found.out
    assert abs(gap - abs(here[0] - there[0])) < 0.002
    assert ci95 < here[1] + there[1]


def test_runs_on_different_tasks_are_not_compared(sinusoid, glyphs):
    found = call("evaluate", sinusoid.folder, "--against", glyphs.folder)
    assert (found.code, found.out) == (2, "")
    assert found.err == (
        "fomaml-jax: the runs are judged on different tasks, data set is sinusoid and glyphs\n"
    )


@pytest.mark.slow
def test_compare_adds_second_order_maml_and_joint_pretraining_to_sine_waves(tmp_path):
    compared = trained(tmp_path, "sinusoid", *TINY, "--inner-steps", "1", "--compare")
    names = ["second-order MAML", "joint pre-training, fine-tuned"]
    assert list(compared.result["baselines"]) == names
    assert [name for name, *_ in rows_of(compared.out)][-2:] == names
    joint = compared.result["baselines"][names[1]]
    assert joint["inner_rate_factor"] == 1
    for name in ("meta-training", "second-order MAML", "joint pre-training"):
        assert f"{name} 100%" in compared.err


def test_a_run_that_diverges_ends_with_valid_json(tmp_path):
    wild = ["--inner-rate", "1e30", "--inner-clip", "1e30", "--eval-steps", "1"]
    run = trained(tmp_path, "sinusoid", *TINY, *wild)
    assert run.result["mean"] is None
    assert np.isfinite(run.result["before_adaptation"])
    assert [row["left_out"] for row in run.metrics] == [2, 2, 2]
    assert run.metrics[-1]["validation"] is None
    assert "6 tasks left out" in run.err
    assert re.search(r"after 1 step +nan ± nan", run.out)


# One's own pictures.


@pytest.mark.slow
def test_a_folder_of_pictures_is_learned_and_evaluated_where_it_is_moved_to(tmp_path):
    data = paint_classes(tmp_path / "data", 6)
    words = ["--path", data, "--size", "8", "--channels", "1", "--no-compare"]
    run = trained(tmp_path / "run", "folder", *SMALL_FOLDER, *words)
    assert run.result["dataset"] == "folder"
    assert run.result["config"]["path"] == str(data)
    assert run.result["before_adaptation"] == pytest.approx(1 / 2)

    moved = data.rename(tmp_path / "moved")
    lost = call("evaluate", run.folder)
    assert (lost.code, lost.out) == (2, "")
    assert lost.err.startswith(f"fomaml-jax: {data} does not exist, expected one folder a class")
    found = call("evaluate", run.folder, "--path", moved, "--eval-tasks", "4")
    assert rows_of(found.out) == rows_of(run.out)

    among = call("evaluate", run.folder, "--path", moved, "--shift", "--out", moved / "shift")
    assert (among.code, among.out) == (2, "")
    assert among.err.endswith(f"would be among the pictures in {moved}; pass another --out\n")
    assert not (moved / "shift").exists()

    (run.folder / "result.json").unlink()
    Image.new("RGB", (10, 12), "white").save(moved / "class 0" / "1.png")
    before = everything(run.folder)
    refused = call("train", "--resume", run.folder, "--path", moved)
    assert refused.code == 2
    assert everything(run.folder) == before
    assert f"the data are not those that the run in {run.folder} has been trained on" in refused.err


# Faults.


def test_a_fault_is_a_line_and_a_file(tmp_path, monkeypatch, sinusoid):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(experiment, "evaluate", Mock(side_effect=KeyError("zeal")))
    run = call("evaluate", sinusoid.folder)
    assert (run.code, run.out) == (1, "")
    (file,) = tmp_path.iterdir()
    assert run.err == f"fomaml-jax: KeyError: 'zeal'; the traceback is in {file}\n"
    assert "Traceback (most recent call last)" in file.read_text("utf-8")


def test_too_little_memory_is_said(monkeypatch, sinusoid):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    monkeypatch.setattr(experiment, "evaluate", Mock(side_effect=error))
    run = call("evaluate", sinusoid.folder)
    assert run.code == 2
    assert run.err == (
        "fomaml-jax: this does not fit in memory; ask for less at once (RESOURCE_EXHAUSTED: Out "
        "of memory allocating 9 bytes.)\n"
    )


@pytest.mark.parametrize("where", ["/dev/full", "a pipe that nobody reads", "a terminal in ASCII"])
def test_an_output_that_takes_no_words(where, sinusoid):
    words = [sys.executable, "-m", "fomaml_jax", "train", "--resume", str(sinusoid.folder)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    read, write = os.pipe()
    os.close(read)
    with (
        open("/dev/full" if where == "/dev/full" else os.devnull, "w") as file,
        open(write, "w") as pipe,
    ):
        out = pipe if where == "a pipe that nobody reads" else file
        done = subprocess.run(
            words, stdout=out, stderr=subprocess.PIPE, text=True, env=environment, check=False
        )
    code, said = done.returncode, done.stderr
    if where == "/dev/full":
        assert (code, said) == (2, "fomaml-jax: [Errno 28] No space left on device\n")
    else:
        assert (code, said) == (0, "")


def test_a_result_that_was_damaged_is_said(sinusoid, tmp_path):
    for i, damage in enumerate(
        [{"per_step": [1]}, {"otherwise": []}, {"statistics": "x"}, {"per_step": []}]
    ):
        folder = shutil.copytree(sinusoid.folder, tmp_path / str(i))
        result = json.loads((folder / "result.json").read_text()) | damage
        (folder / "result.json").write_text(json.dumps(result))
        run = call("train", "--resume", folder)
        assert run.code == 2
        assert run.err == f"fomaml-jax: {folder}/result.json is not what was written\n"


def test_a_finished_run_whose_result_is_not_finite_is_shown_again(sinusoid, tmp_path):
    folder = shutil.copytree(sinusoid.folder, tmp_path / "run")
    result = sinusoid.result
    result["per_step"][-1] |= {"mean": None, "ci95": None}
    (folder / "result.json").write_text(json.dumps(result))
    again = call("train", "--resume", folder)
    assert again.code == 0
    assert re.search(r"after 2 steps +nan ± nan", again.out)


def test_tensorboard(sinusoid, tmp_path, monkeypatch):
    run = trained(tmp_path / "run", "sinusoid", *TINY, "--eval-steps", "2", "--tensorboard")
    assert run.metrics == sinusoid.metrics
    (events,) = (run.folder / "tensorboard").iterdir()
    content = events.read_bytes()
    for name in ("loss", "grad_norm", "left_out", "validation"):
        assert name.encode() in content
    monkeypatch.setattr(option_checks.importlib.util, "find_spec", lambda name: None)
    missing = call("train", "sinusoid", "--tensorboard", "--out", tmp_path / "other")
    assert missing.code == 2
    assert missing.err.endswith('tensorboardX: pip install "fomaml-jax[tensorboard]"\n')
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_options_of_the_optimizers(sinusoid, glyphs, tmp_path):
    for name, words in {
        "apply": ["--apply-if-finite", "5"],
        "clip": ["--inner-clip", "1e-3"],
    }.items():
        run = trained(tmp_path / name, "glyphs", *SMALL_GLYPHS, "--no-compare", *words)
        same = run.metrics == glyphs.metrics
        assert same == (name == "apply")


def test_the_command_line_runs_where_jax_has_started_with_other_devices(monkeypatch):
    devices = jax.devices()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(len(devices) + 5)))
    assert call("--help").code == 0
    assert jax.devices() == devices


def test_no_inner_step_at_all_is_trained_judged_and_drawn(tmp_path):
    run = trained(
        tmp_path / "none", "sinusoid", *TINY, "--inner-steps", "0", "--eval-steps", "None"
    )
    assert [row["inner_steps"] for row in run.result["per_step"]] == [0]
    assert is_picture(run.folder / "adaptation.png")


def test_places_are_read_and_told_as_a_shell_would(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = call("train", "sinusoid", *TINY, "--out=~/my run")
    assert run.code == 0, run.err
    assert (tmp_path / "my run" / "result.json").is_file()
    (tmp_path / "my run" / "result.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "evaluate", lambda *args: os.kill(os.getpid(), signal.SIGINT))
        again = call("train", "--resume=~/my run")
    assert again.code == 130
    assert again.err.endswith(f"fomaml-jax train --resume '{tmp_path}/my run'\n")


# In a process of its own.


def python_m(*words, home):
    """`python -m fomaml_jax`, run and with its cache in `home`."""
    environment = {"FOMAML_JAX_CACHE": str(home)}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "fomaml_jax", *words],
        env=os.environ | environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_real_network_trains_on_glyphs_drawn_afresh(tmp_path):
    words = "train --steps 2 --tasks-per-step 2 --eval-tasks 4 --queries 1 --width 4 --no-compare"
    done = python_m(*words.split(), "--out", "run", home=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["before_adaptation"] == pytest.approx(1 / 5)
    assert result["num_tasks"] == 4
    assert [name for name, *_ in rows_of(done.stdout)][-2:] == [
        "after 3 steps",
        "the same, one-at-a-time",
    ]
    assert is_picture(tmp_path / "run" / "episodes.png")


def test_a_refusal_of_the_process_is_its_exit_code_and_one_line(tmp_path):
    done = python_m("train", "sinusoid", "--rate", "nan", home=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fomaml-jax: --rate must be a finite number above 0, got nan\n"
    assert not list(tmp_path.iterdir())
