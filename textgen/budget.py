"""What a run costs, and widths or numbers of steps that make runs of different architectures cost the same."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from textgen import models
from textgen.arms import BudgetConfig
from textgen.config import Config, UserError, require

WIDEST = 2**15  # of a width that is looked for

# Matrix products of bfloat16 without sparsity, FLOP/s, from the makers' data sheets.
PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


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
        train_flops=3 * model.flops_per_token(config.data.window) * tokens,
        tokens=tokens,
        width=config.model.width,
        steps=config.train.steps,
    )


def utilisation(cost: Cost, seconds: float | None) -> float | None:
    """The share of the device's peak in bfloat16 that a run used (MFU); None where the peak is not known."""
    kind = jax.devices()[0].device_kind
    peak = next((flops for name, flops in PEAKS.items() if name in kind), None)
    return cost.train_flops / seconds / peak if peak and seconds else None


def with_width(config: Config, width: int) -> Config:
    """The config with another width; the feed-forward width keeps its proportion to it.

    Raises:
      UserError: the heads do not divide it.
    """
    transformer = config.model.transformer
    feed_forward = max(round(transformer.feed_forward_width * width / config.model.width), 1)
    transformer = dataclasses.replace(transformer, feed_forward_width=feed_forward)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, width=width, transformer=transformer))


def with_steps(config: Config, steps: int) -> Config:
    """The config with another number of steps."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def solve(
    configs: Mapping[str, Config],
    budget: BudgetConfig,
    vocab_size: int,
    step_seconds: Callable[[Config], float],
) -> tuple[float, dict[str, Config]]:
    """The budget's value, and the configs brought to it by their width or their number of steps.

    Args:
      configs: arm name -> config; the first one's cost is the value, where none is given.
      step_seconds: measures the time of one step of a run; for a budget of seconds alone.

    Raises:
      UserError: a budget that no width or number of steps meets; it says which come nearest.
    """
    costs = {name: cost(config, vocab_size) for name, config in configs.items()}
    seconds = {name: step_seconds(config) for name, config in configs.items()} if budget.kind == "seconds" else {}
    first = next(iter(configs))
    value = budget.value
    if value is None:
        value = seconds[first] * costs[first].steps if seconds else _amount(costs[first], budget.kind)
    solved = {}
    for name, config in configs.items():
        if budget.unknown == "model.width":
            solved[name] = _solve_width(name, config, budget, value, vocab_size)
            continue
        each = seconds[name] if seconds else _amount(costs[name], budget.kind) / costs[name].steps
        solved[name] = _solve_steps(name, config, budget, value, each)
    return float(value), solved


def _amount(cost: Cost, kind: str) -> float:
    return {"parameters": cost.parameters, "flops": cost.train_flops, "tokens": cost.tokens}[kind]


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
    """The admissible width that comes nearest: by bisection, since a wider model costs more."""

    def admissible(width: int) -> Config | None:
        try:
            return with_width(config, width)
        except UserError:
            return None

    grain = next((g for g in range(1, 1025) if admissible(g) and admissible(2 * g) and admissible(3 * g)), None)
    require(grain is not None, f"Arm '{name}': no width up to 1024 goes with its other settings.")
    amount = lambda i: _amount(cost(with_width(config, i * grain), vocab_size), budget.kind)
    low, high = 1, max(WIDEST // grain, 2)  # in grains
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if amount(middle) <= value else (low, middle)
    misses = {i: amount(i) / value - 1 for i in (low, high)}
    best = min(misses, key=lambda i: abs(misses[i]))
    found = "; ".join(f"width {i * grain} has {amount(i):,.6g} ({miss:+.1%})" for i, miss in misses.items())
    require(
        abs(misses[best]) <= budget.tolerance,
        f"Arm '{name}': no width comes within {budget.tolerance:.1%} of {value:,.6g} {budget.kind}. Nearest: {found}. "
        "Set compare.budget.value to one of them, or compare.budget.tolerance higher.",
    )
    return with_width(config, best * grain)
