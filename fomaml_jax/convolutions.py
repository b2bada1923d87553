"""Convolutions written as matrix products, in any function, without touching its code."""

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax import lax
from jax.extend import core, linear_util
from jax.extend.core import primitives

from fomaml_jax import pooling, refusals
from fomaml_jax.convolution_primitives import Geometry, convolve
from fomaml_jax.types import ClosedJaxpr

P = ParamSpec("P")
R = TypeVar("R")

# One slice an offset: above this, a convolution takes many seconds to compile. No usual kernel is
# larger (11 x 11 is 121), but differentiated code has windows as large as a whole image.
_MAX_OFFSETS = 128

# What only evaluates its inner jaxprs, so that they may be exchanged for equal ones.
_TRANSPARENT = frozenset(
    {
        primitives.cond_p,
        primitives.custom_jvp_call_p,
        primitives.custom_vjp_call_p,
        primitives.jit_p,
        primitives.remat_p,
        primitives.scan_p,
        primitives.while_p,
    }
)

_KEPT_PARAMETERS = (
    "window_strides",
    "padding",
    "rhs_dilation",
    "dimension_numbers",
    "precision",
    "preferred_element_type",
)


def matmul_convolutions(fn: Callable[P, R]) -> Callable[P, R]:
    """Writes the convolutions of a function as matrix products.

    A convolution of images `[N, *spatial, C]` with a kernel `[*window, C, O]` becomes one product
    `[N * positions, offsets * C] @ [offsets * C, O]`, where the rows are the patches that the
    kernel sees: one strided slice of the padded images for every offset in the window. Values and
    derivatives of any order are those of `fn`, up to the order of summation.

    Why: meta-learning gives each task its own kernels. Under `jax.vmap` that makes *grouped*
    convolutions, which are slow on every backend, above all backwards (jax issues 13800 and 26568);
    and inside `jax.lax.scan` or `jax.lax.map` XLA:CPU runs the gradient of any convolution on a
    slow path (jax issue 12868). Matrix products stay fast in both places. The price is memory: the
    patches are `offsets / prod(strides)` times as large as the images. So on CPU, where a kernel
    belongs to one task and float32 patches would be more than four times as large (3 x 3 windows
    at stride 1), the product is left to XLA's own convolution, which packs patches as it
    multiplies: forwards and, in forms that stay fast in loops, backwards.

    Maximum and average pooling over windows that do not overlap (by `lax.reduce_window`, or by
    reshape and maximum) is exchanged along with the convolutions, for the same values and
    derivatives at less cost backwards.

    Apply it to the loss or to the network, before `jax.grad` and `jax.vmap`: they would put
    transposed and grouped convolutions in the place of plain ones.

    Left as they are: grouped convolutions (depthwise ones among them), transposed convolutions
    (dilated images), windows of more than 128 offsets, and what is inside of primitives other than
    `jax.jit`, `jax.checkpoint`, `jax.lax.scan`, `while_loop`, `cond`, `switch`, `jax.custom_jvp`
    and `jax.custom_vjp`. Custom derivatives stay the user's own, written in the same way.

    Args:
        fn: any function that JAX can trace. It is traced at every call, as by `jax.jit`, with
            abstract values in place of the JAX arrays in its arguments; all other leaves (Python
            numbers, strings, NumPy arrays, modules) reach it as they are.

    Returns:
        A function with the arguments and results of `fn`, to be used wherever `fn` is: under
        `jax.jit`, `jax.grad`, `jax.vmap`, `jax.lax.scan`, `jax.shard_map`.

    Raises:
        TypeError: if `fn` is not callable.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fomaml_jax.convolutions import matmul_convolutions, native_convolutions
        >>> def blur(images, kernel):
        ...     return jax.lax.conv(images, kernel, window_strides=(1, 1), padding="SAME")
        >>> images, kernel = jnp.ones((1, 1, 3, 3)), jnp.ones((1, 1, 3, 3))
        >>> matmul_convolutions(blur)(images, kernel)[0, 0]
        Array([[4., 6., 4.],
               [6., 9., 6.],
               [4., 6., 4.]], dtype=float32)
        >>> native_convolutions(jax.make_jaxpr(blur)(images, kernel))
        1
        >>> native_convolutions(jax.make_jaxpr(matmul_convolutions(blur))(images, kernel))
        0
    """
    refusals.check_function("fn", fn, "of arrays, such as a loss")

    @functools.wraps(fn)
    def rewritten(*args: P.args, **kwargs: P.kwargs) -> R:
        jaxpr, arrays, rebuild = _trace(fn, args, kwargs)
        if native_convolutions(jaxpr):
            jaxpr = _rewritten(jaxpr)
        return rebuild(core.jaxpr_as_fun(jaxpr)(*arrays))

    return rewritten


