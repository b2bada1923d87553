"""`fomaml-jax predict RUN --file`: rows of groups that come after training."""

import csv
import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import TINY, call, trained

import fomaml_jax as fj
from fomaml_jax import options, problems
from fomaml_jax.commands import predicted_rows

pytestmark = pytest.mark.usefixtures("small_world")

SHOTS = 2
HEADER = ["plot", "year", "rain", "note", "yield"]
OPTIONS = ("--inner-steps", "2", "--shots", SHOTS, "--queries", "3", "--validation", "0.2")
COLUMNS = ("--group", "plot", "--target", "yield", "--features", "rain", "year", "--time", "year")


def harvest_rows(plots=10):
    rng = np.random.default_rng(0)
    return [
        [f"plot {p}", f"{2000 + year}", f"{rng.normal():.3f}", "a, b", f"{p + 0.5 * year:.3f}"]
        for p in range(plots)
        for year in range(5 + p % 3)
    ]


def write(path, rows, header=HEADER):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(small_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    file = write(folder / "harvests.csv", harvest_rows())
    return trained(folder / "run", "table", "--file", file, *COLUMNS, *TINY, *OPTIONS)


def predicted(run, tmp_path, rows, **kwargs):
    file, out = write(tmp_path / "new.csv", rows, **kwargs), tmp_path / "out.csv"
    done = call("predict", run.folder, "--file", file, "--out", out, "--overwrite")
    return done, read(out) if done.code == 0 else []


@pytest.mark.parametrize("interval", [0.1, None])
def test_a_result_that_is_not_finite_is_not_told_about(run, tmp_path, interval):
    changed = shutil.copytree(run.folder, tmp_path / "run")
    (changed / "result.json").write_text(json.dumps(run.result | {"ci95": interval}))
    file = write(tmp_path / "new.csv", [*harvest_rows(1), ["plot 0", "2020", "0.1", "", ""]])
    done = call("predict", changed, "--file", file, "--out", tmp_path / "out.csv")
    assert done.code == 0, done.err
    assert ("In training's own table" in done.out) == (interval is not None)


def test_a_run_without_a_file_is_told_of_both_ways(run):
    done = call("predict", run.folder, "--query", "pictures")
    assert done.code == 2
    assert f"{run.folder} is a run: to fill in a table's rows by it pass --file FILE" in done.err


def test_errors_on_the_unseen_groups_are_those_that_the_run_reports(run, tmp_path):
    """Its first rows known, its later ones asked for, in the order of the time."""
    problem = problems.build(options.from_json(run.result["config"]))
    unseen, seen, rows = problem.splits.test.names, {}, []
    for row in harvest_rows():
        seen[row[0]] = seen.get(row[0], 0) + 1
        if row[0] in unseen:
            rows.append([*row[:4], row[4] if seen[row[0]] <= SHOTS else ""])
    done, found = predicted(run, tmp_path, rows)
    assert (done.code, done.err) == (0, "")
    errors = {name: [] for name in unseen}
    for row, true in zip(found, (r for r in harvest_rows() if r[0] in unseen), strict=True):
        assert list(row)[:4] == HEADER[:4]
        assert row["note"] == "a, b"
        assert bool(row["predicted yield"]) == (not row["yield"])
        if row["predicted yield"]:
            errors[row["plot"]].append(abs(float(row["predicted yield"]) - float(true[4])))
    of_run = np.load(run.folder / "per_task.npy")
    np.testing.assert_allclose([np.mean(e) for e in errors.values()], of_run, rtol=1e-4)
    told = f"the mean absolute error of yield was {run.result['mean']:.3g} ± "
    assert told in done.out
    assert f"of {len(unseen)} groups (plot), each from {SHOTS} known rows of its own" in done.out


def test_groups_do_not_touch_each_other(run, tmp_path):
    """Alone, padded beside larger ones, in any order, and in Python, a group has the same."""
    one = [["new", "2001", "0.1", "", "3"], ["new", "2002", "-0.3", "", "NA"]]
    more = [["other", f"{2000 + k}", "0.5", "", "" if k > 6 else "9"] for k in range(9)]
    _, alone = predicted(run, tmp_path, one)
    _, among = predicted(run, tmp_path, [*more[:4], *one[::-1], *more[4:]])
    value = float(alone[1]["predicted yield"])
    assert float(among[4]["predicted yield"]) == pytest.approx(value, rel=1e-5)
    regressor = fj.load_regressor(run.folder)
    known = [[0.1, 2001]], [3.0]
    found = regressor.predict(known, [[-0.3, 2002]])
    assert found.tolist() == pytest.approx([value], rel=1e-5)
    padded = [[0.1, 2001], [np.nan, 5.0]], [3.0, np.nan]
    same = regressor.predict(padded, [[-0.3, 2002]], weights=[1.0, 0.0])
    assert same.tolist() == pytest.approx([value], rel=1e-5)
    assert not np.allclose(found, regressor.predict(known, [[-0.3, 2002]], steps=0))


def test_a_group_of_which_nothing_is_known_has_the_start(run, tmp_path):
    done, found = predicted(
        run,
        tmp_path,
        [["a", "2001", "1", "", "3"], ["a", "2002", "1", "", ""], ["b", "2002", "1", "", ""]],
    )
    assert "Of 1 of them no row is known, such as of 'b'" in done.out
    assert "Training gave 2 rows of a group; fewer mean larger errors" in done.out
    regressor = fj.load_regressor(run.folder)
    start = regressor.predict((jnp.zeros((0, 2)), []), [[1, 2002]])
    assert float(found[2]["predicted yield"]) == pytest.approx(start.item(), rel=1e-5)
    assert found[1]["predicted yield"] != found[2]["predicted yield"]
    _, all_unknown = predicted(run, tmp_path, [["b", "2002", "1", "", ""]])
    assert all_unknown[0]["predicted yield"] == found[2]["predicted yield"]


def test_rows_without_what_is_needed_stay_without_a_prediction(run, tmp_path):
    rows = [["a", "2001", "1", "", "3"], ["a", "2002", "", "", ""], ["", "2002", "1", "", ""]]
    done, found = predicted(run, tmp_path, [*rows, ["a", "2003", "1", "", ""]])
    assert "2 of 4 rows are left out, their group or a feature is missing" in done.err
    assert [bool(row["predicted yield"]) for row in found] == [False, False, False, True]


def test_missing_features_have_the_mean_where_training_had_it(run, tmp_path):
    other = shutil.copytree(run.folder, tmp_path / "run")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"missing": "mean"}))
    mean = json.loads((other / "data.json").read_text())["columns"]["rain"][0]
    rows = [
        ["a", "2001", "1", "", "3"],
        ["a", "2002", "", "", ""],
        ["a", "2002", f"{mean}", "", ""],
    ]
    _, found = predicted(dataclasses.replace(run, folder=other), tmp_path, rows)
    assert float(found[1]["predicted yield"]) == pytest.approx(
        float(found[2]["predicted yield"]), rel=1e-4
    )


