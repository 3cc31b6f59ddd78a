"""The study in words, as a table, as JSON."""

import math
from collections.abc import Sequence
from typing import Any

from textgen.study.measure import METRICS, Study, Texts


def as_json(study: Study) -> dict[str, Any]:
    """Every number and text."""
    clean = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
    texts = lambda t: {
        "name": t.name,
        "value": clean(t.value),
        **{name: clean(value) for name, value in t.numbers.items()},
        "samples": [{"prompt": p, "text": x} for p, x in zip(t.prompts, t.texts, strict=True)],
    }
    return {
        "recipe": study.recipe,
        "knob": study.knob,
        "loss": float(study.losses.mean()),
        "matches": {name: vars(match) for name, match in study.matches.items()},
        "validation": texts(study.unseen),
        "settings": [texts(setting) for setting in study.settings],
    }


def as_table(study: Study) -> tuple[list[str], list[list[Any]]]:
    """(header, rows): a row for each setting, and for unseen text."""
    names = [name for name in METRICS if name not in {"distinct_3", "distinct_4"}] + judged(study)
    rows = [[t.name, *(t.numbers.get(name) for name in names)] for t in [*study.settings, study.unseen]]
    return ["setting", *(title(name) for name in names)], rows


def as_text(study: Study) -> str:
    """The most telling numbers and the answer, for a terminal."""
    names = ["surprise", "entropy_drawn", "repetition", "distinct_1", "known_words", "longest_copy", *judged(study)]
    rows = [["", *(name.split("/")[-1].replace("_", " ") for name in names)]]
    shown = lambda texts, name: f"{texts.numbers[name]:.3f}" if name in texts.numbers else "-"
    rows += [[t.name, *(shown(t, name) for name in names)] for t in [*study.settings, study.unseen]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, "", *answer(study)])


def answer(study: Study) -> list[str]:
    """The study in a few sentences; the first one answers."""
    loss, unit = study.losses.mean(), study.unit
    lines = []
    match = study.matches.get("surprise")
    if match:
        lines.append(
            f"At {study.knob} {match.value:.2f} the model's own text is as surprising to it as unseen text is, "
            f"{loss:.2f} nats per {unit} (95 % interval {match.low:.2f} to {match.high:.2f})."
        )
    else:
        near = study.settings[study.nearest()]
        lines.append(
            f"{near.name} comes nearest to unseen text: {near.numbers['surprise']:.2f} nats per {unit} "
            f"against {loss:.2f}; no two settings of one number lie on both sides of it."
        )
    dull = min(study.settings, key=lambda s: s.numbers["surprise"])
    wild = max(study.settings, key=lambda s: s.numbers["surprise"])
    n, d, w = study.unseen.numbers, dull.numbers, wild.numbers
    below = [f"its surprise is {d['surprise']:.2f} nats"]
    if d["distinct_1"] < n["distinct_1"]:
        below.append(
            f"of 100 words {100 * d['distinct_1']:.0f} are different ({100 * n['distinct_1']:.0f} in unseen text)"
        )
    if d["repetition"] > n["repetition"]:
        below.append(
            f"{100 * d['repetition']:.1f} % of its runs of four words come again ({100 * n['repetition']:.1f} %)"
        )
    lines.append(f"Below, text grows dull and repeats itself. At {named(study, dull)} {_listed(below)}.")
    above = [f"its surprise is {w['surprise']:.2f} nats"]
    if w["known_words"] < n["known_words"]:
        above.append(
            f"{100 * w['known_words']:.0f} % of its words are in the training text "
            f"({100 * n['known_words']:.0f} % of unseen text's)"
        )
    lines.append(f"Above, it makes up words. At {named(study, wild)} {_listed(above)}.")
    others = {n: study.matches[n].value for n in ("known_words", "distinct_1", *judged(study)) if n in study.matches}
    if match and any(not match.low <= value <= match.high for value in others.values()):
        places = _listed([f"{title(name)} at {value:.2f}" for name, value in others.items()])
        lines.append(f"Other measures are as in unseen text elsewhere: {places}. Choose by what the text is for.")
    plain = next((s for s in study.settings if s.name == "temperature(1)"), None)
    if plain:
        own, error = plain.numbers["entropy"], study.losses.std() / math.sqrt(len(study.losses))
        if abs(own - loss) > 3 * error:
            lines.append(
                f"At temperature 1 the model's entropy along its own text is {own:.2f} nats, its loss {loss:.2f}: "
                + (
                    "it is surer than it is right."
                    if own < loss
                    else "it is less sure of its own text than of the corpus."
                )
            )
    return lines


def named(study: Study, texts: Texts) -> str:
    return f"{study.knob} {texts.value:g}" if study.knob else texts.name


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def judged(study: Study) -> list[str]:
    return [name for name in study.unseen.numbers if name.startswith("judge/")]


def title(name: str) -> str:
    return METRICS[name][0] if name in METRICS else f"loss under {name.removeprefix('judge/')}"
