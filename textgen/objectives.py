"""What training minimises and evaluation reports: next-token nats, summed or averaged by whoever asks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer


def next_token_nats(logits: Float[Array, "*N V"], targets: Integer[Array, "*N"]) -> Float[Array, "*N"]:
    """-ln p(target) of every prediction, float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None].astype(jnp.int32), axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
