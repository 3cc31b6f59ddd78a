"""Blocks of a gated linear recurrence, minGRU (Feng et al. 2024), behind a short causal convolution.

The gates read the input alone, so the state is linear in the past, and all steps of a window can
be computed together. The block's order, convolution before the recurrence and a feed-forward part
after it, is that of Griffin (De et al. 2024).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from textgen.config import ModelConfig
from textgen.models.layers import (
    Dropout,
    Linear,
    Norm,
    feed_forward,
    feed_forward_flops,
    for_each_layer,
    residual_init,
    scanned,
)

TAPS = 4  # tokens that the convolution sees

State = tuple[Float[Array, "B D"], Float[Array, "B taps D"]]  # the hidden state; the convolution's last inputs
# Of each layer; where the layers are scanned, one for all.
Carry = tuple[State, ...] | tuple[Float[Array, "B L D"], Float[Array, "B L taps D"]]


class MinGRU(nn.Module):
    """The backbone. Its carry is a State per layer, or one for all; it has no longest sequence."""

    width: int
    layers: int
    feed_forward_width: int
    activation: str
    norm: str = "rmsnorm"
    dropout: float = 0.0
    remat: bool = False
    scan_layers: bool = False
    dtype: jnp.dtype = jnp.float32
    recurrence: str = "auto"  # of `linear_recurrence`

    @classmethod
    def from_config(cls, config: ModelConfig, context: int) -> "MinGRU":
        del context  # its memory has no edge
        return cls(
            config.width,
            config.layers,
            config.mingru.feed_forward_width,
            config.mingru.activation,
            config.norm,
            config.dropout,
            config.remat,
            config.scan_layers,
            jnp.dtype(config.compute_dtype),
            config.recurrence,
        )

    @property
    def max_positions(self) -> int | None:
        """The longest sequence, in tokens; None: there is none."""
        return None

    def init_carry(self, batch_size: int, max_length: int) -> Carry:
        """An empty past. Its size does not depend on `max_length`."""
        del max_length
        return for_each_layer(empty_state(batch_size, self.width), self.layers, self.scan_layers)

    def flops_per_token(self, length: int) -> float:
        """Of a forward pass's matrix products; `length` makes no difference."""
        del length
        return self.layers * block_flops(self.width, self.feed_forward_width, self.activation)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        carry: Carry | None = None,
        lengths: Integer[Array | np.ndarray, "B"] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], Carry | None]:
        x = Dropout(self.dropout, name="dropout")(x, train)
        kind = nn.remat(Block, prevent_cse=not self.scan_layers, static_argnums=(4,)) if self.remat else Block
        shared = (self.layers, self.norm, self.dropout, self.dtype, self.recurrence)
        block = (self.feed_forward_width, self.activation, *shared)
        states = self.init_carry(x.shape[0], 0) if carry is None else carry
        if self.scan_layers:
            kind = scanned(kind, self.layers, (1, nn.broadcast, nn.broadcast))
            x, states = kind(*block, name="blocks")(x, states, lengths, train)
            return x, None if carry is None else states
        new_states = []
        for i, state in enumerate(states):
            x, state = kind(*block, name=f"block_{i}")(x, state, lengths, train)
            new_states.append(state)
        return x, None if carry is None else tuple(new_states)


def empty_state(rows: int, width: int) -> State:
    """What a block holds before the first token."""
    return jnp.zeros((rows, width), jnp.float32), jnp.zeros((rows, TAPS - 1, width), jnp.float32)


def block_flops(width: int, feed_forward_width: int, activation: str) -> float:
    """Of the matrix products of one block, forward, per token."""
    return 6.0 * width**2 + feed_forward_flops(width, feed_forward_width, activation)


