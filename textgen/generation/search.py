"""Ways to choose whole texts: beam search, stochastic beam search, arithmetic sampling, best of n.

Each is a few pure functions over the K texts that it follows for every prompt; the loop around
them is in textgen/generation/search_loop.py. Where texts can end, an ended one has a single continuation, itself.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from textgen.config import require
from textgen.generation.scan import observe
from textgen.generation.transforms import draw, parse_calls


@flax.struct.dataclass
class Texts:
    """K texts of each of B prompts, with room for R new tokens.

    Attributes:
      seen: Generated of [B, K, R]; after a text's end, end tokens and zeros.
      lengths: [B, K] new tokens, the end token included.
      ended: [B, K] whether the end token was reached.
      total: [B, K] log-probability under the transformed distribution, nats; -inf: no such text.
      score: [B, K] what the decoder ranks by.
      log_weight: [B, K] as in Decoded, or None.
    """

    seen: Any
    lengths: Any
    ended: Any
    total: Any
    score: Any
    log_weight: Any = None


@flax.struct.dataclass
class Step:
    """The moment before the next token of all texts is chosen.

    Attributes:
      logits, drawn: [B, K, V] the model's, and the transformed ones.
      log_q: [B, K, V] log-probabilities of `drawn`; of an ended text, 0 for the end token alone.
      uniform: [B, K] a random number for each text.
      keys: [B] each prompt's random key.
      position: [B] tokens before the one to be chosen, the prompt's included.
      made: [] new tokens so far.
      end: [] the end token, or None.
    """

    logits: Any
    drawn: Any
    log_q: Any
    uniform: Any
    keys: Any
    position: Any
    made: Any
    end: Any

    def total(self, texts: Texts, token: Any) -> Any:
        """[B, K] each text's log-probability with its token [B, K] after it."""
        return texts.total + jnp.take_along_axis(self.log_q, token[..., None], -1)[..., 0]

    def extend(self, texts: Texts, parent: Any, token: Any, total: Any) -> Texts:
        """Text j becomes text parent[j] with token[j] after it; all [B, K]. No parent: text j itself."""
        old, logits, drawn = take((texts, self.logits, self.drawn), parent)
        flat = lambda x: x.reshape(-1, x.shape[-1])
        new = observe(token.reshape(-1), flat(logits), flat(drawn))
        new = jax.tree.map(lambda leaf: jnp.where(old.ended, 0, leaf.reshape(token.shape)), new).replace(tokens=token)
        return old.replace(
            seen=jax.tree.map(lambda room, leaf: room.at[..., self.made].set(leaf), old.seen, new),
            lengths=old.lengths + ~old.ended,
            ended=old.ended if self.end is None else old.ended | (token == self.end),
            total=total,
        )


@flax.struct.dataclass
class Decoder:
    """A way to choose texts: pure functions over K texts of each of B prompts, and its numbers.

        init(texts, keys [B]) -> memory
        choose(memory, texts, step, *numbers) -> (parent [B, K] | None, token [B, K], total [B, K], memory)
        rank(memory, texts, *numbers) -> texts with a score, the best first

    Attributes:
      numbers: its settings, traced.
      name: as it is written.
      width: K, texts followed for each prompt.
      results: how many of them are given back.
      apart: the texts begin as K draws. Else they begin as one, and K - 1 that do not exist.
      init, choose, rank: functions of the module: new ones each time would compile each time.
      judge: (tokens [K, N], lengths [K]) -> scores [K], NumPy; best_of's own opinion of texts.
    """

    numbers: tuple[Any, ...]
    name: str = flax.struct.field(pytree_node=False)
    width: int = flax.struct.field(pytree_node=False)
    results: int = flax.struct.field(pytree_node=False)
    apart: bool = flax.struct.field(pytree_node=False)
    init: Callable[..., Any] = flax.struct.field(pytree_node=False)
    choose: Callable[..., Any] = flax.struct.field(pytree_node=False)
    rank: Callable[..., Texts] = flax.struct.field(pytree_node=False)
    judge: Callable[..., Any] | None = flax.struct.field(pytree_node=False, default=None)

    def __str__(self) -> str:
        return f"{self.name}({', '.join([str(self.width), *(f'{float(n):g}' for n in self.numbers)])})"


def beam(width: int, alpha: float | int = 0.0) -> Decoder:
    """The likeliest texts, as far as a search sees that keeps the best `width` of each length.

    The score of a text Y is log p(Y) / ((5 + |Y|) / 6)^alpha (Wu et al. 2016), so alpha matters
    where texts can end. The best `width` that end are set aside, and `width` others go on. Width 1
    is greedy.

    Raises:
      UserError: a width below 1, or an alpha below 0.
    """
    _check_width("beam", width)
    require(0 <= alpha < math.inf, f"beam's alpha must be 0 or more, got {alpha:g}.")
    return Decoder((np.float32(alpha),), "beam", width, width, False, _none_finished, _beam, _rank_beam)


