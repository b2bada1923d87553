"""Bad input is refused, or warned of, here at the border, by its name and with the remedy."""

import operator
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fomaml_jax.types import (
    Batch,
    Params,
    TaskInfo,
    WithRates,
    WithState,
)


def check_params(params: Params) -> None:
    """Refuses parameters that gradient descent cannot move."""
    leaves = jax.tree.leaves_with_path(params)
    if not leaves:
        raise ValueError("params holds no arrays; pass a pytree with at least one parameter")
    for path, leaf in leaves:
        where = f"params{jax.tree_util.keystr(path)}"
        if not is_array(leaf):
            raise TypeError(
                f"{where} is a {type(leaf).__name__}, not an array; split the model into arrays "
                "and the rest first (equinox.partition, nnx.split)"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{where} has dtype {leaf.dtype}, not a real floating-point one; pass "
                "floating-point parameters and keep the rest in the batch or in a closure; a "
                "counter stands still there (see fomaml_jax.WithState)"
            )


def check_bare(params: Params) -> None:
    """Refuses parameters with something beside them, where they are to be adapted by themselves."""
    if isinstance(params, WithState):
        raise TypeError(
            "the parameters are a fomaml_jax.WithState: pass has_state=True, and to adapt its "
            "params and state apart"
        )
    if isinstance(params, WithRates):
        raise TypeError(
            "the parameters are a fomaml_jax.WithRates, which learned_rates and meta_sgd take: "
            "pass its params, and as inner optimizer what is made from its rates, such as "
            "fomaml_jax.rates.scale_by_rates(rates)"
        )


def check_batch(name: str, batch: Batch, axis: int = 0) -> None:
    """Refuses a batch without examples, which are along this axis."""
    leaves = jax.tree.leaves_with_path(batch)
    if not leaves:
        raise ValueError(f"{name} holds no arrays; pass a pytree whose leaves lead with examples")
    for path, leaf in leaves:
        if 0 in np.shape(leaf)[axis : axis + 1]:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is empty (shape {np.shape(leaf)}); "
                "pass at least one example"
            )


def check_same_examples(batch: Batch) -> int:
    """Returns the number of examples that every leaf leads with."""
    sizes = {
        f"batch{jax.tree_util.keystr(path)}": np.shape(x)[:1]
        for path, x in jax.tree.leaves_with_path(batch)
    }
    first, size = next(iter(sizes.items()))
    for name, other in sizes.items():
        if not other or other != size:
            raise ValueError(
                f"{name} leads with {other[0] if other else 'no'} examples but {first} with "
                f"{size[0] if size else 'none'}; every leaf must lead with the same number"
            )
    return size[0]


def check_num_steps(num_steps: Any) -> int | jax.Array:
    """Returns `num_steps` as a Python int, or as an int32 scalar if it is a JAX array."""
    if isinstance(num_steps, jax.Array):
        if num_steps.ndim or not jnp.issubdtype(num_steps.dtype, jnp.integer):
            raise TypeError(f"num_steps must be an integer scalar, got {jax.typeof(num_steps)}")
        if (known := _known(num_steps)) is not None and known < 0:
            raise ValueError(f"num_steps must be an integer of at least 0, got {known}")
        return num_steps.astype(jnp.int32)
    try:
        steps = operator.index(num_steps)
    except TypeError:
        raise TypeError(
            f"num_steps must be an integer, got {num_steps!r} ({type(num_steps).__name__})"
        ) from None
    if isinstance(num_steps, bool) or steps < 0:
        raise ValueError(f"num_steps must be an integer of at least 0, got {num_steps!r}")
    return steps


def _known(num_steps: int | jax.Array) -> int | None:
    """The number, unless it is traced."""
    return None if isinstance(num_steps, Tracer) else int(num_steps)


def check_optimizer(optimizer: Any) -> None:
    """Refuses what is not an optax transformation."""
    if not (
        callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))
    ):
        raise TypeError(
            "optimizer must be an optax.GradientTransformation, got "
            f"{optimizer!r} ({type(optimizer).__name__}); for gradient descent pass optax.sgd(rate)"
        )


def check_stateless(has_state: bool, **given: Any) -> None:
    """Refuses, without `has_state`, what only a loss with state is given."""
    for name, value in given.items():
        if value is not None and not has_state:
            raise TypeError(f"{name} is given to a loss with state only; pass has_state=True")


def check_task_axis(tasks: Any) -> int:
    """Returns the number of tasks that every leaf leads with."""
    leaves = jax.tree.leaves_with_path(tasks)
    if not leaves:
        raise ValueError("tasks holds no arrays; pass a meta-batch with leaves [tasks, ...]")
    sizes = {f"tasks{jax.tree_util.keystr(p)}": np.shape(x)[:1] for p, x in leaves}
    first, size = next(iter(sizes.items()))
    for name, other in sizes.items():
        if not other:
            raise ValueError(f"{name} is a scalar; every leaf must lead with the task axis")
        if other != size:
            raise ValueError(
                f"{name} leads with {other[0]} tasks but {first} with {size[0]}; "
                "every leaf must lead with the same number of tasks, as those of "
                "jax.vmap(sample_task)(keys) do"
            )
    if size == (0,):
        raise ValueError(f"{first} has 0 tasks; pass at least one")
    return size[0]


