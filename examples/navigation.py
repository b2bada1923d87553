"""A robot that finds a goal it cannot see: a policy that one policy gradient adapts.

The 2-D navigation of the MAML paper (https://arxiv.org/abs/1703.03400, section 5.3.1), first order.
A task is a goal in the square [-0.5, 0.5]^2; the policy sees the robot's position alone, plays 20
trajectories, takes one policy-gradient step, and should then head for that goal.

A batch is the goals of the trajectories that are to be played, and the loss plays them: with the
parameters and the key that it is given. So every gradient is on-policy, the query's too, and
`has_state=True`, by which a loss gets a key of its own for every inner step, is all it takes.

As in the paper or, where that says otherwise (in brackets), in the authors' code
(https://github.com/cbfinn/maml_rl, maml_examples/maml_trpo_point.py): velocities of at most 0.1 a
coordinate, episodes of at most 100 steps that end within 0.01 of the goal, a Gaussian policy of two
layers of 100 ReLUs with a learned deviation, REINFORCE with discount 0.99, a linear baseline fitted
to the same 20 trajectories, standardised advantages, one inner step in training, and 20 goals an
outer step. Rewards are minus the squared distance, as the paper has it; a return is reported as
minus the sum of distances, which are the rewards of the authors' code and fit the paper's figure 4.

Otherwise than in the paper: the meta-gradient is first order; the outer optimizer is Adam and not
TRPO, for 240 outer steps and not up to 500; every tensor's inner rate is learned too, from 1, as
the policy's deviation shrinks in training and its gradients grow; the last parameters are judged
and not the best; an evaluation step has 20 trajectories and not 40; and its rates after the first
step are not halved but are times a factor that validation goals choose, as standardised advantages
do not shrink near the goal, and too large a second step now and then sends the robot away for good.

Run it: python examples/navigation.py (needs matplotlib for the picture)
"""

import argparse
import functools
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import navigation_report as report
import optax

import fomaml_jax as fj

HORIZON, SPEED, REACH, DISCOUNT = 100, 0.1, 0.01, 0.99
TRAJECTORIES, TASKS, INNER_RATE = 20, 20, 1.0
OUTER_STEPS, OUTER_RATE, OUTER_RATE_OF_RATES = 240, 1e-2, 5e-2
GOALS, STEPS_JUDGED = 1000, 3
RATES = 0.1, 0.5, 1.0, 2.0, 4.0, 8.0
"""From which a policy that was not meta-learned has its inner rate, by validation goals."""

LATER = 0.2, 0.1, 0.05, 0.02, 0.01
"""From which comes what rates are times after the first step, by validation goals."""

net = fj.models.mlp(hidden=(100, 100), outputs=2)


def blind(position, goal):
    """What the policy sees: where it is."""
    del goal
    return position


def seeing(position, goal):
    """What the oracle sees: where it is, and the goal."""
    return jnp.concatenate([position, goal], -1)


class Trajectory(NamedTuple):
    """What was seen and done, `[HORIZON, ...]`; distances are zero after the episode's end."""

    observations: jax.Array
    actions: jax.Array
    distances: jax.Array
    running: jax.Array


def first_params(key, observe=blind):
    """A Gaussian policy of standard deviation 1, in units of the greatest speed."""
    origin = jnp.zeros(2)
    mean = net.init(key, observe(origin, origin))["params"]
    return {"mean": mean, "log_std": jnp.zeros(2)}


def mean_action(params, observation):
    """The middle of the policy's Gaussian."""
    return net.apply({"params": params["mean"]}, observation)


def log_likelihood(params, observation, action):
    """Of an action under the policy, but for a constant."""
    deviation = (action - mean_action(params, observation)) * jnp.exp(-params["log_std"])
    return -jnp.sum(0.5 * deviation**2 + params["log_std"])


def move(position, action, goal):
    """The robot's world: `-> (position, distance from the goal, whether that is reached)`."""
    position = position + SPEED * jnp.clip(action, -1, 1)
    apart = position - goal
    return position, jnp.sqrt(jnp.sum(apart**2)), (jnp.abs(apart) < REACH).all()


def play(params, goal, key, observe=blind):
    """One `Trajectory` from the origin."""
    noise = jax.random.normal(key, (HORIZON, 2))

    def step(carry, noise):
        position, running = carry
        observation = observe(position, goal)
        action = mean_action(params, observation) + jnp.exp(params["log_std"]) * noise
        moved, distance, reached = move(position, action, goal)
        seen = Trajectory(observation, action, jnp.where(running, distance, 0), running)
        return (jnp.where(running, moved, position), running & ~reached), seen

    return jax.lax.scan(step, (jnp.zeros(2), jnp.array(True)), noise)[1]


