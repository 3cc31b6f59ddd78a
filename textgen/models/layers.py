"""What every architecture is built of: linear maps, norms, dropout."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Initializer = jax.nn.initializers.Initializer


def compute_capability() -> float:
    """Of the NVIDIA GPU at hand, such as 9.0; 0 where there is none."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "")  # '9.0'; 'gfx90a' is AMD's
    return float(capability) if capability.split(".")[0].isdigit() else 0.0


class Linear(nn.Module):
    """y = x W (+ b) over the last axis, as one matrix product.

    The leading axes are flattened first: XLA's CPU backend computes the weight gradient of a
    two-dimensional product twice as fast as that of a batched one.
    """

    features: int
    use_bias: bool = False
    kernel_init: Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        if x.shape[-1] > self.features and jax.default_backend() == "cpu":
            kernel = gradient_transposed(kernel)
        y = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


@jax.custom_jvp
def gradient_transposed(kernel: Float[Array, "D F"]) -> Float[Array, "D F"]:
    """The kernel itself; its gradient x^T g is computed as (g^T x)^T.

    XLA's CPU backend computes x^T g at 55 to 90 % of that speed where it has more rows than columns.
    """
    return kernel


@gradient_transposed.defjvp
def _gradient_transposed_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    kept = jax.lax.optimization_barrier  # its transpose is a barrier too: XLA would undo what is not kept
    return primals[0], kept(kept(tangents[0]).T).T


def residual_init(layers: int) -> Initializer:
    """For what is added to the residual stream: small, so that its variance does not grow with depth."""
    return nn.initializers.variance_scaling(1 / (2 * layers), "fan_in", "normal")


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016), computed in float32."""

    kind: str

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + 1e-6) * scale
        if self.kind == "layernorm":
            y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return y.astype(x.dtype)


class Dropout(nn.Module):
    """Zeroes a fraction of x and scales the rest up; `shared` axes have one mask.

    The rate is rounded to 1/256, so that one random byte decides: the random bits are what
    dropout costs, and this takes a quarter of them.
    """

    rate: float
    shared: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: Float[Array, "..."], train: bool) -> Float[Array, "..."]:
        kept = 256 - round(self.rate * 256)
        if not train or kept == 256:
            return x
        shape = tuple(1 if axis in self.shared else n for axis, n in enumerate(x.shape))
        words = (*shape[:-1], -(-shape[-1] // 4))
        bits = jax.random.bits(self.make_rng("dropout"), words, jnp.uint32)
        mask = jax.lax.bitcast_convert_type(bits, jnp.uint8).reshape(*shape[:-1], -1)[..., : shape[-1]] < kept
        return jnp.where(mask, x * (256 / max(kept, 1)), 0).astype(x.dtype)


def scanned(block: Any, layers: int, in_axes: tuple[Any, ...]) -> Any:
    """`layers` blocks, each (x, *inputs) -> (x, state), as one that is compiled once: a loop over the layers.

    Their parameters are stacked, the layers in front (parallel.layer_axes knows them by the name
    "blocks"), and their states behind the batch. Each layer draws for itself.

    Args:
      in_axes: for each of the inputs, 1 where it is such a state, nn.broadcast where every layer takes all of it.
    """
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        out_axes=1,
        length=layers,
    )


def for_each_layer(state: Any, layers: int, stacked: bool) -> Any:
    """One layer's state as that of all: a tuple of them, or for `scanned` each leaf [B, ...] as [B, L, ...]."""
    if not stacked:
        return (state,) * layers
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], layers, axis=1), state)


def feed_forward_flops(width: int, hidden: int, activation: str) -> float:
    """Of the matrix products of `feed_forward`, forward, per token."""
    return 2.0 * width * hidden * (3 if activation == "swiglu" else 2)


def feed_forward(
    x: Float[Array, "B T D"],
    hidden: int,
    activation: str,
    layers: int,
    norm: str,
    dropout: float,
    dtype: jnp.dtype,
    train: bool,
) -> Float[Array, "B T D"]:
    """x + down(activation(up(norm(x)))), `hidden` wide; its parameters are those of the block that calls it."""
    bias = norm == "layernorm"
    gated = activation == "swiglu"
    y = Norm(norm, name="feed_forward_norm")(x)
    y = Linear((1 + gated) * hidden, bias, dtype=dtype, name="up")(y)
    if gated:
        gate, y = jnp.split(y, 2, -1)
        y = jax.nn.silu(gate) * y
    else:
        y = jax.nn.gelu(y) if activation == "gelu" else jnp.square(jax.nn.relu(y))
    y = Linear(x.shape[-1], bias, residual_init(layers), dtype, name="down")(y)
    return x + Dropout(dropout, name="feed_forward_dropout")(y, train)
