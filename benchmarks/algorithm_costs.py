"""What each algorithm costs beside FOMAML on the same tasks: time, operations, memory.

Omniglot shapes with strides, 64 channels. Times are ratios within interleaved rounds; operations
and memory are the compiled program's own count of them for one task.
"""

import functools
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import optax
from common import INNER_RATE, Setting

import fomaml_jax as fj
from fomaml_jax.devices import use_every_core


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = common.argument_parser(__doc__, settings=["20w1s"], repeats=15)
    parser.add_argument("--algorithms", nargs="+", help="names; all unless given")
    asked = parser.parse_args()
    use_every_core()
    rows = []
    for name in asked.settings:
        found = measure(common.setting_of(name, asked), asked.repeats, asked.algorithms)
        print(common.table(COLUMNS, found) + "\n", flush=True)
        rows += found
    common.write("algorithm_costs", rows, asked.out)


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "setting": lambda row: row["setting"],
    "algorithm": lambda row: row["algorithm"],
    "ms": lambda row: common.milliseconds(row["seconds"]),
    "time, of FOMAML's": lambda row: f"{row['time_ratio']:.2f}",
    "operations, of FOMAML's": lambda row: f"{row['flops_ratio']:.2f}",
    "memory, MiB": lambda row: f"{row['temp_bytes'] / 2**20:.1f}",
}


def algorithms(
    loss: fj.LossFn, params: fj.Params, steps: int, **options: Any
) -> dict[str, tuple[Any, Any]]:
    """Of each algorithm: its function for one task, and what is meta-learned."""
    sgd, weights = optax.sgd(INNER_RATE), jnp.full(steps, 1 / steps)
    fomaml, maml = (functools.partial(a, loss, sgd, steps, **options) for a in (fj.fomaml, fj.maml))
    meta_sgd = functools.partial(fj.meta_sgd, loss, steps, **options)

    def with_rates(**shape: Any) -> fj.WithRates:
        return fj.WithRates(params, fj.rates.like(params, INNER_RATE, **shape))

    def in_head(path: str) -> bool:
        return "Dense" in path

    return {
        "FOMAML": (fomaml(), params),
        "Meta-SGD, a rate an element": (meta_sgd(), with_rates(per="element")),
        "a rate a tensor": (meta_sgd(), with_rates()),
        "LSLR, a rate a tensor and step": (meta_sgd(per_step=True), with_rates(num_steps=steps)),
        "ANIL": (fomaml(trainable=in_head), params),
        "BOIL": (fomaml(trainable=lambda path: not in_head(path)), params),
        "Reptile": (fj.reptile(loss, sgd, steps, **options), params),
        "multi-step loss": (fomaml(step_weights=weights), params),
        "MAML, second order": (maml(), params),
        "MAML, rematerialised": (maml(remat=True), params),
    }


def program_of(meta_gradient: fj.MetaGradient, shared: Any, task: fj.Task) -> Any:
    """The compiled program for one task."""
    return jax.jit(meta_gradient).lower(shared, task).compile()


def measure(setting: Setting, repeats: int, names: list[str] | None) -> list[dict[str, Any]]:
    """A row an algorithm: all, or FOMAML and those of the names."""
    native, params, tasks = common.image_problem(setting)
    loss = fj.matmul_convolutions(native)
    found = algorithms(loss, params, setting.steps)
    if unknown := sorted(set(names or ()) - set(found)):
        raise SystemExit(f"--algorithms: there are {', '.join(found)}; not {', '.join(unknown)}")
    if names:
        found = {name: found[name] for name in found if name in ("FOMAML", *names)}
    calls = {
        name: common.over_devices(meta_gradient, shared, tasks)
        for name, (meta_gradient, shared) in found.items()
    }
    seconds = common.interleaved(calls, repeats)
    one_task = jax.tree.map(lambda x: x[0], tasks)
    # Unrolled and native, because the count takes a loop for one pass through it.
    unrolled = algorithms(native, params, setting.steps, unroll=True)
    flops = {name: program_of(*unrolled[name], one_task).cost_analysis()["flops"] for name in found}

    def row(name: str) -> dict[str, Any]:
        planned = program_of(*found[name], one_task).memory_analysis()
        return {
            "setting": setting.name,
            "algorithm": name,
            "seconds": seconds[name],
            "time_ratio": common.ratio(seconds[name], seconds["FOMAML"]),
            "flops_ratio": flops[name] / flops["FOMAML"],
            "temp_bytes": planned.temp_size_in_bytes if planned else 0,
        }

    return [row(name) for name in found]


if __name__ == "__main__":
    main()
