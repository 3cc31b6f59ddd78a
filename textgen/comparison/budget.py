"""What a run costs, and widths or numbers of steps that make runs of different architectures cost the same."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from textgen import models, parallel
from textgen.comparison.arms import BudgetConfig
from textgen.config import Config, UserError, require
from textgen.training import loop


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run of a config.

    Attributes:
      parameters: all numbers that are learned.
      non_embedding_parameters: without the tables of tokens and positions, and without the head.
      train_flops: of all matrix products of the training; a backward pass counts as two forward ones.
      tokens: predictions trained on.
      width, steps: model.width and train.steps.
    """

    parameters: int
    non_embedding_parameters: int
    train_flops: float
    tokens: int
    width: int
    steps: int


def cost(config: Config, vocab_size: int) -> Cost:
    """Counts from shapes and formulas; nothing is computed."""
    model = models.build(config, vocab_size)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    sizes = [
        ({str(getattr(p, "key", p)) for p in path}, math.prod(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    ]
    tokens = config.train.steps * config.data.batch_size * config.data.window
    return Cost(
        parameters=sum(size for _, size in sizes),
        non_embedding_parameters=sum(size for names, size in sizes if not names & {"embedding", "positions", "head"}),
        train_flops=loop.flops_per_token(model, config) * tokens,
        tokens=tokens,
        width=config.model.width,
        steps=config.train.steps,
    )


def utilisation(cost: Cost, seconds: float | None) -> float | None:
    """The share of the device's peak in bfloat16 that a run used (MFU); None where the peak is not known."""
    peak = parallel.peak_flops()
    return cost.train_flops / seconds / peak if peak and seconds else None


def with_width(config: Config, width: int) -> Config:
    """The config with another width; the feed-forward widths of all groups keep their proportion to it.

    Raises:
      UserError: the heads do not divide it.
    """
    scaled = {}
    for name, group in vars(config.model).items():
        if hasattr(group, "feed_forward_width"):
            feed_forward = max(round(group.feed_forward_width * width / config.model.width), 1)
            scaled[name] = dataclasses.replace(group, feed_forward_width=feed_forward)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, width=width, **scaled))


def with_steps(config: Config, steps: int) -> Config:
    """The config with another number of steps."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def solve(
    base: Config,
    configs: Mapping[str, Config],
    budget: BudgetConfig,
    vocab_size: int,
    step_seconds: Callable[[Config], float],
) -> tuple[float, dict[str, Config]]:
    """The budget's value, and the configs brought to it by their width or their number of steps.

    Args:
      base: its cost is the value, where none is given.
      configs: arm name -> config.
      step_seconds: measures the time of one step of a run; for a budget of seconds alone.

    Raises:
      UserError: a budget that no width or number of steps meets; it says which come nearest.
    """
    value = budget.value
    if value is None:
        spent = cost(base, vocab_size)
        value = step_seconds(base) * spent.steps if budget.kind == "seconds" else _amount(spent, budget.kind)
    solved = {}
    for name, config in configs.items():
        if budget.unknown == "model.width":
            solved[name] = _solve_width(name, config, budget, value, vocab_size)
            continue
        if budget.kind == "seconds":
            each = step_seconds(config)
        else:
            each = _amount(cost(config, vocab_size), budget.kind) / config.train.steps
        solved[name] = _solve_steps(name, config, budget, value, each)
    return float(value), solved


def _amount(cost: Cost, kind: str) -> float:
    return float({"parameters": cost.parameters, "flops": cost.train_flops, "tokens": cost.tokens}[kind])


def _solve_steps(name: str, config: Config, budget: BudgetConfig, value: float, each: float) -> Config:
    steps = max(round(value / each), 1)
    miss = steps * each / value - 1
    require(
        abs(miss) <= budget.tolerance,
        f"Arm '{name}': no number of steps comes within {budget.tolerance:.1%} of {value:,.6g} {budget.kind}; nearest "
        f"are {steps} ({miss:+.1%}), at {each:,.6g} each: raise compare.budget.value.",
    )
    try:
        return with_steps(config, steps)
    except UserError as error:
        raise UserError(f"Arm '{name}', whose budget leaves it {steps} steps: {error}") from None


def _solve_width(name: str, config: Config, budget: BudgetConfig, value: float, vocab_size: int) -> Config:
    """The width that comes nearest: among the multiples of 8, on which machines are fast, where one will do."""

    def admissible(width: int) -> bool:
        try:
            return bool(models.build(with_width(config, width), vocab_size))
        except UserError:
            return False

    finest = next((g for g in range(1, 1025) if admissible(g) and admissible(2 * g) and admissible(3 * g)), None)
    require(finest is not None, f"Arm '{name}': no width up to 1024 goes with its other settings.")
    amount = functools.cache(lambda width: _amount(cost(with_width(config, width), vocab_size), budget.kind))
    for grain in (math.lcm(finest, 8), finest):
        widths = _around(value, amount, config.model.width, grain)
        misses = {width: amount(width) / value - 1 for width in widths}
        best = min(misses, key=lambda width: abs(misses[width]))
        if abs(misses[best]) <= budget.tolerance:
            return with_width(config, best)
    found = "; ".join(f"width {width} has {amount(width):,.6g} ({miss:+.1%})" for width, miss in misses.items())
    raise UserError(
        f"Arm '{name}': no width comes within {budget.tolerance:.1%} of {value:,.6g} {budget.kind}. Nearest: {found}. "
        "Set compare.budget.value to one of them, or compare.budget.tolerance higher."
    )


def _around(value: float, amount: Callable[[int], float], start: int, grain: int) -> tuple[int, int]:
    """Two neighbouring multiples of the grain; the first costs no more than the value, the second does."""
    low = max(start // grain, 1)
    for _ in range(2):  # costs grow about with the square of the width
        low = max(round(low * math.sqrt(value / amount(low * grain))), 1)
    while low > 1 and amount(low * grain) > value:
        low -= 1
    while amount((low + 1) * grain) <= value:
        low += 1
    return low * grain, (low + 1) * grain
