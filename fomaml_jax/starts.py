"""Where the inner loop starts, if not from the shared parameters as they are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fomaml_jax import refusals
from fomaml_jax.dtypes import accumulator
from fomaml_jax.manual_axes import varying
from fomaml_jax.meta_gradients import finite_with
from fomaml_jax.types import Batch, MetaGradient, Params, Task, TaskInfo
from fomaml_jax.variants import in_every_form


def starting_from(
    prepare: Callable[[Params, Batch], Params], meta_gradient: MetaGradient
) -> MetaGradient:
    """An algorithm whose inner loop starts from `prepare(params, support)`.

    The meta-gradient goes back through `prepare`: leaves that it replaces by something that does
    not depend on them have a meta-gradient of zero, and what it computes under `stop_gradient` is a
    constant.

    Args:
        prepare: `(params, support) -> params`, of the same structure and dtypes: a head from class
            prototypes (`prototype_head`), context parameters set to zero (CAVIA).
        meta_gradient: an algorithm for one task, such as `fomaml(...)`.

    Returns:
        A function `(params, task) -> (grads, TaskInfo)`, which `tune` can have in all forms of
        `meta_gradient`.

    Raises:
        TypeError: for a `prepare` that is no function, or what is no `Task`.
        ValueError: where `prepare` returns another structure, shape or dtype.

    Example:
        >>> import jax.numpy as jnp, optax, fomaml_jax as fj
        >>> loss = lambda p, y: jnp.mean((p["shared"] + p["context"] - y) ** 2)
        >>> fresh = lambda p, support: {**p, "context": jnp.zeros_like(p["context"])}
        >>> cavia = fj.starting_from(
        ...     fresh, fj.maml(loss, optax.sgd(0.1), 2, trainable=lambda path: path == "context"))
        >>> params = {"shared": jnp.ones((1, 1)), "context": jnp.ones((1, 1))}
        >>> grads, _ = cavia(params, fj.Task(jnp.zeros((3, 1)), jnp.zeros((2, 1))))
        >>> grads["context"]
        Array([[0.]], dtype=float32)

    References:
        Triantafillou et al., `Meta-Dataset <https://arxiv.org/abs/1903.03096>`_ (ProtoMAML), 2020;
        Zintgraf et al., `CAVIA <https://arxiv.org/abs/1810.03642>`_, 2019.
    """
    refusals.check_function("prepare", prepare, "(params, support) -> params")

    def prepared(meta_gradient: MetaGradient) -> MetaGradient:
        def prepared_meta_gradient(params: Params, task: Task) -> tuple[Params, TaskInfo]:
            refusals.check_task(task)
            refusals.check_params(params)
            params = varying(jax.tree.map(jnp.asarray, params), task)
            start, back = jax.vjp(lambda params: prepare(params, task.support), params)
            refusals.check_like_params("prepare", start, params)
            grads, info = refusals.checked_meta_gradient(meta_gradient(start, task))
            grads = back(jax.tree.map(lambda g, x: g.astype(x.dtype), grads, start))[0]
            return grads, finite_with(info, grads)

        return prepared_meta_gradient

    return in_every_form(meta_gradient, prepared)


def prototype_head(features: jax.Array, labels: jax.Array, ways: int) -> tuple[Any, Any]:
    r"""A linear head that classifies by the nearest class mean: ProtoMAML's start.

    With the mean :math:`c_k` of the features of class :math:`k`, its weights are :math:`2 c_k` and
    its bias :math:`-\|c_k\|^2`: the logits are minus the squared distances, up to what all
    classes share. Both are constants here: no gradient flows through the means into what the
    features were computed from, where the authors' own code lets it flow. The bias of a class
    without examples is so low that nothing is taken for it. Of biases that float16 cannot hold the
    same number is taken off each.

    Args:
        features: `[examples, features]`.
        labels: `[examples]` integers below `ways`.
        ways: classes.

    Returns:
        The kernel `[features, ways]` and the bias `[ways]`, in the features' dtype, float32 unless
        that is a float.

    Example:
        >>> import jax.numpy as jnp, fomaml_jax as fj
        >>> kernel, bias = fj.prototype_head(jnp.array([[1.0], [3.0]]), jnp.array([0, 1]), ways=2)
        >>> kernel, bias
        (Array([[2., 6.]], dtype=float32), Array([-1., -9.], dtype=float32))

    References:
        Snell, Swersky, Zemel, `Prototypical Networks <https://arxiv.org/abs/1703.05175>`_, 2017,
        section 2.4; Triantafillou et al., `Meta-Dataset <https://arxiv.org/abs/1903.03096>`_, 2020.
    """
    features = jax.lax.stop_gradient(jnp.asarray(features))
    is_float = jnp.issubdtype(features.dtype, jnp.floating)
    dtype = features.dtype if is_float else jnp.float32
    features = features.astype(accumulator(dtype))
    members = jax.nn.one_hot(labels, ways, dtype=features.dtype)
    sums, counts = members.T @ features, members.sum(0)
    prototypes = sums / jnp.maximum(counts, 1)[:, None]
    squares = jnp.minimum(jnp.sum(prototypes**2, -1), float(jnp.finfo(features.dtype).max) / 4)
    # Finite all of them, so that a loss is, and below every class that has examples. What the
    # dtype cannot hold, as in float16, is taken off all classes alike: the logits only shift.
    largest = float(jnp.finfo(dtype).max)
    excess = jnp.maximum(squares.max() - largest / 2, 0)
    of_means = jnp.minimum(excess - squares, largest / 2)
    kernel, bias = 2 * prototypes.T, jnp.where(counts > 0, of_means, -0.75 * largest)
    return kernel.astype(dtype), bias.astype(dtype)
