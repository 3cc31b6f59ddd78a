"""Generation: bulk prefill of ragged prompts, then a lax.scan over any step function.

Nothing here knows a model. A step function is

    step(params, tokens [B, T], carry, lengths [B] | None) -> (logits [B, V], carry)

with the logits after each row's last real token.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from textgen.config import require
from textgen.sampling import Chain, draw

CHUNK = 50  # tokens per dispatch; people ask for multiples of it


@flax.struct.dataclass
class Generated:
    """N new tokens for each of B rows, and what the model thought of them.

    Attributes:
      tokens: [B, N] ids.
      log_probability: [B, N] of each token under the model, nats.
      log_probability_drawn: the same under the transformed distribution it was drawn from.
      entropy, entropy_drawn: [B, N] of the two distributions, nats.
      rank: [B, N] how many tokens the model held to be likelier.
      kept: [B, N] how many tokens the transformations left possible.
    """

    tokens: Any
    log_probability: Any
    log_probability_drawn: Any
    entropy: Any
    entropy_drawn: Any
    rank: Any
    kept: Any


@flax.struct.dataclass
class State:
    """What the scan carries from token to token.

    Attributes:
      carry: the model's past, up to but without `token`.
      token: [B] the last token, which the next step reads.
      position: [B] tokens before the one to be drawn.
      keys: [B] each row's random key, never advanced: a draw uses fold_in(key, position).
    """

    carry: Any
    token: Any
    position: Any
    keys: Any


def row_keys(seed: int, rows: int) -> Any:
    """[rows] keys: row i's draws depend on (seed, i) alone."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(rows))


class Generator:
    """Compiled generation for one step function; compile once, call with any prompt, length, chain numbers."""

    def __init__(self, step: Callable, init_carry: Callable[[int, int], Any], max_positions: int | None = None):
        """
        Args:
          step: as above.
          init_carry: (batch_size, max_length) -> carry.
          max_positions: the longest sequence that the model takes. When the longest row reaches
            it, the last half of every row is read afresh, and generation goes on from there.
            None: the model itself goes on for ever.
        """
        self.max_positions = max_positions

        def prefill(params, prompts, lengths, keys, copies, *, capacity):
            # All but each prompt's last token; that one is the first step's input.
            carry = init_carry(prompts.shape[0], capacity)
            last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
            if prompts.shape[1] > 1:
                _, carry = step(params, prompts, carry, lengths - 1)
            state = State(carry, last, lengths, None)
            state = jax.tree.map(lambda leaf: jnp.take(leaf, copies, axis=0), state)
            return state.replace(keys=keys)

        def decode(params, state, transform, *, steps):
            def body(state, _):
                logits, carry = step(params, state.token[:, None], state.carry, None)
                drawn = transform(logits)
                uniforms = jax.vmap(lambda k, p: jax.random.uniform(jax.random.fold_in(k, p)))
                token = draw(drawn, uniforms(state.keys, state.position))
                state = State(carry, token, state.position + 1, state.keys)
                return state, observe(token, logits, drawn)

            state, generated = jax.lax.scan(body, state, length=steps)
            return state, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), generated)

        self._prefill = jax.jit(prefill, static_argnames="capacity")
        self._decode = jax.jit(decode, static_argnames="steps", donate_argnames="state")

    def stream(
        self,
        params: Any,
        prompts: Sequence[Integer[np.ndarray, "_"]],
        keys: Any,
        transform: Chain,
        *,
        length: int,
        num_samples: int = 1,
        chunk: int = CHUNK,
    ) -> Iterator[Generated]:
        """Yields new tokens as they are made, `chunk` at a time, as NumPy arrays.

        Row p * num_samples + s continues prompt p. A prompt is prefilled once for all its samples.

        Args:
          prompts: ids of each prompt, of any lengths.
          keys: [len(prompts) * num_samples] from `row_keys` or elsewhere.
          transform: numbers scalar, or [B] for the rows.

        Raises:
          UserError: an empty prompt, or a length below 1.
        """
        require(length >= 1, f"length must be 1 or more, got {length}.")
        require(num_samples >= 1, f"num_samples must be 1 or more, got {num_samples}.")
        require(len(prompts) > 0, "Give at least one prompt.")
        require(all(len(p) > 0 for p in prompts), "A prompt is empty: give at least one token to begin from.")
        texts = [np.asarray(p, np.int32) for p in prompts]
        copies = origin = np.repeat(np.arange(len(prompts)), num_samples)
        limit = self.max_positions
        chunk = chunk if limit is None else min(chunk, max(limit // 2, 1))
        state, used, parts = None, 0, []
        for made in range(0, length, chunk):
            if state is None or (limit is not None and used + chunk - 1 > limit):
                if parts:
                    texts = [
                        np.concatenate([prompts[p], *(part[row] for part in parts)]) for row, p in enumerate(origin)
                    ]
                    copies = np.arange(len(texts))
                kept = texts
                if limit is not None and max(map(len, texts)) + chunk - 1 > limit:
                    kept = [text[-max(limit - chunk, 1) :][-max(limit // 2, 1) :] for text in texts]
                used = max(map(len, kept))
                capacity = bucket(used + (length - made + chunk if limit is None else limit))
                state = self._start(params, kept, keys, copies, capacity, [len(text) for text in texts])
            state, generated = self._decode(params, state, transform, steps=chunk)
            used += chunk
            if limit is not None:
                parts.append(np.asarray(generated.tokens, np.int32))
            yield jax.tree.map(lambda leaf, left=length - made: np.asarray(leaf)[:, :left], generated)

    def _start(self, params, prompts, keys, copies, capacity, positions) -> State:
        """Prefills, padded to a bucket so that another prompt length seldom compiles."""
        lengths = np.array([len(p) for p in prompts], np.int32)
        padded = np.zeros((len(prompts), bucket(int(lengths.max()))), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        state = self._prefill(params, padded, lengths, keys, copies, capacity=capacity)
        return state.replace(position=jnp.asarray(np.array(positions, np.int32)[copies]))

    def __call__(
        self, params: Any, prompts: Sequence[Integer[np.ndarray, "_"]], keys: Any, transform: Chain, **options: Any
    ):
        """All of `stream` at once: a Generated of NumPy arrays [B, length]."""
        chunks = list(self.stream(params, prompts, keys, transform, **options))
        return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *chunks)


def bucket(n: int) -> int:
    """The least power of two that is at least n, or 16."""
    return max(16, 1 << (n - 1).bit_length())


def observe(token: Any, logits: Any, drawn: Any) -> Generated:
    """What one step tells: a Generated of [B]."""
    model, ours = jax.nn.log_softmax(logits), jax.nn.log_softmax(drawn)
    at = lambda x: jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]
    entropy = lambda x: -jnp.sum(jnp.where(jnp.isneginf(x), 0, jnp.exp(x) * x), -1)
    rank = jnp.sum(logits > at(logits)[:, None], -1)
    kept = jnp.sum(~jnp.isneginf(drawn), -1)
    return Generated(token, at(model), at(ours), entropy(model), entropy(ours), rank, kept)