def native_convolutions(jaxpr: ClosedJaxpr | core.Jaxpr) -> int:
    """Counts the convolutions that `matmul_convolutions` would rewrite.

    Args:
        jaxpr: what `jax.make_jaxpr` returns; its inner jaxprs count too.

    Returns:
        Their number in the program text: a convolution in a loop counts once.
    """
    return _count(_is_plain_convolution, jaxpr)


def native_convolutions_in(fn: Callable[..., Any], *args: Any) -> int | None:
    """As `native_convolutions` of a call; None where that asks for its place on a mesh around it.

    Args:
        fn: the function to be called.
        *args: its arguments, or `jax.ShapeDtypeStruct`s like them.
    """
    try:
        return native_convolutions(jax.make_jaxpr(fn)(*args))
    except NameError:  # of an axis that is bound inside of the mesh's `shard_map` alone
        return None


def _count(predicate: Callable[[core.JaxprEqn], bool], jaxpr: ClosedJaxpr | core.Jaxpr) -> int:
    return sum(
        predicate(equation) + sum(_count(predicate, inner) for inner in _inner_jaxprs(equation))
        for equation in jaxpr.eqns
    )


def _trace(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ClosedJaxpr, list[jax.Array], Callable[..., Any]]:
    """The jaxpr of a call, the arrays to call it with, and what makes its outputs `fn`'s."""
    arrays, rebuild_arguments = _split_arrays((args, kwargs))
    rebuild_result: Callable[..., Any] = list

    def of_arrays(*arrays):
        nonlocal rebuild_result
        args, kwargs = rebuild_arguments(arrays)
        result_arrays, rebuild_result = _split_arrays(fn(*args, **kwargs))
        return result_arrays

    return jax.make_jaxpr(of_arrays)(*arrays), arrays, rebuild_result


def _split_arrays(tree: Any) -> tuple[list[jax.Array], Callable[..., Any]]:
    """Takes the JAX arrays out of a tree; the second result puts others in their places."""
    leaves, structure = jax.tree.flatten(tree)
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
    arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
    # Tracers are dropped here: they must not outlive their trace.
    others = [None if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]

    def rebuild(arrays):
        remaining = iter(arrays)
        pairs = zip(others, is_array, strict=True)
        return structure.unflatten([next(remaining) if array else leaf for leaf, array in pairs])

    return arrays, rebuild


# JAX compiles a jaxpr once for as long as it lives, so the same inner jaxpr (of a jitted layer
# called twice, say) must always lead to the same rewritten one.
_known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _rewritten(jaxpr: Any) -> Any:
    """The jaxpr with its convolutions and pooling exchanged; itself where it holds none."""
    if not _count(_is_eligible, jaxpr):
        return jaxpr
    if jaxpr not in _known:
        equations = [_rewritten_equation(equation) for equation in jaxpr.eqns]
        _known[jaxpr] = _with_equations(jaxpr, equations)
    return _known[jaxpr]


def _with_equations(jaxpr: Any, equations: list[core.JaxprEqn]) -> Any:
    if isinstance(jaxpr, core.Jaxpr):
        return jaxpr.replace(eqns=equations)
    # Until jax 0.11 a closed jaxpr was a pair of a jaxpr and its constants.
    return jaxpr.replace(jaxpr=jaxpr.jaxpr.replace(eqns=equations))


def _rewritten_equation(equation: core.JaxprEqn) -> core.JaxprEqn:
    if _is_eligible(equation):
        return _exchanged(equation)
    if not any(_count(_is_eligible, inner) for inner in _inner_jaxprs(equation)):
        return equation
    parameters = {
        name: _REWRITTEN_RULES.get(name, _rewritten_parameter)(value)
        for name, value in equation.params.items()
    }
    return equation.replace(params=parameters)


def _rewritten_parameter(value: Any) -> Any:
    if isinstance(value, core.Jaxpr | ClosedJaxpr):
        return _rewritten(value)
    if type(value) is tuple:  # the branches of a cond
        return tuple(map(_rewritten_parameter, value))
    return value


def _rewritten_forward(rule: linear_util.WrappedFun) -> linear_util.WrappedFun:
    """Of a rule that JAX keeps as a function from "which inputs matter" to `(jaxpr, ...)`."""

    def rewritten(*args):
        jaxpr, *rest = rule.call_wrapped(*args)
        return _rewritten(jaxpr), *rest

    return linear_util.wrap_init(rewritten, debug_info=rule.debug_info)