def _none_finished(texts: Texts, keys: Any) -> Texts:
    return texts.replace(score=jnp.full_like(texts.score, -jnp.inf))


def _normalised(texts: Texts, alpha: Any) -> Texts:
    return texts.replace(score=texts.total / ((5 + texts.lengths) / 6) ** alpha)


def _best(finished: Texts, others: Texts) -> Texts:
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), finished, others)
    return take(both, jax.lax.top_k(both.score, others.score.shape[1])[1])


def _beam(finished: Texts, texts: Texts, step: Step, alpha: Any) -> tuple[Any, Any, Any, Texts]:
    rows, width, vocabulary = step.log_q.shape
    log_q = step.log_q
    if step.end is not None:
        token = jnp.full((rows, width), step.end, jnp.int32)
        ending = step.extend(texts, None, token, step.total(texts, token))
        finished = _best(finished, _normalised(ending, alpha))
        log_q = jnp.where(jnp.arange(vocabulary) == step.end, -jnp.inf, log_q)
    total, best = jax.lax.top_k((texts.total[..., None] + log_q).reshape(rows, -1), width)
    return best // vocabulary, best % vocabulary, total, finished


def _rank_beam(finished: Texts, texts: Texts, alpha: Any) -> Texts:
    return _best(finished, _normalised(texts, alpha))


def stochastic_beam(width: int) -> Decoder:
    """`width` different texts, drawn without replacement (Kool et al. 2019).

    A text's log-probability with Gumbel noise added is its score, and the highest scores win: the
    largest of a text's continuations has the score of the text, so that a beam finds them. The
    weights p(Y) / P(score above the best one left out) make unbiased estimates.

    Raises:
      UserError: a width below 1.
    """
    _check_width("stochastic_beam", width)
    return Decoder((), "stochastic_beam", width, width, False, _first_noise, _stochastic_beam, _rank_perturbed)


def _first_noise(texts: Texts, keys: Any) -> tuple[Any, Any]:
    """(score of each text [B, K], best score left out [B])."""
    # Any number would give the same law of the texts; the weights need the whole's own noise.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, texts.total.shape[1:], mode="high"))(keys)
    return texts.total + noise, jnp.full(keys.shape, -jnp.inf)


def _stochastic_beam(memory: Any, texts: Texts, step: Step) -> tuple[Any, Any, Any, Any]:
    perturbed, left_out = memory
    rows, width, vocabulary = step.log_q.shape
    draws = jax.vmap(lambda k, p: jax.random.gumbel(jax.random.fold_in(k, p), (width, vocabulary), mode="high"))
    log_p = texts.total[..., None] + step.log_q
    children = conditioned(log_p + draws(step.keys, step.position), perturbed[..., None])
    children = jnp.where(jnp.isneginf(log_p), -jnp.inf, children).reshape(rows, -1)
    children = jnp.pad(children, ((0, 0), (0, 1)), constant_values=-jnp.inf)  # one text of one token has no other
    scores, best = jax.lax.top_k(children, width + 1)
    # What is left out now is as high as the highest text that it leads to.
    left_out = jnp.maximum(left_out, scores[:, -1])
    best = jnp.minimum(best[:, :-1], width * vocabulary - 1)  # the padding counts as the last, which does not exist
    total = jnp.where(jnp.isneginf(scores[:, :-1]), -jnp.inf, jnp.take_along_axis(log_p.reshape(rows, -1), best, 1))
    return best // vocabulary, best % vocabulary, total, (scores[:, :-1], left_out)


def conditioned(noisy: Float[jax.Array, "*B V"], maximum: Float[jax.Array, "*B 1"]) -> Float[jax.Array, "*B V"]:
    """Gumbels given that their maximum is `maximum`, from free ones (Kool et al. 2019, appendix B.3).

    -ln(exp(-maximum) - exp(-largest) + exp(-noisy)), without overflow.
    """
    below = noisy - jnp.max(noisy, -1, keepdims=True)
    log1mexp = jnp.where(below > -0.7, jnp.log(-jnp.expm1(below)), jnp.log1p(-jnp.exp(below)))
    v = maximum - noisy + log1mexp
    return maximum - jnp.maximum(v, 0) - jnp.log1p(jnp.exp(-jnp.abs(v)))


def _rank_perturbed(memory: Any, texts: Texts) -> Texts:
    perturbed, left_out = memory
    gap = texts.total - left_out[:, None]
    # ln(1 - exp(-exp(gap))), which is `gap` where that is small: then the 1 hides the rest.
    log_inclusion = jnp.where(gap < -15, gap, jnp.log(-jnp.expm1(-jnp.exp(gap))))
    weight = jnp.where(jnp.isneginf(texts.total), -jnp.inf, texts.total - log_inclusion)
    return texts.replace(score=perturbed, log_weight=weight)