def test_a_feature_in_another_unit_is_told(run, tmp_path):
    done, _ = predicted(run, tmp_path, [["a", "2001", "1000", "", "3"], ["a", "2002", "1", "", ""]])
    assert re.search(r"rain is 1000 in a row, where it was \S+ ± \S+ in training", done.err)


@pytest.mark.slow
def test_large_numbers_of_a_small_spread_keep_their_digits(small_world, tmp_path):
    """Seconds since 1970, and a target of millions that differs by units."""
    start, level = 1_700_000_000, 2_000_000
    rows = [[p, start + 20 * t + p, level + p + 0.5 * t] for p in range(10) for t in range(5)]
    header = ["plot", "rain", "yield"]
    file = write(tmp_path / "train.csv", rows, header)
    columns = ("--group", "plot", "--target", "yield", "--features", "rain", "--time", "rain")
    run = trained(tmp_path / "run", "table", "--file", file, *columns, *TINY, *OPTIONS)
    unseen = problems.build(options.from_json(run.result["config"])).splits.test.names
    of_unseen = [row for row in rows if str(row[0]) in unseen]
    asked = [[*row[:2], row[2] if row[1] < start + 30 else ""] for row in of_unseen]
    done, found = predicted(run, tmp_path, asked, header=header)
    assert done.code == 0, done.err
    errors = [
        abs(float(row["predicted yield"]) - true[2])
        for row, true in zip(found, of_unseen, strict=True)
        if row["predicted yield"]
    ]
    of_run = np.load(run.folder / "per_task.npy")
    assert np.mean(errors) == pytest.approx(of_run.mean(), rel=1e-3)


def test_it_works_compiled_over_groups_and_in_double_precision(run, float64):
    regressor = fj.load_regressor(run.folder)
    known, y, asked = [[0.1, 2001.0], [0.2, 2002.0]], [3.0, 4.0], [[-0.3, 2003.0]]
    expected = regressor.predict((known, y), asked)
    assert expected.dtype == jnp.float32
    arrays = [jnp.asarray(part)[None] for part in (known, y, asked)]
    compiled = jax.jit(jax.vmap(lambda x, y, asked: regressor.predict((x, y), asked)))
    np.testing.assert_allclose(compiled(*arrays)[0], expected, rtol=1e-5)


