"""The same network in Flax Linen, NNX, Equinox and Haiku, unchanged, against `models.conv4`.

Each loss is wrapped in one call, `matmul_convolutions`; nothing else is done for speed.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import common
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from common import INNER_RATE, Setting
from flax import nnx

import fomaml_jax as fj
from fomaml_jax.devices import use_every_core


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = common.argument_parser(__doc__, settings=["5w1s", "pool"], repeats=9)
    asked = parser.parse_args()
    use_every_core()
    rows = []
    for name in asked.settings:
        rows += measure(common.setting_of(name, asked), asked.repeats)
    print(common.table(COLUMNS, rows))
    common.write("frameworks", rows, asked.out)


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "setting": lambda row: row["setting"],
    "network": lambda row: row["network"],
    "ms": lambda row: common.milliseconds(row["time"]),
    "times models.conv4": lambda row: common.times(row["times_conv4"]),
}


def measure(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """A row for every framework."""
    _, _, tasks = common.image_problem(setting)
    images = tasks.support[0][0]
    calls = {}
    for name, make in NETWORKS.items():
        predict, params = make(setting, images)

        def loss(params, batch, predict=predict):
            logits = predict(params, batch[0])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

        meta_gradient = fj.fomaml(
            fj.matmul_convolutions(loss), optax.sgd(INNER_RATE), setting.steps
        )
        calls[name] = common.over_devices(meta_gradient, params, tasks)
    timed = common.interleaved(calls, repeats)
    conv4 = timed["models.conv4"]
    return [
        {
            "setting": setting.name,
            "shapes": vars(setting),
            "network": name,
            "time": seconds,
            "times_conv4": common.ratio(seconds, conv4),
        }
        for name, seconds in timed.items()
    ]


def normalised(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Batch statistics and ReLU, by the formula of `models.conv4`."""
    centred = x - x.mean((0, 1, 2))
    variance = jnp.mean(centred**2, (0, 1, 2))
    return nn.relu(centred * (scale * jax.lax.rsqrt(variance + 1e-3)) + shift)


def by_variance(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """The same by `x.var`, whose derivative takes one more pass over the activations."""
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return nn.relu((x - mean) * (scale * jax.lax.rsqrt(variance + 1e-3)) + shift)


def pooled(x: jax.Array, setting: Setting) -> jax.Array:
    """Max-pooling by `reduce_window`, where the network has it."""
    return nn.max_pool(x, (2, 2), (2, 2)) if setting.pooling == "max" else x


def stride(setting: Setting) -> int:
    """Of the convolutions."""
    return 1 if setting.pooling == "max" else 2


def conv4(setting: Setting, images: jax.Array) -> tuple[Any, fj.Params]:
    """The library's own."""
    net = fj.models.conv4(setting.ways, width=setting.width, pooling=setting.pooling)
    return net.apply, net.init(jax.random.key(0), images)


def linen(
    setting: Setting, images: jax.Array, normalised: Callable[..., jax.Array] = normalised
) -> tuple[Any, fj.Params]:
    """Flax Linen."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(4):
                x = nn.Conv(setting.width, (3, 3), strides=stride(setting), use_bias=False)(x)
                scale = self.param(f"scale{i}", nn.initializers.ones, (setting.width,))
                shift = self.param(f"shift{i}", nn.initializers.zeros, (setting.width,))
                x = pooled(normalised(x, scale, shift), setting)
            return nn.Dense(setting.ways)(x.reshape(x.shape[0], -1))

    net = Net()
    return net.apply, net.init(jax.random.key(0), images)


def flax_nnx(setting: Setting, images: jax.Array) -> tuple[Any, fj.Params]:
    """Flax NNX, split into graph and parameters."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            sizes = [setting.channels, *[setting.width] * 4]
            steps = stride(setting)
            self.convs = nnx.List(
                nnx.Conv(i, o, (3, 3), strides=steps, use_bias=False, rngs=rngs)
                for i, o in itertools.pairwise(sizes)
            )
            self.scales = nnx.List(nnx.Param(jnp.ones(setting.width)) for _ in range(4))
            self.shifts = nnx.List(nnx.Param(jnp.zeros(setting.width)) for _ in range(4))
            self.head = nnx.Linear(features(setting), setting.ways, rngs=rngs)

        def __call__(self, x):
            for conv, scale, shift in zip(self.convs, self.scales, self.shifts, strict=True):
                x = pooled(normalised(conv(x), scale[...], shift[...]), setting)
            return self.head(x.reshape(x.shape[0], -1))

    del images
    graph, params = nnx.split(Net(nnx.Rngs(0)))
    return lambda params, x: nnx.merge(graph, params)(x), params


def equinox(setting: Setting, images: jax.Array) -> tuple[Any, fj.Params]:
    """Equinox: channels first, one image at a time under `vmap`."""
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = [setting.channels, *[setting.width] * 4]
    net = {
        "convs": [
            eqx.nn.Conv2d(i, o, 3, stride(setting), padding="SAME", use_bias=False, key=key)
            for (i, o), key in zip(itertools.pairwise(sizes), keys, strict=False)
        ],
        "scales": [jnp.ones(setting.width)] * 4,
        "shifts": [jnp.zeros(setting.width)] * 4,
        "head": eqx.nn.Linear(features(setting), setting.ways, key=keys[4]),
    }
    del images
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def predict(params, x):
        net = eqx.combine(params, static)
        x = jnp.moveaxis(x, -1, 1)
        for conv, scale, shift in zip(net["convs"], net["scales"], net["shifts"], strict=True):
            x = jnp.moveaxis(jax.vmap(conv)(x), 1, -1)
            x = jnp.moveaxis(pooled(normalised(x, scale, shift), setting), -1, 1)
        return jax.vmap(net["head"])(x.reshape(x.shape[0], -1))

    return predict, params


def haiku(setting: Setting, images: jax.Array) -> tuple[Any, fj.Params]:
    """Haiku."""

    def net(x):
        for i in range(4):
            x = hk.Conv2D(setting.width, 3, stride(setting), with_bias=False)(x)
            scale = hk.get_parameter(f"scale{i}", (setting.width,), init=jnp.ones)
            shift = hk.get_parameter(f"shift{i}", (setting.width,), init=jnp.zeros)
            x = pooled(normalised(x, scale, shift), setting)
        return hk.Linear(setting.ways)(x.reshape(x.shape[0], -1))

    transformed = hk.without_apply_rng(hk.transform(net))
    return transformed.apply, transformed.init(jax.random.key(0), images)


def features(setting: Setting) -> int:
    """What the head sees of an image."""
    positions, _, channels = setting.layers()[-1]
    if setting.pooling == "max":
        positions = (math.isqrt(positions) // 2) ** 2
    return positions * channels


NETWORKS = {
    "models.conv4": conv4,
    "Flax Linen": linen,
    "Flax Linen, x.var": functools.partial(linen, normalised=by_variance),
    "Flax NNX": flax_nnx,
    "Equinox": equinox,
    "Haiku": haiku,
}


if __name__ == "__main__":
    main()
