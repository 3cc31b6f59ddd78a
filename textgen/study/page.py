"""The study as a page that people want to look at."""

import html
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from textgen import checkpoints, logs, pages
from textgen.config import require
from textgen.study import figures
from textgen.study.measure import METRICS, Study, Texts
from textgen.study.report import answer, as_json, as_table, named

SHOWN = 4  # texts of each setting on the page; all are in the JSON
LIKELIEST = 128  # tokens at a place of the passage that the sliders reweight
TOP = 5.0  # nats: the full shade

STYLE = """
.answer { font-size: 1.35rem; line-height: 1.4; max-width: 50rem; margin: .8rem 0; }
.answer b { color: var(--c1); white-space: nowrap; }
.pair { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 1.5rem; align-items: start; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 1rem;
  width: min(95vw, 1540px); margin: 1rem 0 1rem 50%; transform: translateX(-50%); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.card h3 { margin: 0; font-size: 1rem; display: flex; justify-content: space-between; gap: .5rem; }
.card h3 small { font-weight: 600; color: var(--c1); } .card.unseen h3 small { color: var(--soft); }
.card p { font-size: .82rem; margin: .15rem 0 .3rem; } .card.near { border: 2px solid var(--c1); }
.card.unseen { border-style: dashed; } .card .shaded { font-size: .76rem; line-height: 1.55; }
button { font: inherit; font-size: .85rem; color: var(--ink); background: var(--card); cursor: pointer;
  border: 1px solid var(--line); border-radius: 6px; padding: .25rem .7rem; margin-right: .3rem; }
button[aria-pressed=true] { border-color: var(--c0); color: var(--c0); } button:hover { border-color: var(--soft); }
.next { display: grid; grid-template-columns: minmax(0, 6fr) minmax(0, 5fr); gap: 2rem; align-items: start; }
#passage { cursor: pointer; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; }
#passage .chosen { outline: 2px solid var(--c0); border-radius: 2px; }
.sliders { display: grid; grid-template-columns: max-content 1fr 3rem; gap: .3rem .8rem; align-items: center; }
.sliders input { width: 100%; accent-color: var(--c0); } output { font-variant-numeric: tabular-nums; }
.readout { display: grid; grid-template-columns: 1fr max-content; gap: .1rem 1rem; font-size: .9rem; max-width: 30rem;
  font-variant-numeric: tabular-nums; margin: .8rem 0; }
.readout span:nth-child(even) { text-align: right; font-weight: 600; }
.bar { display: grid; grid-template-columns: 4.5rem 1fr 4rem; gap: .6rem; align-items: center; font-size: .82rem; }
.bar[hidden] { display: none; } .bar b { text-align: right; font-weight: 500; overflow: hidden; white-space: nowrap; }
.bar b, .before { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.bar div { position: relative; height: 1.05rem; } .bar i, .bar u { position: absolute; left: 0; }
.bar i { top: 1px; bottom: 1px; background: var(--c0); opacity: .85; border-radius: 2px; }
.bar u { top: 0; bottom: 0; border-right: 2px solid var(--ink); opacity: .45; }
.bar em { font-style: normal; color: var(--soft); font-variant-numeric: tabular-nums; }
.bar.came b { color: var(--c1); font-weight: 700; } .bar.came i { background: var(--c1); }
.bar.removed b { text-decoration: line-through; color: var(--soft); }
table { font-size: .82rem; } th, td { padding: .3rem .5rem; }
@media (max-width: 800px) { .pair, .next { grid-template-columns: 1fr; } }
"""


def publish(study: Study, page: Path, board: Path) -> None:
    """Writes the page, the JSON beside it, and TensorBoard's curves and texts to a folder of their own."""
    checkpoints.write_json(page.with_suffix(".json"), as_json(study))
    page.write_text(render(study), encoding="utf-8")
    shutil.rmtree(board, ignore_errors=True)  # an earlier study
    board.mkdir()
    writer = logs.Writer(board, 0)
    steps = [i if study.knob is None else round(100 * s.value) for i, s in enumerate(study.settings)]
    if len(set(steps)) < len(steps):  # TensorBoard's axis holds whole numbers, and small ones would be one
        steps = list(range(len(steps)))
    for step, setting in zip(steps, study.settings, strict=True):
        writer.scalars(step, {f"explore/{name}": value for name, value in setting.numbers.items()})
        writer.text(
            step, f"explore/{setting.name}", "\n\n".join(map("".join, zip(setting.prompts, setting.texts, strict=True)))
        )
    writer.close()


def check_page(page: Path) -> None:
    """Raises UserError where a page cannot be written; asked before the work."""
    require(page.suffix == ".html", f"--output is the page, and ends in .html, got '{page}'.")
    require(page.parent.is_dir(), f"There is no folder '{page.parent}' for the page '{page.name}'.")


