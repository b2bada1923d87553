"""The command line where a run does not go to its end: stopped, resumed, damaged, diverged."""

import functools
import json
import os
import re
import shutil
import signal
from unittest.mock import Mock

import numpy as np
import pytest
from command_line import (
    FILES,
    SMALL_FOLDER,
    TINY,
    call,
    everything,
    has_moved,
    held,
    paint_classes,
    rows_of,
    trained,
)
from PIL import Image

from fomaml_jax import baselines, checkpoints, datasets, experiment, options, problems, runs
from fomaml_jax.commands import train

pytestmark = pytest.mark.usefixtures("small_world")


@pytest.fixture(scope="module")
def out_of_time(small_world, tmp_path_factory):
    """A run that was to take longer."""
    run = trained(tmp_path_factory.mktemp("run"), "sinusoid", *TINY, "--minutes", "0.00001")
    return run.folder


@pytest.fixture
def unfinished(out_of_time, tmp_path):
    """The same, for one test to spoil."""
    return shutil.copytree(out_of_time, tmp_path / "unfinished")


# Interruption.


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def asked_to_stop(monkeypatch, number, step=2):
    """Sends this process a signal when the metrics of a step are written."""
    append = runs.append_metrics

    def once(folder, row):
        append(folder, row)
        if row["step"] == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(runs, "append_metrics", once)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_stopped_run_is_usable_and_resumed_to_the_same_result(
    tmp_path, monkeypatch, sinusoid, number, code
):
    words = ("sinusoid", *TINY, "--eval-steps", "2")
    with monkeypatch.context() as patch:
        asked_to_stop(patch, number)
        run = call("train", *words, "--out", tmp_path)
    assert (run.code, run.out) == (code, "")
    why = "interrupted" if code else "terminated"
    assert run.err.splitlines()[-1] == (
        f"fomaml-jax: {why} after step 2; all steps are saved in {tmp_path}, go on with: "
        f"fomaml-jax train --resume {tmp_path}"
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.json", "parameters.npz", "metrics.jsonl", "checkpoints")
    }
    assert has_moved(tmp_path)
    evaluated = call("evaluate", tmp_path, "--eval-tasks", "4")
    assert evaluated.code == 0
    assert len(rows_of(evaluated.out)) == 3

    resumed = call("train", "--resume", tmp_path)
    assert resumed.code == 0, resumed.err
    assert rows_of(resumed.out) == rows_of(sinusoid.out)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    assert metrics == (sinusoid.folder / "metrics.jsonl").read_bytes()
    again = call("train", "sinusoid", f"--resume={tmp_path}", "--steps", "3")
    assert (again.code, rows_of(again.out)) == (0, rows_of(sinusoid.out))
    assert again.out.endswith(f"The run in {tmp_path} was finished before.\n")


def test_a_network_that_is_handed_on_is_not_trained_over(tmp_path, sinusoid):
    for name in ("config.json", "parameters.npz"):
        shutil.copy(sinusoid.folder / name, tmp_path)
    refused = call("train", "--resume", tmp_path)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.endswith(
        f"fomaml-jax: {tmp_path} holds a trained network and nothing of its training: there is no "
        "run to go on with\n"
    )
    expected = (sinusoid.folder / "parameters.npz").read_bytes()
    assert (tmp_path / "parameters.npz").read_bytes() == expected


