"""A pre-norm Transformer decoder (Vaswani et al. 2017; Radford et al. 2019).

Rotary positions: Su et al. 2021. Grouped-query attention: Ainslie et al. 2023. SwiGLU: Shazeer
2020. Squared ReLU: So et al. 2021. Normalised queries and keys: Henry et al. 2020. Fused attention:
Dao et al. 2022.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from textgen.config import ModelConfig, TransformerConfig
from textgen.errors import note, require
from textgen.models.layers import (
    Dropout,
    Linear,
    Norm,
    compute_capability,
    feed_forward,
    feed_forward_flops,
    for_each_layer,
    residual_init,
    scanned,
)

BLOCK = 64  # queries of `attend_in_blocks`: fewer skip more, and make small products


@flax.struct.dataclass
class Carry:
    """The past of each row: a ring of the last S keys and values of every layer.

    All rows write the same slots, so a step is one slice update and no scatter. A call that gives
    the rows unequal numbers of tokens lays the ring out anew, so that every row ends where the
    longest does; from then on the rows agree. Until the ring is full, what is free lies behind.

    Attributes:
      memory: for each layer (keys [B, G, S, K], values [B, G, S, K]); where the layers are scanned,
        one pair for all, [B, L, G, S, K].
      places: [B, S] 1 + the position of the token in each slot; 0 where there is none.
      position: [B] tokens that the row has seen.
      written: [B] where the next slot is, before it is taken modulo S; equal in all rows.
    """

    memory: tuple[Any, ...]
    places: Any
    position: Any
    written: Any


class Transformer(nn.Module):
    """The backbone. Each token attends to the last `context` tokens, itself included."""

    width: int
    layers: int
    context: int
    options: TransformerConfig
    norm: str = "rmsnorm"
    dropout: float = 0.0
    remat: bool = False
    scan_layers: bool = False
    dtype: jnp.dtype = jnp.float32
    implementation: str | None = None  # of `fused`; None: `attend` instead

    @classmethod
    def from_config(cls, config: ModelConfig, context: int) -> "Transformer":
        return cls(
            config.width,
            config.layers,
            context,
            config.transformer,
            config.norm,
            config.dropout,
            config.remat,
            config.scan_layers,
            jnp.dtype(config.compute_dtype),
            choose_implementation(config),
        )

    @property
    def max_positions(self) -> int | None:
        """The longest sequence, in tokens; None: there is none, the window slides on."""
        return self.context if self.options.positions == "learned" else None

    def init_carry(self, batch_size: int, max_length: int) -> Carry:
        """An empty past with room for `max_length` tokens, or for the context where that is less."""
        groups, key_width = self.options.kv_heads or self.options.heads, self.width // self.options.heads
        slots = min(max_length, self.context)
        empty = jnp.zeros((batch_size, groups, slots, key_width), self.dtype)
        places, zeros = jnp.zeros((batch_size, slots), jnp.int32), jnp.zeros((batch_size,), jnp.int32)
        return Carry(for_each_layer((empty, empty), self.layers, self.scan_layers), places, zeros, zeros)

    def flops_per_token(self, length: int) -> float:
        """Of a forward pass's matrix products, averaged over a window of `length` tokens."""
        o, width = self.options, self.width
        near = min(length, self.context)
        seen = near - near * (near - 1) / (2 * length)  # the mean of min(t, context) over t = 1 ... length
        qkv_and_out = 2 * width**2 * (2 + 2 * (o.kv_heads or o.heads) / o.heads)
        rest = feed_forward_flops(width, o.feed_forward_width, o.activation)
        return self.layers * (qkv_and_out + 4 * width * seen + rest)

    def block(self, i: int) -> Callable:
        """Layer i, or where the layers are scanned all of them: (x, places, memory, lengths, train) -> (x, memory)."""
        kind, name = Block, f"block_{i}"
        if self.remat:
            kind = nn.remat(kind, prevent_cse=not self.scan_layers, static_argnums=(5,))
        if self.scan_layers:
            every = nn.broadcast
            kind, name = scanned(kind, self.layers, (every, 1, every, every)), "blocks"
        return kind(
            self.options, self.layers, self.context, self.norm, self.dropout, self.dtype, self.implementation, name=name
        )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        carry: Carry | None = None,
        lengths: Integer[Array | np.ndarray, "B"] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], Carry | None]:
        steps = x.shape[1]
        first = jnp.zeros((1,), jnp.int32) if carry is None else carry.position
        positions = first[:, None] + jnp.arange(steps)  # [B or 1, T]
        if self.options.positions == "learned":
            require(
                carry is not None or steps <= self.context,
                f"Learned positions end at {self.context}, and the window has {steps} tokens.",
            )
            table = self.param("positions", nn.initializers.normal(0.02), (self.context, self.width), jnp.float32)
            x = x + table[jnp.minimum(positions, self.context - 1)].astype(x.dtype)
        x = Dropout(self.dropout, name="dropout")(x, train)
        turn = None
        if self.options.positions == "rope":
            # Without a past this is a constant: inside the program every head would take its own sines.
            known = np.arange(steps, dtype=np.int32)[None] if carry is None else positions
            turn = angles(known, self.width // self.options.heads, self.options.rope_base)

        memory = past = None
        if carry is not None:
            memory, new = carry.memory, steps if lengths is None else lengths
            position = carry.position + new
            longest = jnp.broadcast_to(jnp.max(position), position.shape)
            after = carry.written + new if agree(len(x), lengths) else longest
            where = carry.written[0], after[0]
            seen = remember(carry.places, positions + 1, *where, lengths, 1)
            past = carry.places - 1, seen - 1, *where
        places = positions, turn, past
        if self.scan_layers:
            x, memory = self.block(0)(x, places, memory, lengths, train)
        else:
            new = []
            for i in range(self.layers):
                x, kept = self.block(i)(x, places, None if memory is None else memory[i], lengths, train)
                new.append(kept)
            memory = tuple(new)
        if carry is None:
            return x, None
        return x, Carry(memory, seen, position, after)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    options: TransformerConfig
    layers: int
    context: int
    norm: str
    dropout: float
    dtype: jnp.dtype
    implementation: str | None

    @nn.compact
    def __call__(self, x: Any, places: Any, memory: Any, lengths: Any, train: bool) -> tuple[Any, Any]:
        """`places` of the tokens: (their positions [B or 1, T], the sines and cosines, `past` as in `attention`)."""
        o, width, (positions, turn, past) = self.options, x.shape[-1], places
        bias = self.norm == "layernorm"
        linear = lambda features, name, init=Linear.kernel_init: Linear(features, bias, init, self.dtype, name=name)

        heads, groups, key_width = o.heads, o.kv_heads or o.heads, width // o.heads
        qkv = linear((heads + 2 * groups) * key_width, "qkv")(Norm(self.norm, name="attention_norm")(x))
        qkv = jnp.swapaxes(qkv.reshape(*x.shape[:2], heads + 2 * groups, key_width), 1, 2)  # [B, H+2G, T, K]
        q, k, v = jnp.split(qkv, (heads, heads + groups), axis=1)
        if o.qk_norm:
            q, k = Norm("rmsnorm", name="query_norm")(q), Norm("rmsnorm", name="key_norm")(k)
        if o.positions == "rope":
            q, k = rotate(jnp.concatenate([q, k], axis=1), turn, heads)
        y, memory = attention(q, k, v, positions, memory, past, lengths, self.context, self.implementation)
        y = jnp.swapaxes(y, 1, 2).reshape(x.shape)  # [B, T, D]
        x = x + Dropout(self.dropout, name="attention_dropout")(
            linear(width, "out", residual_init(self.layers))(y), train
        )

        x = feed_forward(x, o.feed_forward_width, o.activation, self.layers, self.norm, self.dropout, self.dtype, train)
        return x, memory


def choose_implementation(config: ModelConfig) -> str | None:
    """Of `fused`, for a config and the device at hand: "cudnn" or "xla"; None: `attend`.

    cuDNN's takes bfloat16, an NVIDIA GPU from Ampere on (compute capability 8), and heads whose
    width is a multiple of 8, at most 128. XLA's is no faster than `attend`, so "auto" leaves it out.
    """
    key_width = config.width // config.transformer.heads
    cudnn = config.compute_dtype == "bfloat16" and key_width % 8 == 0 and key_width <= 128 and compute_capability() >= 8
    if config.transformer.attention == "fused" and not cudnn:
        note(
            "model.transformer.attention='fused': XLA's, as cuDNN's cannot be had. That takes an NVIDIA GPU from "
            "Ampere on, model.compute_dtype='bfloat16', and model.width / heads a multiple of 8, at most 128."
        )
        return "xla"
    return "cudnn" if cudnn and config.transformer.attention != "plain" else None


def angles(positions: Integer[Array | np.ndarray, "R T"], key_width: int, base: float) -> tuple[Any, Any]:
    """Sines and cosines [R, 1, T, K/2] of position * base^(-2j/K) (Su et al. 2021); NumPy's, of NumPy positions.

    A position is split into 1024 a + b, and the angle of 1024 is reduced modulo a full turn in
    float64, so that the angles of a stream stay exact past a million tokens.
    """
    half = key_width // 2
    rate = base ** (-np.arange(half) / half)
    coarse = np.asarray(1024 * rate % (2 * np.pi), np.float32)
    positions = positions[:, None, :, None]  # [R, 1, T, 1]
    angle = (positions // 1024) * coarse + (positions % 1024) * np.asarray(rate, np.float32)
    if isinstance(positions, np.ndarray):
        return np.sin(angle).astype(np.float32), np.cos(angle).astype(np.float32)
    return jnp.sin(angle), jnp.cos(angle)


def rotate(qk: Float[Array, "B H T K"], turn: tuple[Any, Any], heads: int) -> tuple[Any, Any]:
    """Turns each pair (j, j + K/2) by its angle, then parts queries from keys."""
    sin, cos = turn
    a, b = jnp.split(qk.astype(jnp.float32), 2, -1)
    turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(qk.dtype)
    return turned[:, :heads], turned[:, heads:]


def attention(
    q: Any,
    k: Any,
    v: Any,
    positions: Any,
    memory: Any,
    past: Any,
    lengths: Any,
    context: int,
    implementation: str | None,
) -> tuple[Any, Any]:
    """Attention of T new tokens to themselves and to the past, and the past with them added.

    Without a past this is plain causal attention. With one, the tokens read the ring as it was
    and their own keys beside it; a single token goes into the ring first, over what it no longer
    sees.

    Args:
      q: [B, H, T, K]; k, v: [B, G, T, K]; positions: [B or 1, T].
      memory: of one layer, as in Carry; None: there is no past.
      past: (positions [B, S] of what is in the ring, below 0 where nothing is, before the tokens
        and after them; `written` before; after).
      lengths: [B] or None.
      implementation: of `fused`, which may compute what has no past; None: `attend` does.
    """
    if memory is None and implementation is not None:
        return fused(q, k, v, context, implementation), None
    if memory is None:
        return attend_in_blocks(q, k, v, positions, context), None
    (keys, values), (old, new, before, after) = memory, past
    if k.shape[2] == 1 and lengths is None and len(k) > 1:  # of a single row XLA would copy the ring
        keys, values = (remember(ring, own, before, after, None, 2) for ring, own in ((keys, k), (values, v)))
        return attend(q, [(keys, values, new)], positions, context), (keys, values)
    near = min(context, keys.shape[2]) if k.shape[2] == 1 else context
    y = attend(q, [(keys, values, old), (k, v, positions)], positions, near)
    # Where to write depends on y, if only in appearance: XLA then knows that the ring has been
    # read, and writes in place. Otherwise it copies the whole ring.
    before = before + (0 * y[0, 0, 0, 0]).astype(before.dtype)
    return y, (remember(keys, k, before, after, lengths, 2), remember(values, v, before, after, lengths, 2))


def agree(rows: int, lengths: Any) -> bool:
    """Whether a call gives all rows the same number of tokens, as far as shapes tell."""
    return lengths is None or rows == 1


def remember(ring: Any, new: Any, before: Any, after: Any, lengths: Any, axis: int) -> Any:
    """The ring with what T tokens add to it; the slots are one axis.

    Args:
      before, after: where the next slot is, now and then; see Carry.
      lengths: [B] how many of the tokens are real. None: all.
    """
    slots, steps = ring.shape[axis], new.shape[axis]
    if steps <= max(slots // 2, 1) and agree(len(new), lengths):  # all rows write the same slots
        if steps == 1 and lengths is None:
            return jax.lax.dynamic_update_slice_in_dim(ring, new, before % slots, axis)
        place = (slice(None),) * axis + ((before + jnp.arange(steps)) % slots,)
        if lengths is not None:
            real = jnp.expand_dims(jnp.arange(steps) < lengths[0], range(1, ring.ndim - axis))
            new = jnp.where(real, new, ring[place])
        return ring.at[place].set(new, unique_indices=True)
    # The last S tokens of each row, every row's last one in the same slot.
    taken = jnp.full((len(new),), steps) if lengths is None else lengths
    age = (after - 1 - jnp.arange(slots)) % slots  # 0: the last of these tokens
    order = slots + taken[:, None] - 1 - age  # [B, S], into old tokens oldest first, then new ones
    order = jnp.where(order < slots, (before + order) % slots, order)
    order = jnp.expand_dims(order, [i for i in range(1, ring.ndim) if i != axis])
    return jnp.take_along_axis(jnp.concatenate([ring, new], axis), order, axis)


def fused(q: Any, k: Any, v: Any, context: int, implementation: str) -> Float[Array, "B H T K"]:
    """Causal attention of T tokens with no past to the last `context`, by `jax.nn.dot_product_attention`.

    Args:
      q: [B, H, T, K]; k, v: [B, G, T, K].
      implementation: "cudnn", which holds no [T, T] and skips what is not seen, or "xla".
    """
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # [B, T, H or G, K]
    near = (context - 1, 0) if context < q.shape[1] else None  # tokens before and after
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=near, implementation=implementation)
    return jnp.swapaxes(y, 1, 2)


def attend_in_blocks(q: Any, k: Any, v: Any, positions: Any, context: int) -> Float[Array, "B H T K"]:
    """`attend` where there is no past: a block of queries leaves out the keys that none of them sees.

    There are at most 8 blocks, so that the program stays small.

    Args:
      q: [B, H, T, K]; k, v: [B, G, T, K]; positions: [B or 1, T], one after another.
    """
    steps = q.shape[2]
    block, parts = max(BLOCK, -(-steps // 8)), []
    for start in range(0, steps, block):
        mine, read = slice(start, start + block), slice(max(0, start + 1 - context), start + block)
        seen = k[:, :, read], v[:, :, read], positions[:, read]
        parts.append(attend(q[:, :, mine], [seen], positions[:, mine], context))
    return jnp.concatenate(parts, axis=2)


def attend(q: Any, parts: Sequence[tuple[Any, Any, Any]], q_positions: Any, context: int) -> Float[Array, "B H T K"]:
    """Softmax attention: token at p sees what stands at p - context + 1 ... p; positions below 0 are empty.

    Args:
      q: [B, H, T, K].
      parts: what is read, each (keys [B, G, S, K], values [B, G, S, K], positions [B or 1, S]).
      q_positions: [B or 1, T].
    """
    rows, heads, steps, key_width = q.shape
    groups = parts[0][0].shape[1]
    q = q.reshape(rows, groups, -1, key_width)  # the heads of a group share its keys
    scores = []
    for k, _, k_positions in parts:
        score = jnp.einsum("bgmk,bgsk->bgms", q, k, preferred_element_type=jnp.float32) * key_width**-0.5
        distance = q_positions[:, :, None] - k_positions[:, None, :]  # [B or 1, T, S]
        seen = (distance >= 0) & (distance < context) & (k_positions >= 0)[:, None, :]
        score = score.reshape(rows, groups, heads // groups, steps, -1)
        scores.append(jnp.where(seen[:, None, None], score, -1e30))
    # Softmax by hand, normalised after the product: two passes less over the largest array.
    largest = functools.reduce(jnp.maximum, [jnp.max(score, -1, keepdims=True) for score in scores])
    y = total = 0
    for score, (_, v, _) in zip(scores, parts, strict=True):
        weights = jnp.exp(score - jax.lax.stop_gradient(largest)).reshape(rows, groups, -1, score.shape[-1])
        total += jnp.sum(weights, -1, keepdims=True)
        y += jnp.einsum("bgms,bgsk->bgmk", weights.astype(v.dtype), v)
    return (y / total.astype(y.dtype)).reshape(rows, heads, steps, key_width)
