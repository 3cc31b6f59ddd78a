"""Generation: bulk prefill of ragged prompts, then a lax.scan over any step function.

Nothing here knows a model. A step function is

    step(params, tokens [B, T], carry, lengths [B] | None) -> (logits [B, V], carry)

with the logits after each row's last real token.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from textgen.config import require
from textgen.generation.transforms import Chain, Moment, Number, draw
from textgen.generation.transforms.core import column, entropy
from textgen.parallel import workers

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
    """What the scan carries from token to token, for B rows.

    Attributes:
      carry: the model's past.
      logits: [B, V] of the next token; with guidance [2B, V], those of the second prompts after the first.
      memory: the chain's.
      position: [B] tokens before the one to be drawn.
      made: [B] new ones among them.
    """

    carry: Any
    logits: Any
    memory: Any
    position: Any
    made: Any


def row_keys(seed: int, rows: int, first: int = 0) -> Any:
    """[rows] keys of the rows first, first + 1, ...: row i's draws depend on (seed, i) alone."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(first + jnp.arange(rows))


class Generator:
    """Compiled generation for one step function; compile once, call with any prompt, length, chain numbers."""

    def __init__(self, step: Callable, init_carry: Callable[[int, int], Any], max_positions: int | None = None):
        """
        Args:
          step: as above.
          init_carry: (batch_size, max_length) -> carry. With more room, a carry is the same with
            zeros behind.
          max_positions: the longest sequence that the model takes. A row that has grown beyond it
            is read afresh from where `window_start` says. None: the model itself goes on for ever.
        """
        self.max_positions = max_positions

        def prefill(params, prompts, lengths, copies, *, capacity):
            logits, carry = step(params, prompts, empty_carry(init_carry, prompts.shape[0], capacity), lengths)
            return jax.tree.map(lambda leaf: jnp.take(leaf, copies, axis=0), (carry, logits))

        def decode(params, state, keys, chain, guidance, *, steps):
            def body(state, chance):
                model = mixed = state.logits
                if guidance is not None:
                    model, other = jnp.split(state.logits, 2)
                    mixed = other + column(guidance) * (model - other)
                uniform, more = chance
                drawn, commit = chain.step(mixed, state.memory, Moment(state.made, more))
                token = draw(drawn, uniform)
                read = token if guidance is None else jnp.concatenate([token, token])
                logits, carry = step(params, read[:, None], state.carry, None)
                new = State(carry, logits, commit(token), state.position + 1, state.made + 1)
                return new, observe(token, model, drawn)

            # All random numbers at once: made one by one they would cost as much as a small model.
            positions = state.position + jnp.arange(steps)[:, None]
            state, generated = jax.lax.scan(body, state, jax.vmap(uniforms, (None, 0))(keys, positions))
            return state, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), generated)

        def grow(carry, *, capacity):
            empty = init_carry(jax.tree.leaves(carry)[0].shape[0], capacity)
            place = lambda new, old: jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim)
            return jax.tree.map(place, empty, carry)

        self._grow = jax.jit(grow, static_argnames="capacity")
        self._prefill = jax.jit(prefill, static_argnames="capacity")
        self._decode = jax.jit(decode, static_argnames="steps", donate_argnames="state")

    def stream(
        self,
        params: Any,
        prompts: Sequence[Integer[np.ndarray, "_"]],
        keys: Any,
        chain: Chain,
        *,
        length: int,
        num_samples: int = 1,
        guidance: Number | None = None,
        second_prompts: Sequence[Integer[np.ndarray, "_"]] = (),
        chunk: int = CHUNK,
    ) -> Iterator[Generated]:
        """Yields new tokens as they are made, `chunk` at a time, as NumPy arrays.

        Row p * num_samples + s continues prompt p. A prompt is prefilled once for all its samples;
        each worker has rows of its own, see `groups`.

        Args:
          prompts: ids of each prompt, of any lengths.
          keys: [len(prompts) * num_samples] from `row_keys` or elsewhere. They never advance: a draw
            uses fold_in(key, tokens before it).
          chain: numbers scalar, or [B] for the rows.
          guidance: g of classifier-free guidance (Sanchez et al. 2023): the chain gets the logits
            z' + g (z - z'), where z' are those after the second prompt and the same new tokens.
            1 is the prompt alone; a scalar, or [B].
          second_prompts: one for each prompt, with guidance.

        Raises:
          UserError: an empty prompt, or a length below 1.
        """
        check_request([*prompts, *second_prompts], length, num_samples)
        origin = np.repeat(np.arange(len(prompts)), num_samples)
        guidance = None if guidance is None else np.asarray(guidance, np.float32)

        def share(rows: Any) -> Iterator[Generated]:
            read, copies = np.unique(origin[rows], return_inverse=True)
            texts = [some[p] for some in (prompts, second_prompts) if some for p in read]
            if second_prompts:
                copies = np.concatenate([copies, copies + len(read)])
            mix = guidance[rows] if np.ndim(guidance) else guidance
            return self._stream(params, texts, copies, keys[rows], chain.row(rows), length, mix, chunk)

        count = groups(len(keys))
        streams = [share(rows) for rows in np.split(np.arange(len(keys)), count)]
        if count == 1:
            yield from streams[0]
            return
        with ThreadPoolExecutor(count) as pool:
            while None not in (parts := list(pool.map(lambda stream: next(stream, None), streams))):
                yield jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    def _stream(
        self,
        params: Any,
        prompts: Sequence[Integer[np.ndarray, "_"]],
        copies: Integer[np.ndarray, "R"],
        keys: Any,
        chain: Chain,
        length: int,
        guidance: Any,
        chunk: int,
    ) -> Iterator[Generated]:
        """The same for rows that are computed together, where row i continues prompt copies[i].

        With guidance, R is twice the keys: the rows that read the second prompts come last.
        """
        texts, origin = [np.asarray(p, np.int32) for p in prompts], copies
        rows, limit = len(keys), self.max_positions or math.inf
        state, used, room, drawn = None, 0, 0, []
        for made in range(0, length, chunk):
            parts, lacking = [], chunk
            while lacking:
                if state is None or used > limit:
                    if drawn:
                        new = np.concatenate(drawn, axis=1)
                        texts = [np.concatenate([prompts[p], new[row % rows]]) for row, p in enumerate(origin)]
                        copies = np.arange(len(texts))
                    kept = [text[window_start(len(text), limit) :] for text in texts]
                    used = max(map(len, kept))
                    room = min(bucket(bucket(used) + chunk), limit)
                    carry, logits = self._prefill(params, *pad(kept), copies, capacity=room)
                    if state is None:
                        longest = max(map(len, texts)) + length
                        state = begin(carry, logits, texts, copies[:rows], chain, bucket(longest))
                    else:
                        state = state.replace(carry=carry, logits=logits)
                # With `limit` tokens read one more can be drawn. Few lengths, few compilations.
                steps = int(min(lacking, limit + 1 - used))
                steps = steps if steps == chunk else 1 << (steps.bit_length() - 1)
                used += steps
                if min(used, limit) > room:  # a step reads all the room that there is, so there is little at first
                    room = min(bucket(used), limit)
                    state = state.replace(carry=self._grow(state.carry, capacity=room))
                state, generated = self._decode(params, state, keys, chain, guidance, steps=steps)
                parts.append(jax.tree.map(np.asarray, generated))
                lacking -= steps
                if limit < math.inf:
                    drawn.append(np.asarray(generated.tokens, np.int32))
            yield jax.tree.map(lambda *some, left=length - made: np.concatenate(some, axis=1)[:, :left], *parts)

    def __call__(
        self, params: Any, prompts: Sequence[Integer[np.ndarray, "_"]], keys: Any, chain: Chain, **options: Any
    ) -> Generated:
        """All of `stream` at once: a Generated of NumPy arrays [B, length]."""
        chunks = list(self.stream(params, prompts, keys, chain, **options))
        return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *chunks)


