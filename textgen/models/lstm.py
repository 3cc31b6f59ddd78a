"""A stack of LSTM layers (Hochreiter and Schmidhuber 1997; forget gate of Gers et al. 2000)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import rnn
from jaxtyping import Array, Float, Integer

from textgen.config import ModelConfig
from textgen.errors import note
from textgen.models.layers import Dropout, Linear, compute_capability

Carry = tuple[tuple[Float[Array, "B D"], ...], ...]  # (h, c) of each layer


class LSTM(nn.Module):
    """The backbone. Its carry is (h, c) per layer; it has no longest sequence.

    Dropout draws one mask per sequence for each layer's output and holds it over time, and
    leaves the recurrent connections alone (Gal and Ghahramani 2016, on the vertical path).
    """

    width: int
    layers: int
    dropout: float = 0.0
    remat: bool = False
    dtype: jnp.dtype = jnp.float32
    cudnn: bool = False

    states = 2  # arrays that a layer carries

    @property
    def layer(self) -> type[nn.Module]:
        """What the stack is made of."""
        return CuDNNLayer if self.cudnn else Layer

    @classmethod
    def from_config(cls, config: ModelConfig, context: int) -> "LSTM":
        del context  # its memory has no edge
        dtype = jnp.dtype(config.compute_dtype)
        return cls(config.width, config.layers, config.dropout, config.remat, dtype, choose_cudnn(config))

    @property
    def max_positions(self) -> int | None:
        """The longest sequence, in tokens; None: there is none."""
        return None

    def init_carry(self, batch_size: int, max_length: int) -> Carry:
        """An empty past. Its size does not depend on `max_length`."""
        del max_length
        zeros = jnp.zeros((batch_size, self.width), jnp.float32)
        return ((zeros,) * self.states,) * self.layers

    def flops_per_token(self, length: int) -> float:
        """Of a forward pass's matrix products; `length` makes no difference."""
        del length
        return 16.0 * self.layers * self.width**2

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        carry: Carry | None = None,
        lengths: Integer[Array | np.ndarray, "B"] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], Carry | None]:
        layer = nn.remat(self.layer) if self.remat else self.layer
        states = self.init_carry(x.shape[0], 0) if carry is None else carry
        new_states = []
        for i, state in enumerate(states):
            x, state = layer(self.width, self.dtype, name=f"layer_{i}")(x, state, lengths)
            x = Dropout(self.dropout, shared=(1,), name=f"dropout_{i}")(x, train)
            new_states.append(state)
        return x, None if carry is None else tuple(new_states)


class Layer(nn.Module):
    """One LSTM layer over time."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], state: Any, lengths: Any) -> tuple[Float[Array, "B T D"], Any]:
        width = self.width
        kernel = self.param("kernel", Linear.kernel_init, (x.shape[-1], 4 * width), jnp.float32)
        recurrent = self.param("recurrent", orthogonal_gates, (width, 4 * width), jnp.float32)
        bias = self.param("bias", _forget_bias, (4 * width,), jnp.float32)
        return self.run(x, kernel, recurrent, bias, state, lengths)

    def run(self, x: Any, kernel: Any, recurrent: Any, bias: Any, state: Any, lengths: Any) -> tuple[Any, Any]:
        projected = project(x, kernel, bias, self.dtype)  # [T, B, 4D]
        if lengths is None:
            hidden, state = recurrence(projected, recurrent.astype(self.dtype), *state)
        else:
            hidden, state = _ragged(projected, recurrent.astype(self.dtype), state, lengths)
        return jnp.swapaxes(hidden, 0, 1), state


class CuDNNLayer(Layer):
    """The same with the same parameters, where whole windows run in cuDNN's kernels."""

    def run(self, x: Any, kernel: Any, recurrent: Any, bias: Any, state: Any, lengths: Any) -> tuple[Any, Any]:
        if lengths is not None or x.shape[1] == 1:
            return super().run(x, kernel, recurrent, bias, state, lengths)
        hidden, *state = cudnn(x, *state, jnp.concatenate([kernel, recurrent, bias[None]]))
        return hidden, tuple(state)


def project(x: Float[Array, "B T D"], kernel: Any, bias: Any, dtype: jnp.dtype) -> Float[Array, "T B F"]:
    """x W + b for all steps in one product; time first, so that a scan reads whole slices."""
    rows, steps, inputs = x.shape
    x = jnp.swapaxes(x, 0, 1).reshape(steps * rows, inputs)
    return (x.astype(dtype) @ kernel.astype(dtype) + bias.astype(dtype)).reshape(steps, rows, -1)


