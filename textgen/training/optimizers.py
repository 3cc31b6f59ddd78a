"""From the config to an optax transformation: schedules, decay masks, muon for the matrices."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from textgen.config import OptimizerConfig
from textgen.parallel import layer_axes


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> fraction of the peak learning rate: a linear warm-up, then the named shape down to final_fraction."""
    warmup, final = max(config.warmup_steps, 1), config.final_fraction  # the first step of none is at the peak
    rest = max(steps - warmup, 1)
    if config.schedule == "cosine":
        shape = optax.cosine_decay_schedule(1.0, rest, final)
    elif config.schedule == "linear":
        shape = optax.linear_schedule(1.0, final, rest)
    elif config.schedule == "wsd":  # warm up, stay, decay (Hu et al. 2024)
        decay = min(max(round(config.decay_fraction * steps), 1), rest)
        shape = optax.join_schedules(
            [optax.constant_schedule(1.0), optax.linear_schedule(1.0, final, decay)], [rest - decay]
        )
    else:
        shape = optax.constant_schedule(1.0)
    return optax.join_schedules([optax.linear_schedule(1 / warmup, 1.0, warmup - 1), shape], [warmup - 1])


def is_matrix(path: Any, leaf: Any) -> bool:
    """A weight that multiplies vectors: not an embedding or position table, a norm's scale or a bias."""
    return leaf.ndim - layer_axes(path) >= 2 and str(getattr(path[-1], "key", "")) not in ("embedding", "positions")


def build(config: OptimizerConfig, steps: int, learning_rate: Any = None) -> optax.GradientTransformation:
    """The optimizer that a config describes, for a run of so many steps.

    `learning_rate` takes the place of the config's where it is given, and may be traced: then runs
    with different rates are one program.

    Weight decay is decoupled and acts on matrices alone. Muon (Jordan et al. 2024) moves the
    matrices, with updates scaled to the root mean square that AdamW's have (Liu et al. 2025),
    except the head; AdamW, with Nesterov's momentum, moves the rest.
    """
    shape = schedule(config, steps)
    peak = config.learning_rate if learning_rate is None else learning_rate
    rate = lambda step: peak * shape(step)
    matrices = lambda params: jax.tree_util.tree_map_with_path(is_matrix, params)
    if config.name == "adamw":
        core = optax.adamw(rate, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=matrices)
    elif config.name == "lion":
        core = optax.lion(rate, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=matrices)
    elif config.name == "sgd":
        core = optax.chain(
            optax.trace(config.momentum, nesterov=True),
            optax.add_decayed_weights(config.weight_decay, matrices),
            optax.scale_by_learning_rate(rate),
        )
    else:
        adam_peak = config.adam_learning_rate or peak
        hidden = optax.chain(
            optax.trace(config.momentum, nesterov=True),
            optax.stateless(
                lambda updates, _: jax.tree.map(lambda g: _orthogonal(g, config.newton_schulz_steps), updates)
            ),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
        rest = optax.adamw(
            lambda step: adam_peak * shape(step), config.beta1, config.beta2, weight_decay=0.0, nesterov=True
        )
        core = optax.partition({True: hidden, False: rest}, _is_hidden)
    if config.clip_norm is None:
        return core
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), core)


def _is_hidden(params: Any) -> Any:
    """Which parameters muon moves: the matrices, each layer's by itself, but not the head."""

    def hidden(path: Any, leaf: Any) -> bool:
        return is_matrix(path, leaf) and not any(getattr(p, "key", "") == "head" for p in path)

    return jax.tree_util.tree_map_with_path(hidden, params)


def _orthogonal(g: Float[Array, "*layers I O"], steps: int) -> Float[Array, "*layers I O"]:
    """Nearly the orthogonal matrix that is nearest to g, times 0.2 sqrt(max(I, O)).

    The Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X of Jordan et al. (2024) only
    multiplies X by polynomials of G = X X^T. These are gathered in one matrix on the shorter side:
    with P = a + b G + c G^2, G <- P G P and Q <- P Q, and X is multiplied once, at the end. Squares
    of small singular values need float32 products, whatever the device makes of them by default.
    """
    if g.shape[-2] > g.shape[-1]:
        return _orthogonal(g.mT, steps).mT
    a, b, c = 3.4445, -4.7750, 2.0315
    with jax.default_matmul_precision("highest"):
        x = g / (jnp.linalg.norm(g, axis=(-2, -1), keepdims=True) + 1e-8)
        gram, q = x @ x.mT, None
        for step in range(steps):
            p = a * jnp.eye(gram.shape[-1]) + b * gram + c * gram @ gram
            q = p if q is None else p @ q
            if step < steps - 1:
                gram = p @ gram @ p
        return 0.2 * g.shape[-1] ** 0.5 * (q @ x)
