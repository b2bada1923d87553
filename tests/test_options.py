"""Options: what is written comes back, and the impossible is refused in one line."""

import dataclasses
import datetime
import json
import re
from pathlib import Path

import pytest

from fomaml_jax import option_checks, options

SHARED = {
    "steps": 7,
    "tasks_per_step": 3,
    "inner_steps": 8,
    "eval_steps": 9,
    "inner_rate": 0.25,
    "rate": 1e-4,
    "shots": 4,
    "queries": 6,
    "eval_tasks": 50,
    "tune": True,
    "minutes": 2.5,
    "patience": 3,
    "checkpoint_every": "5min",
    "max_left_out": 0.25,
    "apply_if_finite": 4,
    "tensorboard": True,
    "overwrite": True,
    "compilation_cache": Path("compiled programs"),
    "seed": 11,
    "out": Path("a run"),
}
IMAGES = {
    "ways": 3,
    "train_ways": 3,
    "train_shots": 2,
    "head_rate": 0.5,
    "shift": 1,
    "width": 8,
    "pooling": "max",
    "compute": "bfloat16",
    "affine": 0.1,
    "widening": True,
    "features": "mean",
    "head": "learned",
    "learned_rates": True,
    "schedule": "constant",
    "mirror": True,
    "statistics": "one-at-a-time",
    "inner_clip": 2.0,
    "compare": False,
}
OTHER_THAN_DEFAULT = {
    "glyphs": options.Glyphs(**SHARED, **IMAGES),
    "omniglot": options.Omniglot(
        **SHARED,
        **IMAGES,
        path=Path("data"),
        split="background",
        offline=True,
        recipe="paper",
        turns="drawn",
        resample="nearest",
    ),
    "folder": options.Folder(
        **SHARED,
        **IMAGES,
        path=Path("/data"),
        size=16,
        channels=1,
        unreadable="skip",
        duplicates="keep",
    ),
    "sinusoid": options.Sinusoid(**SHARED, compare=True, inner_clip=2.5),
    "table": options.Table(
        **SHARED,
        compare=False,
        inner_clip=2.5,
        file=Path("/data.csv"),
        group="site",
        target="yield",
        features=("rain", "sun"),
        time="year",
        missing="mean",
        validation=0.1,
        test=0.3,
        split_seed=3,
    ),
}
DEFAULT = {
    "glyphs": options.Glyphs(),
    "omniglot": options.Omniglot(),
    "folder": options.Folder(path=Path("here")),
    "sinusoid": options.Sinusoid(),
    "table": options.Table(file=Path("here.csv"), group="who", target="score", features=("day",)),
}


@pytest.mark.parametrize("name", options.DATA_SETS)
def test_options_come_back_from_json(name):
    default, other = DEFAULT[name], OTHER_THAN_DEFAULT[name]
    for field in dataclasses.fields(default):
        assert getattr(default, field.name) != getattr(other, field.name), field.name
    for chosen in (default, other):
        config = json.loads(json.dumps(options.to_json(chosen)))
        assert config["dataset"] == name == options.name_of(chosen)
        assert options.from_json(config) == chosen


def test_a_run_from_before_an_option_has_its_default():
    config = options.to_json(options.Glyphs(steps=7))
    del config["patience"], config["statistics"]
    assert options.from_json(config) == options.Glyphs(steps=7)


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("10", 10),
        ("30s", datetime.timedelta(seconds=30)),
        ("5min", datetime.timedelta(minutes=5)),
        ("2h", datetime.timedelta(hours=2)),
    ],
)
def test_checkpoint_intervals(text, interval):
    assert option_checks.checkpoint_interval(text) == interval


