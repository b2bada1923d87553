"""A meta-gradient, fifty outer steps and an evaluation on some devices of some processes.

Run by `test_distributed.py`: python scale.py OUT DEVICES [PROCESSES PROCESS PORT]
Writes everything, and what the compiled meta-gradient sends between devices, into one file: on one
process for 1, 2, 4 and 8 devices, on several for all together.
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fomaml_jax as fj
from fomaml_jax.devices import sampled_learner

TASKS = 16


def regression():
    net = fj.models.mlp(hidden=(8,))

    def loss(params, batch):
        return jnp.mean((net.apply(params, batch[0]) - batch[1]) ** 2)

    params = net.init(jax.random.key(0), jnp.zeros((1, 1)))
    sample_task = fj.tasks.sinusoid(shots=3, queries=4)
    return loss, in_double_precision(params), lambda key: in_double_precision(sample_task(key))


def classification():
    images = np.random.default_rng(0).random((6, 5, 8, 8, 1))
    net = fj.models.conv4(3, width=4)

    @fj.matmul_convolutions
    def loss(params, batch):
        logits = net.apply(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    params = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    sample_task = fj.tasks.episodes(images, ways=3, shots=1, queries=2)
    return loss, in_double_precision(params), lambda key: in_double_precision(sample_task(key))


def in_double_precision(tree):
    def leaf(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)


def spread_out(tasks, mesh):
    """The tasks as one array of all processes, to which each brings its own."""
    mine = TASKS // jax.process_count()
    begin = jax.process_index() * mine
    sharding = NamedSharding(mesh, PartitionSpec("tasks"))

    def leaf(x):
        local = np.asarray(x)[begin : begin + mine]
        return jax.make_array_from_process_local_data(sharding, local)

    return jax.tree.map(leaf, tasks)


def sent(text):
    """How often a compiled program talks between devices, by kind."""
    kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    return [len(re.findall(rf"\b{kind}(?:-start)?\(", text)) for kind in kinds]


def on(mesh):
    """The same on any mesh, by name."""
    inner, found = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05)), {}
    whole = NamedSharding(mesh, PartitionSpec())
    for name, (loss, params, sample_task) in {
        "mlp": regression(),
        "conv4": classification(),
    }.items():
        per_task = fj.fomaml(loss, inner, 2)
        params = jax.device_put(params, whole)
        keys = fj.tasks.task_keys(jax.random.key(1), 0, TASKS)
        tasks = spread_out(jax.jit(jax.vmap(sample_task))(keys), mesh)
        over_tasks = fj.over_tasks(per_task, mesh=mesh, tasks_at_once=2 if name == "mlp" else 1)
        program = jax.jit(over_tasks).lower(params, tasks).compile()
        grads, info = program(params, tasks)
        losses = jax.jit(lambda x: x, out_shardings=whole)(info.query_loss)
        found |= {f"{name} gradient": flat(grads), f"{name} losses": np.asarray(losses)}
        found[f"{name} sent"] = sent(program.as_text())
        learner = fj.meta_learner(over_tasks, optax.sgd(0.1))
        step = jax.jit(learner.step).lower(jax.jit(learner.init)(params), tasks).compile()
        found[f"{name} step sent"] = sent(step.as_text())
        if name == "mlp":
            params = trained(per_task, params, sample_task, mesh)
            found[f"{name} trained"] = flat(params)

        @jax.jit
        def judged(params, loss=loss, sample_task=sample_task):
            def adapt(params, support):
                return fj.adapt(loss, params, support, inner, 2)[0]

            key = jax.random.key(3)
            return fj.evaluate(adapt, loss, params, sample_task, key, num_tasks=21, mesh=mesh)

        found[f"{name} judged"] = np.asarray(judged(params).per_task)
    return found


def sharded_besides(devices):
    """The meta-gradient on 2 x n devices whose second axis shards the parameters; its program."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((16, 4096), (4096, 16), (2, 4, 5, 16), (2, 4, 5, 16))
    wide, narrow, x, y = map(jax.random.normal, keys, shapes)
    params = {"in": wide / 4, "out": narrow / 64}

    def loss(params, batch):
        return jnp.mean((jax.nn.relu(batch[0] @ params["in"]) @ params["out"] - batch[1]) ** 2)

    mesh = jax.make_mesh((2, devices // 2), ("tasks", "model"), (AxisType.Auto,) * 2)
    layout = {"in": PartitionSpec(None, "model"), "out": PartitionSpec("model", None)}
    layout = {name: NamedSharding(mesh, spec) for name, spec in layout.items()}
    tasks = fj.Task((x[0], y[0]), (x[1], y[1]))
    per_task = fj.fomaml(loss, optax.sgd(0.01), 3)
    one, each = PartitionSpec(), PartitionSpec("tasks")
    mapped = jax.jit(
        jax.shard_map(
            fj.over_tasks(per_task, axis_name="tasks"),
            mesh=mesh,
            in_specs=(one, each),
            out_specs=(one, each),
            axis_names={"tasks"},
        )
    )
    program = mapped.lower(jax.device_put(params, layout), tasks).compile()
    grads, _ = mapped(jax.device_put(params, layout), tasks)
    in_place = all(grads[name].sharding.is_equivalent_to(layout[name], 2) for name in layout)
    expected, _ = jax.jit(fj.over_tasks(per_task))(params, tasks)
    return {
        "sharded gradient on 1": flat(expected),
        f"sharded gradient on {devices}": flat(grads),
        "sharded program": np.array(program.as_text() if in_place else "moved"),
    }


def trained(per_task, params, sample_task, mesh):
    """The parameters after fifty outer steps."""
    outer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.02, momentum=0.9))
    learner = sampled_learner(per_task, sample_task, outer, mesh=mesh, tasks_at_once="auto")
    many = {"steps": 50, "tasks_per_step": TASKS, "mesh": mesh, "name": None}
    return fj.train(learner, params, lambda key: key, jax.random.key(2), **many).state.params


def flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def main(out, devices, *together):
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_enable_x64", True)
    if together:
        processes, process, port = map(int, together)
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    everything = {}
    sizes = [jax.device_count()] if together else [1, 2, 4, 8]
    for size in sizes:
        mesh = jax.make_mesh((size,), ("tasks",), (AxisType.Auto,), devices=jax.devices()[:size])
        everything |= {f"{name} on {size}": value for name, value in on(mesh).items()}
    if not together:
        everything |= sharded_besides(sizes[-1])
    if jax.process_index() == 0:
        np.savez(out, **everything)


if __name__ == "__main__":
    main(*sys.argv[1:])
