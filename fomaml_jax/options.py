"""What `fomaml-jax train` can be asked: one dataclass a data set, every field an option."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from fomaml_jax.batch_statistics import TRANSDUCTIVE, Statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options that every data set shares."""

    steps: int
    """Outer steps."""
    tasks_per_step: int
    """Tasks in a meta-batch."""
    inner_steps: int
    """Steps of adaptation while training."""
    eval_steps: int | None = None
    """Steps of adaptation on unseen tasks, reported one by one; as many as inner steps unless
    given."""
    inner_rate: float
    """Learning rate of adaptation."""
    rate: float
    """Learning rate of the outer optimizer, Adam."""
    shots: int
    """Examples to adapt on (a class)."""
    queries: int
    """Examples to be judged on (a class)."""
    eval_tasks: int = 1000
    """Unseen tasks in the final evaluation."""
    seed: int = 0
    """Seed of everything random."""
    out: Path | None = None
    """Folder of the run, new or empty; runs/<data>-<time> unless given."""
    compare: bool = True
    """Also train and print the baselines."""
    minutes: float | None = None
    """Training ends after so many minutes, those before it was resumed included, if its steps are
    not done by then."""
    patience: int | None = None
    """Training ends after so many validations without an improvement (there are at most 20); the
    best parameters are then the result."""
    checkpoint_every: str = "2min"
    """Steps (a number), or time (30s, 5min, 1h), between two checkpoints."""
    max_left_out: float = 0.5
    """A run has diverged if it leaves out more than this share of the tasks, as not finite, for ten
    steps in a row."""
    apply_if_finite: int | None = None
    """Outer steps with a gradient that is not finite are skipped, up to so many in a row."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard into the run's folder (needs tensorboardX)."""
    overwrite: bool = False
    """Replace the run that is in the folder."""
    tune: bool = False
    """Measure the ways to run a step on this machine first, and train with the fastest."""
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs, so that the next run starts sooner."""

    @property
    def adaptation_steps(self) -> int:
        """Steps of adaptation on unseen tasks."""
        return self.inner_steps if self.eval_steps is None else self.eval_steps

    @property
    def setting(self) -> str:
        """The problem in a few words."""
        return f"{self.shots} points"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """Options of few-shot classification."""

    ways: int = 5
    """Classes of an unseen task."""
    shots: int = 1
    """Support examples a class of an unseen task."""
    queries: int = 5
    """Query examples a class."""
    statistics: Statistics = TRANSDUCTIVE
    """What a query picture is normalised with, in training and in the results: the other query
    pictures, or the support set alone, which takes (support pictures + 1) times as long. The last
    accuracy is reported either way."""
    train_ways: int | None = None
    """Classes in a training episode; 20, or all if there are fewer, unless given. More make harder
    tasks and better features, and a head that starts at zero fits any number of classes. One that
    is learned fits as many as it was trained with: then they are the ways."""
    train_shots: int = 1
    """Support examples a class in a training episode."""
    steps: int = 2000
    tasks_per_step: int = 4
    inner_steps: int = 3
    inner_rate: float = 0.1
    """Learning rate of adaptation, all layers but the head."""
    head_rate: float = 0.15
    """Learning rate of adaptation, the linear head, for each of the ways."""
    rate: float = 1e-2
    shift: int = 2
    """Training pictures are shifted at random by up to so many pixels."""
    affine: float | None = None
    """Training pictures are turned, slanted and stretched at random, each entry of the matrix off
    the identity's by up to this; not unless given."""
    width: int = 32
    """Channels of the four convolutions."""
    widening: bool = False
    """The third convolution has twice the channels, and the last four times."""
    pooling: Literal["stride", "max"] = "stride"
    """How a block halves the picture."""
    features: Literal["scaled", "flat", "mean"] = "scaled"
    """What the head sees of the last block: scaled to one norm, as it is, or its mean over the
    picture."""
    head: Literal["zero", "learned"] = "zero"
    """The linear head starts at zero in every task, or is meta-learned with the rest, for as many
    classes as are trained with."""
    learned_rates: bool = False
    """Learn the rates of adaptation along, one for every tensor and step, at an outer rate of 0.01
    for their logarithms; those given are the first."""
    inner_clip: float | None = None
    """Largest norm of an inner gradient, all layers together; no bound unless given."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the outer rate goes: down to a hundredth, or not at all."""
    mirror: bool = False
    """Train on mirrored pictures too, as classes of their own."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in while training; parameters, sums and evaluation stay float32.
    bfloat16 is faster on TPU and recent GPUs, not on CPU."""

    @property
    def setting(self) -> str:
        """The problem in a few words."""
        return f"{self.ways}-way {self.shots}-shot"

    @property
    def picture(self) -> tuple[int, int, int]:
        """The shape of a picture."""
        return 28, 28, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glyphs(ImageOptions):
    """Printed letters of scripts never seen in training: needs no download."""

    steps: int = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Omniglot(ImageOptions):
    """Handwritten characters of 50 alphabets (Lake et al. 2015)."""

    recipe: Literal["quick", "paper", "best"] = "quick"
    """Where options that are not given come from: some minutes on two cores, the MAML paper's
    setting as far as it is known, or what reaches the highest accuracy."""
    steps: int = 2500
    inner_steps: int = 2

    path: Path | None = None
    """Folder of the two archives or of the extracted folders; else $FOMAML_JAX_DATA, the cache, a
    download."""
    offline: bool = False
    """Never download."""
    split: Literal["vinyals", "background"] = "vinyals"
    """Which characters are unseen: those of Vinyals et al. 2016, or the evaluation alphabets."""
    turns: Literal["classes", "drawn"] = "classes"
    """Characters turned by 90 degrees while training: classes of their own, or a turn drawn for
    each class of an episode. Unseen tasks always have the latter."""
    resample: Literal["smooth", "nearest"] = "smooth"
    """How drawings are made smaller: in grey, or by picking the nearest pixels, as in the MAML
    authors' code."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder(ImageOptions):
    """Your own pictures: one folder a class, or train/ and test/ folders of such.

    With fewer validation classes than ways, training is followed on its own classes.
    """

    path: Path
    """The folder."""
    size: int = 28
    """Pictures are resized to size x size."""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """Files that are no pictures: stop at the first, or leave them out and say so."""
    duplicates: Literal["refuse", "keep"] = "refuse"
    """The same file in two splits or twice in a class: stop, or keep it and be judged on what was
    trained on, or given."""

    @property
    def picture(self) -> tuple[int, int, int]:
        """The shape of a picture."""
        return self.size, self.size, self.channels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinusoid(Options):
    """Regression of sine waves from a few points, the MAML paper's toy problem."""

    shots: int = 5
    """Points to adapt on."""
    queries: int = 10
    """Points to be judged on while training; 100 in the evaluation."""
    steps: int = 150_000
    tasks_per_step: int = 25
    inner_steps: int = 5
    eval_steps: int | None = 10
    inner_rate: float = 0.01
    inner_clip: float = 10.0
    """Largest norm of an inner gradient: without it some tasks diverge."""
    rate: float = 1e-3
    compare: bool = False
    """Also train second-order MAML and joint pre-training, on as many tasks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(Options):
    """Your own table, a CSV file whose groups (patients, machines, places) are tasks.

    Whole groups are unseen, and of each its first rows are given and all later ones predicted.
    """

    file: Path
    """The CSV file, its first line the names of the columns."""
    group: str
    """The column that says which group a row is of."""
    target: str
    """The column to predict, of numbers."""
    features: tuple[str, ...]
    """The columns to predict it from, of numbers."""
    time: str | None = None
    """The column to order a group's rows by, of numbers or dates; the file's order unless given."""
    missing: Literal["drop", "mean"] = "drop"
    """Missing features: leave the row out, or put the mean of the training groups."""
    validation: float = 0.15
    """Share of the groups to follow training on."""
    test: float = 0.25
    """Share of the groups to be judged on, each once."""
    split_seed: int = 0
    """Seed of which groups these are."""
    shots: int = 5
    """Rows to adapt on, the first of a group."""
    queries: int = 20
    """Rows to be judged on while training, random later ones; all of them in the evaluation."""
    eval_tasks: int = 1000
    """Means nothing here: every unseen group is judged, once."""
    steps: int = 2000
    tasks_per_step: int = 8
    inner_steps: int = 5
    inner_rate: float = 0.01
    inner_clip: float = 10.0
    """Largest norm of an inner gradient."""
    rate: float = 1e-3

    @property
    def setting(self) -> str:
        """The problem in a few words."""
        return f"{self.target} by {self.group} from {self.shots} rows"


def anywhere(chosen: Options) -> Options:
    """The options with the places of data and compiled programs as any other folder knows them."""
    names = "path", "file", "compilation_cache"
    places = {name: getattr(chosen, name, None) for name in names}
    return dataclasses.replace(chosen, **{n: p.resolve() for n, p in places.items() if p})


DATA_SETS: dict[str, type[Options]] = {
    "glyphs": Glyphs,
    "omniglot": Omniglot,
    "sinusoid": Sinusoid,
    "folder": Folder,
    "table": Table,
}


ACCURACY = "accuracy"
"""The metric of classifiers; those of others are errors."""


def metric_of(chosen: Options) -> str:
    """What a run is judged by."""
    if isinstance(chosen, Table):
        return f"mean absolute error of {chosen.target}"
    return ACCURACY if isinstance(chosen, ImageOptions) else "mean squared error"


def name_of(options: Options) -> str:
    """The data set's name on the command line."""
    return next(name for name, kind in DATA_SETS.items() if type(options) is kind)


