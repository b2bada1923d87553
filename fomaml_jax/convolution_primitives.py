"""A convolution and its two gradients, each in its fastest form, as primitives closed under AD."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from fomaml_jax.manual_axes import varying

# Patches are `offsets / prod(strides)` times as large as the images. Up to this, as with 3 x 3
# windows at stride 2, they cost less than what XLA:CPU's own convolution loses to a plain product;
# above, as with 3 x 3 at stride 1 (9), memory traffic outweighs the products (14 x 14 x 64: 1.5
# times slower, 42 x 42 x 32: 2 to 5 times).
_MAX_BLOW_UP = 4

# Examples that stay in a core's cache together.
_TILE_IMAGES = 5

# With fewer channels of input XLA:CPU's convolution packs one by one.
_FEW_CHANNELS = 8


class Geometry(NamedTuple):
    """What a convolution is, but for its operands; one entry for every spatial axis."""

    spatial: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    precision: Any = None
    preferred_element_type: Any = None

    @property
    def positions(self) -> tuple[int, ...]:
        """The spatial shape of the outputs."""
        sizes = zip(
            self.spatial, self.window, self.strides, self.padding, self.dilation, strict=True
        )
        return tuple(
            (size + low + high - dilation * (width - 1) - 1) // stride + 1
            for size, width, stride, (low, high), dilation in sizes
        )

    @property
    def blow_up(self) -> float:
        """How many times larger than the images their patches are."""
        return math.prod(self.window) / math.prod(self.strides)


def convolve(images: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """`[N, *spatial, C]`, `[*window, C, O]` -> `[N, *positions, O]`.

    Differentiable to any order, forwards and backwards: the derivatives of the three operations
    here are the three operations here, so that none of them falls back to a slow form.
    """
    return _bind(_convolve_p, images, kernel, geometry, None)


def image_gradient(outputs: jax.Array, kernel: jax.Array, geometry: Geometry, dtype: Any):
    """The transpose of `convolve` in the images: `[N, *positions, O]` -> `[N, *spatial, C]`."""
    return _bind(_image_gradient_p, outputs, kernel, geometry, dtype)


def kernel_gradient(images: jax.Array, outputs: jax.Array, geometry: Geometry, dtype: Any):
    """The transpose of `convolve` in the kernel: `[N, *positions, O]` -> `[*window, C, O]`."""
    return _bind(_kernel_gradient_p, images, outputs, geometry, dtype)


def _bind(primitive: core.Primitive, lhs: Any, rhs: Any, geometry: Geometry, dtype: Any) -> Any:
    lhs, rhs = varying((lhs, rhs))  # as for any product of two
    return primitive.bind(lhs, rhs, geometry=geometry, dtype=dtype, batch_axes=0)


# --- the forms, for one task; `alone` on CPU, where no other task's kernels come with it ----------


def _convolve(images, kernel, geometry, dtype, alone):
    del dtype  # it follows from the operands
    if alone and _is_native(images, kernel, geometry):
        return _native_convolve(images, kernel, geometry)
    patches = _patches(images, geometry)
    product = _dot(
        _as_rows(patches), kernel.reshape(patches.shape[-1], kernel.shape[-1]), (1, 0), geometry
    )
    return product.reshape(*patches.shape[:-1], kernel.shape[-1])


def _native_convolve(images, kernel, geometry):
    if kernel.shape[-2] >= _FEW_CHANNELS or not _can_pair(kernel, geometry):
        return _native(images, kernel, geometry.strides, geometry.padding, geometry)
    # A pair of neighbours as one output of twice the channels: 2.7 to 4 times as fast at 84 x 84.
    paired, width = _paired(geometry), geometry.positions[1]
    unpadded = [(0, 0)] * 4
    kernels = [jnp.pad(kernel, _with_width(unpadded, pad)) for pad in ((0, 1), (1, 0))]
    wide = lax.concatenate(kernels, dimension=3)
    outputs = _native(images, wide, paired.strides, paired.padding, paired)
    return outputs.reshape(*outputs.shape[:2], -1, kernel.shape[-1])[:, :, :width]


def _image_gradient(outputs, kernel, geometry, dtype, alone):
    if alone and _is_native(outputs, kernel, geometry) and set(geometry.strides) == {1}:
        # A convolution with the mirrored kernel. XLA makes the same of the derivative of its own
        # convolution, but on CPU only outside of loops (jax issue 12868).
        reach = np.multiply(np.subtract(geometry.window, 1), geometry.dilation)
        padding = reach[:, None] - np.array(geometry.padding)
        mirrored = lax.rev(kernel, range(kernel.ndim - 2)).swapaxes(-1, -2)
        strides = (1,) * len(reach)
        images = _native(outputs, mirrored, strides, _as_pairs(padding), geometry)
        return images.astype(dtype)
    channels = kernel.shape[-2]
    shape = (outputs.shape[0], *geometry.spatial, channels)
    matrix = kernel.reshape(math.prod(kernel.shape[:-1]), kernel.shape[-1])
    if jnp.dtype(dtype).itemsize == 2:  # the offsets of a pixel are summed in more bits
        geometry = geometry._replace(preferred_element_type=jnp.float32)

    def product(outputs):
        return _dot(_as_rows(outputs), matrix, (1, 1), geometry)

    patches = (_from_memory if alone else _as_it_comes)(product, outputs)
    patches = patches.reshape(*outputs.shape[:-1], matrix.shape[0])
    gather = functools.partial(_patches, geometry=geometry)
    like = varying(jnp.zeros(shape, patches.dtype), patches)
    (images,) = jax.linear_transpose(gather, like)(patches)
    return images.astype(dtype)


def _kernel_gradient(images, outputs, geometry, dtype, alone):
    if not (alone and _is_native(images, outputs, geometry)):
        return _patches_kernel_gradient(images, outputs, geometry, alone).astype(dtype)
    pairs = _can_pair(outputs, geometry)
    of_tile = _paired_kernel_gradient if pairs else _native_kernel_gradient

    def gradient(images, outputs):
        return _sum_over_tiles(functools.partial(of_tile, geometry=geometry), images, outputs)

    return _from_memory(gradient, images, outputs).astype(dtype)


def _as_it_comes(fn, *operands):
    return fn(*operands)


def _from_memory(fn, *operands):
    """`fn(*operands)`, with the operands written to memory before, once for all who read them.

    XLA:CPU computes elementwise operations again wherever they are read: for each shape, and in a
    transposed order too, where that is dear. It does not look through a condition that it cannot
    decide, nor move transposes into one through a barrier. That saves 2 to 5% of a step with
    28 x 28 images, 6% with 84 x 84.
    """
    shape = jax.eval_shape(fn, *operands)

    def never(*operands):
        return varying(jnp.zeros(shape.shape, shape.dtype), operands)

    always, operands = lax.optimization_barrier((True, operands))
    return lax.cond(always, fn, never, *operands)


def _paired_kernel_gradient(images, outputs, geometry):
    outputs = jnp.pad(outputs, _with_width([(0, 0)] * 4, (0, outputs.shape[2] % 2), axis=2))
    channels = outputs.shape[-1]
    outputs = outputs.reshape(*outputs.shape[:2], -1, 2 * channels)
    wide = _native_kernel_gradient(images, outputs, _paired(geometry))
    left, right = wide[..., :channels], wide[..., channels:]
    return left[:, :-1] + right[:, 1:]


def _native_kernel_gradient(images, outputs, geometry):
    """A convolution of the images with the outputs."""
    height, width = geometry.window
    kernel = _native(
        images.transpose(3, 1, 2, 0),
        outputs.transpose(1, 2, 0, 3),
        geometry.dilation,
        geometry.padding,
        geometry._replace(dilation=geometry.strides),
    )
    return kernel[:, :height, :width].transpose(1, 2, 0, 3)


def _can_pair(of_outputs: jax.Array, geometry: Geometry) -> bool:
    """XLA:CPU's convolution is at its best with 64 channels of output, or more."""
    low, high = geometry.padding[1]
    return (
        of_outputs.shape[-1] < 64
        and geometry.strides[1] == geometry.dilation[1] == 1
        and min(low, high) >= 0  # else a pair would see pixels that are cut away
    )


