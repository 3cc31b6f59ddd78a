"""What training minimises and evaluation reports: next-token nats, summed or averaged by whoever asks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer


def next_token_nats(logits: Float[Array, "*N V"], targets: Integer[Array, "*N"]) -> Float[Array, "*N"]:
    """-ln p(target) of every prediction, float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None].astype(jnp.int32), axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def total_nats(
    head: Callable[[Any], Any],
    y: Float[Array, "B T D"],
    targets: Integer[Array, "B T"],
    chunk: int | None = None,
) -> Float[Array, ""]:
    """The nats of all predictions, summed; a target below 0 is not scored.

    Args:
      head: features [..., D] -> logits [..., V].
      chunk: predictions whose logits are held at once. The backward pass makes them once more, so
        that [B, T, V] is never there. None: all.
    """

    def scored(y: Any, targets: Any) -> Any:
        return jnp.sum(jnp.where(targets >= 0, next_token_nats(head(y), jnp.maximum(targets, 0)), 0))

    if chunk is None or targets.size <= chunk:
        return scored(y, targets)
    pad = -targets.size % chunk
    y = jnp.pad(y.reshape(-1, y.shape[-1]), ((0, pad), (0, 0))).reshape(-1, chunk, y.shape[-1])
    targets = jnp.pad(targets.reshape(-1), (0, pad), constant_values=-1).reshape(-1, chunk)
    add = jax.checkpoint(lambda total, part: (total + scored(*part), None))
    return jax.lax.scan(add, jnp.float32(0), (y, targets))[0]


def ahead_nats(score: Callable[..., Any], y: Float[Array, "B T P D"], targets: Integer[Array, "B T"]) -> Any:
    """The nats of later tokens, summed over the text and averaged over the heads.

    Head i reads y[:, t, i] and predicts targets[:, t + i + 1]. `score` is `total_nats` with a head.
    """
    heads = range(y.shape[2])
    return sum(score(y[:, : -i - 1, i], targets[:, i + 1 :]) for i in heads) / len(heads)
