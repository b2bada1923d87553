"""Many tasks: every plan gives the same numbers, and no task poisons the others."""

import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from problems import assert_close, network, network_problem, one, quadratic

import fomaml_jax as fj
from fomaml_jax import parallel

FOMAML = fj.fomaml(network, optax.sgd(0.1), 3)
plans = pytest.mark.parametrize("tasks_at_once", [1, 2, 3, 7, None, "auto"])


@pytest.mark.usefixtures("float64")
@plans
def test_every_plan_gives_the_mean_of_the_tasks(tasks_at_once):
    params, tasks = network_problem(5)
    each = [jax.jit(FOMAML)(params, one(tasks, i)) for i in range(5)]
    grads, info = jax.jit(fj.over_tasks(FOMAML, tasks_at_once=tasks_at_once))(params, tasks)
    assert_close(grads, jax.tree.map(lambda *g: sum(g) / 5, *(g for g, _ in each)))
    assert_close(info, jax.tree.map(lambda *i: jnp.stack(i), *(i for _, i in each)))


@pytest.mark.makes_nans
@pytest.mark.usefixtures("float64")
@plans
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_diverged_tasks_are_left_out_and_said(tasks_at_once, bad):
    params, tasks = network_problem(5)
    broken = jax.tree.map(lambda x: x.at[jnp.array([1, 4])].set(bad), tasks)
    healthy = jax.tree.map(lambda x: x[jnp.array([0, 2, 3])], tasks)
    over_tasks = jax.jit(fj.over_tasks(FOMAML, tasks_at_once=tasks_at_once))
    grads, info = over_tasks(params, broken)
    assert_close(grads, over_tasks(params, healthy)[0])
    assert info.finite.tolist() == [True, False, True, True, False]


@pytest.mark.makes_nans
def test_no_finite_task_gives_a_zero_gradient():
    params, tasks = network_problem(2)
    tasks = jax.tree.map(lambda x: x * jnp.nan, tasks)
    grads, info = fj.over_tasks(FOMAML)(params, tasks)
    assert_close(grads, jax.tree.map(jnp.zeros_like, params))
    assert not info.finite.any()


@pytest.mark.makes_nans
@plans
def test_propagate_hides_nothing(tasks_at_once):
    params, tasks = network_problem(5)
    broken = jax.tree.map(lambda x: x.at[1].set(jnp.nan), tasks)
    how = {"tasks_at_once": tasks_at_once, "on_nonfinite": "propagate"}
    over_tasks = jax.jit(fj.over_tasks(FOMAML, **how))
    assert jnp.isnan(over_tasks(params, broken)[0]["w1"]).all()
    expected, _ = jax.jit(fj.over_tasks(FOMAML))(params, tasks)
    assert_close(over_tasks(params, tasks)[0], expected, 1e-5)


def test_tasks_may_be_keys_of_a_sampler():
    params, _ = network_problem(1)
    sample_task = fj.tasks.sinusoid(shots=4, queries=3)
    keys = fj.tasks.task_keys(jax.random.key(0), 0, 5)
    sampled = fj.over_tasks(lambda params, key: FOMAML(params, sample_task(key)))
    grads, _ = sampled(params, keys)
    expected, _ = fj.over_tasks(FOMAML)(params, jax.vmap(sample_task)(keys))
    assert_close(grads, expected, 1e-5)


def test_sums_of_low_precision_gradients_are_kept_in_float32():
    params = jnp.zeros((), jnp.bfloat16)
    loss = lambda theta, batch: theta * batch[0].astype(jnp.bfloat16)
    ones = jnp.ones((1000, 1))  # a sum in bfloat16 would stop growing at 256
    meta_gradient = fj.over_tasks(fj.fomaml(loss, optax.sgd(0.1), 0), tasks_at_once=1)
    grads, _ = meta_gradient(params, fj.Task(ones, ones))
    assert grads.dtype == jnp.bfloat16
    assert float(grads) == 1.0


