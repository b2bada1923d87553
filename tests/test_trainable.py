"""Which leaves the inner loop moves, what the others cost, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from problems import assert_close, network, network_problem, one

import fomaml_jax as fj

HEAD = {"w1": False, "b1": False, "w2": True, "b2": True}


@pytest.mark.usefixtures("float64", "standard_promotion")
@pytest.mark.parametrize("trainable", [HEAD, lambda path: path in ("w2", "b2")])
def test_only_the_chosen_leaves_move_as_if_there_were_no_others(trainable):
    params, tasks = network_problem(1)
    support = one(tasks).support
    body = {name: params[name] for name in ("w1", "b1")}
    head = {name: params[name] for name in ("w2", "b2")}
    adam = optax.adam(0.05)
    adapted, info = fj.adapt(network, params, support, adam, 3, trainable=trainable)
    alone, same = fj.adapt(lambda head, batch: network(body | head, batch), head, support, adam, 3)
    assert_close(adapted, body | alone)
    assert_close(info, same)
    for name in body:
        assert (adapted[name] == params[name]).all()


def test_paths_are_names_with_slashes_and_a_boolean_stands_for_all_below():
    params = {"params": {"body": [jnp.ones(2)], "head": {"kernel": jnp.ones(2)}}}
    seen = []

    def loss(params, batch):
        return sum(jnp.sum((leaf - batch) ** 2) for leaf in jax.tree.leaves(params))

    def is_head(path):
        seen.append(path)
        return "head" in path

    by_path, _ = fj.adapt(loss, params, jnp.zeros(2), optax.sgd(0.1), 1, trainable=is_head)
    assert sorted(seen) == ["params/body/0", "params/head/kernel"]
    prefix = {"params": {"body": False, "head": True}}
    by_prefix, _ = fj.adapt(loss, params, jnp.zeros(2), optax.sgd(0.1), 1, trainable=prefix)
    assert_close(by_path, by_prefix)
    assert jax.tree.structure(by_path) == jax.tree.structure(params)


@pytest.mark.usefixtures("float64")
def test_the_derivative_is_still_the_identity():
    params, tasks = network_problem(1, width=3)
    flat, unflatten = jax.flatten_util.ravel_pytree(params)

    def adapted(flat):
        theta, _ = fj.adapt(
            network, unflatten(flat), one(tasks).support, optax.sgd(0.1), 3, trainable=HEAD
        )
        return jax.flatten_util.ravel_pytree(theta)[0]

    assert (jax.jacrev(adapted)(flat) == jnp.eye(flat.size)).all()


@pytest.mark.usefixtures("standard_promotion")
def test_no_optimizer_state_for_what_is_frozen():
    params, tasks = network_problem(1)
    shapes = []

    def remembering(optimizer):
        def init(params):
            shapes.append(jax.tree.map(jnp.shape, params))
            return optimizer.init(params)

        return optax.GradientTransformation(init, optimizer.update)

    support = one(tasks).support
    fj.adapt(network, params, support, remembering(optax.adam(0.1)), 1, trainable=HEAD)
    assert {"w1": None, "b1": None, "w2": (8, 1), "b2": (1,)} in shapes


@pytest.mark.parametrize("algorithm", [fj.fomaml, fj.maml])
def test_an_optimizer_made_for_what_is_adapted(algorithm):
    params, tasks = network_problem(1)
    head = {"w1": None, "b1": None, "w2": "weights", "b2": "bias"}
    rates = {"weights": 0.1, "bias": 0.2}
    expected, _ = algorithm(
        network,
        optax.partition(
            {n: optax.sgd(r) for n, r in rates.items()}, head | {"w1": "bias", "b1": "bias"}
        ),
        3,
        trainable=HEAD,
    )(params, one(tasks))
    of_the_head = jax.tree.map(rates.get, head)
    for inner in (
        optax.partition({n: optax.sgd(r) for n, r in rates.items()}, head),
        fj.rates.scale_by_rates(of_the_head),
    ):
        found, _ = algorithm(network, inner, 3, trainable=HEAD)(params, one(tasks))
        assert_close(found, expected, 1e-6)


def test_a_rate_that_is_missing_is_refused():
    params, tasks = network_problem(1)
    rates = {"w1": None, "b1": None, "w2": 0.1, "b2": None}
    inner = fj.rates.scale_by_rates(rates)
    with pytest.raises(ValueError, match=r"^rates\['b2'\] is None, but that parameter is adapted"):
        fj.adapt(network, params, one(tasks).support, inner, 1, trainable=HEAD)


@pytest.mark.usefixtures("standard_promotion")
def test_optimizers_that_need_the_loss():
    params, tasks = network_problem(1)
    support = one(tasks).support
    for optimizer in (optax.polyak_sgd(), optax.lbfgs()):
        adapted, info = fj.adapt(network, params, support, optimizer, 5, trainable=HEAD)
        assert network(adapted, support) < info.losses[0]


def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("jitted", [False, True])
def test_a_frozen_body_is_run_once_on_the_support_set(jitted):
    """Forward on the support set once, and one query gradient: 4 of 18 units of work."""
    net = fj.models.conv4(ways=5, width=16)
    images = jnp.zeros((5, 28, 28, 1))
    params = net.init(jax.random.key(0), images)

    def loss(params, batch):
        logits = net.apply(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    batch = (images, jnp.arange(5))
    loss = jax.jit(loss) if jitted else loss

    def cost(**options):
        # Unrolled, since the cost analysis counts a loop's body once.
        meta_gradient = fj.fomaml(loss, optax.sgd(0.1), 5, unroll=True, **options)
        return flops(meta_gradient, params, fj.Task(batch, batch))

    assert cost(trainable=lambda path: "head" in path) < 0.25 * cost()


def test_a_mask_that_can_be_called_is_a_mask():
    """As those of Equinox, whose modules are functions."""
    import equinox as eqx

    net = eqx.nn.Linear(2, 1, key=jax.random.key(0))
    mask = eqx.tree_at(lambda net: net.bias, jax.tree.map(lambda _: False, net), True)
    loss = lambda net, batch: jnp.sum(jax.vmap(net)(batch))
    adapted, _ = fj.adapt(loss, net, jnp.ones((3, 2)), optax.sgd(0.5), 1, trainable=mask)
    assert_close((adapted.weight, adapted.bias), (net.weight, net.bias - 1.5))


@pytest.mark.parametrize(
    ("trainable", "error", "message"),
    [
        ({"w1": True}, ValueError, "trainable does not fit the structure of params"),
        ({"w1": 1, "b1": 0, "w2": 0, "b2": 0}, TypeError, r"trainable says 0 of params\['b1'\]"),
        (lambda path: path, TypeError, "trainable says 'b1'"),
        (lambda path: False, ValueError, "chooses no parameter; choose at least one of b1, b2"),
    ],
)
def test_refusals(trainable, error, message):
    params, tasks = network_problem(1)
    with pytest.raises(error, match=message):
        fj.fomaml(network, optax.sgd(0.1), 1, trainable=trainable)(params, one(tasks))


def test_what_is_frozen_is_not_in_the_loop():
    params, tasks = network_problem(1)

    def loops(**options):
        adapt = functools.partial(fj.adapt, network, optimizer=optax.sgd(0.1), num_steps=5)
        program = jax.make_jaxpr(lambda p, s: adapt(p, s, **options))(params, one(tasks).support)
        return [str(e.params["jaxpr"]) for e in program.eqns if e.primitive.name == "scan"]

    (whole,), (head,) = loops(), loops(trainable=HEAD)
    assert "tanh" in whole
    assert "tanh" not in head


def test_a_function_that_is_a_pytree_is_a_function():
    params, tasks = network_problem(1)
    head = jax.tree_util.Partial(lambda path: path in ("w2", "b2"))
    expected = fj.fomaml(network, optax.sgd(0.1), 1, trainable=HEAD)(params, one(tasks))
    found = fj.fomaml(network, optax.sgd(0.1), 1, trainable=head)(params, one(tasks))
    assert_close(found, expected)