def orthogonal_gates(key: Array, shape: tuple[int, int], dtype: Any) -> Float[Array, "D F"]:
    """Each gate's recurrent matrix is orthogonal (Saxe et al. 2014)."""
    init, (width, features) = nn.initializers.orthogonal(), shape
    return jnp.concatenate([init(k, (width, width), dtype) for k in jax.random.split(key, features // width)], axis=1)


def _forget_bias(key: Array, shape: tuple[int], dtype: Any) -> Float[Array, "F"]:
    """Forget gates begin open (Jozefowicz et al. 2015): bias 1 there, 0 elsewhere."""
    del key
    width = shape[0] // 4
    return jnp.zeros(shape, dtype).at[width : 2 * width].set(1)


def _gates(z: Float[Array, "B F"]) -> Float[Array, "B F"]:
    """sigmoid, sigmoid, tanh, sigmoid of the quarters i, f, g, o: one tanh over the whole row.

    sigmoid(z) = tanh(z / 2) / 2 + 1/2. The barrier keeps XLA's CPU backend from computing the
    gates once more for each of their uses.
    """
    width = z.shape[-1] // 4
    scale = jnp.ones((4 * width,), z.dtype).at[: 2 * width].set(0.5).at[3 * width :].set(0.5)
    return jax.lax.optimization_barrier(jnp.tanh(z * scale) * scale + (1 - scale))


def _cell(z: Float[Array, "B F"], c: Float[Array, "B D"]) -> tuple[Any, Any, Any]:
    """(h, c, gates) after one step, from the pre-activations z = x W + h R + b."""
    gates = _gates(z)
    i, f, g, o = jnp.split(gates, 4, -1)
    c = jax.lax.optimization_barrier((f * c + i * g).astype(c.dtype))
    return (o * jnp.tanh(c)).astype(z.dtype), c, gates


@jax.custom_vjp
def recurrence(
    projected: Float[Array, "T B F"],
    recurrent: Float[Array, "D F"],
    h: Float[Array, "B D"],
    c: Float[Array, "B D"],
) -> tuple[Float[Array, "T B D"], tuple[Float[Array, "B D"], Float[Array, "B D"]]]:
    """Runs one layer over time from its input projections x W + b.

    Its backward pass keeps the gates, and computes the gradient of the recurrent weights as one
    matrix product after the scan instead of one in every step.
    """
    return _forward(projected, recurrent, h, c)[0]


def _forward(projected: Any, recurrent: Any, h: Any, c: Any) -> tuple[Any, Any]:
    def step(state: Any, p: Any) -> tuple[Any, Any]:
        h, c_old = state
        h, c, gates = _cell(p + h.astype(p.dtype) @ recurrent, c_old)
        return (h, c), (h, c_old, gates)

    start = (h.astype(projected.dtype), c)
    if projected.shape[0] == 1:  # decoding: a scan of one step has a price
        last, (hidden, c_old, gates) = step(start, projected[0])
        hidden, c_old, gates = hidden[None], c_old[None], gates[None]
    else:
        last, (hidden, c_old, gates) = jax.lax.scan(step, start, projected)
    saved = (recurrent, h, last[1], hidden, c_old, gates)
    return (hidden, (last[0].astype(h.dtype), last[1])), saved


def _backward(saved: Any, cotangents: Any) -> tuple[Any, Any, Any, Any]:
    recurrent, h, c_last, hidden, c_old, gates = saved
    d_hidden, (d_h, d_c) = cotangents
    transposed = recurrent.T
    c_new = jnp.concatenate([c_old[1:], c_last[None]])

    def step(carry: Any, saved: Any) -> tuple[Any, Any]:
        d_h, d_c = carry
        d_y, c_old, c_new, gates = saved
        i, f, g, o = jnp.split(gates, 4, -1)
        t = jnp.tanh(c_new)
        d_h = d_h + d_y
        d_c = d_c + d_h * o * (1 - t * t)
        d_gates = (d_c * g * i * (1 - i), d_c * c_old * f * (1 - f), d_c * i * (1 - g * g), d_h * t * o * (1 - o))
        d_z = jax.lax.optimization_barrier(jnp.concatenate(d_gates, -1).astype(gates.dtype))
        return (d_z @ transposed, (d_c * f).astype(d_c.dtype)), d_z

    start = (d_h.astype(hidden.dtype), d_c)
    (d_h, d_c), d_z = jax.lax.scan(step, start, (d_hidden, c_old, c_new, gates), reverse=True)
    h_old = jnp.concatenate([h[None].astype(hidden.dtype), hidden[:-1]])
    width, features = recurrent.shape
    d_recurrent = h_old.reshape(-1, width).T @ d_z.reshape(-1, features)
    return d_z, d_recurrent, d_h.astype(h.dtype), d_c


recurrence.defvjp(_forward, _backward)


def _ragged(projected: Any, recurrent: Any, state: Any, lengths: Integer[Array | np.ndarray, "B"]) -> tuple[Any, Any]:
    """The same, where row i stops changing its state after lengths[i] steps."""

    def step(state: Any, inputs: Any) -> tuple[Any, Any]:
        t, p = inputs
        h, c, _ = _cell(p + state[0].astype(p.dtype) @ recurrent, state[1])
        alive = (t < lengths)[:, None]
        state = (jnp.where(alive, h.astype(state[0].dtype), state[0]), jnp.where(alive, c, state[1]))
        return state, h

    state, hidden = jax.lax.scan(step, state, (jnp.arange(projected.shape[0]), projected))
    return hidden, state


def choose_cudnn(config: ModelConfig) -> bool:
    """Whether `cudnn` can be had, for a config and the device at hand, and is not declined.

    It takes an NVIDIA GPU and float32, whose products cuDNN may round to TF32, as XLA does there.
    A scan is divided over several devices, and this is not.
    """
    if config.backbone != "lstm" or config.recurrence == "scan":
        return False
    able = compute_capability() > 0 and config.compute_dtype == "float32"
    reason = _trial() if able else "that takes an NVIDIA GPU and model.compute_dtype='float32'."
    if reason and (able or config.recurrence == "cudnn"):
        note(f"model.recurrence={config.recurrence!r}: a scan, as cuDNN's LSTM cannot be had: {reason}")
    return not reason


@functools.cache
def _trial() -> str:
    """Why cuDNN's LSTM is not to be used here: it fails, or differs from the scan; "" where all is well."""
    normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    x, h, c, weights = normal(0, 2, 5, 8), normal(1, 2, 8), normal(2, 2, 8), normal(3, 17, 32)

    def scanned(x: Any, h: Any, c: Any, weights: Any) -> tuple[Any, Any, Any]:
        kernel, recurrent, bias = jnp.split(weights, [8, 16])
        hidden, state = recurrence(project(x, kernel, bias[0], x.dtype), recurrent, h, c)
        return jnp.swapaxes(hidden, 0, 1), *state

    def run(f: Any) -> Any:
        out, back = jax.vjp(f, x, h, c, weights)
        return out, back(jax.tree.map(jnp.ones_like, out))

    try:
        pairs = zip(*(jax.tree.leaves(jax.jit(lambda f=f: run(f))()) for f in (cudnn, scanned)), strict=True)
        apart = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)
    except Exception as error:  # whatever a driver or a library may raise
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return "" if apart < 2e-2 else f"in a trial it differed from the scan by {apart:.2g} of the largest."


@jax.custom_vjp
def cudnn(
    x: Float[Array, "B T D"], h: Float[Array, "B D"], c: Float[Array, "B D"], weights: Float[Array, "E F"]
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"], Float[Array, "B D"]]:
    """One layer over time in cuDNN's kernels: every h, the last h and the last c.

    Args: weights: kernel, recurrent and bias, one above the other, E = 2D + 1.
    """
    return _cudnn_forward(x, h, c, weights)[0]


def _cudnn_forward(x: Any, h: Any, c: Any, weights: Any) -> tuple[Any, Any]:
    @jax.custom_batching.sequential_vmap  # cuDNN knows no seeds side by side
    def forward(x: Any, h: Any, c: Any, weights: Any) -> tuple[Any, Any]:
        width = h.shape[-1]
        kernel, recurrent, bias = jnp.split(weights, [x.shape[-1], weights.shape[0] - 1])
        flat = jnp.concatenate([kernel.T.ravel(), recurrent.T.ravel(), bias[0], jnp.zeros_like(bias[0])])
        lengths = jnp.full(x.shape[:1], x.shape[1], jnp.int32)
        (y, h, c), saved = rnn.lstm_fwd(x, h[None], c[None], flat, lengths, *_shape(x, width))
        return (y, h[0], c[0]), saved

    return forward(x, h, c, weights)


def _cudnn_backward(saved: Any, cotangents: Any) -> tuple[Any, Any, Any, Any]:
    @jax.custom_batching.sequential_vmap
    def backward(saved: Any, cotangents: Any) -> tuple[Any, Any, Any, Any]:
        (x, h, *_), (d_y, d_h, d_c) = saved, cotangents
        inputs, width = x.shape[-1], h.shape[-1]
        d_x, d_h, d_c, d_flat, _ = rnn.lstm_bwd(*_shape(x, width), saved, (d_y, d_h[None], d_c[None]))
        sizes = [4 * width * inputs, 4 * width * width, 4 * width]
        kernel, recurrent, bias, _ = jnp.split(d_flat, np.cumsum(sizes))
        kernel, recurrent = kernel.reshape(4 * width, inputs).T, recurrent.reshape(4 * width, width).T
        return d_x, d_h[0], d_c[0], jnp.concatenate([kernel, recurrent, bias[None]])

    return backward(saved, cotangents)


def _shape(x: Any, width: int) -> tuple[int, int, int, float, bool, None]:
    """What cuDNN is told: sizes of input and state, one layer, no dropout, one direction, the default precision."""
    return x.shape[-1], width, 1, 0.0, False, None


cudnn.defvjp(_cudnn_forward, _cudnn_backward)