def test_memory_does_not_grow_with_the_number_of_sampled_tasks():
    sample_task = fj.tasks.sinusoid(shots=5, queries=5)

    def temporary_bytes(num_tasks):
        params, _ = network_problem(1, width=128)
        keys = fj.tasks.task_keys(jax.random.key(0), 0, num_tasks)
        step = fj.over_tasks(lambda p, key: FOMAML(p, sample_task(key)), tasks_at_once=2)
        return jax.jit(step).lower(params, keys).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(64) <= 1.05 * temporary_bytes(8)


@pytest.mark.parametrize(("backend", "size"), [("cpu", 1), ("gpu", 7), ("tpu", 7)])
def test_auto_is_one_task_at_once_on_cpu_and_all_elsewhere(monkeypatch, backend, size):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert parallel.resolve("auto", 7) == size


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("tasks_at_once", [1, 3, None])
def test_sharded_equals_unsharded(tasks_at_once):
    params, tasks = network_problem(10)
    mesh = jax.make_mesh((2,), ("tasks",))
    grads, info = jax.jit(fj.over_tasks(FOMAML, tasks_at_once=tasks_at_once, mesh=mesh))(
        params, tasks
    )
    expected, reference = fj.over_tasks(FOMAML)(params, tasks)
    assert_close(grads, expected)
    assert_close(info, reference)


@pytest.mark.makes_nans
@pytest.mark.usefixtures("float64")
def test_sharded_leaves_out_the_same_tasks():
    """The mean is over all finite tasks, not the mean of the devices' means."""
    params, tasks = network_problem(6)
    broken = jax.tree.map(lambda x: x.at[jnp.array([0, 1])].set(jnp.nan), tasks)
    mesh = jax.make_mesh((2,), ("tasks",))
    grads, info = jax.jit(fj.over_tasks(FOMAML, mesh=mesh))(params, broken)
    expected, _ = jax.jit(fj.over_tasks(FOMAML))(params, jax.tree.map(lambda x: x[2:], tasks))
    assert_close(grads, expected)
    assert info.finite.tolist() == [False, False, True, True, True, True]


@pytest.mark.makes_nans
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mapped", [jax.pmap, jax.vmap])
def test_an_axis_of_ones_own_leaves_out_the_same_tasks(mapped):
    params, tasks = network_problem(6)
    broken = jax.tree.map(lambda x: x.at[jnp.array([0, 1])].set(jnp.nan), tasks)
    split = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), broken)
    spread = mapped(fj.over_tasks(FOMAML, axis_name="mine"), axis_name="mine", in_axes=(None, 0))
    grads, info = jax.jit(spread)(params, split)
    expected, _ = jax.jit(fj.over_tasks(FOMAML))(params, jax.tree.map(lambda x: x[2:], tasks))
    for device in range(2):
        assert_close(one(grads, device), expected)
    assert info.finite.tolist() == [[False, False, True], [True, True, True]]


@pytest.mark.makes_nans
@pytest.mark.usefixtures("float64")
def test_the_outer_step_knows_the_losses_of_all_devices():
    params, tasks = network_problem(6)
    broken = jax.tree.map(lambda x: x.at[jnp.array([0, 1])].set(jnp.nan), tasks)
    mesh = jax.make_mesh((2,), ("tasks",), (AxisType.Auto,))
    whole = fj.meta_learner(fj.over_tasks(FOMAML), optax.sgd(0.1))
    spread = fj.meta_learner(fj.over_tasks(FOMAML, axis_name="tasks"), optax.sgd(0.1))

    def loss_and_number(state, tasks):
        info = spread.step(state, tasks)[1]
        return info.loss, info.num_finite

    one = jax.P()
    mapped = jax.shard_map(
        loss_and_number, mesh=mesh, in_specs=(one, jax.P("tasks")), out_specs=one
    )
    expected = jax.jit(whole.step)(whole.init(params), broken)[1]
    found = jax.jit(mapped)(whole.init(params), broken)
    assert_close(found, (expected.loss, expected.num_finite))
    assert int(found[1]) == 4


