"""`fomaml-jax adapt` with the network that comes along, on pictures that it was never trained on.

Characters of Omniglot's evaluation alphabets that are in the test split of Vinyals et al. are
written as PNG pictures, black on white, one folder a character, and read as a user's would be. A
task is five of them, with one or five examples each, to tell apart in three more pictures of each;
three pictures of each of five other characters are strangers. Nothing is turned. Each query is
normalised beside the support set alone. Beside it: the nearest class mean on pixels, and on the
features of the same network before it was trained. The same with scikit-learn's digits (`--pictures
digits`): 1,797 by 13 people, the test part of UCI's set, 8 x 8 pixels in 17 tones, written at 48 x
48, five known and five strangers. Nothing was trained on them, but how drawings are framed was
found with their help. And the same with capital letters in the 16 upright and slanted, thin and
bold faces that come with matplotlib (`--pictures letters`), each of a random size, at a random
place and turned by up to 10 degrees: nothing was chosen by these. What framing does is seen beside
pictures that are only made smaller (`--unframed`).

Of "none of these": how many of the known are taken for strangers, how many strangers for known, and
the chance that a known picture is more alike to its nearest class than a stranger (AUROC).
Confidence is the mean probability of what is predicted for known pictures, to be held against the
accuracy. Intervals are over tasks. Times are of the compiled functions, one JAX device, medians
over tasks; the command is timed whole, in a process of its own, by the clock and by what the
processor spent on it. The load average is that of the machine as the command was timed.
The tables took `--tasks 200 100`, and then `--parts share command`; where the threshold is put was
tried on 100 tasks.
"""

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import fomaml_jax as fj
from fomaml_jax import classifiers, heads
from fomaml_jax.batch_statistics import Beside
from fomaml_jax.datasets import ImageClasses, Pictures

QUERIES = 3
"""Pictures to be judged on, of each class and of each stranger."""

SHARES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
"""Of the way from strangers to a picture itself, for the threshold with one example a class."""

LOAD = "load average"
"""Of the machine while the command is timed: processes that want a core, this one included."""

CHARACTERS, DIGITS, LETTERS = "characters", "digits", "letters"

SIZE = 105
"""Of Omniglot's drawings, which are written as they are."""


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", choices=[CHARACTERS, DIGITS, LETTERS], default=CHARACTERS)
    parser.add_argument("--unframed", action="store_true", help="drawings as large as they are")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--tasks", type=int, nargs="+", default=[200], help="for each of the shots")
    parser.add_argument("--characters", type=int, help="so many alone; all unless given")
    parser.add_argument(
        "--parts", nargs="+", choices=["tasks", "share", "command"], default=["tasks"]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/ unless given")
    asked = parser.parse_args()
    out = asked.out or common.RESULTS / f"rare_objects-{jax.devices()[0].platform}.json"
    tasks = asked.tasks * len(asked.shots) if len(asked.tasks) == 1 else asked.tasks
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        classes = CLASSES[asked.pictures]()
        found = read(classes, Path(folder), asked.characters, framed=not asked.unframed)
        for shots, count in zip(asked.shots, tasks, strict=True):
            rng = np.random.default_rng((asked.seed, shots))
            pictures = asked.pictures + ", unframed" * asked.unframed
            asked_for = {"pictures": pictures, "ways": asked.ways, "shots": shots}
            row = next((r for r in common.rows_of(out) if _setting(r) == _setting(asked_for)), {})
            row = asked_for | row
            if "tasks" in asked.parts:
                row |= judged(found, asked.ways, shots, count, rng)
            if "share" in asked.parts and shots == 1:  # with more, it is not put there
                with tempfile.TemporaryDirectory() as other:
                    validation = fj.datasets.omniglot(size=SIZE).validation
                    validation = read(validation, Path(other), asked.characters)
                row |= shares(validation, asked.ways, count, rng)
            if "command" in asked.parts:
                row |= commanded(found, asked.ways, shots, rng)
            rows = sorted([*common.others(out, row, _setting), row], key=_setting)
            common.write("rare_objects", rows, out)
    print("\n" + "\n\n".join(page(rows)))


def characters() -> ImageClasses:
    """Omniglot's test split, as it was drawn."""
    return fj.datasets.omniglot(size=SIZE).test


def digits() -> ImageClasses:
    """Scikit-learn's, light on dark, as many of each."""
    from sklearn import datasets  # pyright: ignore[reportMissingImports]

    found = datasets.load_digits()
    fewest = np.bincount(found.target).min()
    images = np.stack([found.images[found.target == c][:fewest] for c in range(10)])
    pixels = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    large = [np.asarray(Image.fromarray(x).resize((48, 48))) for x in pixels]
    pixels = np.stack(large).reshape(10, fewest, 48, 48, 1)
    return ImageClasses(pixels, np.full(10, fewest, np.int32), tuple("0123456789"))


def letters() -> ImageClasses:
    """Capitals in the faces that come with matplotlib, here and there on a sheet of paper."""
    import matplotlib

    folder, rng = Path(matplotlib.get_data_path()) / "fonts" / "ttf", np.random.default_rng(0)
    faces = sorted(
        file
        for family in ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
        for file in folder.glob(f"{family}*.ttf")
        if file.stem.removeprefix(family).replace("-", "") in SLANTS_AND_WEIGHTS
    )

    def sheet(letter: str, face: Path) -> np.ndarray:
        side, size = 240, int(rng.integers(50, 150))
        ink = Image.new("L", (side, side))
        place = (side / 2 + rng.uniform(-30, 30), side / 2 + rng.uniform(-30, 30))
        ImageDraw.Draw(ink).text(place, letter, 255, ImageFont.truetype(face, size), "mm")
        return np.asarray(ink.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC))

    names = tuple(string.ascii_uppercase)
    images = np.stack([[sheet(letter, face) for face in faces] for letter in names])
    return ImageClasses(images[..., None], np.full(len(names), len(faces), np.int32), names)