def returns_to_go(rewards):
    """The discounted sum of what comes, at every step: `[trajectories, HORIZON]`."""
    step = jnp.arange(float(HORIZON))
    return rewards @ jnp.tril(DISCOUNT ** (step[:, None] - step[None]))


def baseline(played, returns):
    """The least-squares fit to the returns of observation, its square, and a cubic of time."""
    clock = (jnp.arange(float(HORIZON)) / HORIZON)[None, :, None]
    clock = jnp.broadcast_to(clock, (*returns.shape, 1))
    seen = played.observations
    features = jnp.concatenate([seen, seen**2, clock, clock**2, clock**3, jnp.ones_like(clock)], -1)
    counted = jnp.where(played.running[..., None], features, 0)
    gram = jnp.einsum("ntf,ntg->fg", counted, features) + 1e-5 * jnp.eye(features.shape[-1])
    fit = jax.scipy.linalg.solve(gram, jnp.einsum("ntf,nt->f", counted, returns), assume_a="pos")
    return features @ fit


def advantages(played):
    """Returns beyond the baseline, standardised over the steps that were played."""
    returns = returns_to_go(-(played.distances**2))
    beyond, where = returns - baseline(played, returns), played.running
    standardised = (beyond - beyond.mean(where=where)) / (beyond.std(where=where) + 1e-8)
    return jnp.where(where, standardised, 0)


def loss_fn(params, goals, state, key, *, observe=blind):
    """Plays a trajectory to each goal; the gradient of the loss is minus the policy gradient.

    `(params, goals [trajectories, 2], state, key) -> (loss, (state, mean return))`, where a return
    is minus a sum of distances.
    """
    player = jax.lax.stop_gradient(params)
    keys = jax.random.split(key, len(goals))
    played = jax.vmap(lambda goal, key: play(player, goal, key, observe))(goals, keys)
    likelihood = jax.vmap(jax.vmap(functools.partial(log_likelihood, params)))
    gained = advantages(played) * likelihood(played.observations, played.actions)
    return -gained.mean(where=played.running), (state, -played.distances.sum(1).mean())


def sample_task(key, trajectories=TRAJECTORIES) -> fj.KeyedTask:
    """A goal, as often as it is to be played for; the key is that of the players' noise."""
    goal_key, key = jax.random.split(key)
    goal = jax.random.uniform(goal_key, (2,), minval=-0.5, maxval=0.5)
    goals = jnp.tile(goal, (trajectories, 1))
    return fj.KeyedTask(goals, goals, key)


def trainer(steps, *, inner_steps=1, observe=blind, tasks=TASKS):
    """`key -> (params, logarithms of inner rates, mean return of the query trajectories [steps])`.

    Without an inner step it trains one policy on all goals.
    """
    loss: Any = functools.partial(loss_fn, observe=observe)
    algorithm = fj.learned_rates(loss, inner, inner_steps, has_state=True)
    meta_gradient = fj.over_tasks(
        lambda shared, key: algorithm(shared, sample_task(key)),
        mesh=mesh(math.gcd(jax.device_count(), tasks)),
    )

    def adam(rate):
        return optax.adam(optax.cosine_decay_schedule(rate, steps, alpha=0.1))

    outer = optax.partition(
        {
            "policy": adam(OUTER_RATE),
            "rates": adam(OUTER_RATE_OF_RATES),
            "none": optax.set_to_zero(),
        },
        fj.WithRates(fj.WithState("policy", "none"), "rates"),
    )
    learner = fj.meta_learner(meta_gradient, outer)

    def train(key):
        init_key, task_key = jax.random.split(key)

        def step(state, _):
            state, info = learner.step(state, fj.tasks.task_keys(task_key, state.step, tasks))
            return state, info.tasks.aux.mean()

        params = first_params(init_key, observe)
        state = learner.init(fj.WithRates(fj.WithState(params, None), equal(params, INNER_RATE)))
        state, returns = jax.lax.scan(step, state, length=steps)
        return state.params.params.params, state.params.rates, returns

    return jax.jit(train)


def mesh(devices):
    """So many devices, to share tasks out among."""
    return jax.make_mesh((devices,), ("tasks",), (jax.sharding.AxisType.Auto,))


def inner(logarithms, later=1.0):
    """Descent at a rate a tensor, given by its logarithm; times `later` after the first step."""
    rates = jax.tree.map(jnp.exp, logarithms)
    slower = optax.scale_by_schedule(lambda step: jnp.where(step == 0, 1.0, later))
    return optax.chain(fj.rates.scale_by_rates(rates), slower)