def test_annealed_orders_know_the_losses_of_all_devices_inside_of_a_shard_map():
    params, tasks = network_problem(4)
    mesh = jax.make_mesh((2,), ("tasks",), (AxisType.Auto,))
    algorithms = [f(network, optax.sgd(0.1), 1) for f in (fj.fomaml, fj.maml)]

    def loss(**axes):
        at = fj.schedules.first_then_second_order(
            *(fj.over_tasks(algorithm, **axes) for algorithm in algorithms), 1
        )
        learner = fj.scheduled_learner(at, optax.sgd(0.1))
        return lambda state, tasks: learner.step(state, tasks)[1].loss

    start = fj.meta_learner(fj.over_tasks(algorithms[0]), optax.sgd(0.1)).init(params)
    mapped = jax.shard_map(
        loss(axis_name="tasks"), mesh=mesh, in_specs=(jax.P(), jax.P("tasks")), out_specs=jax.P()
    )
    assert_close(jax.jit(mapped)(start, tasks), loss()(start, tasks), 1e-6)


def test_a_users_own_algorithm_inside_of_a_shard_map():
    def own(params, task):
        loss, grads = jax.value_and_grad(network)(params, task.query)
        return grads, fj.TaskInfo(loss, loss[None], jnp.isfinite(loss), None)

    params, tasks = network_problem(4)
    mesh = jax.make_mesh((2,), ("tasks",), (AxisType.Auto,))
    one, each = jax.P(), jax.P("tasks")
    spread = fj.over_tasks(own, axis_name="tasks")
    mapped = jax.shard_map(spread, mesh=mesh, in_specs=(one, each), out_specs=(one, each))
    found, _ = jax.jit(mapped)(params, tasks)
    assert_close(found, fj.over_tasks(own)(params, tasks)[0], 1e-5)


def test_adaptation_with_a_key_of_each_devices_own():
    def noisy(params, batch, state, key):
        return jnp.sum((params - batch - jax.random.normal(key, (1,))) ** 2), (state, None)

    def adapted(key):
        params, support, inner = jnp.zeros(1), jnp.ones(1), optax.sgd(0.1)
        return fj.adapt(noisy, params, support, inner, 2, has_state=True, key=key)[0]

    keys = jax.random.split(jax.random.key(0), 2)
    mesh = jax.make_mesh((2,), ("tasks",), (AxisType.Auto,))
    each = jax.P("tasks")
    mapped = jax.shard_map(
        lambda key: adapted(key[0])[None], mesh=mesh, in_specs=each, out_specs=each
    )
    assert_close(jax.jit(mapped)(keys), jax.vmap(adapted)(keys), 1e-6)


def test_a_number_of_steps_known_at_run_time_inside_of_a_shard_map():
    params, tasks = network_problem(4)
    mesh = jax.make_mesh((2,), ("tasks",), (AxisType.Auto,))

    def mean(params, tasks, num_steps):
        traced = fj.fomaml(network, optax.adam(0.1), num_steps)
        return fj.over_tasks(traced, axis_name="tasks")(params, tasks)[0]

    specs = (jax.P(), jax.P("tasks"), jax.P())
    with jax.numpy_dtype_promotion("standard"):
        mapped = jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=jax.P())
        found = jax.jit(mapped)(params, tasks, jnp.array(3))
        expected, _ = fj.over_tasks(fj.fomaml(network, optax.adam(0.1), 3))(params, tasks)
    assert_close(found, expected, 1e-6)


def test_one_all_reduce_and_nothing_else_is_sent():
    params, tasks = network_problem(4)
    mesh = jax.make_mesh((2,), ("tasks",))
    step = jax.jit(fj.over_tasks(FOMAML, mesh=mesh))
    placed = jax.device_put(tasks, jax.NamedSharding(mesh, jax.P("tasks")))
    text = step.lower(params, placed).compile().as_text()
    assert text.count(" all-reduce(") == 1
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)


