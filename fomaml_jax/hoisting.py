"""What a function computes from constants alone, computed once: for loops around it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives

from fomaml_jax.types import ClosedJaxpr


def hoisted(fn: Callable[[Any], Any], example: Any) -> Callable[[Any], Any]:
    """`fn` with all that does not depend on its argument computed here and now.

    Where only the last layer of a network is adapted, say, a loop around the result does not
    compute the features again in every step. XLA by itself moves little out of loops.

    Args:
        fn: a function of one pytree of arrays, with its constants in its closure.
        example: a pytree like those that the result will be called with.

    Returns:
        A function equal to `fn`, derivatives of any order included.
    """
    leaves, structure = jax.tree.flatten(example)
    out_structure: Any = None

    def of_leaves(*leaves):
        nonlocal out_structure
        out, out_structure = jax.tree.flatten(fn(structure.unflatten(leaves)))
        return out

    closed = jax.make_jaxpr(of_leaves)(*leaves)
    # Once more, through the jitted functions that it calls: part of one may be constant.
    closed = jax.make_jaxpr(lambda *leaves: _inlined(closed, leaves))(*leaves)
    known, rest = _split(closed)
    constants = core.jaxpr_as_fun(known)()

    def of_argument(argument):
        out = core.jaxpr_as_fun(rest)(*jax.tree.leaves(argument), *constants)
        return out_structure.unflatten(out)

    return of_argument


def _inlined(closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr equation by equation, those of jitted functions included."""
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = {}

    def write(variables, written):
        values.update(zip(variables, written, strict=True))

    def read(atoms):
        return [x.val if isinstance(x, core.Literal) else values[x] for x in atoms]

    write(jaxpr.constvars, closed.consts)
    write(jaxpr.invars, args)
    for equation in jaxpr.eqns:
        if equation.primitive is primitives.jit_p:
            outputs = _inlined(equation.params["jaxpr"], read(equation.invars))
        else:
            inputs = _variables(equation.invars)
            alone = _with(jaxpr, (), inputs, equation.outvars, [equation])
            outputs = core.jaxpr_as_fun(ClosedJaxpr(alone, ()))(*read(inputs))
        write(equation.outvars, outputs)
    return read(jaxpr.outvars)


def _split(closed: ClosedJaxpr) -> tuple[ClosedJaxpr, ClosedJaxpr]:
    """What follows from the constants, `() -> known`; and `(*args, *known) -> out`."""
    jaxpr = closed.jaxpr
    dependent = set(jaxpr.invars)
    before, after = [], []
    for equation in jaxpr.eqns:
        is_dependent = equation.effects or not dependent.isdisjoint(_variables(equation.invars))
        (after if is_dependent else before).append(equation)
        if is_dependent:
            dependent.update(equation.outvars)
    used = _variables([x for equation in after for x in equation.invars] + list(jaxpr.outvars))
    known = [x for x in used if x not in dependent]
    return (
        ClosedJaxpr(_with(jaxpr, jaxpr.constvars, (), known, before), closed.consts),
        ClosedJaxpr(_with(jaxpr, (), (*jaxpr.invars, *known), jaxpr.outvars, after), ()),
    )


def _variables(atoms: Sequence[Any]) -> list[Any]:
    """Each variable once, without the literals."""
    return list(dict.fromkeys(x for x in atoms if not isinstance(x, core.Literal)))


def _with(jaxpr, constvars, invars, outvars, equations) -> core.Jaxpr:
    """Some of a jaxpr's equations, with other inputs and outputs."""
    named = jaxpr.debug_info._replace(
        arg_names=("",) * len(invars), result_paths=("",) * len(outvars)
    )
    return jaxpr.replace(
        constvars=list(constvars),
        invars=list(invars),
        outvars=list(outvars),
        eqns=equations,
        effects=frozenset().union(*(equation.effects for equation in equations)),
        debug_info=named,
    )
