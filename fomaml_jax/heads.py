"""A classifier's linear head apart from the rest: begun afresh in every task, at its own rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fomaml_jax.rates import scale_by_rates
from fomaml_jax.types import MetaGradient, Params, Task, TaskInfo, WithRates

HEAD = "head"
"""The name of a network's last, linear layer."""


def without_head(params: Params) -> Params:
    """A network's parameters but for those of its linear head."""
    return {"params": {name: layer for name, layer in params["params"].items() if name != HEAD}}


def with_head(params: Params, head: Params) -> Params:
    """The inverse of `without_head`."""
    return {"params": {**params["params"], HEAD: head}}


def parameters_of(shared: Any) -> Params:
    """The network's own among what is meta-learned, the inner rates left aside."""
    return shared.params if isinstance(shared, WithRates) else shared


def on_parameters(function: Callable[[Params], Params], shared: Any) -> Any:
    """Applies a function to the network's own parameters, the inner rates left as they are."""
    if isinstance(shared, WithRates):
        return shared._replace(params=function(shared.params))
    return function(shared)


def fresh_head(meta_gradient: MetaGradient, head: Params) -> MetaGradient:
    """Begins every task with the same head: it is adapted with the rest, but not meta-learned."""

    def without(shared: Any, task: Task) -> tuple[Any, TaskInfo]:
        grads, info = meta_gradient(on_parameters(lambda p: with_head(p, head), shared), task)
        return on_parameters(without_head, grads), info

    return without


def inner_optimizer(rate: float, head_rate: float) -> optax.GradientTransformation:
    """Gradient descent on every layer, at a rate of its own for the head."""

    def labels(params):
        return {"params": {name: "head" if name == HEAD else "body" for name in params["params"]}}

    return optax.partition({"body": optax.sgd(rate), "head": optax.sgd(head_rate)}, labels)


def first_rates(params: Params, rate: float, head_rate: float, num_steps: int) -> Params:
    """The logarithms of the inner rates before training, one a tensor and step.

    Logarithms because rates then stay positive, and one outer rate fits them all.
    """
    return {
        "params": {
            name: jax.tree.map(
                lambda x, of_layer=head_rate if name == HEAD else rate: jnp.full(
                    (num_steps,), jnp.log(of_layer), x.dtype
                ),
                layer,
            )
            for name, layer in params["params"].items()
        }
    }


def descent_at(logarithms: Params, ways: int) -> optax.GradientTransformation:
    """Gradient descent at learned rates, those of the head for each of the ways."""
    of_layers = jax.tree.map(jnp.exp, logarithms)["params"]
    head = jax.tree.map(lambda x: ways * x, of_layers[HEAD])
    return scale_by_rates(with_head({"params": of_layers}, head), per_step=True)
