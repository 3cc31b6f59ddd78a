"""What training minimises and evaluation reports: next-token nats, summed or averaged by whoever asks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer


def next_token_nats(logits: Float[Array, "*N V"], targets: Integer[Array, "*N"]) -> Float[Array, "*N"]:
    """-ln p(target) of every prediction, float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None].astype(jnp.int32), axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def ahead_nats(logits: Float[Array, "B T P V"], targets: Integer[Array, "B T"]) -> Float[Array, ""]:
    """-ln p of later tokens, summed over the text, the mean of the heads: head i at t predicts targets[t + i + 1].

    Targets below 0 are left out.
    """
    total = jnp.float32(0)
    for i in range(logits.shape[2]):
        later = targets[:, i + 1 :]
        nats = next_token_nats(logits[:, : -i - 1, i], jnp.maximum(later, 0))
        total += jnp.sum(jnp.where(later >= 0, nats, 0))
    return total / logits.shape[2]
