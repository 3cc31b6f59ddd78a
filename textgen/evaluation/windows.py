"""Cut a sequence into windows, and score every token of them: one definition for all who evaluate."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Shaped

from textgen.training.losses import next_token_nats


def cut(
    tokens: Shaped[np.ndarray, "N"], window: int, *, multiple: int = 1, fill: int = 0
) -> tuple[Shaped[np.ndarray, "R W1"], Bool[np.ndarray, "R W"]]:
    """Cut a sequence into windows of W predictions, which overlap by the one token that each begins with.

    >>> ids, scored = windows.cut(np.array([5, 6, 7, 8]), 2)
    >>> ids.tolist(), scored.tolist()
    ([[5, 6, 7], [7, 8, 0]], [[True, True], [True, False]])

    Args:
      tokens: at least two ids.
      multiple: the number of windows is filled up to a multiple of this.
      fill: id that stands behind the last token.

    Returns:
      The windows, W + 1 ids each (a view of one copy), and which of their predictions are of real tokens.
    """
    predictions = len(tokens) - 1
    rows = -(-predictions // window)
    rows = -(-rows // multiple) * multiple
    padded = np.full(rows * window + 1, fill, tokens.dtype)
    padded[: len(tokens)] = tokens
    ids = np.lib.stride_tricks.sliding_window_view(padded, window + 1)[::window]
    return ids, np.arange(rows * window).reshape(rows, window) < predictions


@partial(jax.jit, static_argnums=0)
def nll(model: Any, params: Any, ids: Integer[Array | np.ndarray, "R W1"]) -> Float[Array, "R W"]:
    """Negative log-likelihood, in nats, of each token after the first of each window, from an empty past."""
    ids = ids.astype(jnp.int32)
    logits, _ = model.apply({"params": params}, ids[:, :-1])
    return next_token_nats(logits, ids[:, 1:])