def equal(params, rate):
    """One rate for every tensor, as its logarithm."""
    return fj.rates.like(params, math.log(rate))


def judge(num_goals, num_steps, observe=blind):
    """`(params, logarithms of rates, later, key) -> fj.Evaluation`.

    Of the returns before and after each inner step.
    """
    loss: Any = functools.partial(loss_fn, observe=observe)

    def sample(key):
        task = sample_task(key)
        support_key, query_key = jax.random.split(task.key)
        return fj.Task((task.support, support_key), (task.query, query_key))

    def evaluation(params, logarithms, later, key):
        def adapt_fn(params, support):
            goals, key = support
            optimizer = inner(logarithms, later)
            adapted, info = fj.adapt(
                loss, params, goals, optimizer, num_steps, has_state=True, key=key
            )
            return adapted, info.aux  # the returns of the trajectories that a step is made from

        def metric_fn(adapted, query):
            (params, before), (goals, key) = adapted, query
            return [*before, loss(params, goals, None, key)[1][1]]

        on_all = mesh(jax.device_count())
        return fj.evaluate(
            adapt_fn, metric_fn, params, sample, key, num_tasks=num_goals, mesh=on_all
        )

    return jax.jit(evaluation)


def experiment(steps, goals, tasks):
    """`seed -> (what its policies return on goals never seen, the meta-learned one)`."""
    meta = trainer(steps, tasks=tasks)
    joint = trainer(steps, tasks=tasks, inner_steps=0)
    oracle = trainer(steps, tasks=tasks, inner_steps=0, observe=seeing)
    validate, test = judge(max(goals // 5, 2), STEPS_JUDGED), judge(goals, STEPS_JUDGED)
    unadapted = judge(goals, 0, seeing)

    def one_seed(seed):
        key, validation_key, test_key = jax.random.split(jax.random.key(seed), 3)

        def value(step, params, rates, later=1.0):
            found = float(validate(params, rates, later, validation_key).mean[step])
            return found if math.isfinite(found) else -math.inf

        def tested(params, rates):
            later = max(LATER, key=lambda later: value(-1, params, rates, later))
            return test(params, rates, later, test_key), later

        (params, rates, curve), (on_all, _, curve_on_all) = meta(key), joint(key)
        rate = max(RATES, key=lambda rate: value(1, on_all, equal(on_all, rate)))
        adapted, later = tested(params, rates)
        tuned, later_tuned = tested(on_all, equal(on_all, rate))
        sighted = unadapted(*oracle(key)[:2], 1.0, test_key)
        found = {"first-order MAML": adapted, "joint pre-training": tuned, "oracle": sighted}
        curves = {"first-order MAML": curve, "joint pre-training": curve_on_all}
        chosen = {"rate after pre-training": rate, "later rates times": [later, later_tuned]}
        return report.row(seed, found, curves) | chosen, (params, rates)

    return one_seed


def before_and_after(params, logarithms, key, number=3):
    """A goal, and a few trajectories before and after one step towards it."""
    task, loss = sample_task(key), cast(Any, loss_fn)
    goal, (inner_key, play_key) = task.support[0], jax.random.split(task.key)
    adapted, _ = fj.adapt(
        loss, params, task.support, inner(logarithms), 1, has_state=True, key=inner_key
    )
    players = jax.tree.map(lambda *policies: jnp.stack(policies), params, adapted)
    keys = jax.random.split(play_key, number)
    return goal, jax.vmap(jax.vmap(play, (None, None, 0)), (0, None, None))(players, goal, keys)


def main():
    """Trains and judges with several seeds; writes the numbers and a picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="(0 to 4)")
    parser.add_argument(
        "--out", type=Path, default=Path("navigation"), help="folder of what it writes (navigation)"
    )
    parser.add_argument("--short", action="store_true", help="see it run, and learn nothing")
    asked = parser.parse_args()
    out = asked.out
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    size = (2, 4, 2) if asked.short else (OUTER_STEPS, GOALS, TASKS)
    one_seed = experiment(*size)
    start, rows, learned = time.monotonic(), [], ()
    for seed in asked.seeds[:1] if asked.short else asked.seeds:
        row, learned = one_seed(seed)
        rows.append(row)
        print(report.write(out, rows, (time.monotonic() - start) / 60), flush=True)
    shown = jax.jit(jax.vmap(before_and_after, (None, None, 0)))
    goals, played = shown(*learned, jax.random.split(jax.random.key(1), 4))
    report.draw(out, rows, size[0], zip(goals, played.observations, played.running, strict=True))


if __name__ == "__main__":
    main()
