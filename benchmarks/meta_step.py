"""Milliseconds and tasks per second of one meta-gradient against the floor of its products alone.

The floor is measured in the same process: the matrix products that the convolutions of these tasks
cannot do without (forward, kernel gradient, and input gradient of all layers but the first), on the
same shapes and devices, and nothing else. The whole step draws its tasks from pictures in memory,
and updates the parameters with Adam, in one compiled call; what that adds is its share (negative
where it is less than the noise, or than what the gradient's own call takes to return its results in
new memory, which a step whose state is donated has there). Times are medians of interleaved rounds.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import INNER_RATE, SETTINGS, Setting
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import fomaml_jax as fj
from fomaml_jax.devices import mesh_for, use_every_core
from fomaml_jax.variants import variants_of


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = common.argument_parser(__doc__, settings=list(SETTINGS), repeats=7)
    parser.add_argument("--bfloat16", action="store_true", help="compute the network in bfloat16")
    parser.add_argument("--tune", action="store_true", help="measure the plans, and take the best")
    asked = parser.parse_args()
    use_every_core()
    rows = []
    for name in asked.settings:
        setting = common.setting_of(name, asked)
        rows.append(measure(setting, asked.repeats, asked.bfloat16, asked.tune))
        print(common.table(COLUMNS, rows[-1:]), flush=True)
    print("\n" + common.table(COLUMNS, rows))
    common.write("meta_step", rows, asked.out)


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "setting": lambda row: row["setting"],
    "ms": lambda row: common.milliseconds(row["ours"]),
    "tasks/s": lambda row: f"{row['tasks_per_second']:.0f}",
    "floor, ms": lambda row: common.milliseconds(row["floor"]),
    "times the floor": lambda row: common.times(row["times_the_floor"]),
    "whole step, ms": lambda row: common.milliseconds(row["whole_step"]),
    "sampling and update": lambda row: f"{row['sampling_and_update']:.1%}",
    "GFLOP/s": lambda row: f"{row['flops'] / row['ours']['median'] / 1e9:.0f}",
    "compile, s": lambda row: f"{row['compile_seconds']:.1f}",
}


def measure(setting: Setting, repeats: int, bfloat16: bool, tune: bool) -> dict[str, Any]:
    """One row."""
    loss, params, tasks = common.image_problem(setting)
    if bfloat16:
        loss = fj.compute_in(jnp.bfloat16, loss)
    meta_gradient = fj.fomaml(loss, optax.sgd(INNER_RATE), setting.steps)
    plan = fj.tune(meta_gradient, params, tasks, mesh=mesh_for(setting.tasks)) if tune else None
    if plan:
        print(plan, flush=True)
    form = plan.meta_gradient if plan else variants_of(meta_gradient)["matmul_convolutions"]
    start = time.perf_counter()
    ours = common.over_devices(
        form, params, tasks, tasks_at_once=plan.tasks_at_once if plan else "auto"
    )
    compile_seconds = time.perf_counter() - start
    dtype = jnp.bfloat16 if bfloat16 else jnp.float32
    calls = {
        "ours": ours,
        "whole_step": whole_step(setting, form, params, plan.tasks_at_once if plan else "auto"),
        "floor": floor(setting, dtype),
    }
    timed = common.interleaved(calls, repeats)
    return {
        "setting": setting.name,
        "shapes": vars(setting),
        "dtype": jnp.dtype(dtype).name,
        "plan": plan and {"variant": plan.variant, "tasks_at_once": plan.tasks_at_once},
        **timed,
        "tasks_per_second": setting.tasks / timed["ours"]["median"],
        "times_the_floor": common.ratio(timed["ours"], timed["floor"]),
        "sampling_and_update": 1 - 1 / common.ratio(timed["whole_step"], timed["ours"]),
        "flops": setting.flops(),
        "compile_seconds": compile_seconds,
    }


def whole_step(
    setting: Setting, per_task: fj.MetaGradient, params: fj.Params, tasks_at_once: Any
) -> Callable[[], None]:
    """One outer step from keys to parameters; the state is donated to the next."""
    shape = (100, setting.shots + setting.queries, setting.size, setting.size, setting.channels)
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    sample = fj.tasks.episodes(
        images, ways=setting.ways, shots=setting.shots, queries=setting.queries
    )
    mesh = mesh_for(setting.tasks)
    meta_gradient = fj.over_tasks(
        lambda params, key: per_task(params, sample(key)), tasks_at_once=tasks_at_once, mesh=mesh
    )
    learner = fj.meta_learner(meta_gradient, optax.adam(1e-3))
    key = jax.random.key(0)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        return learner.step(state, fj.tasks.task_keys(key, state.step, setting.tasks))[0]

    state = jax.tree.map(jnp.copy, learner.init(params))
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))

    def call():
        nonlocal state
        state = jax.block_until_ready(step(state))

    return call


def floor(setting: Setting, dtype: Any) -> Callable[[], Any]:
    """The products of a meta-gradient's convolutions and nothing else, on every device."""
    mesh = mesh_for(setting.tasks)
    support, query = setting.ways * setting.shots, setting.ways * setting.queries
    key = jax.random.key(0)

    def operands(images):
        return [
            jax.random.normal(key, (images * positions, inputs), dtype)
            for positions, inputs, _ in setting.layers()
        ]

    def products(patches, kernels):
        """Forward, kernel gradient, and the input gradient where there is one."""
        kernel_gradients, input_gradients = [], []
        for layer, (x, w) in enumerate(zip(patches, kernels, strict=True)):
            y = x @ w
            kernel_gradients.append(_narrow_first(y, x))
            if layer:
                input_gradients.append(y @ w.T)
        return kernel_gradients, input_gradients

    def one_task(carry, kernels):
        del carry
        support_patches, query_patches = patches

        def step(state, _):  # as the inner loop does, so that no product is the same as the last
            kernels, _ = state
            gradients, inputs = products(support_patches, kernels)
            moved = [w - 1e-9 * g for w, g in zip(kernels, gradients, strict=True)]
            return (moved, inputs), None

        inputs = jax.eval_shape(products, support_patches, kernels)[1]
        start = kernels, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
        (kernels, inputs), _ = lax.scan(step, start, length=setting.steps)
        return (inputs, products(query_patches, kernels)), None

    patches = operands(support), operands(query)
    shapes = [(inputs, outputs) for _, inputs, outputs in setting.layers()]
    kernels = [jax.random.normal(key, (setting.tasks, *shape), dtype) for shape in shapes]

    def all_tasks(kernels):
        out = jax.eval_shape(lambda k: one_task(None, k)[0], [k[0] for k in kernels])
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), out)
        last, _ = lax.scan(one_task, start, kernels)
        return jax.tree.map(lambda x: x[None], last)

    tasks = PartitionSpec("tasks")
    sharded = jax.shard_map(
        all_tasks, mesh=mesh, in_specs=(tasks,), out_specs=tasks, check_vma=False
    )
    return common.compiled(sharded, kernels)


def _narrow_first(y: jax.Array, x: jax.Array) -> jax.Array:
    """`x.T @ y`, computed with the narrower factor first, which is faster on CPU."""
    if y.shape[1] <= x.shape[1]:
        return lax.optimization_barrier(y.T @ x).T
    return x.T @ y


if __name__ == "__main__":
    main()