@pytest.mark.slow
def test_baselines_take_the_steps_that_were_taken(tmp_path, monkeypatch):
    budgets = []

    def noted(baseline, chosen, *args):
        budgets.append(chosen.steps)
        return baseline(chosen, *args)

    for name in ("joint_pretraining", "second_order"):
        baseline = functools.partial(noted, getattr(baselines, name))
        monkeypatch.setattr(baselines, name, baseline)
    run = trained(tmp_path, "sinusoid", *TINY, "--minutes", "0.00001", "--compare")
    assert run.result["stopped"] == "out of time"
    assert budgets == [run.result["tasks_seen"] // 2] * 2


@pytest.mark.slow
def test_baselines_can_be_asked_for_when_a_run_has_finished(tmp_path, sinusoid):
    shutil.copytree(sinusoid.folder, tmp_path, dirs_exist_ok=True)
    assert not sinusoid.result["baselines"]
    compared = call("train", "--resume", tmp_path, "--compare")
    assert compared.code == 0, compared.err
    mine = rows_of(sinusoid.out)
    assert rows_of(compared.out)[: len(mine)] == mine
    assert json.loads((tmp_path / "result.json").read_text())["baselines"]
    again = call("train", "--resume", tmp_path, "--compare")
    assert rows_of(again.out) == rows_of(compared.out)
    assert again.out.endswith("was finished before.\n")


def test_a_run_that_is_stopped_while_it_is_judged_goes_on_there(tmp_path, monkeypatch, sinusoid):
    def terminate(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "evaluate", terminate)
        run = call("train", "sinusoid", *TINY, "--eval-steps", "2", "--out", tmp_path)
    assert (run.code, run.out) == (0, "")
    assert run.err.endswith(f"interrupted; go on with: fomaml-jax train --resume {tmp_path}\n")
    judged = call("evaluate", tmp_path, "--eval-tasks", "4")
    assert judged.err == (
        f"fomaml-jax: the run in {tmp_path} has not come to its end: its parameters are of step 3 "
        "or later\n"
    )
    resumed = call("train", "--resume", tmp_path)
    assert rows_of(resumed.out) == rows_of(sinusoid.out)


def test_a_damaged_checkpoint_is_said_in_a_line(tmp_path, monkeypatch, sinusoid):
    with monkeypatch.context() as patch:
        asked_to_stop(patch, signal.SIGINT)
        words = ("--eval-steps", "2", "--checkpoint-every", "1", "--out", tmp_path)
        assert call("train", "sinusoid", *TINY, *words).code == 130
    newest = tmp_path / "checkpoints" / "0000000002"
    (newest / "manifest.json").write_text("")
    before = shutil.copytree(tmp_path, tmp_path.with_name("before"))
    resumed = call("train", "--resume", tmp_path)
    assert f"fomaml-jax: the checkpoint {newest} is damaged and was left out" in resumed.err
    assert rows_of(resumed.out) == rows_of(sinusoid.out)
    for path in (before / "checkpoints").rglob("manifest.json"):
        path.write_text("")
    refused = call("train", "--resume", before)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.splitlines()[-1].startswith("fomaml-jax: no checkpoint can be read: ")


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path, sinusoid):
    folder = shutil.copytree(sinusoid.folder, tmp_path / "run")
    (folder / "notes.txt").touch()
    words = ("train", "sinusoid", *TINY, "--eval-steps", "2", "--overwrite", "--out")
    refused = call("train", "sinusoid", *TINY, "--out", folder)
    assert refused.code == 2
    assert f"holds a run; go on with --resume {folder}, replace it with --overw" in refused.err
    assert call(*words, folder).code == 0
    assert {path.name for path in folder.iterdir()} == FILES | {"adaptation.png", "notes.txt"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for config in (None, '{"model": "bert"}'):
        if config:
            (tmp_path / "mine" / "config.json").write_text(config)
        refused = call(*words, tmp_path / "mine")
        assert refused.code == 2
        assert ("names none of the data sets" if config else "is not empty") in refused.err
        assert (tmp_path / "mine" / "thesis.txt").exists()


WILD = ["--inner-rate", "1e30", "--inner-clip", "1e30", "--steps", "100"]


def test_what_is_said_to_be_saved_of_a_run_that_goes_wrong_is_what_is(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        asked_to_stop(patch, signal.SIGTERM)
        run = call("train", "sinusoid", *TINY, *WILD, "--out", tmp_path)
    assert run.code == 0
    assert run.err.splitlines()[-1].startswith(
        "fomaml-jax: terminated after step 2; most tasks of the last ones were left out, 0 are "
        f"saved in {tmp_path}, go on with: "
    )
    assert not (tmp_path / "checkpoints").exists()


def test_divergence_stops_with_advice(tmp_path):
    run = call("train", "sinusoid", *TINY, *WILD, "--out", tmp_path)
    assert (run.code, run.out) == (3, "")
    last = run.err.splitlines()[-1]
    assert last.startswith("fomaml-jax: training has diverged: in each of the 10 steps up to step")
    assert "clip the inner gradients" in last
    assert last.endswith(f"{tmp_path} holds the parameters before that")
    assert not has_moved(tmp_path)
    assert "20 tasks left out" in run.err
    report = tmp_path / "report"
    assert call("report", tmp_path, "--out", report).code == 0
    page = (report / "report.html").read_text()
    assert "<td>diverged</td>" in page
    assert "<td>20</td>" in page
    again = call("train", "--resume", tmp_path)
    assert (again.code, again.err.splitlines()[-1]) == (3, last)


def test_other_rates_are_no_way_to_go_on(tmp_path):
    run = trained(tmp_path, "sinusoid", *TINY, "--minutes", "0.00001")
    config = json.loads((run.folder / "config.json").read_text())
    (run.folder / "config.json").write_text(json.dumps(config | {"inner_rate": 0.3}))
    before = everything(run.folder)
    refused = call("train", "--resume", run.folder, "--minutes", "60")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.splitlines()[-1] == (
        f"fomaml-jax: the run in {run.folder} is another one: config['inner_rate'] was 0.01, "
        "now 0.3"
    )
    assert everything(run.folder) == before


@pytest.mark.slow
def test_evaluating_on_other_pictures_is_said_or_refused(tmp_path):
    data = paint_classes(tmp_path / "data", 6)
    words = ("--path", data, "--size", "8", "--no-compare")
    run = trained(tmp_path / "run", "folder", *SMALL_FOLDER, *words)
    other = shutil.copytree(run.folder, tmp_path / "other")
    assert call("evaluate", run.folder, "--against", other).code == 0
    shutil.copytree(data, tmp_path / "more")
    tested = json.loads((run.folder / "data.json").read_text())["classes"]["test"][0]
    (picture,) = (tmp_path / "more" / tested).glob("0.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(picture)
    changed = call("evaluate", run.folder, "--path", tmp_path / "more")
    assert changed.code == 0
    assert f"the data are not those that the run in {run.folder} had" in changed.err
    words = ("--path", tmp_path / "more", "--size", "8", "--no-compare")
    third = trained(tmp_path / "third", "folder", *SMALL_FOLDER, *words)
    refused = call("evaluate", run.folder, "--against", third.folder)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.endswith("tasks, their data or splits are not the same\n")
    described = json.loads((run.folder / "data.json").read_text())
    seen = described["classes"]["test"].pop()
    described["classes"]["train"].append(seen)  # as where one class more deals others out
    (run.folder / "data.json").write_text(json.dumps(described))
    shutil.rmtree(data)
    refused = call("evaluate", run.folder, "--path", tmp_path / "more")
    assert (refused.code, refused.out) == (2, "")
    assert f"tested on, 1 served to train or to validate it, such as {seen}; restore" in refused.err


def edited_manifest(**changes):
    """Writes into the newest checkpoint's manifest, as another program would have written it."""

    def edit(run):
        path = max((run / "checkpoints").iterdir()) / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["digest"]
        for name, change in changes.items():
            manifest[name] = change(manifest[name])
        digest = checkpoints._digest_of(manifest)
        path.write_text(json.dumps(manifest | {"digest": digest}))

    return edit


def in_half_precision(leaves):
    return [[name, "float16" if "bias" in name else d, shape] for name, d, shape in leaves]


def of_other_rates(run):
    shutil.rmtree(run / "checkpoints")
    other = run.with_name("other")
    trained(other, "sinusoid", *TINY, "--minutes", "0.00001", "--rate", "0.5")
    shutil.copytree(other / "checkpoints", run / "checkpoints")


def all_emptied(run):
    for path in (run / "checkpoints").rglob("manifest.json"):
        path.write_text("")


BIAS = r"\['best'\]\['params'\]\['Dense_0'\]\['bias'\]"
WRONG_CHECKPOINTS = {
    "of other rates": (
        of_other_rates,
        r"the run in RUN is another one: config\['rate'\] was 0.5, now 0.001",
    ),
    "of another dtype": (
        edited_manifest(leaves=in_half_precision),
        rf"CHECKPOINT is of another problem: {BIAS} should be float32\[40\], found float16\[40\]",
    ),
    "of another shape": (
        edited_manifest(leaves=lambda x: [[n, d, [*s, 1] if "bias" in n else s] for n, d, s in x]),
        rf"CHECKPOINT is of another problem: {BIAS} should be float32\[40\], "
        r"found float32\[40, 1\]",
    ),
    "of another version": (
        edited_manifest(format=lambda _: 99),
        r"CHECKPOINT was written by another version of fomaml_jax \(99\)",
    ),
    "of another step": (
        edited_manifest(step=lambda _: 7),
        "no checkpoint can be read: the checkpoint CHECKPOINT is damaged and was left out: "
        "manifest.json is that of step 7",
    ),
    "emptied": (
        all_emptied,
        "no checkpoint can be read: the checkpoint CHECKPOINT is damaged and was left out: "
        "manifest.json cannot be read",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG_CHECKPOINTS.values(), ids=WRONG_CHECKPOINTS)
def test_a_wrong_checkpoint_is_refused(unfinished, spoil, message):
    run = unfinished
    spoil(run)
    before = everything(run)
    refused = call("train", "--resume", run, "--minutes", "60")
    assert (refused.code, refused.out) == (2, "")
    message = message.replace("CHECKPOINT", str(max((run / "checkpoints").iterdir())))
    said = refused.err.splitlines()[-1]
    assert re.fullmatch("fomaml-jax: " + message.replace("RUN", str(run)), said), said
    assert everything(run) == before


@pytest.mark.parametrize(
    ("minutes", "spent", "more"), [(10.0, 601.0, 20.0), (0.05, 562.0, 12.8), (10.0, 3000.0, 80.0)]
)
def test_the_minutes_to_go_on_with_are_beyond_those_taken(minutes, spent, more):
    assert train._more(minutes, spent) == more


@pytest.mark.slow
def test_patience_and_minutes(tmp_path):
    run = trained(tmp_path / "a", "sinusoid", *TINY, "--minutes", "0.00001")
    assert run.result["stopped"] == "out of time"
    steps = run.result["tasks_seen"] // 2
    assert f"Time was up after {steps} of 3 steps; for more of them:" in run.out
    assert f"fomaml-jax train --resume {run.folder} --minutes " in run.out
    assert 0 < run.result["tasks_seen"] < 6
    assert json.loads((tmp_path / "a/config.json").read_text())["minutes"] == 0.00001
    spoiled = shutil.copytree(tmp_path / "a", tmp_path / "spoiled")
    for path in (spoiled / "checkpoints").rglob("manifest.json"):
        path.write_text("")
    before = everything(spoiled)
    assert call("train", "--resume", spoiled, "--minutes", "60").code == 2
    assert everything(spoiled) == before
    longer = call("train", "--resume", tmp_path / "a", "--minutes", "60")
    assert longer.code == 0
    assert json.loads((tmp_path / "a/config.json").read_text())["minutes"] == 60
    assert json.loads((tmp_path / "a/result.json").read_text())["stopped"] == "finished"


@pytest.mark.parametrize(("patience", "saved"), [(None, [1, 2, 3, 4]), (9, [1, 2, 2, 2])])
def test_with_patience_the_best_so_far_is_what_is_there(tmp_path, monkeypatch, patience, saved):
    found = []

    def training_of(chosen, problem, key, *, on_report, **follow):
        for step, error in enumerate((0.3, 0.1, np.nan, 0.2), 1):
            on_report({"step": step, "validation": error}, {"w": np.float32(step)})
            with np.load(tmp_path / runs.PARAMETERS) as file:
                found.append(int(file["['w']"]))

    monkeypatch.setattr(experiment, "training_of", training_of)
    chosen = options.Sinusoid(patience=patience)
    problem = problems.build(chosen)
    experiment.meta_train(chosen, problem, tmp_path, experiment.Keys.of(0), resume=False)
    assert found == saved


def test_resuming_without_another_step_to_take_keeps_the_result(unfinished, monkeypatch):
    before = everything(unfinished)
    monkeypatch.setattr(experiment, "evaluate", Mock(side_effect=KeyboardInterrupt))
    assert call("train", "--resume", unfinished).code == 130
    assert everything(unfinished) == before


def test_a_folder_that_is_in_use_is_left_alone(unfinished):
    with held(unfinished):
        before = everything(unfinished)
        for words in (("sinusoid", "--overwrite", "--out", unfinished), ("--resume", unfinished)):
            refused = call("train", *words)
            assert (refused.code, refused.out) == (2, "")
            assert refused.err == (
                f"fomaml-jax: another process trains in {unfinished}; wait for it, or stop it\n"
            )
            assert everything(unfinished) == before
    again = call("train", "sinusoid", *TINY, "--overwrite", "--out", unfinished)
    assert again.code == 0


@pytest.mark.slow
def test_a_run_from_before_there_was_the_choice_has_kept_duplicates(tmp_path):
    data = paint_classes(tmp_path / "data", 6)
    words = ("--path", data, "--size", "8", "--no-compare", "--duplicates", "keep")
    splits = datasets.image_folder(data, size=8)
    two = (data / splits.train.names[0] / "0.png", data / splits.test.names[0] / "0.png")
    shutil.copy(*two)
    run = trained(tmp_path / "run", "folder", *SMALL_FOLDER, *words)
    config = json.loads((run.folder / "config.json").read_text())
    assert config.pop("duplicates") == "keep"
    (run.folder / "config.json").write_text(json.dumps(config))
    assert call("evaluate", run.folder).code == 0
    refused = call("evaluate", run.folder, "--duplicates", "refuse")
    assert refused.code == 2
    assert "are the same picture in two splits (1 such in all)" in refused.err


@pytest.mark.slow
def test_what_else_may_be_damaged_is_said_in_a_line(tmp_path, monkeypatch, sinusoid):
    with monkeypatch.context() as patch:
        asked_to_stop(patch, signal.SIGINT)
        run = call("train", "sinusoid", *TINY, "--tune", "--out", tmp_path / "run")
        assert run.code == 130
    for name in ("metrics.jsonl", "plan.json"):
        folder = shutil.copytree(tmp_path / "run", tmp_path / name.split(".")[0])
        (folder / name).write_text("{\n")
        refused = call("train", "--resume", folder)
        assert (refused.code, refused.out) == (2, "")
        said = rf"^fomaml-jax: {folder / name} (is damaged|cannot be read)"
        assert re.search(said, refused.err, re.MULTILINE)


def test_interrupting_the_preparations_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(problems, "build", interrupt)
    run = call("train", "glyphs", "--out", tmp_path / "run")
    assert (run.code, run.out, run.err) == (130, "", "fomaml-jax: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_interrupting_an_evaluation(sinusoid, monkeypatch):
    monkeypatch.setattr(experiment, "evaluate", interrupt)
    run = call("evaluate", sinusoid.folder)
    assert (run.code, run.out, run.err) == (130, "", "fomaml-jax: interrupted\n")
