"""A stack of GRU layers (Cho et al. 2014), with the reset gate after the matrix product as in cuDNN."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from textgen.models.layers import Linear
from textgen.models.lstm import LSTM, orthogonal_gates, project


class GRU(LSTM):
    """The backbone: the LSTM's stack and dropout around another layer. Its carry is (h,) per layer."""

    states = 1

    @property
    def layer(self) -> type[nn.Module]:
        return Layer

    def flops_per_token(self, length: int) -> float:
        """Of a forward pass's matrix products; `length` makes no difference."""
        del length
        return 12.0 * self.layers * self.width**2


class Layer(nn.Module):
    """One GRU layer over time."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], state: Any, lengths: Any) -> tuple[Float[Array, "B T D"], Any]:
        width = self.width
        kernel = self.param("kernel", Linear.kernel_init, (x.shape[-1], 3 * width), jnp.float32)
        recurrent = self.param("recurrent", orthogonal_gates, (width, 3 * width), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (3 * width,), jnp.float32)
        candidate_bias = self.param("candidate_bias", nn.initializers.zeros, (width,), jnp.float32)

        projected = project(x, kernel, bias, self.dtype)  # [T, B, 3D]
        weights = recurrent.astype(self.dtype), candidate_bias.astype(self.dtype)
        if lengths is None:
            hidden, last = recurrence(projected, *weights, *state)
        else:
            hidden, last = _ragged(projected, *weights, *state, lengths)
        return jnp.swapaxes(hidden, 0, 1), (last,)


def _cell(p: Float[Array, "B F"], recurrent: Any, bias: Any, h: Float[Array, "B D"]) -> tuple[Any, Any]:
    """(new h, what the backward pass needs) from the input's share p = x W + b of the pre-activations.

    r = sigmoid(p_r + h R_r), u = sigmoid(p_u + h R_u), n = tanh(p_n + r (h R_n + b_n)),
    h' = u h + (1 - u) n.
    """
    width = h.shape[-1]
    q = h.astype(p.dtype) @ recurrent
    gates = jax.lax.optimization_barrier(jax.nn.sigmoid(p[:, : 2 * width] + q[:, : 2 * width]))
    r, u = jnp.split(gates, 2, -1)
    q = jax.lax.optimization_barrier(q[:, 2 * width :] + bias)
    n = jax.lax.optimization_barrier(jnp.tanh(p[:, 2 * width :] + r * q))
    return (u * h + (1 - u) * n).astype(h.dtype), (h, gates, q, n)


@jax.custom_vjp
def recurrence(
    projected: Float[Array, "T B F"],
    recurrent: Float[Array, "D F"],
    bias: Float[Array, "D"],
    h: Float[Array, "B D"],
) -> tuple[Float[Array, "T B D"], Float[Array, "B D"]]:
    """Runs one layer over time from its input projections x W + b; gives every h, and the last.

    As for the LSTM, the gradient of the recurrent weights is one matrix product after the scan.
    """
    return _forward(projected, recurrent, bias, h)[0]


def _forward(projected: Any, recurrent: Any, bias: Any, h: Any) -> tuple[Any, Any]:
    def step(h: Any, p: Any) -> tuple[Any, Any]:
        h, saved = _cell(p, recurrent, bias, h)
        return h, (h.astype(p.dtype), saved)

    if projected.shape[0] == 1:  # decoding: a scan of one step has a price
        last, (hidden, saved) = step(h, projected[0])
        hidden, saved = jax.tree.map(lambda a: a[None], (hidden, saved))
    else:
        last, (hidden, saved) = jax.lax.scan(step, h, projected)
    return (hidden, last), (recurrent, *saved)


def _backward(saved: Any, cotangents: Any) -> tuple[Any, Any, Any, Any]:
    recurrent, *each = saved
    d_hidden, d_last = cotangents
    transposed = recurrent.T

    def step(d_h: Any, saved: Any) -> tuple[Any, Any]:
        d_y, h, gates, q, n = saved
        r, u = jnp.split(gates, 2, -1)
        d_h = d_h + d_y
        d_n = d_h * (1 - u) * (1 - n * n)
        d_gates = (d_n * q * r * (1 - r), d_h * (h - n) * u * (1 - u))
        # The pre-activations' gradient, and its last third once more as h R_n + b_n has it.
        d_p = jax.lax.optimization_barrier(jnp.concatenate([*d_gates, d_n, d_n * r], -1).astype(gates.dtype))
        width = d_h.shape[-1]
        d_q = jnp.concatenate([d_p[:, : 2 * width], d_p[:, 3 * width :]], -1)
        return (d_h * u + d_q @ transposed).astype(d_h.dtype), (d_p[:, : 3 * width], d_q)

    d_h, (d_p, d_q) = jax.lax.scan(step, d_last, (d_hidden, *each), reverse=True)
    width, features = recurrent.shape
    h_old = each[0].astype(d_q.dtype).reshape(-1, width)
    d_q = d_q.reshape(-1, features)
    return d_p, h_old.T @ d_q, jnp.sum(d_q[:, 2 * width :], 0), d_h


recurrence.defvjp(_forward, _backward)


def _ragged(
    projected: Any, recurrent: Any, bias: Any, h: Any, lengths: Integer[Array | np.ndarray, "B"]
) -> tuple[Any, Any]:
    """The same, where row i stops changing its state after lengths[i] steps."""

    def step(h: Any, inputs: Any) -> tuple[Any, Any]:
        t, p = inputs
        new = jnp.where((t < lengths)[:, None], _cell(p, recurrent, bias, h)[0], h)
        return new, new.astype(p.dtype)

    last, hidden = jax.lax.scan(step, h, (jnp.arange(projected.shape[0]), projected))
    return hidden, last
