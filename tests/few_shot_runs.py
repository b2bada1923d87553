"""What tests of adaptation to a user's pictures share: small runs in folders, and drawings."""

import contextlib
import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image, ImageDraw

from fomaml_jax import classifiers, models, options, runs

SMALL = options.Glyphs(width=4, inner_steps=2, ways=3, learned_rates=True)
SHAPES = ("cross", "dash", "ring", "stroke")


class SmallNetwork(nn.Module):
    """What compiles in no time, and in which, as in the real one, examples see their batch."""

    outputs: int
    width: int

    @nn.compact
    def __call__(self, x, weights=None):
        x = nn.Dense(4 * self.width, name="body")(x.reshape(len(x), -1))
        x = nn.relu(models.BatchStatistics(name="norm")(x, weights))
        return nn.Dense(self.outputs, kernel_init=nn.initializers.zeros, name="head")(x)


@contextlib.contextmanager
def small_networks():
    """In place of four blocks of convolutions."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(classifiers, "network", lambda chosen, n: SmallNetwork(n, chosen.width))
        yield


def write_run(folder, chosen=SMALL):
    """A run of a network that was not trained, but that moves all its layers."""
    side = chosen.size if isinstance(chosen, options.Folder) else 28
    channels = getattr(chosen, "channels", 1)
    params = classifiers.initial_params(chosen, chosen.ways, (side, side, channels))
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / runs.CONFIG, options.to_json(chosen))
    runs.save_parameters(folder, classifiers.shared_of(chosen, params))
    return folder


def draw(shape, rng, *, side=56, ground=255, pen=0):
    """A shape somewhere near the middle, as no other is by a hand."""
    picture = Image.new("L", (side, side), ground)
    pencil = ImageDraw.Draw(picture)
    x, y = rng.uniform(0.42, 0.58, 2) * side
    r = rng.uniform(0.2, 0.3) * side
    width = max(1, side // 14)
    off = rng.uniform(-0.2, 0.2) * r
    if shape in ("cross", "dash"):
        pencil.line((x - r, y - off, x + r, y + off), pen, width)
    if shape in ("cross", "stroke"):
        pencil.line((x - off, y - r, x + off, y + r), pen, width)
    if shape == "ring":
        pencil.ellipse((x - r, y - r, x + r, y + r + off), None, pen, width)
    return picture


def draw_folder(folder, shapes, count, *, seed=0, **how):
    """So many drawings of each shape, a folder each."""
    rng = np.random.default_rng(seed)
    for shape in shapes:
        (folder / shape).mkdir(parents=True)
        for k in range(count):
            draw(shape, rng, **how).save(folder / shape / f"{k}.png")
    return folder


def small_classifier(**changes):
    """With a network that was not trained."""
    chosen = dataclasses.replace(SMALL, **changes)
    params = classifiers.initial_params(chosen, chosen.ways, (28, 28, 1))
    noise = jax.random.key(1)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(noise, x.shape), params)
    return classifiers.Classifier(chosen, classifiers.shared_of(chosen, params), (28, 28, 1))
