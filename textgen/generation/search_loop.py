"""Decoding whole texts: prefill, then one loop over any step function, for every decoder.

    Decoding(step, init_carry)(params, prompts, keys, chain, beam(8, alpha=0.6), length=100)

Like generation it knows no model: a step function is the one of textgen/generation/scan.py. All shapes
are fixed, and another prompt, seed or number does not compile again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from textgen.config import require
from textgen.generation.scan import bucket, check_request, empty_carry, observe, pad, uniforms
from textgen.generation.search import Decoder, Step, Texts
from textgen.generation.transforms import Chain, Moment


@flax.struct.dataclass
class Decoded:
    """What a decoder has chosen: row p * results + k is the k-th text of prompt p, the best first.

    Attributes:
      seen: Generated of [B, N], as sampling gives it; after a text's end, end tokens and zeros.
      lengths: [B] new tokens, the end token included.
      score: [B] what the decoder ranks by; -inf: the prompt has no further text.
      log_weight: [B] the sum of exp(log_weight) f(text) over a prompt's texts estimates the mean
        of f under the transformed distribution without bias. None: these texts are the best of
        many, and stand for nothing else.
    """

    seen: Any
    lengths: Any
    score: Any
    log_weight: Any


class Decoding:
    """Compiled decoding for one step function; compiles once for each decoder's name and width."""

    def __init__(self, step: Callable, init_carry: Callable[[int, int], Any], max_positions: int | None = None):
        """
        Args:
          step, init_carry, max_positions: as in scan.Generator.
        """
        self.max_positions = max_positions

        def run(params, prompts, lengths, keys, chain, decoder, length, end, *, room, capacity):
            rows, width = len(prompts), decoder.width
            logits, carry = step(params, prompts, empty_carry(init_carry, rows, capacity), lengths)
            memories = chain.init(prompts, lengths, logits.shape[-1], prompts.shape[1] + room)
            each = lambda leaf: jnp.repeat(leaf, width, axis=0)
            carry, logits, memories = jax.tree.map(each, (carry, logits, memories))
            chain = jax.tree.map(lambda number: each(number) if np.ndim(number) == 1 else number, chain)
            positions, samples = each(lengths), _sample_keys(keys, width)
            texts = _no_texts(rows, decoder, room, logits, end)

            def body(state):
                made, carry, logits, memories, texts, memory = state
                uniform, more = uniforms(samples, positions + made)
                moment = Moment(jnp.full(rows * width, made), more)
                drawn, commit = chain.step(logits, memories, moment)
                seen = [x.reshape(rows, width, -1) for x in (logits, drawn)]
                log_q = _log_q(seen[1], texts, end)
                now = Step(*seen, log_q, uniform.reshape(rows, width), keys, lengths + made, made, end)
                parent, token, total, memory = decoder.choose(memory, texts, now, *decoder.numbers)
                texts, token = now.extend(texts, parent, token, total), token.reshape(-1)
                if parent is not None:
                    source = (jnp.arange(rows)[:, None] * width + parent).reshape(-1)
                    pick = lambda leaf: jnp.take(leaf, source, axis=0)
                    carry, logits, memories, moment = jax.tree.map(pick, (carry, logits, memories, moment))
                    _, commit = chain.step(logits, memories, moment)  # again, as its parent's memory
                logits, carry = step(params, token[:, None], carry, None)
                return made + 1, carry, logits, commit(token), texts, memory

            state = (jnp.int32(0), carry, logits, memories, texts, decoder.init(texts, keys))
            more = lambda state: (state[0] < length) & ~jnp.all(state[4].ended)
            *_, texts, memory = jax.lax.while_loop(more, body, state)
            return decoder.rank(memory, texts, *decoder.numbers)

        self._run = jax.jit(run, static_argnames=("room", "capacity"))

    def __call__(
        self,
        params: Any,
        prompts: Sequence[Integer[np.ndarray, "_"]],
        keys: Any,
        chain: Chain,
        decoder: Decoder,
        *,
        length: int,
        end: int | None = None,
    ) -> Decoded:
        """`decoder.results` texts of each prompt, as NumPy arrays.

        Args:
          prompts: ids of each prompt, of any lengths.
          keys: [len(prompts)]; a prompt's texts depend on its key alone. Text i is drawn with
            fold_in(key, i), so that from jax.random.key(seed) the samples of best_of are those of
            scan.row_keys(seed, n).
          chain: its numbers scalar, or [len(prompts)].
          length: the most new tokens of a text.
          end: the token that ends a text. None: all texts have `length` tokens.

        Raises:
          UserError: no or an empty prompt, a length below 1, or a text past the model's positions.
        """
        check_request(prompts, length)
        padded, lengths = pad(prompts)
        longest = int(lengths.max()) + length
        require(
            self.max_positions is None or longest <= self.max_positions,
            f"{decoder.name} compares whole texts, and prompt and length take {longest} tokens of "
            f"{self.max_positions} positions: shorten them, or sample instead.",
        )
        texts = self._run(
            params,
            padded,
            lengths,
            keys,
            chain,
            decoder.replace(judge=None),
            np.int32(length),
            None if end is None else np.int32(end),
            room=bucket(length),
            capacity=padded.shape[1] + bucket(length),
        )
        texts = jax.tree.map(np.asarray, texts)
        if decoder.judge is not None:
            shown = zip(texts.seen.tokens[..., :length], texts.lengths, strict=True)
            score = np.stack([np.asarray(decoder.judge(*text), np.float32) for text in shown])
            order = np.argsort(-score, axis=1, kind="stable")
            texts = jax.tree.map(lambda leaf: leaf[np.arange(len(leaf))[:, None], order], texts.replace(score=score))
        kept = jax.tree.map(lambda leaf: leaf[:, : decoder.results].reshape(-1, *leaf.shape[2:]), texts)
        seen = jax.tree.map(lambda leaf: leaf[:, :length], kept.seen)
        return Decoded(seen, kept.lengths, kept.score, kept.log_weight)


def _sample_keys(keys: Any, n: int) -> Any:
    """[B * n] keys: those of each prompt's texts."""
    return jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n)))(keys).reshape(-1)


def _no_texts(rows: int, decoder: Decoder, room: int, logits: Any, end: Any) -> Texts:
    shape = (rows, decoder.width)
    leaves = jax.eval_shape(observe, jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32), logits, logits)
    seen = jax.tree.map(lambda leaf: jnp.zeros((*shape, room), leaf.dtype), leaves)
    seen = seen.replace(tokens=jnp.full_like(seen.tokens, 0 if end is None else end))
    first = jnp.zeros(decoder.width) if decoder.apart else jnp.where(jnp.arange(decoder.width) == 0, 0.0, -jnp.inf)
    total = jnp.broadcast_to(first, shape)
    return Texts(seen, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), total, jnp.zeros(shape))


def _log_q(drawn: Any, texts: Texts, end: Any) -> Any:
    log_q = jax.nn.log_softmax(drawn)
    if end is None:
        return log_q
    itself = jnp.where(jnp.arange(log_q.shape[-1]) == end, 0.0, -jnp.inf)
    return jnp.where(texts.ended[..., None], itself, log_q)