SLANTS_AND_WEIGHTS = {
    *("", "Bold", "Oblique", "BoldOblique", "Italic", "BoldItalic"),
    *("Bol", "BolIta"),
}
"""Of the faces, as their files name them; others are of symbols or for large print."""

CLASSES: dict[str, Callable[[], ImageClasses]] = {
    CHARACTERS: characters,
    DIGITS: digits,
    LETTERS: letters,
}


def read(
    classes: ImageClasses, folder: Path, characters: int | None, *, framed: bool = True
) -> Pictures:
    """Writes drawings as PNG pictures, one folder a character, and reads them as a user's."""
    for images, name in list(zip(classes.images, classes.names, strict=True))[:characters]:
        home = folder / name.replace("/", " ")
        home.mkdir()
        for drawer, ink in enumerate(images[..., 0], start=1):
            Image.fromarray(255 - ink).save(home / f"{drawer:02}.png")
    if framed:
        return fj.datasets.few_pictures(folder)
    found = fj.datasets.few_pictures(folder, background="as is")
    return found._replace(images=255 - found.images)


def drawn(found: Pictures, ways: int, shots: int, rng: np.random.Generator) -> tuple[Any, ...]:
    """Where in the folder a random task is: support, queries of the same classes, strangers."""
    assert found.labels is not None
    classes = rng.choice(len(found.names), 2 * ways, replace=False)
    places = [rng.permutation(np.flatnonzero(found.labels == c)) for c in classes]
    support = np.concatenate([of_class[:shots] for of_class in places[:ways]])
    queries = np.concatenate([of_class[shots : shots + QUERIES] for of_class in places[:ways]])
    strangers = np.concatenate([of_class[:QUERIES] for of_class in places[ways:]])
    return support, queries, strangers


