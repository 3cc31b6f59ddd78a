"""How the next token is chosen: small transformations of the logits that compose, and the draw.

Sampling is to logits what optax is to gradients:

    chain(temperature(0.8), top_p(0.95))

Each transformation is a pytree whose numbers are traced leaves, so another temperature never
recompiles, and a number may be an array [B], one for each row. The order is the one written.
Probabilities that a transformation removes become logits of -inf.
"""

import ast
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Shaped

from textgen.config import UserError, did_you_mean, require

Logits = Float[Array, "B V"]
Number = float | int | Sequence[float | int] | Shaped[np.ndarray, "*B"] | Shaped[Array, "*B"]  # one, or one a row


@flax.struct.dataclass
class Transform:
    """A transformation of logits: apply(logits [B, V], *numbers) -> logits [B, V].

    Attributes:
      numbers: its settings, scalars or [B].
      name: as it is written in a chain.
      apply: a pure function of the module: a new one each time would compile each time.
    """

    numbers: tuple[Any, ...]
    name: str = flax.struct.field(pytree_node=False)
    apply: Callable[..., Logits] = flax.struct.field(pytree_node=False)

    def __call__(self, logits: Logits) -> Logits:
        return self.apply(logits, *self.numbers)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(_number(n) for n in self.numbers)})"


@flax.struct.dataclass
class Chain:
    """Transformations one after another; the empty chain is the model's own distribution."""

    transforms: tuple[Transform, ...]

    def __call__(self, logits: Logits) -> Logits:
        for transform in self.transforms:
            logits = transform(logits)
        return logits

    def __str__(self) -> str:
        return ", ".join(map(str, self.transforms))


def chain(*transforms: Transform) -> Chain:
    """The transformations in the order written."""
    return Chain(transforms)


def _number(n: Any) -> str:
    n = np.asarray(n)
    return f"{n:g}" if n.ndim == 0 else "[" + ", ".join(f"{x:g}" for x in n) + "]"


def _transform(name: str, apply: Callable[..., Logits], *numbers: Any) -> Transform:
    return Transform(tuple(np.asarray(n, np.float32) for n in numbers), name, apply)


def _check(name: str, value: Any, good: Callable[[np.ndarray], Any], wanted: str) -> None:
    require(np.all(good(np.asarray(value, np.float64))), f"{name} must {wanted}, got {_number(value)}.")


def _column(number: Any) -> Float[Array, "B 1"]:
    """A scalar or [B] as [1, 1] or [B, 1]."""
    return jnp.reshape(jnp.asarray(number, jnp.float32), (-1, 1))


def temperature(value: Number) -> Transform:
    """p^(1/T), renormalised (Ackley et al. 1985): below 1 duller, above 1 livelier, 0 greedy exactly.

    Among equal largest logits, T = 0 takes the first.

    Raises:
      UserError: a temperature below 0, or not finite.
    """
    _check("temperature", value, lambda t: (t >= 0) & np.isfinite(t), "be 0 or more")
    return _transform("temperature", _temperature, value)


def _temperature(logits: Logits, t: Any) -> Logits:
    t = _column(t)
    # The largest logit becomes 0 first, so that a tiny temperature cannot overflow.
    shifted = logits - jnp.max(logits, -1, keepdims=True)
    first = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, -1, keepdims=True)
    return jnp.where(t > 0, shifted / jnp.where(t > 0, t, 1), jnp.where(first, 0.0, -jnp.inf))


def greedy() -> Transform:
    """The likeliest token alone: temperature 0."""
    return temperature(0.0)


def top_k(k: Number) -> Transform:
    """Keeps the k largest logits (Fan et al. 2018); of equal ones, the first.

    Raises:
      UserError: k below 1 or not whole. To keep all, leave top_k out.
    """
    _check(
        "top_k", k, lambda k: (k >= 1) & (k == np.round(k)), "be a whole number of 1 or more; to keep all, leave it out"
    )
    return _transform("top_k", _top_k, k)


def _top_k(logits: Logits, k: Any) -> Logits:
    return _keep(logits, _largest(logits, jnp.ones_like(logits), _column(k)))


def top_p(p: Number) -> Transform:
    """Keeps the smallest set of likeliest tokens whose mass reaches p, the crossing one included.

    Nucleus sampling (Holtzman et al. 2020). Of equally likely tokens the first come first. The
    threshold is found by bisection, so that the vocabulary is never sorted.

    Raises:
      UserError: p outside (0, 1].
    """
    _check("top_p", p, lambda p: (p > 0) & (p <= 1), "lie in (0, 1]")
    return _transform("top_p", _top_p, p)


def _top_p(logits: Logits, p: Any) -> Logits:
    nucleus = _largest(logits, jax.nn.softmax(logits, -1), _column(p))
    return _keep(logits, nucleus | (_column(p) >= 1))


def min_p(m: Number) -> Transform:
    """Keeps tokens at least m times as likely as the likeliest (Nguyen et al. 2024).

    Raises:
      UserError: m outside [0, 1].
    """
    _check("min_p", m, lambda m: (m >= 0) & (m <= 1), "lie in [0, 1]")
    return _transform("min_p", _min_p, m)


def _min_p(logits: Logits, m: Any) -> Logits:
    least = jnp.max(logits, -1, keepdims=True) + jnp.log(_column(m))
    return _keep(logits, logits >= least)


def typical(mass: Number) -> Transform:
    """Keeps the tokens whose surprise is nearest to the entropy, up to this mass (Meister et al. 2023).

    Raises:
      UserError: mass outside (0, 1].
    """
    _check("typical", mass, lambda p: (p > 0) & (p <= 1), "lie in (0, 1]")
    return _transform("typical", _typical, mass)


