"""`fomaml-jax train table`: a run of your own table, from its file to its result."""

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
from command_line import TINY, call, everything, rows_of, trained
from PIL import Image

from fomaml_jax import experiment, options, problems
from fomaml_jax.commands.words import saying_what_moved

pytestmark = pytest.mark.usefixtures("small_world")

OPTIONS = (*TINY, "--inner-steps", "1", "--shots", "2", "--queries", "3", "--validation", "0.2")
COLUMNS = ("--group", "plot", "--target", "yield", "--features", "rain", "year", "--time", "year")


def write(path, *more, plots=10):
    rng = np.random.default_rng(0)
    rows = [
        f"plot {p},{2000 + year},{rng.normal():.3f},{p + 0.5 * year + rng.normal():.3f}"
        for p in range(plots)
        for year in range(5 + p % 3)
    ]
    path.write_text("\n".join(["plot,year,rain,yield", *rows, *more]) + "\n")
    return path


@pytest.fixture(scope="module")
def harvests(small_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    file = write(folder / "harvests.csv", "plot 0,2009,,3", "new plot,2000,1,1")
    return trained(folder / "run", "table", "--file", file, *COLUMNS, *OPTIONS, "--compare")


def problem_of(run):
    return problems.build(options.from_json(run.result["config"]))


@pytest.fixture(scope="module")
def problem(harvests):
    with pytest.warns(UserWarning, match="left out"):
        return problem_of(harvests)


def test_what_was_left_out_is_said(harvests):
    assert "fomaml-jax: 1 of 61 rows are left out, their feature is missing\n" in harvests.err
    assert "1 of 11 groups are left out, such as 'new plot'" in harvests.err
    assert "table, yield by plot from 2 rows, into " in harvests.err


def test_every_unseen_group_is_judged_once_in_its_own_units(harvests, problem):
    result, test = harvests.result, problem.splits.test
    assert result["metric"] == "mean absolute error of yield"
    assert result["num_tasks"] == len(test.names) == 2
    per_task = np.load(harvests.folder / "per_task.npy")
    np.testing.assert_allclose(per_task.mean(), result["mean"], rtol=1e-5)
    mean, scale = problem.standard
    real = mean + scale * test.targets
    errors = [np.abs(y[2:n] - y[:2].mean()).mean() for y, n in zip(real, test.counts, strict=True)]
    own_mean = result["baselines"]["the mean of the rows given"]
    np.testing.assert_allclose(own_mean["mean"], np.mean(errors), rtol=1e-5)
    assert "joint pre-training, fine-tuned" in result["baselines"]
    assert "  at the level of the rows given " in harvests.out


def test_the_network_at_each_groups_level_is_judged_as_numpy_would(harvests, problem):
    saved = np.load(harvests.folder / "parameters.npz")
    of = "['network']['params']"
    layers = [
        (saved[f"{of}['{name}']['kernel']"], saved[f"{of}['{name}']['bias']"])
        for name in ("Dense_0", "Dense_1", "head")
    ]
    test = problem.splits.test
    x = test.features
    for kernel, bias in layers[:-1]:
        x = np.maximum(x @ kernel + bias, 0)
    predicted = (x @ layers[-1][0] + layers[-1][1])[..., 0]
    above = (test.targets - predicted)[:, :2].mean(1, keepdims=True)  # of the two rows given
    predicted += above * 2 / (2 + np.exp(saved["['log_doubt']"]))
    apart = problem.standard[1] * np.abs(predicted - test.targets)
    errors = [row[2:n].mean() for row, n in zip(apart, test.counts, strict=True)]
    np.testing.assert_allclose(harvests.result["before_adaptation"], np.mean(errors), rtol=1e-4)


def test_groups_are_drawn(harvests):
    for name in ("adaptation.png", "learning_curve.png"):
        with Image.open(harvests.folder / name) as image:
            assert np.asarray(image.convert("L")).std() > 1


def test_an_emptied_class_folder_has_not_moved(tmp_path):
    chosen = options.Folder(path=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^ring is empty$"), saying_what_moved(chosen):
        raise FileNotFoundError("ring is empty")


def test_a_file_that_was_moved_is_asked_for_and_found(harvests, tmp_path):
    config = json.loads((harvests.folder / "config.json").read_text())
    moved = shutil.copy(config["file"], tmp_path / "elsewhere.csv")
    run = shutil.copytree(harvests.folder, tmp_path / "run")
    options = config | {"file": str(tmp_path / "nowhere.csv")}
    (run / "config.json").write_text(json.dumps(options))
    lost = call("evaluate", run)
    assert lost.err.endswith("expected a CSV file; where it has moved, pass --file\n")
    (run / "result.json").unlink()
    assert call("train", "--resume", run).err == lost.err
    found = call("evaluate", run, "--file", moved)
    assert found.code == 0, found.err
    assert rows_of(found.out) == rows_of(harvests.out)[:2]
    refused = {
        "--ways": "--ways: table has no classes",
        "--queries": "--queries: table is judged on a fixed number",
        "--eval-tasks": "--eval-tasks: a run of table is judged on all its unseen groups",
        "--seed": "--seed: a run of table is judged on all its unseen groups",
        "--path": "--path is no option of runs of table, which have --file",
    }
    for option, message in refused.items():
        assert call("evaluate", run, option, "3").err == f"fomaml-jax: {message}\n"


def test_evaluating_on_groups_that_were_trained_on_is_refused(harvests, tmp_path):
    """With more groups the deal is another one."""
    more = write(tmp_path / "more.csv", plots=14)
    before = everything(harvests.folder)
    refused = call("evaluate", harvests.folder, "--file", more)
    assert refused.code == 2
    assert re.search("served to train or to validate it, such as plot", refused.err)
    assert everything(harvests.folder) == before


@pytest.mark.parametrize("column", ["rain", "yield"])
def test_a_table_in_other_units_is_refused(column, harvests, tmp_path):
    """Standardised, its rows may be the very same."""
    lines = write(tmp_path / "tonnes.csv", "plot 0,2009,,3", "new plot,2000,1,1").read_text()
    header, *rows = lines.splitlines()
    place, cells = header.split(",").index(column), [row.split(",") for row in rows]
    for row in cells:
        row[place] = row[place] and str(1000 * float(row[place]))
    rows = [",".join(row) for row in cells]
    (tmp_path / "kilograms.csv").write_text("\n".join([header, *rows]) + "\n")
    refused = call("evaluate", harvests.folder, "--file", tmp_path / "kilograms.csv")
    assert refused.code == 2
    assert "by which values are standardised; restore the file" in refused.err


def test_a_report_of_a_table(harvests, tmp_path):
    found = call("report", harvests.folder, "--out", tmp_path / "page")
    assert found.code == 0, found.err
    scored = f"{harvests.result['mean']:.3f} ± {harvests.result['ci95']:.3f}<"  # not in percent
    assert scored in (tmp_path / "page" / "report.html").read_text()


REFUSED = {
    "train table --file nowhere.csv": "nowhere.csv does not exist, expected a CSV file",
    "train table --file empty.csv": "empty.csv holds nothing, expected a header and rows below it",
    "train table --file table.csv --target mood": "table.csv has no column 'mood'; there are plot, "
    "year, rain, yield",
    "train table --file table.csv --features yield": "'yield' is named twice among the target and "
    "the features",
    "train table --file table.csv --features plot": "'plot' is the group, and cannot be the target "
    "or a feature too",
    "train table --file table.csv --shots 0": "--shots must be an integer of at least 1, got 0",
    "train table --file table.csv --test 0": "--test must be a share of the groups below 1, got "
    "0.0",
    "train table --file table.csv --validation 1": "--validation must be a share of the groups "
    "below 1, got 1.0",
    "train table --file table.csv --shots 50": "table.csv has 0 groups of more than 50 usable "
    "rows, expected at least 4: two to train on and two others to test on",
    "train sinusoid --file table.csv": "Unrecognized options: --file",
}


@pytest.mark.parametrize(("words", "line"), REFUSED.items(), ids=REFUSED)
def test_wrong_tables_are_refused_in_a_line(words, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "table.csv")
    (tmp_path / "empty.csv").touch()
    command, name, *rest = words.split()
    columns = (
        {"--group": "plot", "--target": "yield", "--features": "rain"} if name == "table" else {}
    )
    given = [word for pair in columns.items() if pair[0] not in rest for word in pair]
    refused = call(command, name, *rest, *given)
    assert (refused.code, refused.out) == (2, "")
    *_, last = refused.err.splitlines()
    assert last.startswith(f"fomaml-jax: {line}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_table_that_has_changed_before_anything_was_saved_is_the_runs(tmp_path, monkeypatch):
    """Told by what `predict` will standardise with."""
    file = write(tmp_path / "harvests.csv")
    words = ("table", "--file", file, *COLUMNS, *OPTIONS, "--no-compare")
    expected = trained(tmp_path / "expected", *words)
    write(file, plots=9)
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "meta_train", lambda *args: os.kill(os.getpid(), signal.SIGINT))
        assert call("train", *words, "--out", tmp_path / "run").code == 130
    said = call("predict", tmp_path / "run", "--file", file).err
    assert "has not come to its end: its parameters are untrained, or of the first steps" in said
    write(file)
    resumed = call("train", "--resume", tmp_path / "run")
    assert resumed.code == 0, resumed.err
    found, wanted = (
        (folder / "data.json").read_bytes() for folder in (tmp_path / "run", expected.folder)
    )
    assert found == wanted


@pytest.mark.slow
def test_dollars_are_no_mathematics_and_no_inner_step_is_one_too(tmp_path, monkeypatch):
    """Nor is a path another one in another folder."""
    file = write(tmp_path / "harvests.csv")
    file.write_text(file.read_text().replace("yield", "cost_$_per_$", 1))
    names = [word if word != "yield" else "cost_$_per_$" for word in COLUMNS]
    words = ("table", "--file", file.name, *names, *OPTIONS, "--inner-steps", "0", "--steps", "1")
    monkeypatch.chdir(tmp_path)
    run = trained(tmp_path / "run_$_a_$", *words, "--eval-steps", "1", "--compare")
    assert run.result["config"]["file"] == str(file)
    monkeypatch.chdir("/")
    reported = call("report", run.folder, "--out", tmp_path / "page")
    assert (reported.code, reported.err) == (0, "")
    assert call("evaluate", run.folder).code == 0