def arithmetic(n: int) -> Decoder:
    """n texts that spread evenly over the distribution (Vilnis et al. 2023).

    Text i is the one whose interval of the cumulative distribution over all texts holds the code
    (i + u) / n, with one random u: every text Y comes floor or ceil of n p(Y) times, and each
    alone is a fair sample. The score is the mean log-probability per token under the model; the
    texts stand in the order of their codes.

    Raises:
      UserError: n below 1.
    """
    _check_width("arithmetic", n)
    return Decoder((), "arithmetic", n, n, True, _codes, _arithmetic, _rank_codes)


def _codes(texts: Texts, keys: Any) -> Any:
    n = texts.total.shape[1]
    return jnp.minimum((jnp.arange(n) + jax.vmap(jax.random.uniform)(keys)[:, None]) / n, 1 - 2.0**-24)


def _arithmetic(codes: Any, texts: Texts, step: Step) -> tuple[None, Any, Any, Any]:
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    token, left = decode_symbol(flat(step.log_q), flat(codes), flat(step.uniform))
    token = token.reshape(codes.shape)
    return None, token, step.total(texts, token), left.reshape(codes.shape)


def decode_symbol(
    log_q: Float[jax.Array, "B V"], code: Float[jax.Array, "B"], fresh: Float[jax.Array, "B"]
) -> tuple[Integer[jax.Array, "B"], Float[jax.Array, "B"]]:
    """The token whose interval holds the code, and the code's place in that interval.

    A code has 23 bits, and a token of probability p uses up log2(1/p) of them; as many bits of
    `fresh` take their places at the lower end, so that a text of any length is drawn fairly.
    """
    token = draw(log_q, code)
    at = lambda x: jnp.take_along_axis(x, token[:, None], -1)[:, 0]
    p = jnp.exp(log_q - jnp.max(log_q, -1, keepdims=True))
    mass = jnp.cumsum(p, -1)
    p_token = at(p)
    code = (code * mass[:, -1] - (at(mass) - p_token)) / p_token
    code = code + fresh * 2.0**-23 * mass[:, -1] / p_token
    return token, jnp.clip(code - jnp.floor(code), 0, 1 - 2.0**-24)


def _rank_codes(codes: Any, texts: Texts) -> Texts:
    weight = jnp.full(codes.shape, -np.log(codes.shape[1]), jnp.float32)
    return texts.replace(score=_mean_log_probability(texts), log_weight=weight)


def best_of(n: int, judge: Callable[..., Any] | None = None) -> Decoder:
    """The best of n samples, the ones that plain sampling makes from the same keys.

    Args:
      n: samples of each prompt.
      judge: (tokens [n, N], lengths [n]) -> scores [n] in NumPy, the higher the better. None:
        the mean log-probability per token under the model.

    Raises:
      UserError: n below 1, or a judge that is no function.
    """
    _check_width("best_of", n)
    require(judge is None or callable(judge), f"The judge of best_of is a function, and not {judge!r}.")
    return Decoder((), "best_of", n, 1, True, _nothing, _sample, _rank_likely, judge)


def _nothing(texts: Texts, keys: Any) -> None:
    """No memory."""


def _sample(memory: None, texts: Texts, step: Step) -> tuple[None, Any, Any, None]:
    token = draw(step.drawn.reshape(-1, step.drawn.shape[-1]), step.uniform.reshape(-1)).reshape(step.uniform.shape)
    token = token if step.end is None else jnp.where(texts.ended, step.end, token)
    return None, token, step.total(texts, token), None


def _rank_likely(memory: None, texts: Texts) -> Texts:
    texts = texts.replace(score=_mean_log_probability(texts))
    return take(texts, jnp.argsort(-texts.score, axis=1))


def _mean_log_probability(texts: Texts) -> Any:
    return jnp.sum(texts.seen.log_probability, -1) / texts.lengths


DECODERS: dict[str, Callable[..., Decoder]] = {
    "beam": beam,
    "stochastic_beam": stochastic_beam,
    "arithmetic": arithmetic,
    "best_of": best_of,
}


def parse(text: str) -> Decoder:
    """The decoder that a string describes, such as "beam(8, alpha=0.6)".

    Raises:
      UserError: no such decoder, an impossible number, or not the form name(number, ...).
    """
    require(isinstance(text, str), f"A decoder is named by a text, such as 'beam(8, alpha=0.6)', got {text!r}.")
    made = parse_calls(text, DECODERS, "decoder", "beam(8, alpha=0.6)")
    require(len(made) == 1, f"Give one decoder, such as 'beam(8, alpha=0.6)', got '{text}'.")
    return made[0]


def take(tree: Any, index: Any) -> Any:
    """Each leaf [B, K, ...] at index [B, K]; all of it for None."""
    if index is None:
        return tree
    along = lambda leaf: jnp.take_along_axis(leaf, index.reshape(index.shape + (1,) * (leaf.ndim - 2)), axis=1)
    return jax.tree.map(along, tree)


def _check_width(name: str, width: Any) -> None:
    whole = isinstance(width, int) and not isinstance(width, bool) and width >= 1
    require(whole, f"{name} takes a whole number of texts, 1 or more, got {width!r}.")
