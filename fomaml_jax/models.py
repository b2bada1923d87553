"""The small networks of the field, in Flax."""

from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fomaml_jax import refusals
from fomaml_jax.dtypes import accumulator
from fomaml_jax.padding import without_padding as without_padding


def mlp(
    hidden: Sequence[int] = (40, 40),
    outputs: int = 1,
    *,
    activation: Callable[[jax.Array], jax.Array] = nn.relu,
) -> nn.Module:
    """A multi-layer perceptron; the defaults are the MAML paper's sinusoid network.

    Args:
        hidden: the widths of the hidden layers.
        outputs: the width of the last, linear layer.
        activation: between the layers.

    Returns:
        A Flax module `[..., features] -> [..., outputs]`.

    Example:
        >>> import jax, jax.numpy as jnp, fomaml_jax as fj
        >>> net = fj.models.mlp()
        >>> params = net.init(jax.random.key(0), jnp.zeros((5, 1)))
        >>> net.apply(params, jnp.zeros((5, 1))).shape
        (5, 1)

    References:
        Finn, Abbeel, Levine, `Model-Agnostic Meta-Learning <https://arxiv.org/abs/1703.03400>`_,
        2017, section 5.1.
    """
    for width in (*hidden, outputs):
        refusals.check_at_least("hidden and outputs", width, 1)
    return _MLP(tuple(hidden), outputs, activation)


def conv4(
    ways: int,
    *,
    width: int | Sequence[int] = 64,
    pooling: Literal["stride", "max"] = "stride",
    features: Literal["flat", "mean", "scaled"] = "flat",
) -> nn.Module:
    """The field's network: four blocks of 3x3 convolution, batch statistics and ReLU, then linear.

    The normalisation always uses the statistics of the batch it is given and keeps none, so a
    query batch is normalised together: predictions are *transductive*, as in the published
    Omniglot numbers. Give the query images one at a time beside the support set for others.

    Args:
        ways: outputs of the linear head.
        width: channels of every block, or of each of the four. Of max-pooling networks the second
            block is by far the dearest: twice and four times its channels in the two after it take
            1.4 times the multiplications (28 x 28).
        pooling: `"stride"` halves the size by strided convolutions (Omniglot in the MAML paper),
            `"max"` by 2x2 max-pooling (miniImageNet), with 3.7 times the
            multiplications.
        features: what the head sees: the last block's output flattened; its spatial `"mean"`, as
            in the MAML authors' Omniglot code; or flattened, without the last ReLU, and
            `"scaled"` to norm `sqrt(D)` for each image, with a head that starts at zero, so that
            one head rate fits every image.

    Returns:
        A Flax module `[images, height, width, channels] -> [images, ways]`, which also takes
        weights `[images]` for its batch statistics (see `fj.uneven`). Its convolutions are native;
        wrap the loss in `matmul_convolutions`.

    Example:
        >>> import jax, jax.numpy as jnp, fomaml_jax as fj
        >>> net = fj.models.conv4(ways=5, width=32)
        >>> params = net.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        >>> net.apply(params, jnp.zeros((5, 28, 28, 1))).shape
        (5, 5)

    References:
        Vinyals et al., `Matching Networks <https://arxiv.org/abs/1606.04080>`_, 2016; Finn,
        Abbeel, Levine, `Model-Agnostic Meta-Learning <https://arxiv.org/abs/1703.03400>`_, 2017.
    """
    refusals.check_at_least("ways", ways, 1)
    widths = tuple(width) if isinstance(width, Sequence) else (width,) * 4
    if len(widths) != 4:
        raise ValueError(f"width must be one number or four, got {len(widths)}")
    for channels in widths:
        refusals.check_at_least("width", channels, 1)
    refusals.check_choice("pooling", pooling, ("stride", "max"))
    refusals.check_choice("features", features, ("flat", "mean", "scaled"))
    return _Conv4(ways, widths, pooling, features)


