"""Sequences of symbols, each task a language of its own: a random Markov chain."""

import jax
import jax.numpy as jnp

from maml.types import Sampler, Task, whole


def markov(
    split: str = "meta_train",
    shots: int = 5,
    queries: int = 5,
    symbols: int = 8,
    length: int = 16,
    concentration: float = 0.3,
) -> Sampler:
    """Tasks of predicting the next symbol of a Markov chain, whose rows of transitions are Dirichlet(c, ..., c) draws.

    Our own family: what can be known before the support set is seen is nothing (the marginal is uniform), and what can be known
    at all is the entropy of the chain. In the mean over tasks and uniform states that is ψ(nc + 1) - ψ(c + 1) nats for n symbols
    (`expected_entropy`), a bound that no learner's loss falls below.

    Inputs and labels are integers [tasks, sequences, length]: a label is the symbol after the input. A sequence starts with a
    uniform symbol. All splits are one distribution; only the keys differ.

    Raises:
      ValueError: for sizes below 1, fewer than two symbols, and a concentration that is not positive.
    """
    del split
    for name, size, least in (
        ("shots", shots, 1),
        ("queries", queries, 1),
        ("symbols", symbols, 2),
        ("length", length, 1),
    ):
        if not whole(size, least):
            raise ValueError(f"{name}={size!r}: give a whole number, {least} or more")
    if not concentration > 0:
        raise ValueError(
            f"concentration={concentration}: give a positive number; a small one makes chains that are nearly certain"
        )

    def draw(key) -> Task:
        key_chain, key_start, key_steps = jax.random.split(key, 3)
        chain = jax.random.loggamma(key_chain, concentration, (symbols, symbols))  # logits of Dirichlet rows
        first = jax.random.randint(key_start, (shots + queries,), 0, symbols)

        def step(state, key):
            following = jax.random.categorical(key, chain[state])
            return following, following

        _, rest = jax.lax.scan(step, first, jax.random.split(key_steps, length))
        every = jnp.concatenate([first[None], rest]).T
        inputs, labels = every[:, :-1], every[:, 1:]
        return Task((inputs[:shots], labels[:shots]), (inputs[shots:], labels[shots:]))

    return jax.vmap(draw)


def expected_entropy(symbols: int, concentration: float) -> float:
    """The mean entropy of a row in nats: ψ(nc + 1) - ψ(c + 1)."""
    digamma = jax.scipy.special.digamma
    return float(digamma(symbols * concentration + 1.0) - digamma(concentration + 1.0))