def _paired(geometry: Geometry) -> Geometry:
    """Of a convolution whose outputs are pairs of neighbours along the width."""
    (height, width), (top, (left, right)) = geometry.window, geometry.padding
    return geometry._replace(
        window=(height, width + 1),
        strides=(geometry.strides[0], 2),
        padding=(top, (left, right + geometry.positions[1] % 2)),
    )


def _with_width(pads, width_pad, axis=1):
    return [width_pad if i == axis else pad for i, pad in enumerate(pads)]


def _patches_kernel_gradient(images, outputs, geometry, alone):
    patches = _patches(images, geometry)
    shape = (*geometry.window, images.shape[-1], outputs.shape[-1])

    def product(patches, outputs):
        patches, outputs = _as_rows(patches), _as_rows(outputs)
        if patches.shape[1] < outputs.shape[1]:
            return _dot(patches, outputs, (0, 0), geometry).reshape(shape)
        # On CPU the product with the narrower factor first is twice as fast; without the barrier
        # XLA turns it round again.
        transposed = lax.optimization_barrier(_dot(outputs, patches, (0, 0), geometry))
        return transposed.T.reshape(shape)

    return (_from_memory if alone else _as_it_comes)(product, patches, outputs)


def _sum_over_tiles(fn, images, outputs):
    """`fn(images, outputs)` summed over tiles of examples, which stay in cache one by one."""
    num_images = images.shape[0]
    if not isinstance(num_images, int) or num_images <= _TILE_IMAGES:
        return fn(images, outputs)
    # What is over goes first: the sum then starts as a value of the right kind, also where it
    # varies over the devices of a mesh. Tiles are sliced in the loop: as its inputs they would be
    # copies of everything.
    first = num_images % _TILE_IMAGES or _TILE_IMAGES

    def add_tile(i, total):
        start = first + i * _TILE_IMAGES
        tile = [lax.dynamic_slice_in_dim(x, start, _TILE_IMAGES) for x in (images, outputs)]
        return total + fn(*tile)

    num_tiles = (num_images - first) // _TILE_IMAGES
    return lax.fori_loop(0, num_tiles, add_tile, fn(images[:first], outputs[:first]))


_CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")


def _is_native(lhs: jax.Array, rhs: jax.Array, geometry: Geometry) -> bool:
    """Whether XLA's own convolution is the better form on CPU, for operands without task axes."""
    return (
        len(geometry.spatial) == 2
        and lhs.dtype == rhs.dtype == np.float32
        and geometry.blow_up > _MAX_BLOW_UP
        and _is_padded_within_the_window(geometry)
    )


def _is_padded_within_the_window(geometry: Geometry) -> bool:
    """Else it, or a derivative, pads one side and cuts another: XLA:CPU then reads stray memory."""
    reach = np.multiply(np.subtract(geometry.window, 1), geometry.dilation)[:, None]
    return bool(np.all((np.array(geometry.padding) >= 0) & (np.array(geometry.padding) <= reach)))


def _native(images, kernel, strides, padding, geometry):
    return lax.conv_general_dilated(
        images,
        kernel,
        strides,
        padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=_CHANNELS_LAST,
        precision=geometry.precision,
        preferred_element_type=geometry.preferred_element_type,
    )


def _patches(images: jax.Array, geometry: Geometry) -> jax.Array:
    """What the window sees: `[N, *spatial, C]` -> `[N, *positions, offsets * C]`."""
    zero, unpadded = lax.full_like(images, 0, shape=()), (0, 0, 0)
    padding = [unpadded, *((*pad, 0) for pad in geometry.padding), unpadded]
    images = lax.pad(images, zero, padding)
    batch, *spatial, channels = images.shape

    def seen_at(offset):
        starts = np.multiply(offset, geometry.dilation)
        # The last start leaves room for what remains of the window.
        remaining = np.multiply(np.subtract(geometry.window, 1), geometry.dilation) - starts
        limits = np.subtract(spatial, remaining)
        strides = (1, *geometry.strides, 1)
        return lax.slice(images, (0, *starts, 0), (batch, *limits, channels), strides)

    slices = [seen_at(offset) for offset in np.ndindex(*geometry.window)]
    return lax.concatenate(slices, dimension=images.ndim - 1)


def _as_rows(x: jax.Array) -> jax.Array:
    # Products of two plain matrices: with more axes XLA:CPU takes half as long again.
    return lax.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))


def _as_pairs(padding: np.ndarray) -> tuple[tuple[int, int], ...]:
    return tuple((int(low), int(high)) for low, high in padding)