class _MLP(nn.Module):
    hidden: tuple[int, ...]
    outputs: int
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        for width in self.hidden:
            x = self.activation(nn.Dense(width, kernel_init=nn.initializers.he_normal())(x))
        return nn.Dense(self.outputs, name="head")(x)


LINEAR = ("scaled",)
"""Features that the last block gives without a rectifier."""


class _Conv4(nn.Module):
    ways: int
    widths: tuple[int, ...]
    pooling: str
    features: str

    @nn.compact
    def __call__(self, x, weights=None):
        if x.ndim != 4:  # a convolution would take examples for rows
            raise ValueError(
                f"pictures must be [images, height, width, channels], got {x.shape}; give pictures "
                "without channels one by x[..., None], and several tasks by jax.vmap"
            )
        if self.pooling == "max" and min(x.shape[1:3]) < 16:
            raise ValueError(
                "pooling='max' halves pictures four times; pass pictures of at least 16 x 16, got "
                f"{x.shape[1]} x {x.shape[2]}, or pooling='stride'"
            )
        x = without_padding(x, weights)
        for block, width in enumerate(self.widths):
            x = nn.Conv(
                width,
                (3, 3),
                strides=2 if self.pooling == "stride" else 1,
                use_bias=False,  # the normalisation would take it away again
                kernel_init=nn.initializers.he_normal(),
                name=f"conv{block}",
            )(x)
            x = BatchStatistics(name=f"norm{block}")(x, weights)
            if block < 3 or self.features not in LINEAR:
                x = nn.relu(x)
            if self.pooling == "max":
                x = max_pool(x)
        x = x.mean((1, 2)) if self.features == "mean" else x.reshape(x.shape[0], -1)
        if self.features == "scaled":
            squares = x.astype(accumulator(x.dtype)) ** 2
            x = x * jax.lax.rsqrt(squares.mean(-1, keepdims=True) + 1e-6).astype(x.dtype)
            return nn.Dense(self.ways, kernel_init=nn.initializers.zeros, name="head")(x)
        return nn.Dense(self.ways, name="head")(x)


class BatchStatistics(nn.Module):
    """Normalises each channel by the batch's own mean and variance, then scales and shifts.

    Batch normalisation without running averages: nothing is kept, so there is no state to carry
    through an inner loop.

    Attributes:
        epsilon: added to the variance.
    """

    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array | None = None) -> jax.Array:
        """Normalises `[examples, ..., channels]` over all axes but the last.

        With `weights`, `[examples]`, examples count by them in the statistics, and those of weight
        zero (the padding of uneven tasks) not at all.
        """
        axes = tuple(range(x.ndim - 1))
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], x.dtype)
        shift = self.param("shift", nn.initializers.zeros, x.shape[-1:], x.dtype)
        x = without_padding(x, weights)
        wide = accumulator(x.dtype)
        if weights is not None:
            weights = weights.reshape(-1, *(1 for _ in x.shape[1:])).astype(wide)
            total = weights.mean()
            weights = weights / jnp.where(total > 0, total, jnp.ones_like(total))

        def mean(x):
            return (x if weights is None else weights * x).mean(axes)

        centred = x - jnp.expand_dims(mean(x.astype(wide)).astype(x.dtype), axes)
        spread = jax.lax.rsqrt(mean(centred.astype(wide) ** 2) + self.epsilon)
        factor = scale * spread.astype(x.dtype)
        return centred * jnp.expand_dims(factor, axes) + jnp.expand_dims(shift, axes)


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 max-pooling of `[n, height, width, channels]`, an odd last row or column left out.

    By reshape, because the gradient of `reduce_window` is slow on CPU and not deterministic on
    GPU.

    Example:
        >>> import jax.numpy as jnp, fomaml_jax as fj
        >>> fj.models.max_pool(jnp.arange(4.0).reshape(1, 2, 2, 1)).item()
        3.0
    """
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))