def check_divides(num_tasks: int, mesh: jax.sharding.Mesh) -> None:
    """Refuses a number of tasks that does not divide among the devices."""
    if num_tasks % mesh.size:
        below = num_tasks // mesh.size * mesh.size
        fitting = f"{below} or {below + mesh.size}" if below else f"{mesh.size}"
        raise ValueError(
            f"tasks: {num_tasks} tasks do not divide among the {mesh.size} devices of the mesh; "
            f"pass {fitting}"
        )


def check_like_params(name: str, out: Any, params: Params) -> None:
    """Refuses what a function made of the parameters if it is not like them."""
    if described(out) != described(params):
        raise ValueError(
            f"{name} must have the structure, shapes and dtypes that it was given; got "
            f"{jax.tree.map(jax.typeof, out)} for {jax.tree.map(jax.typeof, params)}"
        )


def checked_pair(out: Any) -> tuple[Params, TaskInfo]:
    """What a meta-gradient returned, refusing all but gradients and a `TaskInfo`."""
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], TaskInfo)):
        raise TypeError(
            "meta_gradient must return (grads, fomaml_jax.TaskInfo), as fomaml(loss_fn, optimizer, "
            f"num_steps) does, got {describe(out)}"
        )
    return out


def checked_meta_gradient(out: Any) -> tuple[Params, TaskInfo]:
    """What a meta-gradient returned for one task, as `checked_pair`."""
    checked_pair(out)
    if (shape := np.shape(out[1].query_loss)) != ():
        raise ValueError(
            f"meta_gradient is not one for a single task (its query_loss has shape {shape}, not "
            "[]); pass it before it is wrapped in over_tasks"
        )
    return out


def check_gradients(grads: Params, params: Params) -> None:
    """Refuses gradients that cannot be summed for the parameters; their precision may differ."""

    def shapes(tree):
        structure, leaves = described(tree)
        return structure, [shape for shape, _ in leaves]

    is_real = [jnp.issubdtype(jnp.result_type(g), jnp.floating) for g in jax.tree.leaves(grads)]
    if not all(is_real) or shapes(grads) != shapes(params):
        raise ValueError(
            "meta_gradient must return floating-point gradients of the structure and shapes of "
            f"params; got {jax.tree.map(jax.typeof, grads)} for {jax.tree.map(jax.typeof, params)}"
        )


def checked_weight(weight: Any) -> jax.Array:
    """The weight of a task in float32, NaN for what is none; refuses what is not a scalar."""
    if np.shape(weight) != ():
        raise ValueError(f"task_weight must return a scalar, got shape {np.shape(weight)}")
    weight = jnp.asarray(weight, jnp.float32)
    # Beyond, the sum of many might overflow, or vanish, and with it the mean gradient.
    is_weight = (weight == 0) | ((weight >= 1e-20) & (weight <= 1e20))
    return jnp.where(is_weight, weight, jnp.nan)


def check_over_tasks(info: TaskInfo) -> None:
    """Refuses what a meta-gradient for one task has seen of a meta-batch."""
    if info.query_loss.ndim != 1:
        raise ValueError(
            "meta_gradient is one for a single task (its query_loss has shape "
            f"{info.query_loss.shape}, not [tasks]); wrap it: over_tasks(meta_gradient)"
        )


def check_task(task: Any) -> None:
    """Refuses what is not a task, and a query batch without examples."""
    check_kind_of_task("task must be", task)
    check_batch("query", task.query)


def check_kind_of_task(what: str, task: Any) -> None:
    """Refuses what is not a task."""
    if not (hasattr(task, "support") and hasattr(task, "query")):
        raise TypeError(f"{what} a fomaml_jax.Task(support, query), got a {type(task).__name__}")


def check_state(state: Any) -> None:
    """Refuses what is no state of a learner, such as its parameters alone."""
    if not all(hasattr(state, name) for name in ("params", "opt_state", "step")):
        raise TypeError(
            f"state must be what the learner's init or step gave, got a {type(state).__name__}"
        )


def check_key(key: Any) -> None:
    """Refuses what is not one PRNG key."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = is_array(key) and key.dtype == np.uint32  # as of jax.random.PRNGKey
    if not (typed or raw) or np.ndim(key) != (0 if typed else 1):
        raise TypeError(f"key must be one PRNG key, such as jax.random.key(0), got {describe(key)}")


def warn_of_rbg(key: jax.Array) -> None:
    """Of keys whose numbers differ where tasks are sampled together."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        is_rbg = "rbg" in str(jax.random.key_impl(key))
    else:  # as of jax.random.PRNGKey
        is_rbg = np.shape(key)[-1:] == (4,)
    if is_rbg:
        warnings.warn(
            "JAX draws other numbers from keys of rbg under vmap: which tasks these are depends on "
            "how many are sampled together, and on how many devices; for tasks that do not, make "
            'the key with jax.random.key(seed, impl="threefry2x32")',
            stacklevel=3,
        )


