"""Settings of Omniglot known by name, for any number of ways and shots."""

import dataclasses

from fomaml_jax import options


def omniglot(chosen: options.Omniglot) -> options.Omniglot:
    """The recipe that is named in the options, for their ways and shots.

    Example:
        >>> from fomaml_jax import options, recipes
        >>> recipes.omniglot(options.Omniglot(recipe="paper", ways=20)).inner_steps
        5
    """
    named = NAMED[chosen.recipe](chosen.ways, chosen.shots)
    return dataclasses.replace(named, recipe=chosen.recipe)


def quick(ways: int, shots: int) -> options.Omniglot:
    """Some minutes on two cores: the defaults."""
    return options.Omniglot(ways=ways, shots=shots)


def paper(ways: int, shots: int) -> options.Omniglot:
    """The MAML paper's setting, as far as its text and its authors' code say.

    Every layer adapts, the head is meta-learned. What differs: the paper's characters are 1,200
    random ones, not the 1,028 of Vinyals et al.; its code sums the losses of a class where ours
    takes the mean over classes, so that its rates of 0.4 (five ways) and 0.1 (twenty) would both be
    2.0 here. On validation tasks, early in training, 2.0 is behind 0.4 for five ways, and 0.1 and
    1.0 are behind 0.3 for twenty: 0.4 is taken for both.

    References:
        Finn, Abbeel, Levine, `Model-Agnostic Meta-Learning <https://arxiv.org/abs/1703.03400>`_,
        2017, appendix A.1, and https://github.com/cbfinn/maml.
    """
    few = ways <= 5
    rate = 0.4
    return options.Omniglot(
        ways=ways,
        shots=shots,
        queries=shots,
        train_shots=shots,
        steps=60_000,
        tasks_per_step=32 if few else 16,
        inner_steps=1 if few else 5,
        eval_steps=3 if few else 5,
        inner_rate=rate,
        head_rate=rate / ways,
        rate=1e-3,
        schedule="constant",
        width=64,
        features="mean",
        head="learned",
        shift=0,
        turns="drawn",
        resample="nearest",
        eval_tasks=10_000,
        compare=False,
    )


def best(ways: int, shots: int) -> options.Omniglot:
    """What reaches the highest accuracy here: one network for any ways and shots.

    The head starts at zero in every task, over features of one norm, and its rate is learned. From
    a head of zeros the gradient of all other layers is zero, so the one step is of the head alone,
    close to a classifier by class means; what first order learns is the features for it.
    Max-pooling, and more channels in the late blocks, where pictures are small, are worth their
    time. The rates of the other layers stay where they begin.

    References:
        Raghu et al., `Rapid Learning or Feature Reuse? <https://arxiv.org/abs/1909.09157>`_, 2020;
        Snell, Swersky, Zemel, `Prototypical Networks <https://arxiv.org/abs/1703.05175>`_, 2017;
        Antoniou, Edwards, Storkey, `How to train your MAML <https://arxiv.org/abs/1810.09502>`_,
        2019 (learned rates).
    """
    return options.Omniglot(
        ways=ways,
        shots=shots,
        steps=10_000,
        inner_steps=1,
        pooling="max",
        widening=True,
        learned_rates=True,
        mirror=True,
        shift=1,
        eval_tasks=10_000,
        compare=False,
    )


NAMED = {"quick": quick, "paper": paper, "best": best}
