"""What a transformation of logits is, and how several make a chain."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Shaped

from textgen.config import UserError, require

Logits = Float[Array, "B V"]
Number = float | int | Sequence[float | int] | Shaped[np.ndarray, "*B"] | Shaped[Array, "*B"]  # one, or one a row
Tokens = Annotated[Any, "ids; in a chain's text, texts of one token too"]


@flax.struct.dataclass
class Moment:
    """What a transformation with a memory may ask about the token to be drawn.

    Attributes:
      made: [B] new tokens so far.
      uniform: [B] one more random number, independent of the draw's.
    """

    made: Any
    uniform: Any


@flax.struct.dataclass
class Transform:
    """A transformation of logits [B, V]: a pair (init, apply) of pure functions, and its numbers.

    Without a memory, init is None and apply(logits, *numbers) -> logits. With one,

        init(prompts [B, T], lengths [B], vocab_size, room, *numbers) -> state
        apply(logits, state, moment, *numbers) -> (logits, commit), commit(token [B]) -> state

    where the batch is the first axis of every leaf of the state, and `room` is the longest text
    to come, prompt included.

    Attributes:
      numbers: its settings: scalars; or [B], one for each row; or [1, N], a list for all rows.
      name: as it is written in a chain.
      apply, init: functions of the module: new ones each time would compile each time.
    """

    numbers: tuple[Any, ...]
    name: str = flax.struct.field(pytree_node=False)
    apply: Callable[..., Any] = flax.struct.field(pytree_node=False)
    init: Callable[..., Any] | None = flax.struct.field(pytree_node=False, default=None)

    def __call__(self, logits: Logits) -> Logits:
        """Transforms logits once, where there is no memory."""
        return Chain((self,))(logits)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(written(n) for n in self.numbers)})"


@flax.struct.dataclass
class Chain:
    """Transformations one after another; the empty chain is the model's own distribution."""

    transforms: tuple[Transform, ...]

    def __call__(self, logits: Logits) -> Logits:
        """Transforms logits once, where no transformation has a memory."""
        return self.step(logits, self.init(*_NO_PROMPT, logits.shape[-1], 1), None)[0]

    def init(self, prompts: Any, lengths: Any, vocab_size: int, room: int) -> tuple[Any, ...]:
        """The memory of each transformation after the prompts.

        Args:
          prompts: [B, T] ids, padded.
          lengths: [B] how many of them are real.
          room: the longest text to come, prompt included.
        """
        return tuple(
            None if t.init is None else t.init(prompts, lengths, vocab_size, room, *t.numbers) for t in self.transforms
        )

    def step(self, logits: Logits, states: tuple[Any, ...], moment: Moment | None) -> tuple[Logits, Callable]:
        """Transformed logits, and the function from the tokens [B] then chosen to the next states."""
        commits = []
        for transform, state in zip(self.transforms, states, strict=True):
            if transform.init is None:
                logits = transform.apply(logits, *transform.numbers)
                commits.append(lambda token: None)
            else:
                logits, commit = transform.apply(logits, state, moment, *transform.numbers)
                commits.append(commit)
        return logits, lambda token: tuple(commit(token) for commit in commits)

    def row(self, i: Any) -> "Chain":
        """The chain as row i sees it, or rows [R]: their own numbers where each row has one."""
        pick = lambda n: n[i] if np.ndim(n) == 1 else n
        return Chain(tuple(t.replace(numbers=tuple(map(pick, t.numbers))) for t in self.transforms))

    def __str__(self) -> str:
        return ", ".join(map(str, self.transforms))


_NO_PROMPT = (np.zeros((1, 1), np.int32), np.zeros(1, np.int32))


def chain(*transforms: Transform) -> Chain:
    """The transformations in the order written."""
    return Chain(transforms)


def transform(name: str, apply: Callable[..., Any], *numbers: Any, init: Callable[..., Any] | None = None) -> Transform:
    """A transformation whose numbers, but for token ids, are float32."""
    arrays = (np.asarray(n) for n in numbers)
    return Transform(tuple(a if a.dtype == np.int32 else a.astype(np.float32) for a in arrays), name, apply, init)