def _dot(lhs: jax.Array, rhs: jax.Array, contracted: tuple[int, int], geometry: Geometry):
    lhs_axis, rhs_axis = contracted
    return lax.dot_general(
        lhs,
        rhs,
        (((lhs_axis,), (rhs_axis,)), ((), ())),
        precision=geometry.precision,
        preferred_element_type=geometry.preferred_element_type,
    )


# --- as primitives -----------------------------------------------------------------------------


def _primitive(name: str, form: Callable[..., jax.Array]) -> core.Primitive:
    """A form for one task as a primitive; `batch_axes` leading axes of both operands are tasks."""

    def evaluate(lhs, rhs, *, geometry, dtype, batch_axes, alone=False):
        # With kernels of many tasks a native convolution would be a grouped one.
        alone = alone and batch_axes == 0
        fn = functools.partial(form, geometry=geometry, dtype=dtype, alone=alone)
        for _ in range(batch_axes):
            fn = jax.vmap(fn)
        return fn(lhs, rhs)

    def abstract(lhs, rhs, **parameters):
        operands = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in (lhs, rhs)
        ]
        out = jax.eval_shape(functools.partial(evaluate, **parameters), *operands)
        # On the same mesh as the operands, unsharded over its automatic axes.
        sharding = lhs.sharding.update(spec=jax.sharding.PartitionSpec(*(None for _ in out.shape)))
        return lhs.update(
            shape=out.shape, dtype=out.dtype, weak_type=out.weak_type, sharding=sharding
        )

    primitive = core.Primitive(name)
    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(evaluate, multiple_results=False))
    on_cpu = mlir.lower_fun(functools.partial(evaluate, alone=True), multiple_results=False)
    mlir.register_lowering(primitive, on_cpu, platform="cpu")
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    return primitive


def _batch(primitive, operands, axes, *, batch_axes, **parameters):
    lhs, rhs = operands
    lhs_axis, rhs_axis = axes
    if batch_axes == 0 and rhs_axis is None and primitive is not _kernel_gradient_p:
        # One kernel for all: more examples, no more tasks.
        lhs = jnp.moveaxis(lhs, lhs_axis, 0)
        merged = lhs.reshape(lhs.shape[0] * lhs.shape[1], *lhs.shape[2:])
        out = primitive.bind(merged, rhs, batch_axes=0, **parameters)
        return out.reshape(*lhs.shape[:2], *out.shape[1:]), 0
    size = lhs.shape[lhs_axis] if lhs_axis is not None else rhs.shape[rhs_axis]

    def leading(x, axis):
        if axis is None:
            return jnp.broadcast_to(x, (size, *x.shape))
        return jnp.moveaxis(x, axis, 0)

    lhs, rhs = leading(lhs, lhs_axis), leading(rhs, rhs_axis)
    return primitive.bind(lhs, rhs, batch_axes=batch_axes + 1, **parameters), 0


_convolve_p = _primitive("patch_convolution", _convolve)
_image_gradient_p = _primitive("patch_convolution_image_gradient", _image_gradient)
_kernel_gradient_p = _primitive("patch_convolution_kernel_gradient", _kernel_gradient)


def _define_transposes(primitive: core.Primitive, of_lhs: tuple, of_rhs: tuple) -> None:
    """Each transpose as `(another of the three, whether the cotangent is its first operand)`."""

    def transposed(cotangent, unknown, known, transpose, *, dtype, **parameters):
        del dtype
        other, cotangent_first = transpose
        operands = (cotangent, known) if cotangent_first else (known, cotangent)
        wanted = unknown.aval.dtype
        return other.bind(*operands, dtype=wanted, **parameters).astype(wanted)

    def lhs_rule(cotangent, lhs, rhs, **parameters):
        return transposed(cotangent, lhs, rhs, of_lhs, **parameters)

    def rhs_rule(cotangent, lhs, rhs, **parameters):
        return transposed(cotangent, rhs, lhs, of_rhs, **parameters)

    ad.defbilinear(primitive, lhs_rule, rhs_rule)


# convolve(x, w), image_gradient(y, w), kernel_gradient(x, y): each the others' transpose.
_define_transposes(_convolve_p, (_image_gradient_p, True), (_kernel_gradient_p, False))
_define_transposes(_image_gradient_p, (_convolve_p, True), (_kernel_gradient_p, True))
_define_transposes(_kernel_gradient_p, (_image_gradient_p, False), (_convolve_p, False))
