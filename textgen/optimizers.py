"""From the config to an optax transformation: schedules, decay masks, muon for the matrices."""

from typing import Any

import jax
import optax
from optax import contrib

from textgen.config import OptimizerConfig
from textgen.parallel import layer_axes


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> fraction of the peak learning rate: a linear warm-up, then the named shape down to final_fraction."""
    warmup, final = config.warmup_steps, config.final_fraction
    rest = steps - warmup
    if config.schedule == "cosine":
        shape = optax.cosine_decay_schedule(1.0, rest, final)
    elif config.schedule == "linear":
        shape = optax.linear_schedule(1.0, final, rest)
    elif config.schedule == "wsd":  # warm up, stay, decay (Hu et al. 2024)
        decay = max(round(config.decay_fraction * steps), 1)
        shape = optax.join_schedules(
            [optax.constant_schedule(1.0), optax.linear_schedule(1.0, final, decay)], [max(rest - decay, 0)]
        )
    else:
        shape = optax.constant_schedule(1.0)
    if not warmup:
        return shape
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
    except the head; AdamW moves the rest.
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
        core = contrib.muon(
            rate,
            ns_steps=config.newton_schulz_steps,
            beta=config.momentum,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_weight_decay=0.0,
            adam_learning_rate=lambda step: adam_peak * shape(step),
            muon_weight_dimension_numbers=_muon_dimensions,
            consistent_rms=0.2,
        )
    if config.clip_norm is None:
        return core
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), core)


def _muon_dimensions(params: Any) -> Any:
    """Which parameters muon moves, for optax: dimension numbers, or None for AdamW's.

    An axis of layers before these two is a batch of matrices, each orthogonalised by itself.
    """

    def dimensions(path: Any, leaf: Any) -> contrib.MuonDimensionNumbers | None:
        head = any(getattr(p, "key", "") == "head" for p in path)
        return contrib.MuonDimensionNumbers(-2, -1) if is_matrix(path, leaf) and not head else None

    return jax.tree_util.tree_map_with_path(dimensions, params)
