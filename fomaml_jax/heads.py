"""A classifier's linear head apart from the rest: begun afresh in every task, at its own rate."""

import optax

from fomaml_jax.types import MetaGradient, Params, Task, TaskInfo

HEAD = "head"
"""The name of a network's last, linear layer."""


def without_head(params: Params) -> Params:
    """A network's parameters but for those of its linear head."""
    return {"params": {name: layer for name, layer in params["params"].items() if name != HEAD}}


def with_head(params: Params, head: Params) -> Params:
    """The inverse of `without_head`."""
    return {"params": {**params["params"], HEAD: head}}


def fresh_head(meta_gradient: MetaGradient, head: Params) -> MetaGradient:
    """Begins every task with the same head: it is adapted with the rest, but not meta-learned."""

    def without(params: Params, task: Task) -> tuple[Params, TaskInfo]:
        grads, info = meta_gradient(with_head(params, head), task)
        return without_head(grads), info

    return without


def inner_optimizer(rate: float, head_rate: float) -> optax.GradientTransformation:
    """Gradient descent on every layer, at a rate of its own for the head."""

    def labels(params):
        return {"params": {name: "head" if name == HEAD else "body" for name in params["params"]}}

    return optax.partition({"body": optax.sgd(rate), "head": optax.sgd(head_rate)}, labels)