def check_arrays(name: str, tree: Any) -> None:
    """Refuses a tree that holds anything but arrays, or nothing."""
    leaves = jax.tree.leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"{name} holds no arrays; pass a pytree with at least one")
    for path, leaf in leaves:
        if not is_array(leaf):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, not an array"
            )


def check_same_task(task: Any, first: Any) -> None:
    """Refuses a task of other structure, shapes or dtypes than the learner was made for."""
    if described(task) != described(first):
        raise ValueError(
            "task must have the structure, shapes and dtypes of the one that init was given; got "
            f"{jax.tree.map(jax.typeof, task)}, not {jax.tree.map(jax.typeof, first)} (for tasks "
            "of uneven size see fj.uneven)"
        )


def check_shared(shared: Any, needed: Any) -> None:
    """Refuses parameters without what has to be beside them, by the tuple that holds both."""
    missing = [field for field in needed._fields if not hasattr(shared, field)]
    if missing:
        raise TypeError(
            f"the shared parameters must be a fomaml_jax.{needed.__name__}"
            f"({', '.join(needed._fields)}), got a {type(shared).__name__}"
        )


def check_rates(rates: Any) -> None:
    """Refuses rates that cannot be learned."""
    for path, leaf in jax.tree.leaves_with_path(rates):
        if not jnp.issubdtype(dtype := jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"rates{jax.tree_util.keystr(path)} has dtype {dtype}, not a real floating-point "
                "one; a rate of one is 1.0"
            )


def check_per_step(support: Batch, num_steps: int | jax.Array) -> None:
    """Refuses a support set that does not lead with one batch for every step."""
    if (known := _known(num_steps)) is None:
        return
    for path, leaf in jax.tree.leaves_with_path(support):
        if np.shape(leaf)[:1] != (known,):
            raise ValueError(
                f"support{jax.tree_util.keystr(path)} has shape {np.shape(leaf)}, but with "
                f"per_step_support every leaf must lead with num_steps={known}"
            )


def check_step_weights(step_weights: Any, num_steps: int | jax.Array) -> jax.Array:
    """Returns one weight for every step as an array."""
    if isinstance(num_steps, jax.Array):
        raise TypeError("step_weights needs num_steps to be a Python int, not an array")
    weights = jnp.asarray(step_weights)
    if (
        not num_steps
        or weights.shape != (num_steps,)
        or not jnp.issubdtype(weights.dtype, jnp.floating)
    ):
        raise ValueError(
            f"step_weights must be {num_steps} floating-point numbers, one for the query loss "
            f"after each step, got shape {weights.shape} and dtype {weights.dtype}"
        )
    return weights


def check_one_each(name: str, values: Any, count: int, of: str) -> None:
    """Refuses what is not one value `of` each of so many."""
    if np.shape(values) != (count,):
        raise ValueError(f"{name} must be [{count}], one {of}, got {list(np.shape(values))}")


def check_weights(weights: Any, count: int, of: str, *, some: bool = False) -> None:
    """Refuses weights that are negative, not finite, or with `some` all zero."""
    check_one_each("weights", weights, count, of)
    if isinstance(weights, Tracer):
        return
    plain = np.asarray(weights, np.float64)
    if not (np.isfinite(plain).all() and (plain >= 0).all() and (plain.any() or not some)):
        above = ", and some of them above 0" if some else ""
        raise ValueError(f"weights must be at least 0, finite{above}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuses a string that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_at_least(name: str, value: Any, least: int) -> int:
    """Returns an integer as a Python int, refusing all but those of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def check_tasks_at_once(value: Any) -> None:
    """Refuses what is neither a number of tasks nor a word for one."""
    if not (value is None or (isinstance(value, str) and value == "auto")):
        check_at_least("tasks_at_once", value, 1)


def check_function(name: str, value: Any, form: str) -> None:
    """Refuses what cannot be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function {form}, got {value!r} ({type(value).__name__})")


def check_mesh(mesh: Any) -> None:
    """Refuses what is neither a mesh nor None."""
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(
            "mesh must be a jax.sharding.Mesh, such as jax.make_mesh((2,), ('tasks',)), got "
            f"{mesh!r}"
        )


def check_range(name: str, value: tuple[float, float]) -> None:
    """Refuses what is not `(low, high)` with `low < high`, both finite."""
    if np.shape(value) != (2,):
        raise ValueError(f"{name} must be a range (low, high), got {value!r}")
    low, high = value
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f"{name} must be a range (low, high) with low < high, got {low, high}")


def is_array(x: Any) -> bool:
    """Whether it is an array of JAX or NumPy."""
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def described(tree: Any) -> tuple[Any, list[tuple[tuple[int, ...], Any]]]:
    """What is compared of a tree: two containers of the caller's own class need not be equal."""
    leaves = [(np.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), leaves


def describe(x: Any) -> str:
    """A value, short enough for a message."""
    if isinstance(x, tuple):
        return f"a tuple of {len(x)}"
    if is_array(x):
        return f"an array of shape {x.shape} and dtype {x.dtype}"
    return f"{x!r} ({type(x).__name__})"
