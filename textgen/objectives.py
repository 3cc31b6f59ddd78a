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
    """-ln p of later tokens, the mean over the heads summed over the text: head i at t predicts targets[t + i + 1]."""
    heads = range(logits.shape[2])
    means = [jnp.mean(next_token_nats(logits[:, : -i - 1, i], targets[:, i + 1 :])) for i in heads]
    return sum(means) / len(means) * targets.size
