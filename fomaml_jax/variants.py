"""A meta-gradient that can be had in several forms, all computing the same numbers."""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

from fomaml_jax.types import MetaGradient

Variants = Callable[[], dict[str, MetaGradient]]
"""Makes the forms by name."""


def with_variants(meta_gradient: MetaGradient, variants: Variants) -> MetaGradient:
    """Notes on a function, which stays a plain one, how to have it in other forms."""
    setattr(meta_gradient, _NAME, (weakref.ref(meta_gradient), variants))
    return meta_gradient


def variants_of(meta_gradient: MetaGradient) -> dict[str, MetaGradient]:
    """All forms by name; the function itself where it has no others."""
    noted: tuple[Callable[[], Any], Variants] | None = getattr(meta_gradient, _NAME, None)
    # Decorators copy what is noted on a function, and compute something else.
    if noted is None or noted[0]() is not meta_gradient:
        return {"as given": meta_gradient}
    return noted[1]()


def in_every_form(
    meta_gradient: MetaGradient, wrap: Callable[[MetaGradient], MetaGradient]
) -> MetaGradient:
    """`wrap(meta_gradient)`, whose forms are the wrapped ones: with a sampler before it, say."""

    def variants() -> dict[str, MetaGradient]:
        return {name: wrap(form) for name, form in variants_of(meta_gradient).items()}

    return with_variants(wrap(meta_gradient), variants)


def preferring(variant: str, meta_gradient: MetaGradient) -> MetaGradient:
    """The form of that name, which can still be had in the others."""
    forms = variants_of(meta_gradient)
    preferred = forms[variant]
    return with_variants(lambda params, task: preferred(params, task), lambda: forms)


def as_measured(meta_gradient: MetaGradient) -> MetaGradient:
    """Notes on a function that no other of its forms was faster."""
    with contextlib.suppress(AttributeError, TypeError):  # what takes no notes is warned of
        setattr(meta_gradient, _MEASURED, weakref.ref(meta_gradient))
    return meta_gradient


def was_measured(meta_gradient: MetaGradient) -> bool:
    """Whether `as_measured` saw this very function, not one that a decorator put around it."""
    return getattr(meta_gradient, _MEASURED, lambda: None)() is meta_gradient


_NAME, _MEASURED = "_fomaml_jax_variants", "_fomaml_jax_measured"
