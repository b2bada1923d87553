"""Which pictures a query is normalised with: the other queries, or the support set alone."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fomaml_jax import refusals
from fomaml_jax.types import Batch, Params, Task

Statistics = Literal["transductive", "one-at-a-time"]
"""What a query is normalised with, by the names that follow."""

TRANSDUCTIVE = "transductive"
"""The query batch is normalised together."""

ONE_AT_A_TIME = "one-at-a-time"
"""Each query is normalised beside the support set, and with no other query."""


class Beside(NamedTuple):
    """Query inputs with the support inputs that each of them is seen beside.

    Attributes:
        support: the support inputs, any pytree with leaves `[support examples, ...]`.
        query: the query inputs, the same with leaves `[queries, ...]`.
    """

    support: Any
    query: Any


def beside_support(sample_task: Callable[[jax.Array], Task]) -> Callable[[jax.Array], Task]:
    """The same task distribution, its query inputs in a `Beside`: tasks without transduction.

    Args:
        sample_task: a task distribution whose batches are pairs `(inputs, targets)`.

    Returns:
        `key -> Task` with the query batch `(Beside(support inputs, query inputs), targets)`, for
        a loss and a metric whose network is wrapped in `one_at_a_time`.

    Raises:
        TypeError: for batches that are not pairs.

    Example:
        >>> import jax, fomaml_jax as fj
        >>> sample_task = fj.batch_statistics.beside_support(fj.tasks.sinusoid(shots=5, queries=9))
        >>> inputs, targets = sample_task(jax.random.key(0)).query
        >>> inputs.support.shape, inputs.query.shape, targets.shape
        ((5, 1), (9, 1), (9, 1))
    """

    def sample(key: jax.Array) -> Task:
        task = sample_task(key)
        (support, _), (query, targets) = _pair("support", task.support), _pair("query", task.query)
        return task._replace(query=(Beside(support, query), targets))

    return sample


def one_at_a_time(
    predict: Callable[[Params, Any], jax.Array], *, queries_at_once: int | None = None
) -> Callable[[Params, Any], jax.Array]:
    """The same network, in which the queries of a `Beside` do not see one another.

    A network that normalises by the statistics of its batch tells queries apart by their company:
    accuracy is higher where a query batch is normalised together, and a lone query may have no
    statistics worth the name. Here each query is put behind the support set and predicted in that
    batch, so its prediction depends on nothing but the support set and itself. That computes
    `queries x (support examples + 1)` examples.

    Args:
        predict: `(params, inputs) -> outputs`, an array, or a pytree of them, that lead with the
            example axis.
        queries_at_once: how many of those batches are computed together, to bound memory; all
            unless given.

    Returns:
        A function that predicts the queries of a `Beside` one at a time, and other inputs as
        `predict` does.

    Raises:
        ValueError: for `queries_at_once` below 1; where support and query inputs differ in more
            than the number of examples.

    Example:
        >>> import jax.numpy as jnp, fomaml_jax as fj
        >>> centred = lambda params, x: params * (x - x.mean())
        >>> predict = fj.batch_statistics.one_at_a_time(centred)
        >>> predict(jnp.ones(()), jnp.array([1.0, 3.0]))
        Array([-1.,  1.], dtype=float32)
        >>> predict(jnp.ones(()), fj.batch_statistics.Beside(jnp.zeros(1), jnp.array([1.0, 3.0])))
        Array([0.5, 1.5], dtype=float32)

    References:
        Bronskill et al., `TaskNorm <https://arxiv.org/abs/2003.03284>`_, 2020, section 3; Nichol,
        Achiam, Schulman,
        `On First-Order Meta-Learning Algorithms <https://arxiv.org/abs/1803.02999>`_, 2018,
        section 6.1.
    """
    if queries_at_once is not None:
        refusals.check_at_least("queries_at_once", queries_at_once, 1)

    def predict_separately(params: Params, inputs: Any) -> jax.Array:
        if not isinstance(inputs, Beside):
            return predict(params, inputs)
        _check_same_kind(inputs.support, inputs.query)

        def behind(support: jax.Array, query: jax.Array) -> jax.Array:
            return jnp.concatenate([support, query[None]])

        def one(query: Any) -> jax.Array:
            outputs = predict(params, jax.tree.map(behind, inputs.support, query))
            return jax.tree.map(lambda y: y[-1], outputs)

        if queries_at_once is None or not jax.tree.leaves(inputs.query)[0].shape[0]:
            return jax.vmap(one)(inputs.query)
        return jax.lax.map(one, inputs.query, batch_size=queries_at_once)

    return predict_separately


def queries_of(inputs: Any) -> Any:
    """The query inputs, with or without a support set beside them.

    Example:
        >>> import fomaml_jax as fj
        >>> beside = fj.batch_statistics.Beside(support=[1.0], query=[2.0, 3.0])
        >>> fj.batch_statistics.queries_of(beside), fj.batch_statistics.queries_of([4.0])
        ([2.0, 3.0], [4.0])
    """
    return inputs.query if isinstance(inputs, Beside) else inputs


def both(metric_fn: Callable[[Any, Batch], Any]) -> Callable[[Any, Batch], dict[str, Any]]:
    """A metric under either statistics, by name, for `evaluate` to report in one run.

    Args:
        metric_fn: `(adapted, query) -> metric`, of a network wrapped in `one_at_a_time`.

    Returns:
        `(adapted, query) -> {"transductive": metric, "one-at-a-time": metric}`, for tasks
        from `beside_support`.

    Example:
        >>> import jax, jax.numpy as jnp, fomaml_jax as fj
        >>> predict = fj.batch_statistics.one_at_a_time(lambda params, x: params + x - x.mean())
        >>> error = lambda params, batch: jnp.mean((predict(params, batch[0]) - batch[1]) ** 2)
        >>> report = fj.evaluate(
        ...     lambda params, support: params, fj.batch_statistics.both(error), jnp.zeros(()),
        ...     fj.batch_statistics.beside_support(fj.tasks.sinusoid()), jax.random.key(0))
        >>> sorted(report.mean)
        ['one-at-a-time', 'transductive']
    """

    def metrics(adapted: Any, query: Batch) -> dict[str, Any]:
        inputs, targets = _pair("query", query)
        if not isinstance(inputs, Beside):
            raise TypeError(
                "query inputs must be a Beside, of support and query inputs; sample the tasks from "
                "fj.batch_statistics.beside_support(sample_task)"
            )
        return {
            TRANSDUCTIVE: metric_fn(adapted, (inputs.query, targets)),
            ONE_AT_A_TIME: metric_fn(adapted, query),
        }

    return metrics


def _pair(name: str, batch: Batch) -> tuple[Any, Any]:
    if not (isinstance(batch, tuple) and len(batch) == 2):
        raise TypeError(
            f"the {name} batch must be a pair (inputs, targets), got a {type(batch).__name__}"
        )
    return batch


def _check_same_kind(support: Any, query: Any) -> None:
    """Refuses support and query inputs that cannot stand in one batch."""

    def of_an_example(tree):
        structure, leaves = refusals.described(tree)
        return structure, [(shape[1:], dtype) for shape, dtype in leaves]

    if of_an_example(support) != of_an_example(query):
        raise ValueError(
            "support and query inputs must differ in nothing but their number of examples; got "
            f"{jax.tree.map(jax.typeof, support)} and {jax.tree.map(jax.typeof, query)}"
        )
