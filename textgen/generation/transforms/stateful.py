"""Transformations that look at more than one step's logits: at the text so far, at the position, at chance.

The text so far is the prompt and what was drawn, but for the presence and frequency penalties,
which count what was drawn alone, as their origin does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from textgen.config import require
from textgen.generation.transforms.core import (
    MOST,
    Logits,
    Moment,
    Number,
    Tokens,
    Transform,
    check,
    column,
    keep,
    keep_or_all,
    likeliest,
    moderate,
    token_ids,
    transform,
)
from textgen.generation.transforms.truncation import scale

Ids = Integer[Array | np.ndarray, "1 N"]


def logit_bias(tokens: Tokens, biases: Any) -> Transform:
    """Adds biases[n] to the logit of tokens[n], in all rows; one of each may stand alone.

    Raises:
      UserError: as many biases as tokens are wanted, and of 1e9 or less in size.
    """
    check("logit_bias", biases, moderate, "be 1e9 or less in size")
    ids, values = token_ids("logit_bias", tokens), np.atleast_1d(np.asarray(biases, np.float32))
    require(values.shape == ids[0].shape, f"logit_bias takes as many biases as tokens, got {biases!r} for {tokens!r}.")
    return transform("logit_bias", _logit_bias, ids, values[None])


def _logit_bias(logits: Logits, ids: Ids, values: Any) -> Logits:
    return logits + jnp.zeros(logits.shape[-1]).at[ids[0]].add(values[0])


def banned(*tokens: Tokens) -> Transform:
    """Makes some tokens impossible. A ban that would leave nothing is not applied.

    Raises:
      UserError: no tokens.
    """
    return transform("banned", _banned, token_ids("banned", _flat(tokens)))


def _banned(logits: Logits, ids: Ids) -> Logits:
    return keep_or_all(logits, ~_one_of(ids, logits.shape[-1]))


def allowed(*tokens: Tokens) -> Transform:
    """Makes all but some tokens impossible, unless that would leave nothing.

    Raises:
      UserError: no tokens.
    """
    return transform("allowed", _allowed, token_ids("allowed", _flat(tokens)))


def _allowed(logits: Logits, ids: Ids) -> Logits:
    return keep_or_all(logits, _one_of(ids, logits.shape[-1]))


def _flat(tokens: Any) -> list[Any]:
    return list(tokens[0]) if len(tokens) == 1 and isinstance(tokens[0], list | tuple) else list(tokens)


def _one_of(ids: Ids, vocab_size: int) -> Bool[Array, "1 V"]:
    return jnp.zeros(vocab_size, bool).at[ids[0]].set(True)[None]


def _no_memory(prompts: Any, lengths: Any, vocab_size: int, room: int, *numbers: Any) -> tuple[()]:
    return ()


def temperature_schedule(start: Number, end: Number, steps: Number) -> Transform:
    """A temperature that goes from start to end, linearly, over the first `steps` new tokens, and stays.

    Raises:
      UserError: a temperature below 0, or steps below 1.
    """
    for value in (start, end):
        check("temperature_schedule", value, lambda t: (t >= 0) & np.isfinite(t), "have temperatures of 0 or more")
    check("temperature_schedule", steps, lambda n: n >= 1, "take 1 step or more")
    return transform("temperature_schedule", _temperature_schedule, start, end, steps, init=_no_memory)


def _temperature_schedule(logits: Logits, state: Any, moment: Moment, start: Any, end: Any, steps: Any) -> Any:
    way = jnp.minimum(moment.made / steps, 1)
    # Exact at both ends, so that an end of 0 is greedy.
    return scale(logits, (1 - way) * start + way * end), lambda token: state


def xtc(threshold: Number = 0.1, probability: Number = 0.5) -> Transform:
    """Excludes top choices: with this probability, all tokens of at least the threshold but the least likely of them.

    p-e-w 2024. It takes two such tokens or more; of equally likely ones the first stays.

    Raises:
      UserError: a number outside [0, 1].
    """
    for value in (threshold, probability):
        check("xtc", value, lambda x: (x >= 0) & (x <= 1), "have a threshold and a probability in [0, 1]")
    return transform("xtc", _xtc, threshold, probability, init=_no_memory)


def _xtc(logits: Logits, state: Any, moment: Moment, threshold: Any, probability: Any) -> Any:
    p = jax.nn.softmax(logits, -1)
    top = (p >= column(threshold)) & (p > 0)
    least = jnp.argmin(jnp.where(top, p, jnp.inf), -1)
    removed = top & (jnp.arange(p.shape[-1]) != least[:, None]) & (moment.uniform[:, None] < column(probability))
    return keep(logits, ~removed), lambda token: state


def mirostat(surprise: Number = 5.0, rate: Number = 0.1) -> Transform:
    """Holds the text's mean surprise at a target, in bits per token: mirostat 2.0 (Basu et al. 2021).

    What is more surprising than a bound is cut off, but for the likeliest; the bound starts at
    twice the target and moves against the error of each token drawn, whose surprise is taken
    before the cut.

    Raises:
      UserError: a surprise or a rate of 0 or less.
    """
    for value in (surprise, rate):
        check("mirostat", value, lambda x: x > 0, "have a surprise and a rate above 0")
    return transform("mirostat", _mirostat, surprise, rate, init=_mirostat_init)


def _mirostat_init(prompts: Any, lengths: Any, vocab_size: int, room: int, surprise: Any, rate: Any) -> Any:
    return jnp.broadcast_to(2 * jnp.asarray(surprise, jnp.float32), (prompts.shape[0],))


def _mirostat(logits: Logits, bound: Any, moment: Moment, surprise: Any, rate: Any) -> Any:
    bits = -jax.nn.log_softmax(logits) / np.log(2)

    def commit(token: Any) -> Any:
        return bound - rate * (jnp.take_along_axis(bits, token[:, None], 1)[:, 0] - surprise)

    return keep(logits, (bits <= bound[:, None]) | likeliest(logits)), commit


def repetition_penalty(theta: Number) -> Transform:
    """Divides the positive logits of tokens in the text so far, and multiplies the negative ones (Keskar et al. 2019).

    It depends on where the model's logits have their zero: it is not invariant to a shift.

    Raises:
      UserError: theta outside [1e-9, 1e9]. Above 1 repetition becomes rarer.
    """
    check("repetition_penalty", theta, lambda x: (x >= 1 / MOST) & moderate(x), "lie in [1e-9, 1e9]")
    return transform("repetition_penalty", _repetition_penalty, theta, init=_seen)


def _seen(prompts: Any, lengths: Any, vocab_size: int, room: int, *numbers: Any) -> Bool[Array, "B V"]:
    rows, real = jnp.arange(prompts.shape[0])[:, None], jnp.arange(prompts.shape[1]) < lengths[:, None]
    return jnp.zeros((prompts.shape[0], vocab_size), bool).at[rows, prompts].max(real)


def _repetition_penalty(logits: Logits, seen: Any, moment: Moment, theta: Any) -> Any:
    penalised = jnp.where(logits > 0, logits / column(theta), logits * column(theta))
    return jnp.where(seen, penalised, logits), lambda token: seen | _is(token, logits)


def _is(token: Integer[Array, "B"], logits: Logits) -> Bool[Array, "B V"]:
    return jnp.arange(logits.shape[-1]) == token[:, None]


def presence_penalty(a: Number) -> Transform:
    """Subtracts a number from the logits of tokens that were drawn before (OpenAI's API).

    Raises:
      UserError: a number above 1e9 in size. Below 0 it rewards.
    """
    check("presence_penalty", a, moderate, "be 1e9 or less in size")
    return transform("presence_penalty", _presence_penalty, a, init=_none_drawn)


def frequency_penalty(b: Number) -> Transform:
    """Subtracts a number from a token's logit for each time that it was drawn before (OpenAI's API).

    Raises:
      UserError: a number above 1e9 in size. Below 0 it rewards.
    """
    check("frequency_penalty", b, moderate, "be 1e9 or less in size")
    return transform("frequency_penalty", _frequency_penalty, b, init=_none_drawn)


def _none_drawn(prompts: Any, lengths: Any, vocab_size: int, room: int, *numbers: Any) -> Float[Array, "B V"]:
    return jnp.zeros((prompts.shape[0], vocab_size), jnp.float32)


def _presence_penalty(logits: Logits, counts: Any, moment: Moment, a: Any) -> Any:
    return logits - column(a) * (counts > 0), lambda token: counts + _is(token, logits)


def _frequency_penalty(logits: Logits, counts: Any, moment: Moment, b: Any) -> Any:
    return logits - column(b) * counts, lambda token: counts + _is(token, logits)


def no_repeat_ngram(n: Number) -> Transform:
    """No n tokens in a row occur twice in the text (Paulus et al. 2018), unless that would leave nothing.

    Raises:
      UserError: n below 1 or not whole.
    """
    check("no_repeat_ngram", n, lambda n: (n >= 1) & (n == np.round(n)), "be a whole number of 1 or more")
    return transform("no_repeat_ngram", _no_repeat_ngram, n, init=_past)


def _no_repeat_ngram(logits: Logits, past: Any, moment: Moment, n: Any) -> Any:
    tokens, matched = _continuations(past)
    rows = jnp.arange(tokens.shape[0])[:, None]
    repeated = jnp.zeros(logits.shape, bool).at[rows, tokens].max(matched >= column(n) - 1)
    return keep_or_all(logits, ~repeated), lambda token: _append(past, token)


def dry(multiplier: Number = 0.8, base: Number = 1.75, allowed: Number = 2, breakers: Tokens = None) -> Transform:
    """Subtracts multiplier * base^(n - allowed) where a token would extend a repetition of n tokens (p-e-w 2024).

    Args:
      allowed: shorter repetitions than this go free.
      breakers: tokens over which no repetition is followed, such as "\\n" and ":".

    Raises:
      UserError: a multiplier below 0 or above 1e9, a base below 1, or allowed below 1.
    """
    check("dry", multiplier, lambda x: (x >= 0) & moderate(x), "have a multiplier of 0 or more, up to 1e9")
    check("dry", base, lambda x: x >= 1, "have a base of 1 or more")
    check("dry", allowed, lambda x: x >= 1, "allow 1 token or more")
    lists = () if breakers is None else (token_ids("dry", _flat([breakers])),)
    return transform("dry", _dry, multiplier, base, allowed, *lists, init=_dry_past)


def _dry(logits: Logits, past: Any, moment: Moment, multiplier: Any, base: Any, allowed: Any, *breakers: Any) -> Any:
    tokens, matched = _continuations(past)
    over = matched - column(allowed)
    growth = jnp.minimum(column(base) ** jnp.minimum(over, 30), MOST)
    penalty = jnp.where(over >= 0, column(multiplier) * growth, 0)
    rows = jnp.arange(tokens.shape[0])[:, None]
    return (
        logits - jnp.zeros(logits.shape, jnp.float32).at[rows, tokens].max(penalty),
        lambda token: _append(past, token, *breakers),
    )


# The text so far as (tokens [B, N], its length [B], match [B, N]): match[j] is how many tokens
# that end at j also end the text.
Past = tuple[Any, Any, Any]


def _past(prompts: Any, lengths: Any, vocab_size: int, room: int, *numbers: Any) -> Past:
    return _read(prompts, lengths, room)


def _dry_past(
    prompts: Any, lengths: Any, vocab_size: int, room: int, multiplier: Any, base: Any, allowed: Any, *breakers: Any
) -> Past:
    return _read(prompts, lengths, room, *breakers)


def _read(prompts: Any, lengths: Any, room: int, *breakers: Any) -> Past:
    """The past after a prompt, token by token."""
    rows = prompts.shape[0]
    empty = (jnp.zeros((rows, room), jnp.int32), jnp.zeros(rows, jnp.int32), jnp.zeros((rows, room), jnp.int32))

    def body(past: Any, inputs: Any) -> Any:
        t, token = inputs
        new = _append(past, token, *breakers)
        alive = t < lengths
        return jax.tree.map(lambda n, o: jnp.where(alive.reshape(-1, *[1] * (n.ndim - 1)), n, o), new, past), None

    return jax.lax.scan(body, empty, (jnp.arange(prompts.shape[1]), jnp.asarray(prompts, jnp.int32).T))[0]


def _append(past: Past, token: Any, *breakers: Any) -> Past:
    """One more token: a match goes on where the token stood before, and ends everywhere else."""
    tokens, length, match = past
    place = jnp.arange(tokens.shape[1])
    same = (tokens == token[:, None]) & (place < length[:, None])
    for ids in breakers:
        same &= ~jnp.any(token[:, None] == ids, -1, keepdims=True)
    match = jnp.where(same, _shifted(match) + 1, 0)
    return jnp.where(place == length[:, None], token[:, None], tokens), length + 1, match


def _shifted(match: Any) -> Any:
    return jnp.pad(match[:, :-1], ((0, 0), (1, 0)))


def _continuations(past: Past) -> tuple[Any, Any]:
    """Each token of the text and how many tokens before it also end the text; -1 where there is none."""
    tokens, length, match = past
    return tokens, jnp.where(jnp.arange(tokens.shape[1]) < length[:, None], _shifted(match), -1)