def test_the_level_is_shrunk_as_a_random_intercept(run):
    """Without steps: n rows above the network's predictions by as much as n / (n + doubt)."""
    regressor = fj.load_regressor(run.folder)
    doubt = float(np.exp(regressor.params["log_doubt"]))
    base = regressor.predict((np.zeros((0, 2)), []), [[0.1, 2001]])
    for count in (1, 20):
        known = [[0.1, 2001]] * count, [float(base[0]) + 4.0] * count
        raised = regressor.predict(known, [[0.1, 2001]], steps=0)
        assert float(raised[0] - base[0]) == pytest.approx(4 * count / (count + doubt), rel=1e-3)


def test_a_known_row_that_throws_its_group_off_is_told(run, tmp_path):
    rows = [["a", "2001", "1", "", "3"], ["a", "2002", "1", "", ""]]
    rows += [["b", "2001", "1", "", "1e39"], ["b", "2002", "1", "", ""]]
    done, _ = predicted(run, tmp_path, rows)
    assert done.code == 2
    assert "yield is 1e+39 in a row" in done.err
    assert "leave the cell empty if it has no value" in done.err


def test_adaptation_that_diverges_is_told(run, tmp_path):
    regressor = fj.load_regressor(run.folder)
    wild = dataclasses.replace(regressor.chosen, inner_rate=1e30)
    rows = [["b", "2001", "1", "", "3"], ["b", "2002", "1", "", ""]]
    asked = {"group": "plot", "target": "yield", "features": ("rain", "year")}
    found = fj.datasets.few_rows(write(tmp_path / "new.csv", rows), **asked)
    with pytest.raises(ValueError, match="adaptation to 'b' diverged: look at its known rows"):
        predicted_rows.predictions(dataclasses.replace(regressor, chosen=wild), found)


ROW = ["a", "2001", "1", "", ""]
REFUSED = {
    "no row to predict": ([["a", "2001", "1", "", "3"]], HEADER, "has no row to predict: leave "),
    "no target": ([ROW[:4]], HEADER[:4], "has no column 'yield'; there are plot, year, rain"),
    "text": ([["a", "2001", "wet", "", ""]], HEADER, "line 2: rain is 'wet', expected a number"),
    "predicted before": ([ROW], [*HEADER[:3], "predicted yield", "yield"], "take it out"),
}


@pytest.mark.parametrize(("rows", "header", "line"), REFUSED.values(), ids=REFUSED)
def test_wrong_tables_are_refused_in_a_line(rows, header, line, run, tmp_path):
    done, _ = predicted(run, tmp_path, rows, header=header)
    assert done.code == 2
    assert line in done.err
    assert not (tmp_path / "out.csv").exists()


def test_what_is_there_is_not_lost(run, tmp_path):
    file = write(tmp_path / "new.csv", [ROW])
    before = file.read_bytes()
    for out in (file, tmp_path):
        refused = call("predict", run.folder, "--file", file, "--out", out, "--overwrite")
        assert refused.code == 2
    there = tmp_path / "there.csv"
    there.write_text("mine")
    refused = call("predict", run.folder, "--file", file, "--out", there)
    assert (refused.code, "is there already" in refused.err) == (2, True)
    assert (file.read_bytes(), there.read_text()) == (before, "mine")


def test_other_runs_are_refused(run, sinusoid, tmp_path):
    file = write(tmp_path / "new.csv", [ROW])
    refused = call("predict", sinusoid.folder, "--file", file)
    assert "is a run of sinusoid, not of a table" in refused.err
    old = shutil.copytree(run.folder, tmp_path / "old")
    described = json.loads((old / "data.json").read_text())
    (old / "data.json").write_text(json.dumps(described | {"columns": {}}))
    assert "does not say how yield, rain, year were" in call("predict", old, "--file", file).err