def _rewritten_backward(rule: linear_util.WrappedFun) -> linear_util.WrappedFun:
    """Of a rule that JAX keeps as a function of residuals and cotangents."""
    return linear_util.wrap_init(matmul_convolutions(rule.call_wrapped), debug_info=rule.debug_info)


# How jax.custom_jvp and jax.custom_vjp keep their rules, by the name of the parameter.
_REWRITTEN_RULES: dict[str, Callable[[Any], Any]] = {
    "jvp_jaxpr_fun": _rewritten_forward,
    "fwd_jaxpr_thunk": _rewritten_forward,
    "bwd": _rewritten_backward,
}


def _inner_jaxprs(equation: core.JaxprEqn) -> Iterable[core.Jaxpr]:
    return core.jaxprs_in_params(equation.params) if equation.primitive in _TRANSPARENT else ()


def _is_eligible(equation: core.JaxprEqn) -> bool:
    return (
        _is_plain_convolution(equation)
        or (pooling.is_max_over_windows(equation) and not _is_sharded(equation))
        or (pooling.is_tiled_window(equation) and not _is_sharded(equation))
    )


def _is_plain_convolution(equation: core.JaxprEqn) -> bool:
    if equation.primitive is not primitives.conv_general_dilated_p:
        return False
    parameters = equation.params
    kernel: Any = equation.invars[1].aval
    result: Any = equation.outvars[0].aval
    offsets = math.prod(kernel.shape[axis] for axis in parameters["dimension_numbers"].rhs_spec[2:])
    return (
        parameters["feature_group_count"] == parameters["batch_group_count"] == 1
        and all(dilation == 1 for dilation in parameters["lhs_dilation"])
        and 0 < offsets <= _MAX_OFFSETS
        and 0 not in (*kernel.shape, *result.shape)
        and parameters.get("out_sharding") is None
        and not _is_sharded(equation)
    )


def _is_sharded(equation: core.JaxprEqn) -> bool:
    """Whether an operand is split over an Explicit axis of a mesh: JAX's own rules apply then."""
    operands: list[Any] = [x.aval for x in equation.invars]
    return any(any(operand.sharding.spec) for operand in operands)


def _exchanged(equation: core.JaxprEqn) -> core.JaxprEqn:
    """A call of a jitted function: one equation for one, so that nothing else has to change."""
    with jax.disable_jit(False):
        traced = jax.make_jaxpr(_equal_function(equation))(*(x.aval for x in equation.invars))
    (call,) = traced.eqns
    return equation.replace(primitive=call.primitive, params=call.params)


def _equal_function(equation: core.JaxprEqn) -> Callable[..., jax.Array]:
    parameters = equation.params
    if equation.primitive is primitives.conv_general_dilated_p:
        kept = {name: parameters[name] for name in _KEPT_PARAMETERS}
        return functools.partial(_matmul_convolution, **kept)
    if equation.primitive is primitives.reduce_max_p:
        return functools.partial(_max_over_windows, axes=parameters["axes"])
    is_max = equation.primitive is primitives.reduce_window_max_p
    function = _max_of_tiles if is_max else _sum_of_tiles
    return functools.partial(function, window=parameters["window_dimensions"])


_max_over_windows = jax.jit(pooling.max_over_windows, static_argnames="axes")
_max_of_tiles = jax.jit(pooling.max_of_tiles, static_argnames="window")
_sum_of_tiles = jax.jit(pooling.sum_of_tiles, static_argnames="window")


@functools.partial(jax.jit, static_argnames=_KEPT_PARAMETERS)
def _matmul_convolution(
    images: jax.Array,
    kernel: jax.Array,
    *,
    window_strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    rhs_dilation: tuple[int, ...],
    dimension_numbers: lax.ConvDimensionNumbers,
    precision: Any,
    preferred_element_type: Any,
) -> jax.Array:
    """What `lax.conv_general_dilated` computes from the same parameters."""
    out_channels, in_channels, *window = dimension_numbers.rhs_spec
    images = lax.transpose(images, _channels_last(dimension_numbers.lhs_spec))
    kernel = lax.transpose(kernel, (*window, in_channels, out_channels))
    geometry = Geometry(
        images.shape[1:-1],
        kernel.shape[:-2],
        window_strides,
        padding,
        rhs_dilation,
        precision,
        preferred_element_type,
    )
    product = convolve(images, kernel, geometry)
    return lax.transpose(product, np.argsort(_channels_last(dimension_numbers.out_spec)))


def _channels_last(spec: Sequence[int]) -> tuple[int, ...]:
    batch, channels, *spatial = spec
    return batch, *spatial, channels