def render(study: Study) -> str:
    """The page."""
    first, *others = answer(study)
    unit, near = study.unit, study.nearest()
    knob = study.knob or "setting"
    header, rows = as_table(study)
    texts = "".join(
        f'<button class="text" data-text="{i}" aria-pressed="{str(i == 0).lower()}">text {i + 1}</button>'
        for i in range(min(SHOWN, len(study.settings[0].texts)))
    )
    cards = [_card(study, setting, i == near) for i, setting in enumerate(study.settings)]
    cards.insert(near + 1, _card(study, study.unseen, False))
    match = study.matches.get("surprise")
    return pages.page(
        f"Which {knob}?",
        f'<p class="answer">{_emphasised(first, match)}</p>',
        *(pages.paragraph(line) for line in others),
        f'<div class="pair">{pages.figure(lambda f: figures.entropies(f, study), size=(6.6, 3.9))}'
        f"{pages.figure(lambda f: figures.agreement(f, study), size=(4.4, 3.9)) if study.matches else ''}</div>",
        pages.section(
            f"The texts, each {unit} shaded by its surprise",
            f"<p>{texts}</p>",
            pages.scale("certain", f"{TOP:g} nats or more"),
            f'<div class="cards">{"".join(cards)}</div>',
        ),
        pages.section(
            f"The next {unit}, reweighted",
            pages.paragraph(
                f"Unseen text, as the model reads it. Click a {unit}, or walk with the arrow keys, and move the "
                "sliders: filled bars are what is drawn from, the lines mark the model's own distribution. "
                f"At each place the {LIKELIEST} likeliest are reweighted, where the vocabulary is larger than that."
            ),
            _sliders(study),
        ),
        pages.section(
            "What else changes",
            pages.paragraph("Dashed: as much unseen text, cut to the same length.", "note"),
            pages.figure(lambda f: figures.counted(f, study), size=(11, 5.6)),
        ),
        pages.section(
            "All numbers",
            pages.table(header, rows, marked=[near]),
            "".join(pages.paragraph(f"{title}: {text}.", "note") for title, text in METRICS.values()),
            pages.paragraph("Made with " + ", ".join(f"{k} {v}" for k, v in study.recipe.items()) + ".", "note"),
        ),
        style=STYLE,
        script=f"const PASSAGE = {_passage(study)};\n" + Path(__file__).with_suffix(".js").read_text(encoding="utf-8"),
    )


def _emphasised(line: str, match: Any) -> str:
    """The first sentence with its number set apart."""
    number = f"{match.value:.2f}" if match else ""
    head, found, tail = line.partition(f" {number}") if match else (line, "", "")
    name = head.rsplit(" ", 1)
    return (
        f"{html.escape(name[0])} <b>{html.escape(name[1] + found)}</b>{html.escape(tail)}"
        if match
        else html.escape(line)
    )


def _card(study: Study, texts: Texts, near: bool) -> str:
    unseen = texts is study.unseen
    n = texts.numbers
    blocks = [
        f'<div data-text="{i}"{" hidden" * (i > 0)}>'
        + pages.shaded(
            texts.pieces[i],
            texts.nats[i],
            top=TOP,
            given=texts.prompts[i],
            tips=[f"p = {math.exp(-x):.3g}, {x:.2f} nats" for x in texts.nats[i]],
        )
        + "</div>"
        for i in range(min(SHOWN, len(texts.texts)))
    ]
    name = "unseen text" if unseen else named(study, texts)
    badge = "from the corpus" if unseen else "nearest to unseen" if near else ""
    facts = f"{n['surprise']:.2f} nats · {100 * n['known_words']:.0f} % known words"
    return (
        f'<div class="card{" near" * near}{" unseen" * unseen}"><h3>{html.escape(name)} <small>{badge}</small></h3>'
        f'<p class="note">{html.escape(facts)}</p>{"".join(blocks)}</div>'
    )


def _sliders(study: Study) -> str:
    slider = lambda name, low, high, step, value: (
        f'<label for="{name}">{name}</label><input type="range" id="{name}" min="{low}" max="{high}" step="{step}" '
        f'value="{value}"><output id="{name}_now" for="{name}">{value}</output>'
    )
    presets = [("the model's own", "1 1 0"), ("T 0.5", "0.5 1 0"), ("top-p 0.9", "1 0.9 0"), ("min-p 0.1", "1 1 0.1")]
    match = study.matches.get("surprise")
    if match and study.knob == "temperature":
        presets.insert(1, (f"matching T {match.value:.2f}", f"{match.value:.2f} 1 0"))
    buttons = "".join(f'<button class="preset" data-values="{values}">{name}</button>' for name, values in presets)
    readout = lambda *pairs: (
        '<div class="readout">' + "".join(f'<span>{name}</span><span id="{i}"></span>' for name, i in pairs) + "</div>"
    )
    return (
        '<div class="next"><div><div class="shaded" id="passage" tabindex="0"></div>'
        + readout(
            ("loss of this passage at these settings, nats", "all_loss"),
            ("entropy drawn from, mean, nats", "all_entropy"),
            (f"{study.unit}s of it that became impossible", "all_impossible"),
        )
        + f'</div><div><p>{buttons}</p><div class="sliders">{slider("temperature", 0, 2, 0.01, 1)}'
        + f"{slider('top_p', 0.05, 1, 0.01, 1)}{slider('min_p', 0, 0.5, 0.01, 0)}</div>"
        + readout(
            ("entropy, nats", "entropy"),
            ("entropy of the model", "entropy_model"),
            (f"{study.unit}s left possible", "kept"),
            ("mass under the model that is kept", "mass"),
        )
        + '<p class="note">after <span class="before" id="before"></span></p><div id="bars"></div></div></div>'
    )


def _passage(study: Study) -> str:
    """The passage for the script: at each place the likeliest tokens, and the one that came."""
    p = study.passage
    places = []
    for token, costs in zip(p.tokens, np.round(-1000 * p.log_probability).astype(int), strict=True):
        ids = np.argsort(costs, kind="stable")[:LIKELIEST]
        ids = ids if token in ids else np.append(ids[:-1], token)
        places.append([ids.tolist(), costs[ids].tolist()])
    used = {i for ids, _ in places for i in ids}
    surprises = [costs[ids.index(token)] for token, (ids, costs) in zip(p.tokens.tolist(), places, strict=True)]
    data = {
        "pieces": p.pieces,
        "tokens": p.tokens.tolist(),
        "places": places,
        "vocabulary": [text if i in used else "" for i, text in enumerate(p.vocabulary)],
        "top": TOP,
        "start": int(np.argmin(np.abs(np.array(surprises) - 2000))),  # a place with something to see
    }
    return json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