def token_ids(name: str, ids: Any) -> Integer[np.ndarray, "1 N"]:
    """A list of tokens as a number of a transformation.

    Raises:
      UserError: an empty list, or what is not an id.
    """
    try:
        array = np.atleast_1d(np.asarray(ids))
    except ValueError:
        array = np.zeros(0)
    good = array.size > 0 and array.ndim == 1 and array.dtype.kind in "iu"
    if not good or array.min() < 0 or array.max() >= 2**31:
        raise UserError(f"{name} takes token ids, or texts of one token each, got {ids!r}.")
    return array.astype(np.int32)[None]


def written(n: Any) -> str:
    """A number as a chain's text has it, short and exact."""
    n = np.asarray(n)
    if n.ndim:
        return "[" + ", ".join(map(written, n.reshape(-1))) + "]"
    short = f"{n:g}"
    return short if n.dtype.type(float(short)) == n else repr(float(str(n)))


def check(name: str, value: Any, good: Callable[[np.ndarray], Any], wanted: str) -> None:
    """Raises UserError where a number, or one row's, is not as wanted."""
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} must {wanted}, got {value!r}.") from None
    require(array.ndim <= 1, f"{name} takes one number, or a list with one for each row, got {value!r}.")
    with np.errstate(over="ignore"):
        used = array.astype(np.float32)  # what it is computed with
    fine = np.all(np.isfinite(used)) and np.all(good(array)) and np.all(good(used))
    require(fine, f"{name} must {wanted}, got {written(array)}.")


MOST = 1e9  # in size, of what is added to logits or multiplies them: what comes of it, even many times, is finite


def moderate(x: Any) -> Any:
    return np.abs(x) <= MOST


def column(number: Any) -> Float[Array, "B 1"]:
    """A scalar or [B] as [1, 1] or [B, 1]."""
    return jnp.reshape(jnp.asarray(number, jnp.float32), (-1, 1))


def keep(logits: Logits, mask: Bool[Array, "#B V"]) -> Logits:
    """What is not in the mask becomes impossible."""
    return jnp.where(mask, logits, -jnp.inf)


def keep_or_all(logits: Logits, mask: Bool[Array, "#B V"]) -> Logits:
    """The same, but a mask that would leave a row nothing does not apply to it."""
    masked = keep(logits, mask)
    return jnp.where(jnp.any(masked > -jnp.inf, -1, keepdims=True), masked, logits)


def likeliest(logits: Logits) -> Bool[Array, "B V"]:
    return logits == jnp.max(logits, -1, keepdims=True)


def entropy(log_p: Logits) -> Float[Array, "B 1"]:
    """Nats."""
    return -jnp.sum(jnp.where(jnp.isneginf(log_p), 0, jnp.exp(log_p) * log_p), -1, keepdims=True)


def draw(logits: Logits, uniform: Float[Array, "B"]) -> Integer[Array, "B"]:
    """One token per row by inverting the cumulative distribution at a uniform in [0, 1).

    One random number a row is all it takes, and the draw is exact for a grid of them. A uniform
    has 23 bits here: what is less likely than 1e-7 is drawn a little too often or not at all.
    """
    p = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
    size = math.isqrt(p.shape[-1])  # of a block; first the block, then in it: a running sum over all is far slower
    blocks = jnp.pad(p, ((0, 0), (0, -p.shape[-1] % size))).reshape(len(p), -1, size)
    mass = jnp.sum(blocks, -1)
    target = uniform[:, None] * jnp.cumsum(mass, -1)[:, -1:]
    block, before = _invert(mass, target)
    within, _ = _invert(jnp.take_along_axis(blocks, block[..., None], 1)[:, 0], target - before)
    return (block * size + within)[:, 0].astype(jnp.int32)


def _invert(p: Float[Array, "B N"], target: Float[Array, "B 1"]) -> tuple[Any, Any]:
    """[B, 1]: where the running sum of p first exceeds the target, and the sum before that place."""
    mass, place = jnp.cumsum(p, -1), jnp.arange(p.shape[-1])
    found = jnp.sum(mass <= target, -1, keepdims=True)
    # Rounding can carry the target up to the whole mass: then it is the last possible place.
    found = jnp.minimum(found, jnp.max(jnp.where(p > 0, place, 0), -1, keepdims=True))
    return found, jnp.max(jnp.where(place < found, mass, 0), -1, keepdims=True)


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