def empty_carry(init_carry: Callable[[int, int], Any], rows: int, capacity: int) -> Any:
    """Empty past for a prefill inside jit, hidden from XLA's constant folding.

    A cache of zeros is a constant: without the barrier XLA evaluates the attention of every prompt over the
    empty cache while it compiles, layer by layer, which takes tens of seconds for many prompts.
    """
    return jax.lax.optimization_barrier(init_carry(rows, capacity))


def check_request(prompts: Sequence[Integer[np.ndarray, "_"]], length: int, num_samples: int = 1) -> None:
    """Refuses what no way of generating can do.

    Raises:
      UserError: no or an empty prompt, a length or num_samples below 1.
    """
    require(length >= 1, f"length must be 1 or more, got {length}.")
    require(num_samples >= 1, f"num_samples must be 1 or more, got {num_samples}.")
    require(len(prompts) > 0, "Give at least one prompt.")
    require(all(len(p) > 0 for p in prompts), "A prompt is empty: give at least one token to begin from.")


def groups(rows: int) -> int:
    """In how many equal parts rows are decoded side by side: one for each worker, of 4 rows or more."""
    most = max(min(workers(), rows // 4), 1)
    return max(n for n in range(1, most + 1) if rows % n == 0)


def window_start(tokens: int, limit: int | float) -> int:
    """Where the window begins that predicts the token after so many: at 0 up to the limit, then half of it on.

    It depends on a row's own length alone, so that the row does not depend on others.
    """
    if tokens <= limit:
        return 0
    stride = math.ceil(limit / 2)
    return stride * math.ceil((tokens - limit) / stride)


def pad(prompts: Sequence[Integer[np.ndarray, "_"]]) -> tuple[Any, Any]:
    """Prompts as ([P, T], lengths [P]), with T a bucket, so that another length seldom compiles."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    padded = np.zeros((len(prompts), bucket(int(lengths.max()))), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, lengths


def begin(carry: Any, logits: Any, texts: Any, copies: Any, chain: Chain, room: int) -> State:
    """The state after a prefill: row i continues texts[copies[i]]."""
    padded, lengths = pad([texts[i] for i in copies])
    memory = _remember(chain, padded, lengths, logits.shape[-1], room)
    return State(carry, logits, memory, jnp.asarray(lengths), jnp.zeros(len(copies), jnp.int32))


_remember = jax.jit(Chain.init, static_argnums=(3, 4))


def bucket(n: int) -> int:
    """The least power of two that is at least n, or 16."""
    return max(16, 1 << (int(n) - 1).bit_length())


def uniforms(keys: Any, position: Any) -> tuple[Any, Any]:
    """Each row's random numbers for a position: [B] for the draw, [B] for what else the chain leaves to chance."""
    here = jax.vmap(jax.random.fold_in)(keys, position)
    uniform = jax.vmap(jax.random.uniform)
    return uniform(here), uniform(jax.vmap(jax.random.fold_in, (0, None))(here, 1))


def observe(token: Any, logits: Any, drawn: Any) -> Generated:
    """What one step tells: a Generated of [B]."""
    model, ours = jax.nn.log_softmax(logits), jax.nn.log_softmax(drawn)
    at = lambda x: jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]
    rank = jnp.sum(logits > at(logits)[:, None], -1)
    kept = jnp.sum(~jnp.isneginf(drawn), -1)
    return Generated(token, at(model), at(ours), entropy(model)[:, 0], entropy(ours)[:, 0], rank, kept)
