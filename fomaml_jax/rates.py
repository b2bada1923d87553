"""Inner rates as parameters: trees of them, optimizers made from them, a report of their ways."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fomaml_jax import refusals
from fomaml_jax.dtypes import accumulator
from fomaml_jax.types import Params


def like(
    params: Params,
    rate: float,
    *,
    per: Literal["tensor", "element"] = "tensor",
    num_steps: int | None = None,
) -> Params:
    """A rate for every tensor or every element of the parameters, all equal at first.

    Args:
        params: the parameters, a pytree of arrays.
        rate: the first value.
        per: whether a tensor has one rate (LSLR) or each of its elements one (Meta-SGD).
        num_steps: where given, a rate for each inner step too, in a leading axis.

    Returns:
        A pytree like `params`, of shape `[]` or that of the tensor, behind `[num_steps]`.

    Raises:
        ValueError: for another `per`, or fewer than one step.

    Example:
        >>> import jax, jax.numpy as jnp, fomaml_jax as fj
        >>> params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
        >>> jax.tree.map(jnp.shape, fj.rates.like(params, 0.1, num_steps=5))
        {'b': (5,), 'w': (5,)}
    """
    refusals.check_choice("per", per, ("tensor", "element"))
    refusals.check_params(params)
    if num_steps is not None:
        refusals.check_at_least("num_steps", num_steps, 1)
    steps = () if num_steps is None else (num_steps,)

    def leaf(x):
        shape = np.shape(x) if per == "element" else ()
        return jnp.full((*steps, *shape), rate, jnp.asarray(x).dtype)

    return jax.tree.map(leaf, params)


def scale_by_rates(rates: Params, *, per_step: bool = False) -> optax.GradientTransformation:
    """Multiplies updates by minus the rates: the last link of a chain that descends.

    Args:
        rates: a pytree like the parameters, as `like` makes it; traced if you like, and then the
            derivative with respect to them is kept.
        per_step: whether the rates lead with the step. After the last one its rates stay.

    Returns:
        An optax transformation: `sgd` by itself, Adam with learned rates behind
        `optax.scale_by_adam()`.

    Raises:
        ValueError: when it is used, for rates of another structure, or of a shape that is neither
            `[]` nor that of the tensor, behind `[num_steps]` with `per_step`.

    Example:
        >>> import jax.numpy as jnp, optax, fomaml_jax as fj
        >>> momentum = optax.chain(optax.trace(0.9), fj.rates.scale_by_rates(jnp.array(0.5)))
        >>> loss = lambda theta, centre: 0.5 * jnp.sum((theta - centre) ** 2)
        >>> fj.adapt(loss, jnp.zeros(1), jnp.ones(1), momentum, 1)[0]
        Array([0.5], dtype=float32)
    """

    def init(params):
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        _check_fits(rates, updates, per_step)

        def scaled(update, rate):
            if _is_absent(update):
                return update
            rate = jnp.asarray(rate)
            if per_step:
                rate = rate[jnp.minimum(state.count, rate.shape[0] - 1)]
            if not jnp.issubdtype(rate.dtype, jnp.floating):
                rate = rate.astype(update.dtype)
            # In the bits of the wider, and of sums: the rate's gradient is one.
            both = accumulator(rate.dtype), accumulator(update.dtype)
            wide = max(both, key=lambda dtype: jnp.finfo(dtype).bits)
            return (-rate.astype(wide) * update.astype(wide)).astype(update.dtype)

        scaled_updates = jax.tree.map(scaled, updates, rates, is_leaf=_is_absent)
        return scaled_updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(init, update)


def report(before: Params, after: Params) -> str:
    """A table of the rates of every tensor: before, and after training.

    Args:
        before: the rates at the start.
        after: the rates now.

    Returns:
        Text, a line a tensor that has any: the mean before, the mean, least and largest now, and
        how many are not above zero.

    Example:
        >>> import jax.numpy as jnp, fomaml_jax as fj
        >>> print(fj.rates.report({"w": jnp.array([0.1, 0.1])}, {"w": jnp.array([0.3, -0.1])}))
        rates    before      mean     least   largest  not above 0
        w           0.1       0.1      -0.1       0.3       1 of 2
    """
    rows: list[tuple[str, ...]] = [("rates", "before", "mean", "least", "largest", "not above 0")]
    pairs = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, old), new in pairs:
        new = np.asarray(new)
        if not new.size:
            continue
        numbers = [np.mean(np.asarray(old)), new.mean(), new.min(), new.max()]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        below = f"{int((~(new > 0)).sum())} of {new.size}"
        rows.append((name, *(f"{x:.4g}" for x in numbers), below))
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        " ".join([row[0].ljust(width), *(cell.rjust(9) for cell in row[1:-1]), row[-1].rjust(12)])
        for row in rows
    )


def _is_absent(x: Any) -> bool:
    """Whether this stands in a tree of updates for a leaf that is not adapted: None, or optax's."""
    return x is None or isinstance(x, optax.MaskedNode)


def _check_fits(rates: Any, updates: Any, per_step: bool) -> None:
    """Refuses rates that are neither one for a tensor nor one for each of its elements."""
    hint = "fomaml_jax.rates.like(params, rate) makes rates that fit"

    def flat(tree):
        return jax.tree.flatten_with_path(tree, is_leaf=_is_absent)

    (leaves, structure), (given, found) = flat(updates), flat(rates)
    if structure != found:
        raise ValueError(
            f"rates must have the structure of params, {structure}, got {found}; {hint}"
        )
    for (path, update), (_, rate) in zip(leaves, given, strict=True):
        if _is_absent(update):
            continue
        where, shape = f"rates{jax.tree_util.keystr(path)}", np.shape(rate)
        if _is_absent(rate):
            raise ValueError(f"{where} is None, but that parameter is adapted; {hint}")
        if per_step and not shape:
            raise ValueError(
                f"{where} is a scalar, but with per_step rates lead with the step; {hint}"
            )
        of_one = shape[1:] if per_step else shape
        if of_one not in ((), np.shape(update)):
            behind = "behind the steps" if per_step else "(per_step=True where steps lead)"
            raise ValueError(
                f"{where} has shape {shape}, expected () or {np.shape(update)} {behind}; {hint}"
            )