class Block(nn.Module):
    """x + recurrence(convolution(norm(x))), then x + feed_forward(norm(x))."""

    feed_forward_width: int
    activation: str
    layers: int
    norm: str
    dropout: float
    dtype: jnp.dtype
    recurrence: str

    @nn.compact
    def __call__(self, x: Any, state: State, lengths: Any, train: bool) -> tuple[Any, State]:
        h, recent = state
        steps, width = x.shape[1:]
        u = Norm(self.norm, name="recurrence_norm")(x)
        u = jnp.concatenate([recent.astype(u.dtype), u], axis=1)  # [B, 3 + T, D]
        ends = jnp.full(x.shape[:1], steps) if lengths is None else lengths
        recent = jnp.take_along_axis(u, ends[:, None, None] + jnp.arange(TAPS - 1)[:, None], axis=1)
        u = jnp.swapaxes(u, 0, 1)  # time first: a scan reads whole slices
        taps = self.param("convolution", nn.initializers.normal(TAPS**-0.5), (TAPS, width), jnp.float32)
        u = sum(u[j : j + steps] * taps[j].astype(u.dtype) for j in range(TAPS))

        gate, candidate = jnp.split(Linear(2 * width, dtype=self.dtype, name="gates")(u).astype(jnp.float32), 2, -1)
        if lengths is not None:  # a closed gate keeps the state
            gate = jnp.where((jnp.arange(steps)[:, None] < lengths)[..., None], gate, -jnp.inf)
        kept, new = jax.nn.sigmoid(-gate), jax.nn.sigmoid(gate) * candidate
        hidden = linear_recurrence(kept, new, h, self.recurrence)  # [T, B, D]
        y = jnp.swapaxes(hidden, 0, 1).astype(self.dtype)
        y = Linear(width, False, residual_init(self.layers), self.dtype, name="out")(y)
        x = x + Dropout(self.dropout, name="recurrence_dropout")(y, train)
        x = feed_forward(
            x, self.feed_forward_width, self.activation, self.layers, self.norm, self.dropout, self.dtype, train
        )
        return x, (hidden[-1], recent.astype(jnp.float32))


def _sequential(a: Any, b: Any, h: Any, *, reverse: bool) -> Any:
    def step(h: Any, ab: Any) -> tuple[Any, Any]:
        h = ab[0] * h + ab[1]
        return h, h

    return jax.lax.scan(step, h, (a, b), reverse=reverse)[1]


def _parallel(a: Any, b: Any, h: Any, *, reverse: bool) -> Any:
    """Pairs (a, b) stand for h -> a h + b, and compose (Blelloch 1990)."""
    compose = lambda first, then: (then[0] * first[0], then[0] * first[1] + then[1])
    a, b = jax.lax.associative_scan(compose, (a, b), reverse=reverse)
    return a * h + b


def _run(a: Any, b: Any, h: Any, way: str, *, reverse: bool = False) -> Any:
    if len(a) == 1:  # decoding
        return a * h + b
    scan, associative = (functools.partial(f, reverse=reverse) for f in (_sequential, _parallel))
    if way == "auto":
        return jax.lax.platform_dependent(a, b, h, cpu=scan, default=associative)
    return (scan if way == "scan" else associative)(a, b, h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear_recurrence(
    a: Float[Array, "T B D"], b: Float[Array, "T B D"], h: Float[Array, "B D"], way: str = "auto"
) -> Float[Array, "T B D"]:
    """h_t = a_t h_(t-1) + b_t for every t, with 0 <= a <= 1.

    The gradient is the same recurrence backwards, so that nothing is kept but the factors and the
    result.

    Args:
      way: "scan", a loop, on the CPU the fastest by far; "associative", a scan log T deep; or
        "auto", the first on the CPU and the second on an accelerator.
    """
    return _run(a, b, h, way)


def _forward(a: Any, b: Any, h: Any, way: str) -> tuple[Any, Any]:
    hidden = _run(a, b, h, way)
    return hidden, (a, h, hidden)


def _backward(way: str, saved: Any, d_hidden: Any) -> tuple[Any, Any, Any]:
    a, h, hidden = saved
    after = jnp.concatenate([a[1:], jnp.ones_like(a[:1])])
    d_b = _run(after, d_hidden, jnp.zeros_like(h), way, reverse=True)
    return d_b * jnp.concatenate([h[None], hidden[:-1]]), d_b, a[0] * d_b[0]


linear_recurrence.defvjp(_forward, _backward)