def flag(name: str) -> str:
    """An option as it is typed."""
    return "--" + name.replace("_", "-")


FREE = (
    "path",
    "file",
    "duplicates",
    "offline",
    "compilation_cache",
    "compare",
    "checkpoint_every",
    "minutes",
)
"""Options that may differ when a run is resumed: they do not change what it learns."""


UNSHOWN = ("out", "overwrite", "tensorboard")
"""Options about where a run goes, and not about what it is."""


def identity(options: Options) -> dict[str, Any]:
    """What makes a run the run it is, as plain JSON: a checkpoint is of one such alone."""
    plain = to_json(options)
    return {name: value for name, value in plain.items() if name not in (*FREE, *UNSHOWN)}


def to_json(options: Options) -> dict[str, Any]:
    """The options as plain JSON, the data set's name first."""
    plain = dataclasses.asdict(options)
    return {"dataset": name_of(options)} | json.loads(json.dumps(plain, default=str))


def from_json(config: dict[str, Any]) -> Options:
    """The inverse of `to_json`.

    Raises:
        ValueError: for an unknown data set or option.
    """
    config, name = dict(config), str(config.get("dataset"))
    if name == "folder":  # a run from before there was the choice has kept them
        config.setdefault("duplicates", "keep")
    kind = DATA_SETS.get(name)
    if kind is None:
        raise ValueError(f"the configuration names none of the data sets {', '.join(DATA_SETS)}")
    del config["dataset"]
    fields = {f.name: f for f in dataclasses.fields(kind)}
    # Options that are younger than the run have their default, which is what was done before.
    needed = {name for name, f in fields.items() if f.default is dataclasses.MISSING}
    strange = (set(config) - set(fields)) | (needed - set(config))
    if strange:
        raise ValueError(
            "the configuration's options differ from this version's: " + ", ".join(sorted(strange))
        )
    expected = typing.get_type_hints(kind)
    for name, value in config.items():
        if not _fits(value, expected[name]):
            raise ValueError(f"the configuration has {json.dumps(value)} for {name}")
    paths: dict[str, Any] = {
        n: Path(x) for n, x in config.items() if x and Path in alternatives(expected[n])
    }
    several: dict[str, Any] = {n: tuple(x) for n, x in config.items() if isinstance(x, list)}
    return kind(**(config | paths | several))


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The types that a union is of, or the one."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    """Whether plain JSON can be an option of that type."""
    if len(several := alternatives(kind)) > 1:
        return any(_fits(value, one) for one in several)
    if isinstance(value, bool) or kind is bool:
        return kind is bool and isinstance(value, bool)
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list) and all(_fits(x, typing.get_args(kind)[0]) for x in value)
    accepted: dict[Any, Any] = {float: int | float, Path: str}
    return isinstance(value, accepted.get(kind, kind))
