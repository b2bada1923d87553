"""Tables: groups in three splits, standardised by the training groups, and what is refused."""

import re
import warnings

import numpy as np
import pytest

import fomaml_jax as fj
from fomaml_jax.datasets._checks import check_rows_fit

HEADER = "patient,day,dose,score"


def write(folder, *rows, header=HEADER):
    path = folder / "table.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def visits(patients=8, most=9):
    """Uneven groups, their rows neither together nor in order."""
    rng = np.random.default_rng(0)
    rows = [
        (p, day, rng.normal(3, 2), 10 * p + day + rng.normal())
        for p in range(patients)
        for day in range(most - p % 3)
    ]
    return [",".join(map(str, rows[i])) for i in rng.permutation(len(rows))]


def read(path, **options):
    chosen = {"group": "patient", "target": "score", "features": ["day", "dose"], "time": "day"}
    return fj.datasets.table(path, **(chosen | {"shots": 3} | options))


def test_rows_are_those_of_their_group_in_order_and_standardised_by_training_groups(tmp_path):
    rows = visits()
    found = read(write(tmp_path, *rows))
    numbers = np.array([row.split(",") for row in rows], float)
    names = [name for groups in found.splits for name in groups.names]
    assert sorted(names) == [str(p) for p in range(8)]
    trained = np.isin(numbers[:, 0], [float(name) for name in found.splits.train.names])
    columns = numbers[:, [3, 1, 2]]
    np.testing.assert_allclose(found.mean, columns[trained].mean(0))
    np.testing.assert_allclose(found.scale, columns[trained].std(0))
    assert found.columns == ("score", "day", "dose")
    for groups in found.splits:
        for values, count, name in zip(*groups, strict=True):
            own = numbers[numbers[:, 0] == float(name)]
            own = own[np.argsort(own[:, 1])]
            assert count == len(own)
            real = found.mean + found.scale * values[:count]
            np.testing.assert_allclose(real, own[:, [3, 1, 2]], rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(values[count:], 0)
    train = found.splits.train
    np.testing.assert_array_equal(train.targets, train.values[..., 0])
    np.testing.assert_array_equal(train.features, train.values[..., 1:])


def test_other_seeds_deal_otherwise_and_no_time_keeps_the_order_of_the_file(tmp_path):
    path = write(tmp_path, *visits())
    deals = {read(path, seed=seed).splits.test.names for seed in range(6)}
    assert len(deals) > 1
    found = read(path, time=None)
    (name, *_), (values, *_) = found.splits.train.names, found.splits.train.values
    days = [float(row.split(",")[1]) for row in visits() if row.split(",")[0] == name]
    real = found.mean[1] + found.scale[1] * values[: len(days), 1]
    np.testing.assert_allclose(real, days, atol=1e-5)


def test_dates_order_rows_too(tmp_path):
    rows = [f"{p},2026-{12 - m:02}-01,{m},{m + p}" for p in range(5) for m in range(6)]
    found = read(write(tmp_path, *rows), features=["dose"], validation=0)
    assert (np.diff(found.splits.train.features[..., 0]) < 0).all()


def test_a_byte_order_mark_quotes_and_empty_lines_do_no_harm(tmp_path):
    path = write(tmp_path, *visits(), "", header='\ufeff"patient", day ,dose,score')
    assert len(read(path).splits.train.names) == 4


def missing(rows, places):
    rows = [row.split(",") for row in rows]
    for row, column, text in places:
        rows[row][column] = text
    return [",".join(row) for row in rows]


def test_rows_with_missing_cells_are_left_out_and_counted(tmp_path):
    places = [(0, 3, "NA"), (1, 2, ""), (2, 2, "?"), (3, 1, "nan"), (4, 0, "")]
    path = write(tmp_path, *missing(visits(), places))
    total = len(visits())
    with pytest.warns(UserWarning, match="left out") as said:
        found = read(path)
    assert [str(w.message) for w in said] == [
        f"1 of {total} rows are left out, their group is missing",
        f"1 of {total} rows are left out, their target is missing",
        f"1 of {total} rows are left out, their time is missing",
        f"3 of {total} rows are left out, their feature is missing",  # a time is a feature here
    ]
    assert sum(groups.counts.sum() for groups in found.splits) == total - 5


def test_missing_features_may_get_the_mean_of_the_training_groups(tmp_path):
    path = write(tmp_path, *missing(visits(), [(1, 2, ""), (2, 2, "?")]))
    with pytest.warns(UserWarning, match="^2 missing cells have the mean of the training groups$"):
        found = read(path, missing="mean")
    assert sum(groups.counts.sum() for groups in found.splits) == len(visits())
    assert sum((groups.values[..., 2][real(groups)] == 0).sum() for groups in found.splits) == 2


def real(groups):
    return np.arange(groups.values.shape[1]) < groups.counts[:, None]


def test_groups_without_a_row_to_predict_are_left_out_and_named(tmp_path):
    path = write(tmp_path, *visits(), "alone,1,2,3", "few,1,2,3", "few,2,2,4")
    with pytest.warns(UserWarning, match="2 of 10 groups are left out, such as 'alone': with 3"):
        found = read(path)
    names = {name for groups in found.splits for name in groups.names}
    assert names == {str(p) for p in range(8)}


def test_a_constant_feature_says_nothing(tmp_path):
    rows = [",".join([*row.split(",")[:2], "0.1", row.split(",")[3]]) for row in visits()]
    with pytest.warns(UserWarning, match="dose is the same in all rows to train on"):
        found = read(write(tmp_path, *rows))
    assert np.abs(found.splits.test.values[..., 2]).max() < 1e-6


def test_a_feature_that_only_unseen_groups_have_stays_silent(tmp_path):
    """The network has never seen it move: what it would make of it is noise."""
    seen = read(write(tmp_path, *visits())).splits.train.names
    rows = [row.split(",") for row in visits()]
    rows = [",".join([p, day, "5" if p in seen else "1000", y]) for p, day, _, y in rows]
    with pytest.warns(UserWarning, match="dose is the same in all rows to train on"):
        found = read(write(tmp_path, *rows))
    assert not found.splits.test.values[..., 2].any()


def test_rows_whose_group_is_not_known_are_no_group(tmp_path):
    with pytest.warns(UserWarning, match="^6 of|is taken for missing") as said:
        found = read(write(tmp_path, *visits(), *(f"NA,{day},2,3" for day in range(6))))
    assert "a group that is called 'NA' is taken for missing" in str(said[-1].message)
    assert "NA" not in {name for groups in found.splits for name in groups.names}


def test_rows_of_one_time_on_both_sides_are_told(tmp_path):
    rows = [row.split(",") for row in visits()]
    rows = [",".join([p, "1" if p == "0" else day, *rest]) for p, day, *rest in rows]
    with pytest.warns(UserWarning, match="^in 1 of 8 groups the last row given and the first"):
        read(write(tmp_path, *rows))


def test_small_tables_have_no_validation_groups(tmp_path):
    with pytest.warns(UserWarning, match="no groups are left to validate on"):
        found = read(write(tmp_path, *visits(5)))
    assert [len(groups.names) for groups in found.splits] == [3, 0, 2]


ROW = "1,2,3,4"
REFUSED = {
    "an empty file": ((), {"header": ""}, {}, "holds nothing, expected a header and rows"),
    "a header alone": ((), {}, {}, "holds a header and no rows"),
    "an unknown column": ([ROW], {}, {"target": "mood"}, "no column 'mood'; there are patient, "),
    "a doubled column": (
        [ROW],
        {"header": "score,day,dose,dose"},
        {"group": "day", "time": None, "features": ["dose"]},
        "2 columns 'dose'",
    ),
    "the target as a feature": ([ROW], {}, {"features": ["score"]}, "'score' is named twice"),
    "a feature twice": ([ROW], {}, {"features": ["day", "day"]}, "'day' is named twice"),
    "the group as a feature": ([ROW], {}, {"features": ["patient"]}, "'patient' is the group"),
    "the target as the time": ([ROW], {}, {"time": "score"}, "'score' is the time"),
    "no features": ([ROW], {}, {"features": []}, "features is empty"),
    "a word": ([ROW, "1,2,high,4"], {}, {}, "line 3: dose is 'high', expected a number"),
    "an infinity": ([ROW, "1,2,3,inf"], {}, {}, "line 3: score is 'inf', expected a number"),
    "a number of Python's alone": ([ROW, "1,2,1_0,4"], {}, {}, "line 3: dose is '1_0', expected a"),
    "a date of Python's numbers": (
        ["1,2026_1_2,3,4"],
        {},
        {"features": ["dose"]},
        "line 2: day is '2026_1_2', expected a number or a date such as 2026-01-31",
    ),
    "a date with a zone among those without": (
        ["1,2026-01-02T10:00,3,4", "1,2026-01-02T11:00+10:00,3,4"],
        {},
        {"features": ["dose"]},
        "line 3: day is '2026-01-02T11:00+10:00', expected a date such as 2026-01-31, without a",
    ),
    "a mark for no value": ([ROW, "1,2,-1.797e308,4"], {}, {}, "and nothing for no value)"),
    "no date": (["1,Monday,3,4"], {}, {"features": ["dose"]}, "line 2: day is 'Monday', expected"),
    "a date among numbers": (
        [ROW, "1,2026-01-02,3,4"],
        {},
        {"features": ["dose"]},
        "line 3: day is '2026-01-02', expected a number, as in the first row",
    ),
    "a number among dates": (
        ["1,2026-01-02,3,4", "1,2026-01-03,3,4", "1,20260104,3,4"],
        {},
        {"features": ["dose"]},
        "line 4: day is '20260104', expected a date such as 2026-01-31, without a time zone as in",
    ),
    "a short row": ([ROW, "1,2,3"], {}, {}, "line 3: 3 cells, but the header has 4"),
    "a quote without end": (['1,"2,3,4'], {}, {}, "is no CSV file"),
    "an unknown remedy": ([ROW], {}, {"missing": "guess"}, "missing='guess' must be one of"),
    "no shots": ([ROW], {}, {"shots": 0}, "shots=0 must be a whole number of at least 1"),
    "too few groups": (visits(3), {}, {}, "has 3 groups of more than 3 usable rows, expected at"),
    "no test": (visits(), {}, {"test": 0.0}, "test must be a fraction of the groups below 1"),
    "a constant target": (
        [f"{p},{day},{day},7" for p in range(6) for day in range(5)],
        {},
        {},
        "score is 7 in all rows to train on: there is nothing to predict",
    ),
    "a mark that float32 cannot hold": (
        [f"{p},{day},{day},{day}" for p in range(6) for day in range(5)] + ["2,5,9e99,5"],
        {},
        {},
        "line 32: dose is '9e99', ",
    ),
    "an empty feature": (
        [f"{p},{day},,{day}" for p in range(6) for day in range(5)],
        {},
        {"missing": "mean"},
        "dose is missing in all rows to train on",
    ),
}


@pytest.mark.parametrize(("rows", "file", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_table_is_refused(tmp_path, rows, file, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(write(tmp_path, *rows, **file), **options)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv does not exist, expected a CSV file"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(IsADirectoryError, match="is a folder, expected a CSV file"):
        read(tmp_path)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"is no CSV file in UTF-8: .*; save it as CSV UTF-8"):
        read(tmp_path / "binary.csv")


def test_a_long_text_beside_what_is_read(tmp_path):
    notes = "x" * 140_000
    rows = [f"{p},{day},{day},{day},{notes}" for p in range(8) for day in range(5)]
    found = read(write(tmp_path, *rows, header="patient,day,dose,score,notes"))
    assert len(found.splits.train.names) == 4


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_other_separators_are_named(tmp_path, separator, name):
    (tmp_path / "excel.csv").write_text(f"patient{separator}dose\n1{separator}2,5\n")
    with pytest.raises(ValueError, match=f"has {name} between its columns, expected commas"):
        read(tmp_path / "excel.csv")


def test_other_values_are_another_digest(tmp_path):
    rows = visits()
    first = fj.datasets.digest(read(write(tmp_path, *rows)).splits)
    assert first == fj.datasets.digest(read(write(tmp_path, *rows)).splits)
    changed = missing(rows, [(0, 3, "99")])
    assert first != fj.datasets.digest(read(write(tmp_path, *changed)).splits)


def test_a_whole_table_is_read_in_silence(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(write(tmp_path, *visits()))


def test_groups_that_memory_cannot_hold_side_by_side_are_refused(tmp_path):
    long = {"a": range(10), "machine 7": range(10**12), "b": range(3)}
    with pytest.raises(
        ValueError, match="3 groups, each padded to the 1,000,000,000,000 rows of"
    ) as e:
        check_rows_fit(tmp_path / "log.csv", long, 4)
    assert "96000 GB" in str(e.value)
    assert "'machine 7'" in str(e.value)
    check_rows_fit(tmp_path / "log.csv", {"a": range(10)}, 4)


def test_one_name_is_not_taken_for_a_list_of_letters(tmp_path):
    path = write(tmp_path, ROW)
    with pytest.raises(TypeError, match=re.escape("must be a list of names, such as ['day']")):
        read(path, features="day")
    with pytest.raises(TypeError, match="must be a list of names"):
        fj.datasets.few_rows(path, group="patient", target="score", features="day")
