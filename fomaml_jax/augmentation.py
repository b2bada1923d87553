"""Pictures made into others: turned, moved, bent; and brought from bytes to numbers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fomaml_jax import refusals
from fomaml_jax.dtypes import accumulator

Augmentation = Callable[[jax.Array, jax.Array], jax.Array]
"""`(key, example) -> example`, of the same shape and dtype."""


def as_float(x: jax.Array) -> jax.Array:
    """Pictures of uint8 as float32 in `[0, 1]`; anything else as it is.

    Example:
        >>> import jax.numpy as jnp, fomaml_jax as fj
        >>> fj.tasks.as_float(jnp.array([0, 255], jnp.uint8))
        Array([0., 1.], dtype=float32)
    """
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x


def float_pixels(x: Any) -> jax.Array:
    """Pictures as floats: those of uint8 in `[0, 1]`, floats as they are.

    Raises:
        TypeError: for other integers, of which nobody knows what white is.
    """
    return _floats(as_float(jnp.asarray(x)))


def _floats(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"pictures must be uint8, or floats in [0, 1], got {x.dtype}")
    return x


def turned(image: jax.Array, turns: jax.Array) -> jax.Array:
    """Turns `[size, size, ...]` by `turns` times 90 degrees."""
    return jnp.stack([jnp.rot90(image, k) for k in range(4)])[turns]


def rotated_classes(images: np.ndarray) -> np.ndarray:
    """Each class turned by 0, 90, 180 and 270 degrees as four classes of their own.

    Args:
        images: `[classes, examples, size, size, ...]`.

    Returns:
        `[4 * classes, examples, size, size, ...]`; class `c` turned `k` times is `k * classes + c`.

    Example:
        >>> import numpy as np, fomaml_jax as fj
        >>> fj.tasks.rotated_classes(np.zeros((3, 20, 28, 28, 1), np.uint8)).shape
        (12, 20, 28, 28, 1)

    References:
        Santoro et al., `Meta-Learning with Memory-Augmented Neural Networks
        <https://proceedings.mlr.press/v48/santoro16.html>`_, 2016.
    """
    check_square(images.shape)
    return np.concatenate([np.rot90(images, turns, axes=(2, 3)) for turns in range(4)])


def random_shift(pixels: int) -> Augmentation:
    """Moves a picture by up to so many pixels in each direction; what comes in is zero.

    Args:
        pixels: at least 1.

    Returns:
        `(key, image [height, width, ...]) -> image`, for `episodes(augment=...)`.

    Example:
        >>> import jax, jax.numpy as jnp, fomaml_jax as fj
        >>> fj.tasks.random_shift(2)(jax.random.key(0), jnp.ones((28, 28, 1))).shape
        (28, 28, 1)
    """
    refusals.check_at_least("pixels", pixels, 1)

    def shift(key: jax.Array, image: jax.Array) -> jax.Array:
        border = [(pixels, pixels)] * 2 + [(0, 0)] * (image.ndim - 2)
        corner = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
        starts = (*corner, *[0] * (image.ndim - 2))
        return jax.lax.dynamic_slice(jnp.pad(image, border), starts, image.shape)

    return shift


def random_affine(most: float) -> Augmentation:
    """Turns, slants and stretches a picture about its middle; what comes in is zero.

    Args:
        most: by how much each entry of the 2 x 2 matrix may be off the identity's, above 0 and
            below 0.5. With 0.1 that is up to 6 degrees, or a tenth of the size.

    Returns:
        `(key, image [height, width, ...]) -> image` in floating point, for
        `episodes(augment=...)`; pixels are interpolated linearly.

    Raises:
        ValueError: for another number.

    Example:
        >>> import jax, jax.numpy as jnp, fomaml_jax as fj
        >>> image = fj.tasks.random_affine(0.1)(jax.random.key(0), jnp.ones((28, 28, 1)))
        >>> image.shape, image[14, 14].item()
        ((28, 28, 1), 1.0)
    """
    if not 0 < most < 0.5:
        raise ValueError(f"most must be above 0 and below 0.5, got {most}")

    def transform(key: jax.Array, image: jax.Array) -> jax.Array:
        image = _floats(image)
        off = jax.random.uniform(key, (2, 2), accumulator(image.dtype), -most, most)
        return resampled(image, jnp.eye(2, dtype=off.dtype) + off)

    return transform


def resampled(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """A picture whose pixels are fetched from elsewhere, and from beyond its borders as zero.

    Args:
        image: `[height, width, ...]`, floating point.
        matrix: `[2, 2]`, from a place (row, column) about the middle to that from which it is
            fetched; pixels are interpolated linearly.

    Returns:
        The picture, of the same shape.

    Raises:
        TypeError: for a picture of integers.

    Example:
        >>> import jax.numpy as jnp, fomaml_jax as fj
        >>> fj.tasks.resampled(jnp.array([[0.0, 1.0]]), -jnp.eye(2))
        Array([[1., 0.]], dtype=float32)
    """
    image = _floats(image)
    dtype = accumulator(image.dtype)  # 16 bits would put places a good part of a pixel off
    middle = [(n - 1) / 2 for n in image.shape[:2]]
    axes = [jnp.arange(2 * m + 1, dtype=dtype) - m for m in middle]
    apart = jnp.stack(jnp.meshgrid(*axes, indexing="ij"))
    rows, columns = jnp.einsum("ij,jhw->ihw", matrix.astype(dtype), apart, precision="highest")
    where = [rows + middle[0], columns + middle[1]]
    flat = image.astype(dtype).reshape(*image.shape[:2], -1)
    resample = functools.partial(jax.scipy.ndimage.map_coordinates, order=1, mode="constant")
    moved = jax.vmap(lambda channel: resample(channel, where), in_axes=2, out_axes=2)(flat)
    return moved.reshape(image.shape).astype(image.dtype)


def check_square(shape: tuple[int, ...]) -> None:
    """Refuses pictures that a quarter turn gives another shape."""
    if len(shape) < 4 or shape[2] != shape[3]:
        raise ValueError(
            f"rotations need square pictures [classes, examples, size, size, ...], got {shape}"
        )
