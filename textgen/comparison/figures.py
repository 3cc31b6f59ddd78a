"""The figures of a comparison's report; each draws on an empty matplotlib Figure (see `pages.figure`)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from textgen import pages
from textgen.comparison import statistics

HEADROOM = 0.6  # nats above the least loss of a sweep that its figure shows
Draw = Callable[[Any], None]


def color(i: int) -> str:
    return pages.COLORS[i % len(pages.COLORS)]


def losses(
    arms: Mapping[str, Any],
    intervals: Mapping[str, float],
    colors: Mapping[str, int],
    baselines: Mapping[str, float],
    unit: str,
) -> Draw:
    """Every seed a dot, the mean with its interval, and a line for each baseline.

    Args:
      arms: losses by seed.
      intervals: half a width for each arm; NaN for none.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, (name, seeds) in enumerate(arms.items()):
            mean, wide = float(np.mean(seeds)), intervals[name]
            if math.isfinite(wide):
                axes.plot([mean - wide, mean + wide], [place, place], color=color(colors[name]), lw=7, alpha=0.25)
            axes.plot(seeds, [place] * len(seeds), "o", color=color(colors[name]), ms=6, alpha=0.8, mew=0)
            axes.plot([mean], [place], "|", color=pages.INK, ms=16, mew=1.6)
        ends = [np.mean(arms[name]) + sign * wide for name, wide in intervals.items() for sign in (-1, 1)]
        _frame_on(
            axes,
            [*(loss for seeds in arms.values() for loss in seeds), *filter(math.isfinite, ends)],
            baselines.values(),
        )
        low, high = axes.get_xlim()
        for i, (name, loss) in enumerate(sorted(baselines.items(), key=lambda item: item[1])):
            if low <= loss <= high:
                axes.axvline(loss, color=pages.INK, lw=1, ls=(0, (4, 3)), alpha=0.6)
                # Names stand at two heights and on the page's own ground: neighbours do not cover each other.
                axes.annotate(
                    name,
                    (loss, 1),
                    (3, -3 - 12 * (i % 2)),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    va="top",
                    bbox={"facecolor": pages.PAPER, "edgecolor": "none", "pad": 0.5},
                )
        axes.set_yticks(range(len(arms)), list(arms))
        axes.set_ylim(len(arms) - 0.4, -0.9)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"loss, {unit} (left is better)")

    return draw


def _frame_on(axes: Any, values: Sequence[float], others: Any) -> None:
    """Shows all values, and of the others those that lie near."""
    low, high = min(values), max(values)
    room = max(high - low, 0.02 * abs(high), 1e-3)
    near = [v for v in others if low - 3 * room < v < high + 3 * room]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.12 * (high - low) + 0.05 * room
    axes.set_xlim(low - margin, high + margin)


def curves(arms: Mapping[str, Any], colors: Mapping[str, int], unit: str) -> Draw:
    """A thin line for each seed: the validation loss by step.

    Args:
      arms: for each the curves of its seeds, [[step, loss], ...].
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, seeds in arms.items():
            for i, curve in enumerate(seeds):
                steps, nats = zip(*curve, strict=True)
                axes.plot(
                    steps,
                    nats,
                    color=color(colors[name]),
                    lw=1.3,
                    alpha=0.75,
                    label=name if i == 0 else None,
                    marker="." if len(steps) < 3 else None,
                )
        last = [curve[-1][1] for seeds in arms.values() for curve in seeds if math.isfinite(curve[-1][1])]
        first = [curve[0][1] for seeds in arms.values() for curve in seeds if math.isfinite(curve[0][1])]
        if last and max(first) > min(last):  # the end is what matters
            axes.set_ylim(min(last) - 0.08 * (max(first) - min(last)), min(max(first), min(last) + 1.2) * 1.02)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(f"loss, {unit}")
        axes.legend()

    return draw


def tuning(
    arms: Mapping[str, Any],
    initial: Mapping[str, float],
    colors: Mapping[str, int],
) -> Draw:
    """Left: the loss of every trial, what is far off at the top. Right: the least loss to expect among k trials.

    Args:
      arms: loss of each seed by learning rate; NaN where one diverged.
      initial: the loss before training; a diverged trial stands there.
    """

    every = [loss for name, some in arms.items() for losses in some.values() for loss in (*losses, initial[name])]
    top = float(np.nanmin(every)) + HEADROOM

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for name, trials in arms.items():
            filled = {rate: np.fmin(np.asarray(some, float), initial[name]) for rate, some in sorted(trials.items())}
            for rate, some in filled.items():
                left.plot(
                    [rate] * len(some), np.fmin(some, top), "o", color=color(colors[name]), ms=4, alpha=0.6, mew=0
                )
            means = [min(some.mean(), top) for some in filled.values()]
            left.plot(list(filled), means, color=color(colors[name]), label=name)
            best = statistics.best_of_k(np.concatenate(list(filled.values())))
            right.plot(
                np.arange(1, len(best) + 1),
                best,
                color=color(colors[name]),
                marker=".",
                label=name,
                drawstyle="default",
            )
        left.set_xscale("log")
        rates = sorted({rate for losses in arms.values() for rate in losses})
        left.set_xticks(rates, [f"{rate:g}" for rate in rates])
        left.minorticks_off()
        left.set_ylim(top=top + 0.03)
        left.set_title("every trial, and the mean at each rate")
        left.set_xlabel("learning rate")
        left.set_ylabel("loss on the end of the training text, nats per token")
        right.set_title("expected best of k trials")
        right.set_xlabel("k trials")
        right.xaxis.get_major_locator().set_params(integer=True)
        left.legend()

    return draw


def groups(
    labels: Sequence[str],
    losses: Mapping[str, Any],
    differences: Mapping[str, Any],
    colors: Mapping[str, int],
    leader: str,
    axis: str,
) -> Draw:
    """Left: the loss of each group of predictions. Right: how much more it is than the leader's, with intervals."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        places = np.arange(len(labels))
        for name, nats in losses.items():
            left.plot(places, nats, color=color(colors[name]), marker="o", ms=4, mew=0, label=name)
        shift = np.linspace(-0.15, 0.15, max(len(differences), 1)) if len(differences) > 1 else [0.0]
        for (name, (mean, wide)), aside in zip(differences.items(), shift, strict=False):
            right.errorbar(
                places + aside, mean, yerr=wide, color=color(colors[name]), fmt="o", ms=5, lw=1.6, capsize=3, label=name
            )
        right.axhline(0, color=color(colors[leader]), lw=2)
        left.set_title("loss, nats per token")
        right.set_title(f"loss less that of {leader}; above the line: worse")
        for axes in (left, right):
            axes.set_xticks(places, labels, fontsize=8)
            axes.set_xlabel(axis)
        left.legend()

    return draw
