"""The study in words, as a table, as JSON."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

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
    """The study in a few sentences; the first one answers. What the numbers do not show is not said."""
    loss, unit, unseen = float(study.losses.mean()), study.unit, study.unseen.numbers
    percent = lambda share, digits=0: f"{100 * share:.{digits}f} %"
    surprises = [s.numbers["surprise"] for s in study.settings]
    match = study.matches.get("surprise")
    if match:
        first = (
            f"At {study.knob} {match.value:.2f} the model's own text is as surprising to it as unseen text is, "
            f"{loss:.2f} nats per {unit} (95 % interval {match.low:.2f} to {match.high:.2f})."
        )
    else:
        near = study.nearest()
        low, high = max(surprises) < loss, min(surprises) > loss
        side = ("; all settings lie below it" * low + "; all settings lie above it" * high) * (len(surprises) > 1)
        first = (
            f"{study.settings[near].name} comes nearest to unseen text: the model's surprise is "
            f"{surprises[near]:.2f} nats per {unit} against {loss:.2f}{side}."
        )
    lines = [first]
    dull, wild = (study.settings[int(i)] for i in (np.argmin(surprises), np.argmax(surprises)))
    n, facts = dull.numbers, []
    if n["distinct_1"] < unseen["distinct_1"]:
        shares = percent(n["distinct_1"]), percent(unseen["distinct_1"])
        facts.append(f"{shares[0]} of its words are different ({shares[1]} in unseen text)")
    if n["repetition"] > unseen["repetition"]:
        shares = percent(n["repetition"], 1), percent(unseen["repetition"], 1)
        facts.append(f"{shares[0]} of its runs of four words come again ({shares[1]})")
    if len(surprises) > 1 and min(surprises) < loss and facts:
        lines.append(f"Below, text grows dull: at {named(study, dull)}, {min(surprises):.2f} nats, {_listed(facts)}.")
    n = wild.numbers
    if len(surprises) > 1 and max(surprises) > loss and n["known_words"] < unseen["known_words"]:
        lines.append(
            f"Above, it makes up words: at {named(study, wild)}, {max(surprises):.2f} nats, "
            f"{percent(n['known_words'])} of its words are in the training text "
            f"({percent(unseen['known_words'])} of unseen text's)."
        )
    names = [name for name in ("known_words", "distinct_1", *judged(study)) if name in study.matches]
    others = [(name, study.matches[name].value) for name in names]
    if match and any(not match.low <= value <= match.high for _, value in others):
        places = _listed([f"{title(name)} at {value:.2f}" for name, value in others])
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
