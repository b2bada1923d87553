"""`fomaml-jax` in this process, and what tests of it share: a small network on small pictures."""

import contextlib
import dataclasses
import fcntl
import io
import json
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from PIL import Image

from fomaml_jax import cli, options, problems, runs
from fomaml_jax.datasets import ImageClasses

TINY = ("--steps", "3", "--tasks-per-step", "2", "--eval-tasks", "4")
SMALL = (*TINY, "--queries", "2", "--inner-steps", "1", "--width", "4")
SMALL_GLYPHS = (*SMALL, "--train-ways", "4", "--ways", "3")
SMALL_FOLDER = (*SMALL, "--train-ways", "2", "--ways", "2")
FILES = {
    *("config.json", "parameters.npz", "metrics.jsonl", "checkpoints", "result.json"),
    "per_task.npy",
    "learning_curve.png",
}


class SmallNetwork(nn.Module):
    """A network in which, as in the real one, examples see their batch."""

    outputs: int
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="body")(x.reshape(len(x), -1))
        x = nn.relu(x - x.mean(0, keepdims=True))
        return nn.Dense(self.outputs, kernel_init=nn.initializers.zeros, name="head")(x)


def noise(classes):
    images = np.random.default_rng(classes).integers(0, 256, (classes, 6, 8, 8, 1))
    names = tuple(map(str, range(classes)))
    return ImageClasses(images.astype(np.uint8), np.full(classes, 6, np.int32), names)


@dataclasses.dataclass
class Finished:
    code: Any
    out: str
    err: str
    folder: Path = Path()

    @property
    def result(self):
        return json.loads((self.folder / "result.json").read_text())

    @property
    def metrics(self):
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def call(*words: str | Path) -> Finished:
    """`fomaml-jax`, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
    return Finished(code, out.getvalue(), err.getvalue())


def trained(folder, *words):
    run = call("train", *words, "--out", folder)
    assert run.code == 0, run.err
    return dataclasses.replace(run, folder=folder)


def rows_of(table):
    """Name, mean and interval of each row, as printed."""
    rows = re.findall(r"^  (\S.*?)  +([\d.]+)(?: %)? ± ([\d.]+)$", table, re.MULTILINE)
    return [(name, float(mean), float(ci95)) for name, mean, ci95 in rows]


@contextlib.contextmanager
def held(folder):
    """Another process trains in a folder."""
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    (folder / ".lock").unlink(missing_ok=True)


def paint_classes(folder, count):
    rng = np.random.default_rng(0)
    for c in range(count):
        (folder / f"class {c}").mkdir(parents=True)
        for e in range(3):
            pixels = rng.integers(0, 256, (10, 12, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"class {c}" / f"{e}.png")
    return folder


def everything(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def has_moved(folder):
    """Whether the saved parameters are not those that training started from."""
    first = problems.build(options.from_json(runs.read_config(folder))).params
    saved = runs.load_parameters(folder, first)
    return any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (first, saved)), strict=True))


def is_picture(path):
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and np.asarray(image.convert("L")).std() > 1
