"""Which options are refused: impossible ones, another run's, other tasks than a run can have."""

import dataclasses
import datetime
import importlib.util
import math
import re
import typing
from typing import Any

from fomaml_jax import refusals
from fomaml_jax.options import FREE, ImageOptions, Options, Table, alternatives, flag, name_of

MOST = 2**31 - 1
"""The largest number, that of int32."""


def check(chosen: Options) -> None:
    """Refuses impossible numbers before any data are read.

    Raises:
        ValueError: naming the option, the value, and what it may be.
    """
    least = {"inner_steps": 0, "eval_steps": 1, "eval_tasks": 2, "seed": 0, "shift": 0}
    least |= {"split_seed": 0, "ways": 2, "train_ways": 2}
    for name, kind in typing.get_type_hints(type(chosen)).items():
        value, option = getattr(chosen, name), flag(name)
        if value is None:
            continue
        if int in alternatives(kind):
            refusals.check_at_least(option, value, least.get(name, 1))
            if value > MOST:
                raise ValueError(f"{option} must be at most {MOST}, got {value}")
        elif float in alternatives(kind):
            _check_number(name, option, value)
    checkpoint_interval(chosen.checkpoint_every)
    if isinstance(chosen, ImageOptions):
        _check_head_and_rates(chosen)
        if chosen.shift >= (side := chosen.picture[0]):
            raise ValueError(f"--shift must be below a picture's {side} pixels, got {chosen.shift}")
    if chosen.tensorboard and not importlib.util.find_spec("tensorboardX"):
        raise ValueError('--tensorboard needs tensorboardX: pip install "fomaml-jax[tensorboard]"')


def _check_number(name: str, option: str, value: float) -> None:
    if name == "max_left_out":
        if not 0 <= value <= 1:
            raise ValueError(f"{option} must be a share between 0 and 1, got {value}")
    elif name in ("validation", "test"):
        if not 0 <= value < 1 or (name == "test" and not value):
            raise ValueError(f"{option} must be a share of the groups below 1, got {value}")
    elif name == "affine":
        if not 0 < value < 0.5:
            raise ValueError(f"{option} must be above 0 and below 0.5, got {value}")
    elif not (math.isfinite(value) and value > 0):
        raise ValueError(f"{option} must be a finite number above 0, got {value}")


def _check_head_and_rates(chosen: ImageOptions) -> None:
    if chosen.head == "learned" and chosen.train_ways not in (None, chosen.ways):
        raise ValueError(
            f"--train-ways must be --ways ({chosen.ways}) where the head is learned, got "
            f"{chosen.train_ways}"
        )
    if chosen.learned_rates and not chosen.inner_steps:
        raise ValueError("--inner-steps must be at least 1 with --learned-rates, got 0")


def checkpoint_interval(text: str) -> int | datetime.timedelta:
    """Steps, or time.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"(\d{1,9})(s|min|h|)", text)
    if not found or int(found[1]) == 0:
        raise ValueError(
            "--checkpoint-every must be steps (a number above 0) or time (30s, 5min, 1h), got "
            f"{text!r}"
        )
    count, unit = int(found[1]), found[2]
    seconds = {"s": 1, "min": 60, "h": 3600}
    return datetime.timedelta(seconds=count * seconds[unit]) if unit else count


def check_resumed(saved: Options, now: Options) -> None:
    """Refuses to go on with a run under other options.

    Raises:
        ValueError: naming the first that differs.
    """
    for field in dataclasses.fields(saved):
        before, after = (getattr(one, field.name) for one in (saved, now))
        if before != after and field.name not in FREE:
            raise ValueError(
                f"{flag(field.name)}: the run was started with {before}, got {after}; leave it "
                "out to resume the run, or start another"
            )


def check_same_tasks(one: Options, other: Options) -> None:
    """Refuses to compare runs that are judged on different tasks.

    Raises:
        ValueError: naming what differs.
    """
    names = ["ways", "shots", "split", "size", "channels", "statistics", "target"]
    if isinstance(one, ImageOptions):  # of others queries are of training alone
        names.append("queries")
    kinds = {"data set": tuple(name_of(run) for run in (one, other))}
    kinds |= {
        "--" + name: tuple(getattr(run, name, None) for run in (one, other)) for name in names
    }
    for name, (here, there) in kinds.items():
        if here != there:
            raise ValueError(
                f"the runs are judged on different tasks, {name} is {here} and {there}"
            )


def check_judged_otherwise(chosen: Options, changes: dict[str, Any]) -> None:
    """Refuses other tasks than a run can be judged on.

    Raises:
        ValueError: naming the option.
    """
    images = isinstance(chosen, ImageOptions)
    for name in ("ways", "queries", "statistics"):
        if name in changes and not images:
            why = "is judged on a fixed number" if name == "queries" else "has no classes"
            raise ValueError(f"--{name}: {name_of(chosen)} {why}")
    for name in ("eval_tasks", "seed"):
        if name in changes and isinstance(chosen, Table):
            raise ValueError(f"{flag(name)}: a run of table is judged on all its unseen groups")
    ways = changes.get("ways")
    if images and chosen.head == "learned" and ways not in (None, chosen.ways):
        raise ValueError(f"--ways: the run's head is learned for {chosen.ways}, got {ways}")