def _typical(logits: Logits, mass: Any) -> Logits:
    log_p = jax.nn.log_softmax(logits)
    distance = jnp.where(jnp.isneginf(log_p), jnp.inf, jnp.abs(-log_p - _entropy(log_p)))
    near = _largest(-distance, jnp.exp(log_p), _column(mass))
    return _keep(logits, near | (_column(mass) >= 1))


def epsilon(e: Number) -> Transform:
    """Keeps tokens of at least this probability, and always the likeliest (Hewitt et al. 2022).

    Raises:
      UserError: e outside [0, 1].
    """
    _check("epsilon", e, lambda e: (e >= 0) & (e <= 1), "lie in [0, 1]")
    return _transform("epsilon", _epsilon, e)


def _epsilon(logits: Logits, e: Any) -> Logits:
    log_p = jax.nn.log_softmax(logits)
    return _keep(logits, (log_p >= jnp.log(_column(e))) | _likeliest(logits))


def eta(e: Number) -> Transform:
    """The epsilon cut-off, lowered where the distribution is broad: min(e, sqrt(e) exp(-H)) (Hewitt et al. 2022).

    Raises:
      UserError: e outside [0, 1].
    """
    _check("eta", e, lambda e: (e >= 0) & (e <= 1), "lie in [0, 1]")
    return _transform("eta", _eta, e)


def _eta(logits: Logits, e: Any) -> Logits:
    log_p, log_e = jax.nn.log_softmax(logits), jnp.log(_column(e))
    return _keep(logits, (log_p >= jnp.minimum(log_e, log_e / 2 - _entropy(log_p))) | _likeliest(logits))


def top_n_sigma(n: Number) -> Transform:
    """Keeps logits within n standard deviations of the largest, whatever the temperature (Tang et al. 2024).

    Raises:
      UserError: n below 0.
    """
    _check("top_n_sigma", n, lambda n: n >= 0, "be 0 or more")
    return _transform("top_n_sigma", _top_n_sigma, n)


def _top_n_sigma(logits: Logits, n: Any) -> Logits:
    deviation = jnp.std(logits, -1, keepdims=True, where=jnp.isfinite(logits))  # of what is left
    return _keep(logits, logits >= jnp.max(logits, -1, keepdims=True) - _column(n) * deviation)


def _keep(logits: Logits, mask: Bool[Array, "B V"]) -> Logits:
    return jnp.where(mask, logits, -jnp.inf)


def _likeliest(logits: Logits) -> Bool[Array, "B V"]:
    return logits == jnp.max(logits, -1, keepdims=True)


def _entropy(log_p: Logits) -> Float[Array, "B 1"]:
    return -jnp.sum(jnp.where(jnp.isneginf(log_p), 0, jnp.exp(log_p) * log_p), -1, keepdims=True)


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


TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "temperature": temperature,
    "greedy": greedy,
    "top_k": top_k,
    "top_p": top_p,
    "min_p": min_p,
    "typical": typical,
    "epsilon": epsilon,
    "eta": eta,
    "top_n_sigma": top_n_sigma,
}


def parse(text: str) -> Chain:
    """The chain that a string describes, such as "temperature(0.8), top_p(0.95)".

    Raises:
      UserError: an unknown transformation, or arguments that it does not take.
    """
    try:
        calls = ast.parse(f"[{text}]", mode="eval").body.elts  # type: ignore[attr-defined]
    except SyntaxError:
        raise UserError(f"A sampler is written like 'temperature(0.8), top_p(0.95)', got '{text}'.") from None
    transforms = []
    for call in calls:
        require(
            isinstance(call, ast.Call) and isinstance(call.func, ast.Name),
            f"A sampler is written like 'temperature(0.8), top_p(0.95)', got '{ast.unparse(call)}'.",
        )
        name = call.func.id
        require(name in TRANSFORMS, f"Unknown sampler transformation '{name}'.{did_you_mean(name, TRANSFORMS)}")
        try:
            transforms.append(
                TRANSFORMS[name](
                    *map(ast.literal_eval, call.args), **{str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
                )
            )
        except UserError:
            raise
        except (TypeError, ValueError):
            raise UserError(f"'{ast.unparse(call)}' has arguments that {name} does not take.") from None
    return chain(*transforms)


def draw(logits: Logits, uniform: Float[Array, "B"]) -> Integer[Array, "B"]:
    """One token per row by inverting the cumulative distribution at a uniform in [0, 1).

    One random number a row is all it takes, and the draw is exact for a grid of them. A uniform
    has 23 bits here: what is less likely than 1e-7 is drawn a little too often or not at all.
    """
    p = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
    mass = jnp.cumsum(p, -1)
    below = mass <= (uniform[:, None] * mass[:, -1:])
    token = jnp.sum(below, -1)
    # Rounding can carry the product up to the whole mass: then it is the last possible token.
    last = logits.shape[-1] - 1 - jnp.argmax(jnp.flip(p > 0, -1), -1)
    return jnp.minimum(token, last).astype(jnp.int32)


def reweight_distribution(
    distribution: Float[np.ndarray, "*B V"], temperature: float = 0.5
) -> Float[np.ndarray, "*B V"]:
    """The textbook's softmax temperature: log, divide, exponentiate, normalise.

    Args:
      distribution: probabilities that sum to 1 over the last axis.
      temperature: above 0. Higher: more surprising; lower: more predictable.
    """
    require(temperature > 0, f"temperature must be above 0, got {temperature}.")
    with np.errstate(divide="ignore"):
        scaled = np.log(np.asarray(distribution, np.float64)) / temperature
    weights = np.exp(scaled - np.max(scaled, -1, keepdims=True))
    return weights / np.sum(weights, -1, keepdims=True)