def convolutional_loss(kernel, batch):
    images = jax.lax.conv(batch, kernel, (1, 1), "SAME")
    return jnp.mean(images**2)


def test_native_convolutions_are_warned_of_with_the_remedy():
    kernel, images = jnp.ones((1, 1, 3, 3)), jnp.ones((2, 1, 1, 4, 4))
    tasks = fj.Task(images, images)
    native = fj.over_tasks(fj.fomaml(convolutional_loss, optax.sgd(0.1), 1))
    with pytest.warns(UserWarning, match=r"matmul_convolutions\(loss_fn\)") as caught:
        native(kernel, tasks)
    assert caught[0].filename == __file__
    rewritten = fj.fomaml(fj.matmul_convolutions(convolutional_loss), optax.sgd(0.1), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fj.over_tasks(rewritten)(kernel, tasks)


def test_so_are_those_of_pictures_that_a_sampler_makes_of_a_key():
    kernel = jnp.ones((1, 1, 3, 3))
    loss = lambda scale, images: convolutional_loss(scale * kernel, images)
    images = jnp.ones((1, 1, 4, 4))
    fomaml = fj.fomaml(loss, optax.sgd(0.1), 1)
    composed = fj.over_tasks(lambda scale, key: fomaml(scale, fj.Task(images, images)))
    with pytest.warns(UserWarning, match="holds native convolutions"):
        composed(jnp.ones(()), fj.tasks.task_keys(jax.random.key(0), 0, 2))


@jax.tree_util.register_pytree_node_class
class Layer:
    """Parameters whose class, as most, is equal to itself alone."""

    def __init__(self, **named):
        self.named = named

    def tree_flatten(self):
        return tuple(self.named.values()), tuple(self.named)

    @classmethod
    def tree_unflatten(cls, names, leaves):
        return cls(**dict(zip(names, leaves, strict=True)))


def test_parameters_may_be_of_a_class_without_equality():
    params, tasks = network_problem(2)
    loss, inner = lambda layer, batch: network(layer.named, batch), optax.sgd(0.1)
    by_layer = fj.over_tasks(
        fj.starting_from(lambda layer, support: layer, fj.fomaml(loss, inner, 3))
    )
    learner = fj.meta_learner(by_layer, optax.sgd(0.1))
    grads, _ = jax.jit(by_layer)(Layer(**params), tasks)
    expected, _ = jax.jit(fj.over_tasks(FOMAML))(params, tasks)
    assert_close(grads.named, expected, 1e-6)
    jax.jit(learner.step)(learner.init(Layer(**params)), tasks)
    order = fj.check_order(loss, Layer(**params), one(tasks), inner, 1)
    assert order.verdict == "first"


def test_an_algorithm_may_have_attributes_of_its_own():
    def algorithm(params, task):
        return FOMAML(params, task)

    vars(algorithm).update(measured=True, variants=[])
    params, tasks = network_problem(2)
    grads, _ = jax.jit(fj.over_tasks(algorithm))(params, tasks)
    assert_close(grads, jax.jit(fj.over_tasks(FOMAML))(params, tasks)[0], 1e-6)


def test_where_none_can_be_nothing_is_traced_to_look_for_them():
    params, tasks = network_problem(4)
    jax.jit(fj.over_tasks(chex.assert_max_traces(FOMAML, 1)))(params, tasks)


def test_weights_beyond_the_range_of_a_gradient_leave_it_finite():
    def algorithm(params, task):
        loss = jnp.mean(task.query)
        return params * task.query[0], fj.TaskInfo(loss, jnp.zeros(0), jnp.isfinite(loss), None)

    def weight(task):
        return 70_000 * task.query[0].astype(jnp.float32)

    weighted = fj.over_tasks(algorithm, task_weight=weight)
    queries = jnp.array([[1.0], [2.0]], jnp.float16)
    grads, _ = weighted(jnp.ones(3, jnp.float16), fj.Task(queries, queries))
    assert_close(grads, jnp.full(3, 5 / 3, jnp.float16), 1e-3)


@plans
@pytest.mark.usefixtures("float64")
def test_gradients_of_more_bits_than_the_parameters_are_summed_so(tasks_at_once):
    def algorithm(params, task):
        loss = jnp.mean(task.query)
        return task.query, fj.TaskInfo(loss, jnp.zeros(0), jnp.isfinite(loss), None)

    centres = jnp.arange(10, dtype=jnp.float64).reshape(5, 2)
    over_tasks = jax.jit(fj.over_tasks(algorithm, tasks_at_once=tasks_at_once))
    grads, _ = over_tasks(jnp.zeros(2, jnp.float32), fj.Task(centres, centres))
    assert grads.dtype == jnp.float32
    assert_close(grads, centres.mean(0), 1e-6)


@pytest.mark.makes_nans
@pytest.mark.parametrize("wrong", [np.inf, np.nan, -1.0, 3e38, 1e-30])
def test_a_weight_that_is_no_weight_leaves_its_task_out(wrong):
    params, tasks = network_problem(2)
    tasks = tasks._replace(query=(tasks.query, jnp.array([[2.0], [wrong]])))
    per_task = lambda params, task: FOMAML(params, task._replace(query=task.query[0]))
    weighted = fj.over_tasks(per_task, task_weight=lambda task: task.query[1][0])
    grads, info = jax.jit(weighted)(params, tasks)
    assert info.finite.tolist() == [True, False]
    assert_close(grads, per_task(params, one(tasks))[0], 1e-6)


@plans
def test_plain_numbers_beside_a_loss_come_from_every_plan(tasks_at_once):
    params, tasks = network_problem(3)
    loss = lambda params, batch: (network(params, batch), {"examples": len(batch[0])})
    per_task = fj.fomaml(loss, optax.sgd(0.1), 1, has_aux=True)
    over_tasks = fj.over_tasks(per_task, tasks_at_once=tasks_at_once)
    _, info = jax.jit(over_tasks)(params, tasks)
    assert info.aux["examples"].tolist() == 3 * [len(one(tasks).query[0])]


def test_a_meta_gradient_that_asks_where_it_is_on_the_mesh():
    """The look for native convolutions is outside of the mesh, where nobody knows."""
    mesh = jax.make_mesh((2,), ("tasks",), (AxisType.Auto,))

    def placed(params, task):
        grads, info = fj.fomaml(quadratic, optax.sgd(0.1), 1)(params, task)
        return grads * (1.0 + jax.lax.axis_index("tasks").astype(grads.dtype)), info

    params, centres = jnp.zeros((2, 3, 1)), jnp.ones((2, 2, 3, 1))
    grads, _ = jax.jit(fj.over_tasks(placed, mesh=mesh))(params, fj.Task(centres, centres))
    plain = fj.fomaml(quadratic, optax.sgd(0.1), 1)(params, fj.Task(centres[0], centres[0]))[0]
    np.testing.assert_allclose(grads, 1.5 * plain, rtol=1e-6)


def test_what_is_no_mesh_or_weight_is_refused():
    meta_gradient = fj.fomaml(quadratic, optax.sgd(0.1), 1)
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh, such as .*, got 2"):
        fj.over_tasks(meta_gradient, mesh=2)
    with pytest.raises(TypeError, match="task_weight must be a function task -> weight, got"):
        fj.over_tasks(meta_gradient, task_weight=jnp.ones(5))


def test_it_can_be_named_as_a_function_can():
    meta_gradient = fj.over_tasks(fj.fomaml(quadratic, optax.sgd(0.1), 1))
    centres = jnp.ones((2, 3))
    named = jax.named_call(meta_gradient)(jnp.zeros(3), fj.Task(centres, centres))
    assert_close(named, meta_gradient(jnp.zeros(3), fj.Task(centres, centres)), 0)
