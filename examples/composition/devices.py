"""The core under `shard_map` and `pmap`: the same gradient from your own partitioning.

`over_tasks(..., mesh=mesh)` does this for you; this is for programs that shard more than tasks.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

import fomaml_jax as fj

net = fj.models.mlp()


def loss_fn(params, batch):
    """Mean squared error."""
    return jnp.mean((net.apply(params, batch[0]) - batch[1]) ** 2)


fomaml = fj.fomaml(loss_fn, optax.sgd(0.01), num_steps=5)


def by_shard_map(params, tasks):
    """Each device takes its own tasks; one all-reduce inside joins what they found."""
    mesh = jax.make_mesh((jax.device_count(),), ("tasks",), (jax.sharding.AxisType.Auto,))
    one, each = PartitionSpec(), PartitionSpec("tasks")

    joined = fj.over_tasks(fomaml, axis_name="tasks")
    mapped = jax.shard_map(joined, mesh=mesh, in_specs=(one, each), out_specs=(one, each))
    return jax.jit(mapped)(params, tasks)[0]


def by_pmap(params, tasks):
    """The same by `pmap`, with the devices as a leading axis."""
    devices = jax.device_count()
    split = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), tasks)

    joined = fj.over_tasks(fomaml, axis_name="devices")
    grads, _ = jax.pmap(joined, axis_name="devices", in_axes=(None, 0))(params, split)
    return jax.tree.map(lambda x: x[0], grads)


def main():
    """Compares both with one device."""
    params = net.init(jax.random.key(0), jnp.zeros((1, 1)))
    sample_task = fj.tasks.sinusoid(shots=5, queries=10)
    tasks = jax.vmap(sample_task)(fj.tasks.task_keys(jax.random.key(1), 0, 4 * jax.device_count()))
    expected, _ = jax.jit(fj.over_tasks(fomaml))(params, tasks)
    for way in (by_shard_map, by_pmap):
        apart = jax.tree.map(lambda a, b: abs(a - b).max(), way(params, tasks), expected)
        furthest = max(jax.tree.leaves(apart))
        print(f"{way.__name__}, {jax.device_count()} devices: {furthest:.1e} apart at most")
    return furthest


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)  # nothing to other devices
    main()
