"""Bad input is refused at the border, by a message that names it and says what to pass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, network, network_problem, one

import fomaml_jax as fj

PARAMS, TASKS = network_problem(3)
TASK = one(TASKS)
SGD = optax.sgd(0.1)
INTEGERS = jax.tree.map(lambda x: x.astype(jnp.int32), PARAMS)


def adapt(loss=network, params=PARAMS, support=TASK.support, optimizer=SGD, steps=1, **kwargs):
    return fj.adapt(loss, params, support, optimizer, steps, **kwargs)


def fomaml(loss=network, optimizer=SGD, steps=1, params=PARAMS, task=TASK, **kwargs):
    return fj.fomaml(loss, optimizer, steps, **kwargs)(params, task)


def over_tasks(tasks, **kwargs):
    return fj.over_tasks(fj.fomaml(network, SGD, 1), **kwargs)(PARAMS, tasks)


def train(learner=None, key=None):
    learner = learner or fj.meta_learner(fj.over_tasks(fj.fomaml(network, SGD, 1)), SGD)
    key = jax.random.key(0) if key is None else key
    return fj.train(learner, PARAMS, lambda key: TASK, key, tasks_per_step=2, steps=1)


def episodes(images, **kwargs):
    return fj.tasks.episodes(images, **{"ways": 2, "shots": 1, "queries": 1} | kwargs)


NAN_PIXELS = np.zeros((4, 5, 2))
NAN_PIXELS[2, 1, 0] = np.nan


def cut(tree, size):
    return jax.tree.map(lambda x: x[:size], tree)


REFUSED = {
    "negative steps": (lambda: adapt(steps=-1), ValueError, "num_steps .* at least 0, got -1"),
    "negative steps in an array": (
        lambda: adapt(steps=jnp.array(-3)),
        ValueError,
        "num_steps .* at least 0, got -3",
    ),
    "negative steps of serial Reptile": (
        lambda: fj.serial_reptile(network, SGD, -1, SGD),
        ValueError,
        "num_steps .* at least 0, got -1",
    ),
    "steps of maml in an array": (
        lambda: fj.maml(network, SGD, jnp.array(3)),
        TypeError,
        "num_steps must be a Python int",
    ),
    "a Python number for a parameter of maml": (
        lambda: fj.maml(network, SGD, 1)({"w": 1.0}, TASK),
        TypeError,
        r"params\['w'\] is a float, not an array",
    ),
    "a state without has_state": (
        lambda: adapt(state=jnp.ones(4)),
        TypeError,
        "state is given to a loss with state only; pass has_state=True",
    ),
    "a key without has_state": (
        lambda: adapt(key=jax.random.key(0)),
        TypeError,
        "key is given to a loss with state only",
    ),
    "the order of negative steps": (
        lambda: fj.check_order(network, PARAMS, TASK, SGD, -3, PARAMS),
        ValueError,
        "num_steps .* at least 0, got -3",
    ),
    "the order of no optimizer": (
        lambda: fj.check_order(network, PARAMS, TASK, 0.5, 1, PARAMS),
        TypeError,
        "optimizer must be an optax.GradientTransformation, got 0.5",
    ),
    "gradients of another shape": (
        lambda: fj.over_tasks(lambda p, t: (jnp.ones(3), fomaml()[1]))(PARAMS, TASKS),
        ValueError,
        "must return floating-point gradients of the structure and shapes of params",
    ),
    "gradients that are integers": (
        lambda: fj.over_tasks(lambda p, t: (INTEGERS, fomaml()[1]))(PARAMS, TASKS),
        ValueError,
        "must return floating-point gradients",
    ),
    "an integer rate to be learned": (
        lambda: fj.meta_sgd(network, 1)(fj.WithRates(PARAMS, {"all": 1}), TASK),
        TypeError,
        r"rates\['all'\] has dtype int32, not a real floating-point one; a rate of one is 1.0",
    ),
    "a weight for every example": (
        lambda: over_tasks(TASKS, task_weight=lambda task: task.support[1][:, 0]),
        ValueError,
        r"task_weight must return a scalar, got shape \(",
    ),
    "a start for many tasks": (
        lambda: fj.starting_from(lambda p, s: p, fj.over_tasks(fj.fomaml(network, SGD, 1)))(
            PARAMS, TASKS
        ),
        ValueError,
        r"not one for a single task \(its query_loss has shape \(3,\)",
    ),
    "no query at once": (
        lambda: fj.batch_statistics.one_at_a_time(lambda p, x: x, queries_at_once=0),
        ValueError,
        "queries_at_once must be an integer of at least 1, got 0",
    ),
    "tasks with a key and without": (
        lambda: fj.uneven.stack_tasks([TASK, fj.KeyedTask(*TASK, jax.random.key(0))]),
        ValueError,
        "some of the tasks have a key and others none",
    ),
    "counts that are no integers": (
        lambda: episodes(np.zeros((4, 5, 2)), counts=np.full(4, 2.9, np.float32)),
        ValueError,
        "counts must be integers, got dtype float32",
    ),
    "a batch without examples for every step": (
        lambda: adapt(support=(jnp.ones((2, 0, 1)),), steps=2, per_step_support=True),
        ValueError,
        r"support\[0\] is empty \(shape \(2, 0, 1\)\)",
    ),
    "a number for a key": (
        lambda: train(key=0),
        TypeError,
        r"key must be one PRNG key, such as jax.random.key\(0\), got 0",
    ),
    "many keys for one": (
        lambda: train(key=jax.random.split(jax.random.key(0))),
        TypeError,
        "key must be one PRNG key",
    ),
    "a meta-gradient for a learner": (
        lambda: train(learner=fj.over_tasks(fj.fomaml(network, SGD, 1))),
        TypeError,
        r"learner has no init; make one, meta_learner\(",
    ),
    "evaluations of other metrics": (
        lambda: fj.paired_difference(
            fj.Evaluation(0, 0, jnp.ones(3), 3), fj.Evaluation(0, 0, {"loss": jnp.ones(3)}, 3)
        ),
        ValueError,
        "the evaluations are of different metrics",
    ),
    "more steps than batches": (
        lambda: adapt(support=cut(TASK.support, 2), steps=jnp.array(4), per_step_support=True),
        ValueError,
        "must lead with num_steps=4",
    ),
    "half a step": (lambda: adapt(steps=0.5), TypeError, r"num_steps must be an integer, got 0\.5"),
    "steps that are a bool": (lambda: adapt(steps=True), ValueError, "num_steps .* got True"),
    "steps when made": (lambda: fj.fomaml(network, SGD, -2), ValueError, "num_steps .* got -2"),
    "traced steps of maml": (
        lambda: jax.jit(lambda k: fj.maml(network, SGD, k)(PARAMS, TASK))(2),
        TypeError,
        "num_steps must be a Python int",
    ),
    "a rate for an optimizer": (
        lambda: adapt(optimizer=0.1),
        TypeError,
        r"pass optax\.sgd\(rate\)",
    ),
    "no outer optimizer": (
        lambda: fj.meta_learner(fj.over_tasks(fj.fomaml(network, SGD, 1)), None),
        TypeError,
        "optimizer must be an optax.GradientTransformation, got None",
    ),
    "a rate of nan": (lambda: adapt(optimizer=optax.sgd(np.nan)), ValueError, "pass finite rates"),
    "a rate of infinity": (
        lambda: adapt(optimizer=optax.sgd(jnp.inf)),
        ValueError,
        "pass finite rates",
    ),
    "a rate of nan in a chain": (
        lambda: fomaml(optimizer=optax.chain(optax.clip(1.0), optax.sgd(np.nan, momentum=0.9))),
        ValueError,
        "not finite",
    ),
    "a decay of nan": (
        lambda: fomaml(optimizer=optax.chain(optax.add_decayed_weights(np.nan), SGD)),
        ValueError,
        "not finite",
    ),
    "integer parameters": (lambda: adapt(params=INTEGERS), TypeError, r"params\['b1'\] .* int32"),
    "a function among parameters": (
        lambda: adapt(params={"w": PARAMS["w1"], "activation": jnp.tanh}),
        TypeError,
        r"params\['activation'\] .* not an array; split the model",
    ),
    "no parameters": (lambda: adapt(params={}), ValueError, "params holds no arrays"),
    "an empty support": (
        lambda: adapt(support=cut(TASK.support, 0)),
        ValueError,
        r"support\[0\] is empty \(shape \(0, 1\)\)",
    ),
    "an empty query": (
        lambda: fomaml(task=fj.Task(TASK.support, cut(TASK.query, 0))),
        ValueError,
        r"query\[0\] is empty",
    ),
    "no support": (lambda: adapt(support=()), ValueError, "support holds no arrays"),
    "a batch for a task": (
        lambda: fomaml(task=TASK.support),
        TypeError,
        r"task must be a fomaml_jax\.Task\(support, query\), got a tuple",
    ),
    "a vector for a loss": (
        lambda: fomaml(loss=lambda p, b: jnp.ones(3)),
        ValueError,
        r"must return a real scalar, got an array of shape \(3,\)",
    ),
    "a list for a loss": (
        lambda: fomaml(loss=lambda p, b: [network(p, b)]),
        ValueError,
        r"must return a real scalar, got .* \(list\)",
    ),
    "a word for a loss": (
        lambda: fomaml(loss=lambda p, b: "small"),
        ValueError,
        "must return a real scalar, got 'small'",
    ),
    "an integer for a loss": (
        lambda: fomaml(loss=lambda p, b: jnp.zeros((), jnp.int32)),
        ValueError,
        "must return a real scalar",
    ),
    "a pair without has_aux": (
        lambda: fomaml(loss=lambda p, b: (network(p, b), {})),
        TypeError,
        "returned a tuple of 2 with has_aux=False",
    ),
    "no pair with has_aux": (
        lambda: fomaml(has_aux=True),
        TypeError,
        "with has_aux=True",
    ),
    "a number for a loss function": (
        lambda: fomaml(loss=3),
        TypeError,
        "loss_fn must be a function",
    ),
    "task axes that differ": (
        lambda: over_tasks(fj.Task(TASKS.support, cut(TASKS.query, 2))),
        ValueError,
        r"tasks\.query\[0\] leads with 2 tasks but tasks\.support\[0\] with 3",
    ),
    "no tasks": (lambda: over_tasks(cut(TASKS, 0)), ValueError, "has 0 tasks; pass at least one"),
    "tasks without arrays": (lambda: over_tasks(()), ValueError, "tasks holds no arrays"),
    "a scalar among tasks": (
        lambda: over_tasks((TASKS, jnp.zeros(()))),
        ValueError,
        "is a scalar; every leaf must lead with the task axis",
    ),
    "tasks_at_once of 0": (
        lambda: over_tasks(TASKS, tasks_at_once=0),
        ValueError,
        "tasks_at_once must be an integer of at least 1, got 0",
    ),
    "tasks_at_once of most": (
        lambda: over_tasks(TASKS, tasks_at_once="most"),
        ValueError,
        "tasks_at_once must be an integer of at least 1, got 'most'",
    ),
    "an unknown on_nonfinite": (
        lambda: over_tasks(TASKS, on_nonfinite="ignore"),
        ValueError,
        "on_nonfinite must be one of 'skip', 'propagate', got 'ignore'",
    ),
    "tasks that do not divide": (
        lambda: over_tasks(TASKS, mesh=jax.make_mesh((2,), ("t",))),
        ValueError,
        "3 tasks do not divide among the 2 devices of the mesh; pass 2 or 4",
    ),
    "two ways to share out tasks": (
        lambda: over_tasks(TASKS, mesh=jax.make_mesh((1,), ("t",)), axis_name="t"),
        ValueError,
        "given a mesh, on which it shards the tasks itself, and an axis_name, for tasks",
    ),
    "too many ways": (
        lambda: fj.tasks.episodes(np.zeros((4, 5, 2)), ways=5, shots=1, queries=1),
        ValueError,
        "ways=5 is more than the 4 classes there are",
    ),
    "no examples of a class": (
        lambda: episodes(np.zeros((4, 5, 2)), counts=np.array([5, 5, 0, 5])),
        ValueError,
        "shots=1 plus queries=1 is more than the 0 examples of the smallest class",
    ),
    "pixels of nan": (
        lambda: episodes(NAN_PIXELS),
        ValueError,
        r"images\[2, 1\] has pixels that are not finite \(1 examples in all\)",
    ),
    "pixels of nan on the device": (
        lambda: episodes(jnp.asarray(NAN_PIXELS)),
        ValueError,
        r"images\[2, 1\] has pixels that are not finite",
    ),
    "pictures of different sizes": (
        lambda: episodes([[np.zeros((8, 8)), np.zeros((9, 9))]] * 2),
        TypeError,
        "images must be one array .* of numbers, got list; bring pictures of different sizes to",
    ),
    "objects for pictures": (
        lambda: episodes(np.full((4, 5, 2), None)),
        TypeError,
        "images must be one array .* of numbers, got object",
    ),
    "a split for its pictures": (
        lambda: episodes(fj.datasets.glyphs().train),
        TypeError,
        r"images must be an array: pass the ImageClasses's \.images, and \.counts",
    ),
    "an evaluation on what are no tasks": (
        lambda: fj.evaluate_on(lambda p, s: p, lambda p, q: 0.0, (), (TASK.support, TASK.query)),
        TypeError,
        r"tasks must be a fomaml_jax\.Task\(support, query\), got a tuple",
    ),
    "the order of parameters with state": (
        lambda: fj.check_order(network, fj.WithState(PARAMS, 0.0), TASK, SGD, 1),
        TypeError,
        "the order is judged without state: pass the params of the WithState, and a loss with",
    ),
    "a diagnosis of parameters with state": (
        lambda: fj.diagnose(network, fj.WithState(PARAMS, 0.0), TASKS, SGD, 1),
        TypeError,
        "the order is judged without state",
    ),
    "keys for pictures": (
        lambda: episodes(jax.random.split(jax.random.key(0), (4, 5))),
        TypeError,
        "images must be one array .* of numbers, got PRNGKeyArray",
    ),
    "a meta-gradient that is none": (
        lambda: fj.over_tasks(None),
        TypeError,
        r"meta_gradient must be a function \(params, task\) -> \(grads, TaskInfo\), got None",
    ),
    "a meta-gradient that returns a dict": (
        lambda: fj.over_tasks(lambda params, task: (params, {"loss": 0}))(PARAMS, TASKS),
        TypeError,
        r"meta_gradient must return \(grads, fomaml_jax.TaskInfo\), as fomaml",
    ),
    "a task that is no meta-batch": (
        lambda: over_tasks(fj.Task(TASK.support, cut(TASK.query, 1))),
        ValueError,
        r"every leaf must lead with the same number of tasks, as those of jax.vmap\(sample_task\)",
    ),
    "words for pictures": (
        lambda: episodes(np.full((4, 5, 2), "word")),
        TypeError,
        "images must be one array .* of numbers, got <U4",
    ),
    "an unknown pooling": (
        lambda: fj.models.conv4(5, pooling="mean"),
        ValueError,
        "pooling must be one of 'stride', 'max', got 'mean'",
    ),
    "a network without outputs": (
        lambda: fj.models.mlp(outputs=0),
        ValueError,
        "must be an integer of at least 1, got 0",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("jit", [False, True])
def test_refusals_come_before_tracing_the_loss(jit):
    def never(params, batch):
        raise AssertionError("the loss was traced")

    run = fj.fomaml(never, SGD, 1)
    with pytest.raises(TypeError, match="int32"):
        (jax.jit(run) if jit else run)(INTEGERS, TASK)


def test_a_rate_that_is_traced_is_left_to_run_time():
    grads, _ = jax.jit(lambda rate: fomaml(optimizer=optax.sgd(rate)))(0.1)
    assert jnp.isfinite(grads["w1"]).all()


@pytest.mark.parametrize("clip", [optax.clip, optax.clip_by_global_norm])
def test_clipping_by_infinity_is_no_infinite_rate(clip):
    clipped, _ = fomaml(optimizer=optax.chain(clip(np.inf), SGD))
    assert_close(clipped, fomaml()[0], 1e-6)
