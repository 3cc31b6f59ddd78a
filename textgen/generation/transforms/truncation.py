"""Transformations of one step's logits: temperature, and what cuts off the unlikely."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from textgen.generation.transforms.core import (
    Logits,
    Number,
    Transform,
    check,
    column,
    entropy,
    keep,
    likeliest,
    transform,
)


def temperature(value: Number) -> Transform:
    """p^(1/T), renormalised (Ackley et al. 1985): below 1 duller, above 1 livelier, 0 greedy exactly.

    Among equal largest logits, T = 0 takes the first.

    Raises:
      UserError: a temperature below 0, or not finite.
    """
    check("temperature", value, lambda t: (t >= 0) & np.isfinite(t), "be 0 or more")
    return transform("temperature", scale, value)


def scale(logits: Logits, t: Any) -> Logits:
    """Logits over the temperature: T = 1 is the identity, so that what follows sees the model's own logits."""
    t = column(t)
    divisor = jnp.where(t > 0, t, 1)
    top = jnp.max(logits, -1, keepdims=True)
    # Only where the largest one would overflow are the logits shifted: penalties depend on their sign.
    scaled = jnp.where(jnp.isfinite(top / divisor), logits, logits - top) / divisor
    first = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, -1, keepdims=True)
    return jnp.where(t > 0, scaled, jnp.where(first, 0.0, -jnp.inf))


def greedy() -> Transform:
    """The likeliest token alone: temperature 0."""
    return temperature(0.0)


def top_k(k: Number) -> Transform:
    """Keeps the k largest logits (Fan et al. 2018); of equal ones, the first.

    Raises:
      UserError: k below 1 or not whole. To keep all, leave top_k out.
    """
    check(
        "top_k", k, lambda k: (k >= 1) & (k == np.round(k)), "be a whole number of 1 or more; to keep all, leave it out"
    )
    return transform("top_k", _top_k, k)


def _top_k(logits: Logits, k: Any) -> Logits:
    return keep(logits, _largest(logits, jnp.ones_like(logits), column(k)))


def top_p(p: Number) -> Transform:
    """Keeps the smallest set of likeliest tokens whose mass reaches p, the crossing one included.

    Nucleus sampling (Holtzman et al. 2020). Of equally likely tokens the first come first. The
    threshold is found by bisection, so that the vocabulary is never sorted.

    Raises:
      UserError: p outside (0, 1].
    """
    check("top_p", p, lambda p: (p > 0) & (p <= 1), "lie in (0, 1]")
    return transform("top_p", _top_p, p)


def _top_p(logits: Logits, p: Any) -> Logits:
    nucleus = _largest(logits, jax.nn.softmax(logits, -1), column(p))
    return keep(logits, nucleus | (column(p) >= 1))


def min_p(m: Number) -> Transform:
    """Keeps tokens at least m times as likely as the likeliest (Nguyen et al. 2024).

    Raises:
      UserError: m outside [0, 1].
    """
    check("min_p", m, lambda m: (m >= 0) & (m <= 1), "lie in [0, 1]")
    return transform("min_p", _min_p, m)


def _min_p(logits: Logits, m: Any) -> Logits:
    least = jnp.max(logits, -1, keepdims=True) + jnp.log(column(m))
    return keep(logits, logits >= least)


def typical(mass: Number) -> Transform:
    """Keeps the tokens whose surprise is nearest to the entropy, up to this mass (Meister et al. 2023).

    Raises:
      UserError: mass outside (0, 1].
    """
    check("typical", mass, lambda p: (p > 0) & (p <= 1), "lie in (0, 1]")
    return transform("typical", _typical, mass)


def _typical(logits: Logits, mass: Any) -> Logits:
    log_p = jax.nn.log_softmax(logits)
    distance = jnp.where(jnp.isneginf(log_p), jnp.inf, jnp.abs(-log_p - entropy(log_p)))
    near = _largest(-distance, jnp.exp(log_p), column(mass))
    return keep(logits, near | (column(mass) >= 1))


def epsilon(e: Number) -> Transform:
    """Keeps tokens of at least this probability, and always the likeliest (Hewitt et al. 2022).

    Raises:
      UserError: e outside [0, 1].
    """
    check("epsilon", e, lambda e: (e >= 0) & (e <= 1), "lie in [0, 1]")
    return transform("epsilon", _epsilon, e)


def _epsilon(logits: Logits, e: Any) -> Logits:
    log_p = jax.nn.log_softmax(logits)
    return keep(logits, (log_p >= jnp.log(column(e))) | likeliest(logits))


def eta(e: Number) -> Transform:
    """The epsilon cut-off, lowered where the distribution is broad: min(e, sqrt(e) exp(-H)) (Hewitt et al. 2022).

    Raises:
      UserError: e outside [0, 1].
    """
    check("eta", e, lambda e: (e >= 0) & (e <= 1), "lie in [0, 1]")
    return transform("eta", _eta, e)


def _eta(logits: Logits, e: Any) -> Logits:
    log_p, log_e = jax.nn.log_softmax(logits), jnp.log(column(e))
    return keep(logits, (log_p >= jnp.minimum(log_e, log_e / 2 - entropy(log_p))) | likeliest(logits))


def top_n_sigma(n: Number) -> Transform:
    """Keeps logits within n standard deviations of the largest, whatever the temperature (Tang et al. 2024).

    Raises:
      UserError: n below 0.
    """
    check("top_n_sigma", n, lambda n: n >= 0, "be 0 or more")
    return transform("top_n_sigma", _top_n_sigma, n)


def _top_n_sigma(logits: Logits, n: Any) -> Logits:
    deviation = jnp.std(logits, -1, keepdims=True, where=jnp.isfinite(logits))  # of what is left
    return keep(logits, logits >= jnp.max(logits, -1, keepdims=True) - column(n) * deviation)


def _largest(values: Logits, weight: Logits, wanted: Float[Array, "#B 1"]) -> Bool[Array, "B V"]:
    """The largest values, as few as bring their weights' sum to `wanted`; of equal ones the first.

    The threshold is the largest value whose upper set weighs enough. It is found exactly, by
    bisecting the 32 bits of a float mapped to integers of the same order.
    """
    wanted = jnp.broadcast_to(wanted, (values.shape[0], 1))
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.int32)  # -0 is 0
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers ordered as the floats are
    low = jnp.full_like(wanted, jnp.iinfo(jnp.int32).min, jnp.int32)
    high = jnp.max(order, -1, keepdims=True)

    def halve(_: Any, bounds: Any) -> Any:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounded up, without overflow
        enough = jnp.sum(jnp.where(order >= middle, weight, 0), -1, keepdims=True) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    threshold, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    above, equal = order > threshold, order == threshold
    missing = wanted - jnp.sum(jnp.where(above, weight, 0), -1, keepdims=True)
    before = jnp.cumsum(jnp.where(equal, weight, 0), -1) - jnp.where(equal, weight, 0)
    return above | (equal & (before < missing))
