"""What a difference between two arms is worth: an interval over the text and the seeds, and a verdict in words.

The loss of an arm varies for two reasons. Another text of the same kind would give another
loss: seen from blocks of consecutive tokens, the same in both arms (paired).
Another seed would give another model: seen from the seeds, of which there are few (Student's t).
The two are crossed: every seed reads every block. So their variances are added, and what a seed
does to a block, which both hold, is counted once.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

from textgen.errors import require

DRAWS = 2000  # of a bootstrap
MOST_SEEDS = 1000  # beyond this many, more seeds are no advice


def student_t(confidence: float, freedom: float | int) -> float:
    """The two-sided quantile of Student's t: 2.776 for 0.95 and 4 degrees of freedom."""
    return float(stdtrit(freedom, 0.5 + confidence / 2))


def block_means(nats: Float[np.ndarray, "S N"], block: int) -> Float[np.ndarray, "S M"]:
    """The mean of each block of `block` consecutive tokens; what is left over at the end is left out.

    A text shorter than two blocks is cut into two: the interval then says how little it tells.
    """
    require(nats.shape[-1] >= 2, f"A loss over {nats.shape[-1]} tokens has no interval: it takes two or more.")
    block = min(block, nats.shape[-1] // 2)
    whole = nats[:, : nats.shape[-1] // block * block].astype(np.float64)
    return whole.reshape(len(nats), -1, block).mean(-1)


@functools.lru_cache(maxsize=4)
def _resamplings(blocks: int, draws: int) -> np.ndarray:
    """How often each block is drawn, as a share. [draws, blocks]; the same for everyone, hence paired."""
    return np.random.default_rng(0).multinomial(blocks, np.full(blocks, 1 / blocks), draws) / blocks


def bootstrap(blocks: Float[np.ndarray, "M"], draws: int = DRAWS) -> Float[np.ndarray, "draws"]:
    """Means of texts made of blocks drawn with replacement (Efron 1979, on blocks).

    The same blocks are drawn at every call with as many of them: what is drawn is paired.
    """
    return _resamplings(len(blocks), draws) @ blocks


@dataclasses.dataclass(frozen=True)
class Arm:
    """How the loss of one arm varies from seed to seed; variances in nats^2 of one seed's mean loss.

    Attributes:
      seeds: runs that count.
      spread: variance between seeds.
      mixed: the part of it that other blocks would change; the least that the spread can be.
    """

    seeds: int
    spread: float
    mixed: float

    @classmethod
    def of(cls, blocks: Float[np.ndarray, "S M"]) -> "Arm":
        seeds, count = blocks.shape
        if seeds < 2:
            return cls(seeds, 0.0, 0.0)
        means = blocks.mean(1)
        rest = blocks - blocks.mean(0) - means[:, None] + means.mean()
        mixed = float(np.square(rest).sum() / (seeds - 1) / (count - 1) / count)
        return cls(seeds, float(means.var(ddof=1)), mixed)

    @property
    def variance(self) -> float:
        """Of the mean over the seeds, that of the text apart."""
        return max(self.spread, self.mixed) / self.seeds


@dataclasses.dataclass(frozen=True)
class Difference:
    """The loss of arm A less that of arm B: below 0, A is better. Nats per token.

    Attributes:
      mean: over seeds and text.
      half_width: the interval is mean +- half_width.
      confidence: how often such intervals hold the truth, when both the text and the seeds are drawn anew.
      text: variance of `mean` that another text of the same length would bring.
      blocks: how many blocks the text has.
      a, b: how the arms vary from seed to seed.
    """

    mean: float
    half_width: float
    confidence: float
    text: float
    blocks: int
    a: Arm
    b: Arm

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def difference(
    a: Float[np.ndarray, "S N"], b: Float[np.ndarray, "R N"], *, block: int = 512, confidence: float = 0.95
) -> Difference:
    """The difference of two arms from the nats of every run on every token of one text.

    A two-way layout with random seeds and random blocks (Satterthwaite 1946 for the degrees of
    freedom). With one seed in an arm the interval is over the text alone: `verdict` says so.

    Args:
      a, b: one row per seed; the tokens are the same in all rows.
      block: tokens that are drawn together, because neighbours are alike.

    Raises:
      UserError: fewer than two tokens.
    """
    mean = float(a.mean(dtype=np.float64) - b.mean(dtype=np.float64))
    blocks_a, blocks_b = block_means(a, block), block_means(b, block)
    arms, count = (Arm.of(blocks_a), Arm.of(blocks_b)), blocks_a.shape[1]
    # What a bootstrap of the blocks comes to with endless draws, but for its shortfall of (M - 1) / M.
    over_text = float((blocks_a.mean(0) - blocks_b.mean(0)).var(ddof=1)) / count
    text = max(over_text - sum(arm.mixed / arm.seeds for arm in arms), 0.0)
    return Difference(mean, _half_width(text, count, *arms, confidence), confidence, text, count, *arms)


def _half_width(text: float, blocks: int, a: Arm, b: Arm, confidence: float) -> float:
    total = text + a.variance + b.variance
    if total == 0:
        return 0.0
    wobble = text**2 / (blocks - 1) + sum(arm.variance**2 / (arm.seeds - 1) for arm in (a, b) if arm.seeds > 1)
    return student_t(confidence, total**2 / wobble) * math.sqrt(total)


def text_interval(nats: Float[np.ndarray, "N"], *, block: int = 512, confidence: float = 0.95) -> tuple[float, float]:
    """The bootstrap's percentile interval of a mean loss over the text alone: of one model, as it is."""
    blocks = block_means(nats[None], block)[0]
    shift = float(nats.mean(dtype=np.float64)) - blocks.mean()  # the left-over end counts in the mean
    low, high = np.quantile(bootstrap(blocks), [(1 - confidence) / 2, (1 + confidence) / 2]) + shift
    return float(low), float(high)


def seed_interval(losses: Any, confidence: float = 0.95) -> float:
    """Half the width of the interval of an arm's mean loss over its seeds, on this text; NaN for one seed.

    Student's t: exact if seeds are normal, and weak with few of them: with 3, it is 4.3 standard
    errors to either side.
    """
    if len(losses) < 2:
        return math.nan
    error = float(np.std(losses, ddof=1)) / math.sqrt(len(losses))
    return student_t(confidence, len(losses) - 1) * error


def best_of_k(losses: Any) -> Float[np.ndarray, "K"]:
    """The expected least loss among k trials, for k = 1 ... all, had the trials been these in random order.

    The unbiased estimate, over all subsets of k (Tang et al. 2020); that of Dodge et al. (2019)
    draws with replacement and is too low.
    """
    ordered, count = np.sort(np.asarray(losses, np.float64)), len(losses)
    ways = [
        [math.comb(count - i, k - 1) / math.comb(count, k) for i in range(1, count + 1)] for k in range(1, count + 1)
    ]
    return np.array(ways).reshape(count, count) @ ordered


def rate_sensitivity(losses: Mapping[float, Any], initial: float) -> float:
    """How much a learning rate off the best costs: mean over the rates of min(loss, initial) less the best.

    Wortsman et al. (2023). Nats per token; a trial that diverged counts as the loss before training.

    Args:
      losses: by learning rate, of every seed; NaN where one diverged.
      initial: the loss before training.
    """
    means = [np.mean(np.fmin(np.asarray(some, np.float64), initial)) for some in losses.values()]
    return float(np.mean(means) - np.min(means))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the rule says about two arms.

    Attributes:
      outcome: "better" (one of them is), "equal" (no difference that matters), "unresolved" or "none".
      text: the same in a sentence or two, for people.
      difference: what it rests on; None where an arm has no finished run.
    """

    outcome: str
    text: str
    difference: Difference | None


def verdict(
    names: tuple[str, str],
    nats: tuple[Float[np.ndarray, "S N"] | None, Float[np.ndarray, "R N"] | None],
    *,
    unit: str = "nats per token",
    block: int = 512,
    confidence: float = 0.95,
    smallest: float = 0.0,
) -> Verdict:
    """The rule, fixed before the run, on two arms.

    No difference matters if the whole interval lies within +- `smallest`; else one is better if
    the interval holds no zero; else it is not resolved, and what would resolve it is said, should
    the difference stay as it is.

    Args:
      nats: of every finished run on every token; None where there is none.
      unit: of the loss, in words.
      smallest: the difference that would matter, in that unit.
    """
    (a, b), missing = names, [name for name, some in zip(names, nats, strict=True) if some is None]
    if missing:
        return Verdict("none", f"No comparison: {' and '.join(missing)} has no finished run.", None)
    d = difference(nats[0], nats[1], block=block, confidence=confidence)
    if d.mean > 0:
        a, b = b, a
    size, wide = rounded(abs(d.mean), d.half_width)
    interval = f"{size} \u00b1 {wide} {unit}"
    single = [name for name, arm in zip(names, (d.a, d.b), strict=True) if arm.seeds < 2]
    if single:
        text = (
            f"Not resolved: on this text the loss of {a} was lower than that of {b} by {interval}, but of "
            f"{' and of '.join(single)} one run finished, and nothing tells how much another seed would change. "
            "Two seeds or more are needed, better five."
        )
        return Verdict("unresolved", text, d)
    over = f"({confidence * 100:.3g} % interval over the text and {_seeds(names, d)})"
    lower = f"the loss of {a} was lower than that of {b} by {interval} {over}"
    if d.half_width + abs(d.mean) < smallest:
        return Verdict(
            "equal", f"No difference that matters: {lower}, within the {smallest:g} fixed before the run.", d
        )
    if d.half_width < abs(d.mean):
        return Verdict("better", f"{a} is better than {b} by {interval} {over}.", d)
    return Verdict("unresolved", f"Not resolved: {lower}. {_advice(d, smallest)}", d)


def _advice(d: Difference, smallest: float) -> str:
    """What would resolve a difference, if it stays as it is."""
    target = max(abs(d.mean), smallest - abs(d.mean))
    floor = student_t(d.confidence, d.blocks - 1) * math.sqrt(d.text)
    if floor >= target:
        times = (floor / target) ** 2 if target > 0 else math.inf
        much = f"more than {math.ceil(times)} times as much" if times < 100 else "far more"
        return f"The text is the limit, not the seeds: it would take {much} validation text."
    now = max(d.a.seeds, d.b.seeds)
    for seeds in range(now + 1, MOST_SEEDS):
        arms = (dataclasses.replace(arm, seeds=seeds) for arm in (d.a, d.b))
        if _half_width(d.text, d.blocks, *arms, d.confidence) < target:
            more = f"{seeds - now} more seed{'s' * (seeds - now > 1)}"
            return f"If the difference stays as it is, about {more} of each arm would settle it."
    return f"More than {MOST_SEEDS} seeds would be needed: take more validation text, or call it a tie."


def _seeds(names: tuple[str, str], d: Difference) -> str:
    if d.a.seeds == d.b.seeds:
        return f"{d.a.seeds} seeds of each"
    return f"{d.a.seeds} seeds of {names[0]} and {d.b.seeds} of {names[1]}"


def rounded(value: float, error: float) -> tuple[str, str]:
    """Both to the two leading digits of the error: ("0.0312", "0.0081")."""
    places = 4 if not error > 0 or not math.isfinite(error) else min(max(1 - math.floor(math.log10(error)), 2), 6)
    while places < 6 and value != error and f"{value:.{places}f}" == f"{error:.{places}f}":
        places += 1  # the interval must be seen to hold zero, or not to
    return f"{value:.{places}f}", f"{error:.{places}f}"