def test_the_table_is_not_overwritten_by_another_name_of_it(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write(tmp_path / "new.csv", [ROW])
    before = file.read_bytes()
    monkeypatch.chdir(tmp_path)
    for name in ("~/new.csv", "new.csv"):
        refused = call("predict", run.folder, "--file", file, "--out", name, "--overwrite")
        assert (refused.code, file.read_bytes()) == (2, before)
        assert "is the table itself" in refused.err
    done = call("predict", run.folder, "--file", "~/new.csv", "--out", "deep/er/out.csv")
    assert done.code == 0, done.err
    assert len(read(tmp_path / "deep" / "er" / "out.csv")) == 1
    assert call("predict", run.folder, "--file", file).code == 0
    assert (tmp_path / "predictions.csv").exists()


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ({"missing": "drpo"}, "missing='drpo' must be one of"),
        ({"features": []}, "features is empty"),
        ({"features": ["rain", "rain"]}, "'rain' is named twice"),
        ({"features": ["yield"]}, "'yield' is named twice"),
        ({"features": ["plot"]}, "'plot' is the group"),
    ],
)
def test_columns_and_choices_are_checked(how, line, tmp_path):
    file = write(tmp_path / "new.csv", [ROW])
    asked = {"group": "plot", "target": "yield", "features": ["rain"]} | how
    with pytest.raises(ValueError, match=line):
        fj.datasets.few_rows(file, **asked)


def test_nothing_known_may_be_an_empty_list_and_what_is_infinite_or_negative_is_refused(run):
    predict = fj.load_regressor(run.folder).predict
    nothing, row = ([], []), [[1.0, 2.0]]
    np.testing.assert_array_equal(predict(nothing, row), predict((np.zeros((0, 2)), []), row))
    assert np.isfinite(predict(nothing, [[np.nan, 2.0]])).all()
    for known, asked in (((row, [1.0]), [[np.inf, 2.0]]), (([[-np.inf, 2.0]], [1.0]), row)):
        with pytest.raises(ValueError, match="rows hold an infinite feature; pass NaN for one"):
            predict(known, asked)
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"^weights must be at least 0, finite$"):
            predict((2 * row, [1.0, 2.0]), row, weights=[wrong, 1.0])
    level = predict(nothing, row)
    np.testing.assert_allclose(predict((row, [9.0]), row, weights=[0.0]), level, rtol=1e-5)
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match="targets must be finite; leave such rows out, or"):
            predict((2 * row, [1.0, wrong]), row)
    without = predict((2 * row, [1.0, np.nan]), row, weights=[1.0, 0.0])
    np.testing.assert_allclose(without, predict((row, [1.0]), row), rtol=1e-5)


def test_a_row_of_weight_two_is_as_if_it_were_there_twice(run):
    predict = fj.load_regressor(run.folder).predict
    known, asked = [[1.0, 2.0], [3.0, 1.0], [3.0, 1.0]], [[2.0, 2.0]]
    twice = predict((known, [1.0, 7.0, 7.0]), asked)
    weighted = predict((known[:2], [1.0, 7.0]), asked, weights=[1.0, 2.0])
    np.testing.assert_allclose(weighted, twice, rtol=1e-5)
    assert abs(float(twice[0] - predict((known[:2], [1.0, 7.0]), asked)[0])) > 0.01


def test_predictions_are_compiled_once(run, caplog):
    regressor = fj.load_regressor(run.folder)
    with jax.log_compiles():
        for level in (1.0, 2.0, 3.0):
            caplog.clear()
            regressor.predict(([[1.0, 2.0]], [level]), [[2.0, 2.0]])
    assert "Compiling" not in caplog.text
    listed = dataclasses.replace(regressor.chosen, features=list(regressor.chosen.features))
    by_hand = dataclasses.replace(regressor, chosen=listed)
    np.testing.assert_array_equal(
        *(one.predict(([[1.0, 2.0]], [1.0]), [[2.0, 2.0]]) for one in (by_hand, regressor))
    )


def test_weights_are_one_a_known_row(run):
    known = [[1.0, 2.0], [1.0, 2.0]], [1.0, 2.0]
    for weights in ([1.0], 1.0, [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match=r"weights must be \[2\], one a known row, got \["):
            fj.load_regressor(run.folder).predict(known, [[1.0, 2.0]], weights=weights)


@pytest.mark.parametrize(
    ("known", "asked", "line"),
    [
        (([[1.0]], [1.0]), [[1.0, 2.0]], r"rows must be \[n, 2\], for rain, year, got \[1, 1\]"),
        (([[1.0, 2.0]], [1.0]), [1.0, 2.0], r"rows must be \[n, 2\]"),
        (
            ([[1.0, 2.0]], [1.0, 2.0]),
            [[1.0, 2.0]],
            r"targets must be \[1\], one a known row, got \[2\]",
        ),
    ],
)
def test_wrong_shapes_are_refused(known, asked, line, run):
    with pytest.raises(ValueError, match=line):
        fj.load_regressor(run.folder).predict(known, asked)
