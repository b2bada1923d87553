"""FOMAML with parameters that need not fit one device: sharded over a second axis of the mesh.

The tasks are shared out over the axis "tasks" by `shard_map`, with `over_tasks(axis_name="tasks")`
inside. The axis "model" is left to JAX, which splits every product as the parameters are split: the
first layer by columns and the second by rows, so that a device never holds a whole matrix, nor an
adapted one, a gradient, or Adam's moments of one.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fomaml_jax as fj

INPUTS, HIDDEN = 128, 16384
LAYOUT = {"in": PartitionSpec(None, "model"), "out": PartitionSpec("model", None)}


def loss_fn(params, batch):
    """Mean squared error of a two-layer network."""
    x, y = batch
    return jnp.mean((jax.nn.relu(x @ params["in"]) @ params["out"] - y) ** 2)


def init(key):
    """Weights scaled by their inputs."""
    first, second = jax.random.split(key)
    wide = jax.random.normal(first, (INPUTS, HIDDEN)) * (2 / INPUTS) ** 0.5
    narrow = jax.random.normal(second, (HIDDEN, INPUTS)) / HIDDEN**0.5
    return {"in": wide, "out": narrow}


def sample_task(key):
    """A linear map of low rank, seen through eight points and judged on eight others."""
    keys = jax.random.split(key, 3)
    left, right = jax.random.normal(keys[0], (2, INPUTS, 4)) / INPUTS**0.5
    x = jax.random.normal(keys[1], (2, 8, INPUTS))
    y = x @ left @ right.T
    return fj.Task((x[0], y[0]), (x[1], y[1]))


def sharded_over_both(mesh):
    """The meta-gradient, manual over "tasks" and left to JAX over "model"."""
    fomaml = fj.fomaml(loss_fn, optax.sgd(1e-3), num_steps=3)
    one, each = PartitionSpec(), PartitionSpec("tasks")
    return jax.shard_map(
        fj.over_tasks(
            lambda params, key: fomaml(params, sample_task(key)),
            axis_name="tasks",
            tasks_at_once=1,
        ),
        mesh=mesh,
        in_specs=(one, each),
        out_specs=(one, each),
        axis_names={"tasks"},
    )


def step_on(mesh):
    """The compiled outer step on this mesh, its state and the keys of eight tasks."""
    learner = fj.meta_learner(sharded_over_both(mesh), optax.adam(1e-4))
    layout = {name: NamedSharding(mesh, spec) for name, spec in LAYOUT.items()}
    # Made in shards: at no time are they whole anywhere.
    params = jax.jit(init, out_shardings=layout)(jax.random.key(0))
    state = learner.init(params)
    keys = fj.tasks.task_keys(jax.random.key(1), 0, 8)
    keys = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("tasks")))
    return jax.jit(learner.step, donate_argnums=0).lower(state, keys).compile(), state, keys


def main():
    """Thirty steps with whole parameters on each device, and with a quarter of them."""
    found = []
    for size in (1, 4):
        # An axis of two at least for the tasks: XLA (jax 0.10) compiles no all-reduce over one.
        devices = jax.devices()[: 2 * size]
        mesh = jax.make_mesh((2, size), ("tasks", "model"), (AxisType.Auto,) * 2, devices=devices)
        step, state, keys = step_on(mesh)
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
        analysis = step.memory_analysis()
        planned = analysis.temp_size_in_bytes if analysis else 0
        losses = []
        for _ in range(30):
            state, info = step(state, keys)
            losses.append(float(info.loss))
        found.append((held, planned, losses))
        print(
            f"2 x {size} devices: each holds {held / 1e6:.1f} MB of parameters and moments, and "
            f"plans {planned / 1e6:.1f} MB for a step; loss {losses[0]:.4f} -> {losses[-1]:.4f}"
        )
    return found


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # nothing to other devices
    main()