def judged(
    found: Pictures, ways: int, shots: int, count: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Mean and interval of everything over random tasks."""
    classifier = fj.load_classifier("pretrained:omniglot")
    names = tuple(map(str, range(ways)))
    plain = jax.jit(lambda x, y: classifier.adapt((x, y), ways=ways))
    adapt = jax.jit(lambda x, y: fj.adapt_classifier(classifier, (x, y), names=names))
    predict = jax.jit(fj.AdaptedClassifier.predict)
    untrained = jax.jit(untrained_features(classifier))
    y, asked = np.repeat(np.arange(ways), shots), np.repeat(np.arange(ways), QUERIES)
    per_task, seconds = [], []
    known = slice(0, len(asked))
    for _ in range(count):
        support, *others = drawn(found, ways, shots, rng)
        x, queries = found.images[support], found.images[np.concatenate(others)]
        clock = [time.perf_counter()]
        jax.block_until_ready(plain(x, y))
        clock.append(time.perf_counter())
        adapted = jax.block_until_ready(adapt(x, y))
        clock.append(time.perf_counter())
        said = jax.device_get(predict(adapted, queries))
        clock.append(time.perf_counter())
        seconds.append(np.diff(clock))
        seen, of_queries = jax.device_get(untrained(x, queries[known]))
        pixels = x.reshape(len(x), -1) / 255, queries[known].reshape(len(asked), -1) / 255
        per_task.append(
            {
                "accuracy": np.mean(said.probabilities[known].argmax(1) == asked),
                "pixels": np.mean(nearest_mean(*pixels, y) == asked),
                "untrained features": np.mean(nearest_mean(seen, of_queries, y) == asked),
                "known rejected": 1 - said.is_known[known].mean(),
                "strangers accepted": said.is_known[len(asked) :].mean(),
                "auroc": auroc(said.similarity[known], said.similarity[len(asked) :]),
                "confidence": said.probabilities[known].max(1).mean(),
            }
        )
    middle = np.median(np.asarray(seconds)[1:], axis=0) if count > 1 else seconds[0]
    timed = dict(zip(("adapt", "adapt and calibrate", "predict"), map(float, middle), strict=True))
    return {
        "tasks": count,
        "classes": len(found.names),
        "seconds": timed | {"queries": 2 * len(asked)},
        **{name: summary([task[name] for task in per_task]) for name in per_task[0]},
    }


def shares(found: Pictures, ways: int, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """Errors by where the threshold is put with one example a class, on validation characters."""
    classifier = fj.load_classifier("pretrained:omniglot")
    names, y = tuple(map(str, range(ways))), np.arange(ways)
    adapt = jax.jit(lambda x: fj.adapt_classifier(classifier, (x, y), names=names))
    predict = jax.jit(fj.AdaptedClassifier.predict)
    errors = {share: {"known rejected": [], "strangers accepted": []} for share in SHARES}
    for _ in range(count):
        support, *others = drawn(found, ways, 1, rng)
        adapted = adapt(found.images[support])
        said = jax.device_get(predict(adapted, found.images[np.concatenate(others)]))
        known, strangers = np.split(said.similarity, 2)
        of_strangers = float(adapted.calibration.strangers)
        for share, errors_there in errors.items():
            threshold = of_strangers + share * (1 - of_strangers)
            errors_there["known rejected"].append(np.mean(known < threshold))
            errors_there["strangers accepted"].append(np.mean(strangers >= threshold))
    return {
        "share": {
            str(share): {kind: summary(values) for kind, values in errors_there.items()}
            for share, errors_there in errors.items()
        }
    }


def untrained_features(classifier: fj.Classifier) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """What the head would see of support and queries, had the network not been trained."""
    chosen = classifier.chosen
    params = classifiers.initial_params(chosen, 2, classifier.picture)
    size = params["params"][heads.HEAD]["kernel"].shape[0]
    identity = {"kernel": jnp.eye(size), "bias": jnp.zeros(size)}
    params = heads.with_head(heads.without_head(params), identity)
    predict = classifiers.predictor(chosen)

    def features(x, queries):
        x, queries = (classifiers.as_pictures(part, classifier.picture) for part in (x, queries))
        return predict(params, x), predict(params, Beside(x, queries))

    return features


def nearest_mean(support: np.ndarray, queries: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The class whose mean is nearest to each query."""
    means = np.stack([support[y == c].mean(0) for c in range(y.max() + 1)])
    return ((queries[:, None] - means) ** 2).sum(-1).argmin(1)


def auroc(known: np.ndarray, strangers: np.ndarray) -> float:
    """The chance that one of the known is above a stranger, a tie counting half."""
    apart = np.sign(known[:, None] - strangers)
    return float((apart + 1).mean() / 2)


def summary(values: list[float]) -> dict[str, float]:
    """Mean and 95 % interval of the mean."""
    spread = statistics.stdev(map(float, values)) if len(values) > 1 else 0.0
    return {
        "mean": float(statistics.mean(map(float, values))),
        "ci95": 1.96 * spread / math.sqrt(len(values)),
    }


def commanded(
    found: Pictures, ways: int, shots: int, rng: np.random.Generator, repeats: int = 2
) -> dict[str, Any]:
    """The whole command on random tasks in folders: its seconds, of clock and processor."""
    timed = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as home:
            words = task_folders(found, drawn(found, ways, shots, rng), Path(home))
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            start = time.perf_counter()
            subprocess.run(words, check=True, capture_output=True)
            clock = time.perf_counter() - start
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            result = json.loads((Path(home) / "out" / "result.json").read_text())
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        timed.append({"clock": clock, "processor": processor, "accuracy": result["accuracy"]})
    load = os.getloadavg()[0]
    return {"command": {"runs": timed, LOAD: load}}


def task_folders(found: Pictures, task: tuple[Any, ...], home: Path) -> list[str]:
    """Copies a task's pictures to folders; the command for it."""
    support, *others = task
    for part, places in (("support", support), ("query", np.concatenate(others))):
        for place in places:
            file = found.files[place]
            (home / part / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, home / part / file.parent.name / file.name)
    program = [sys.executable, "-m", "fomaml_jax", "adapt", "pretrained:omniglot"]
    folders = [f"--{part}={home / part}" for part in ("support", "query", "out")]
    return [*program, *folders]


def percent(name: str) -> Callable[[dict[str, Any]], str]:
    """A cell: mean and interval in percent."""
    return lambda row: f"{100 * row[name]['mean']:.1f} ± {100 * row[name]['ci95']:.1f}"


def _setting(row: dict[str, Any]) -> str:
    return f"{row['pictures']}, {row['ways']}-way {row['shots']}-shot"


def _of_command(row: dict[str, Any], clock: str) -> str:
    runs = row.get("command", {}).get("runs", [])
    return f"{statistics.median(run[clock] for run in runs):.1f}" if runs else "-"


Columns = dict[str, Callable[[dict[str, Any]], str]]

TABLES: dict[str, Columns] = {
    "Accuracy, %, of known pictures:": {
        "setting": _setting,
        "adapted": percent("accuracy"),
        "its confidence": percent("confidence"),
        "class mean, pixels": percent("pixels"),
        "class mean, untrained features": percent("untrained features"),
        "tasks": lambda row: str(row["tasks"]),
    },
    "None of these, %:": {
        "setting": _setting,
        "known rejected": percent("known rejected"),
        "strangers accepted": percent("strangers accepted"),
        "AUROC": percent("auroc"),
    },
    "Time:": {
        "setting": _setting,
        "adapt, ms": lambda row: f"{1e3 * row['seconds']['adapt']:.0f}",
        "with threshold, ms": lambda row: f"{1e3 * row['seconds']['adapt and calibrate']:.0f}",
        "predict, ms": lambda row: f"{1e3 * row['seconds']['predict']:.0f}",
        "pictures": lambda row: str(row["seconds"]["queries"]),
        "command, s": lambda row: _of_command(row, "clock"),
        "of processor, s": lambda row: _of_command(row, "processor"),
        "load average": lambda row: f"{row['command'][LOAD]:.0f}" if "command" in row else "-",
    },
}


OF_SHARES: Columns = {
    "of the way from strangers to 1": lambda row: row["share"],
    "known rejected": percent("known rejected"),
    "strangers accepted": percent("strangers accepted"),
}


def compact(rows: list[dict[str, Any]]) -> str:
    """How good it is, in percent."""
    accuracy, none_of_these, _ = TABLES.values()
    return common.table(accuracy | none_of_these, rows)


def page(rows: list[dict[str, Any]]) -> list[str]:
    """The tables of the page."""
    tables = [f"{name}\n\n{common.table(columns, rows)}" for name, columns in TABLES.items()]
    tried = [
        {"share": share, **found} for row in rows for share, found in row.get("share", {}).items()
    ]
    if tried:
        title = "Where the threshold is put with one example a class, validation characters, %:"
        tables.append(f"{title}\n\n{common.table(OF_SHARES, tried)}")
    return tables


if __name__ == "__main__":
    main()
