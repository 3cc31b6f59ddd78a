"""The study's figures. Each draws on an empty matplotlib figure."""

import math
from typing import Any

import numpy as np

from textgen import pages
from textgen.study.measure import Study
from textgen.study.report import judged, title


def _axis(study: Study, axes: Any) -> list[float]:
    """Where the settings stand on the x axis."""
    axes.set_xlabel(study.knob or "setting, in the order of the table")
    return [s.value for s in study.settings] if study.knob else [1.0 + i for i in range(len(study.settings))]


def entropies(figure: Any, study: Study) -> None:
    axes = figure.subplots()
    x = _axis(study, axes)
    loss = study.losses.mean()
    error = 2 * study.losses.std() / math.sqrt(len(study.losses))
    axes.axhspan(loss - error, loss + error, color=pages.INK, alpha=0.1, linewidth=0)
    axes.axhline(loss, color=pages.INK, linestyle="--", linewidth=1.2)
    axes.annotate("loss on unseen text", (x[0], loss), (0, 4), textcoords="offset points", fontsize=8.5)
    for i, (name, label) in enumerate(
        [
            ("entropy", "entropy of the model"),
            ("entropy_drawn", "entropy drawn from"),
            ("surprise", "surprise under the model"),
        ]
    ):
        y = [s.numbers[name] for s in study.settings]
        axes.plot(x, y, color=pages.COLORS[(5, 0, 1)[i]], marker="o", markersize=4, label=label)
    spread = [2 * s.surprise.std() / math.sqrt(len(s.surprise)) for s in study.settings]
    y = np.array([s.numbers["surprise"] for s in study.settings])
    axes.fill_between(x, y - spread, y + spread, color=pages.COLORS[1], alpha=0.15, linewidth=0)
    match = study.matches.get("surprise")
    if match:
        axes.plot([match.value] * 2, [0, loss], color=pages.COLORS[1], linewidth=1.2, linestyle=":")
        axes.plot(match.value, loss, "o", color=pages.COLORS[1], markersize=9, markeredgecolor=pages.INK)
        axes.annotate(f"{match.value:.2f}", (match.value, 0), (5, 4), textcoords="offset points", color=pages.COLORS[1])
    axes.set_ylim(0)
    axes.set_ylabel(f"nats per {study.unit}")
    axes.set_title("How surprising the model's own text is to it")
    axes.legend(loc="upper left", fontsize=8.5)


def agreement(figure: Any, study: Study) -> None:
    """Where each measure is as in unseen text."""
    axes = figure.subplots()
    names = [
        "surprise",
        "entropy_drawn",
        "known_words",
        "distinct_1",
        "distinct_2",
        "zipf",
        "longest_copy",
        *judged(study),
    ]
    names = [name for name in names if name in study.matches][::-1]
    for i, name in enumerate(names):
        match = study.matches[name]
        color = pages.COLORS[1 if name == "surprise" else 0]
        if match.low is not None:
            axes.plot([match.low, match.high], [i, i], color=color, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(match.value, i, "o", color=color, markersize=7)
        axes.annotate(
            f"{match.value:.2f}", (match.value, i), (0, 7), textcoords="offset points", ha="center", fontsize=8.5
        )
    axes.set_yticks(range(len(names)), [title(name) for name in names])
    axes.set_ylim(-0.6, len(names) - 0.3)
    axes.set_xlim(study.settings[0].value, study.settings[-1].value)
    axes.set_xlabel(study.knob)
    axes.set_title("As in unseen text at")


def counted(figure: Any, study: Study) -> None:
    panels = [
        ("repetition",),
        ("distinct_1", "distinct_2", "distinct_3", "distinct_4"),
        ("known_words",),
        ("zipf",),
        ("longest_copy",),
    ]
    panels += [(name,) for name in judged(study)]
    match = study.matches.get("surprise")
    grid = figure.subplots(-(-len(panels) // 3), 3, squeeze=False).ravel()
    for axes, names in zip(grid, panels, strict=False):
        x = _axis(study, axes)
        for i, name in enumerate(names):
            color = pages.COLORS[i]
            label = name.replace("_", "-") if len(names) > 1 else None
            axes.plot(
                x, [s.numbers[name] for s in study.settings], color=color, marker="o", markersize=3.5, label=label
            )
            axes.axhline(study.unseen.numbers[name], color=color, linestyle="--", linewidth=1.2)
        if match:
            axes.axvline(match.value, color=pages.COLORS[1], linestyle=":", linewidth=1.2)
        axes.set_title("distinct-n" if len(names) > 1 else title(names[0]))
        if len(names) > 1:
            axes.legend(fontsize=8, loc="center right")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