CONFIG = options.to_json(options.Sinusoid())
UNREADABLE = {
    "no data set": ({}, "names none of the data sets glyphs, omniglot, sinusoid, folder, table"),
    "an unknown data set": ({"dataset": "mnist"}, "names none of the data sets"),
    "options of another version": (
        CONFIG | {"zeal": 1},
        "the configuration's options differ from this version's: zeal",
    ),
    "no name for a data set": ({"dataset": ["x"]}, "names none of the data sets"),
    **{
        f"{value!r} for {name}": (
            CONFIG | {name: value},
            f"the configuration has {re.escape(json.dumps(value))} for {name}",
        )
        for name, value in [
            ("steps", None),
            ("steps", "3"),
            ("steps", 3.5),
            ("steps", True),
            ("inner_rate", "0.01"),
            ("minutes", "x"),
            ("inner_clip", None),
            ("compare", 1),
            ("checkpoint_every", 5),
            ("out", 3),
        ]
    },
    "an unknown choice": (
        options.to_json(options.Glyphs()) | {"pooling": "mean"},
        'the configuration has "mean" for pooling',
    ),
    "no path": (
        {"dataset": "folder"},
        "the configuration's options differ from this version's: path",
    ),
}


@pytest.mark.parametrize(("config", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_configuration_of_something_else_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        options.from_json(config)


IMPOSSIBLE = {
    "ways": (1, "--ways must be an integer of at least 2, got 1"),
    "train_ways": (1, "--train-ways must be an integer of at least 2, got 1"),
    "shots": (-1, "--shots must be an integer of at least 1, got -1"),
    "queries": (0, "--queries must be an integer of at least 1, got 0"),
    "steps": (0, "--steps must be an integer of at least 1, got 0"),
    "tasks_per_step": (0, "--tasks-per-step must be an integer of at least 1, got 0"),
    "inner_steps": (-1, "--inner-steps must be an integer of at least 0, got -1"),
    "eval_steps": (0, "--eval-steps must be an integer of at least 1, got 0"),
    "eval_tasks": (1, "--eval-tasks must be an integer of at least 2, got 1"),
    "seed": (2**31, "--seed must be at most 2147483647, got 2147483648"),
    "shift": (-1, "--shift must be an integer of at least 0, got -1"),
    "width": (0, "--width must be an integer of at least 1, got 0"),
    "rate": (0.0, "--rate must be a finite number above 0, got 0.0"),
    "inner_rate": (float("nan"), "--inner-rate must be a finite number above 0, got nan"),
    "head_rate": (float("inf"), "--head-rate must be a finite number above 0, got inf"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_numbers_are_refused(name):
    value, message = IMPOSSIBLE[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        option_checks.check(options.Glyphs(**{name: value}))


def test_numbers_are_judged_by_what_the_option_is():
    """And not by what they happen to be: a share of zero is an integer in a configuration."""
    table = {"file": Path("f"), "group": "g", "target": "t", "features": ("x",)}
    option_checks.check(options.Table(**table, validation=0, inner_clip=1))
    option_checks.check(options.Glyphs(max_left_out=0))
    for chosen, message in (
        (options.Glyphs(affine=1), "--affine must be above 0 and below 0.5, got 1"),
        (options.Glyphs(rate=0), "--rate must be a finite number above 0, got 0"),
        (options.Glyphs(steps=2.5), "--steps must be an integer of at least 1, got 2.5"),  # pyright: ignore[reportArgumentType]
        (options.Table(**table, test=0), "--test must be a share of the groups below 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            option_checks.check(chosen)


@pytest.mark.parametrize("chosen", [*DEFAULT.values(), *OTHER_THAN_DEFAULT.values()])
def test_possible_numbers_are_not(chosen):
    option_checks.check(chosen)
    steps = 1 if getattr(chosen, "learned_rates", False) else 0  # rates are those of steps
    option_checks.check(dataclasses.replace(chosen, inner_steps=steps, seed=0, eval_tasks=2))


def test_places_are_known_from_any_other_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = options.anywhere(options.Sinusoid(compilation_cache=Path("kept"))).compilation_cache
    assert kept == tmp_path / "kept"
