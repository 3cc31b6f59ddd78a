"""The later sections of a comparison's report: models together, where they differ, one text under both, samples."""

import html

import numpy as np

from textgen import pages
from textgen.comparison import analysis, figures, statistics
from textgen.comparison.document import Document
from textgen.comparison.results import Results

PASSAGE = 700  # tokens of a shaded text


def apart(document: Document, results: Results) -> None:
    """Losses that do not belong beside those of single, static models."""
    blends = results.blends()
    if not blends:
        return
    number = lambda nats: f"{round(nats * results.scale, 4) + 0:.4f}"  # + 0: no -0.0000
    rows = [[b.models, b.kind, number(b.loss), number(b.gain), b.weights] for b in blends]
    document.only_html('<div class="apart">')
    document.heading("Apart from the comparison: together, and adapting")
    document.table(["models", "kind", results.unit, "gain", "weights"], rows)
    document.text(
        "These are other games than the one above: never put them beside single, static models. Ensemble: the mean of "
        "the seeds' probabilities; gain over their mean loss. Mixture: a weighted mean of two models' probabilities, "
        "by seed; each half of the validation text is read with the weights that are best on the other half; gain over "
        "the better of the two. A mixture that gains much is of models that know different things. Dynamic evaluation: "
        "the model goes on learning from the validation text as it reads it (Krause et al. 2018), each half with the "
        "rate that is best on the other.",
        "note",
    )
    document.only_html("</div>")


WHERE = {
    "position": (
        "Position in the window",
        "tokens of the window read before",
        "What a model gains from more context: a curve that goes on falling uses it.",
    ),
    "frequency": (
        "Frequency of the token",
        "times that the training text has it, at least",
        "By how often the training text has the token that came.",
    ),
    "repetition": (
        "Repetition",
        "longest n-gram completed that the window held before",
        "0: the token is new to the window. Large: a stretch that stood there before comes again, and a model that can "
        "look it up knows what follows.",
    ),
}


def where(document: Document, results: Results) -> None:
    if not results.finished:
        return
    document.heading("Where they differ")
    document.text(
        f"Each interval below stands by itself, at {results.record['rule']['confidence'] * 100:.3g} %: of many, a few "
        "leave out zero by chance. A pattern means more than a point.",
        "note",
    )
    leader, others = results.finished[0], results.finished[1:]
    groups = results.groups()
    for key, found in groups.items():
        title, axis, note = WHERE[key]
        losses = {arm.name: [float(arm.mean_nats[here].mean()) for here in found.values()] for arm in results.finished}
        apart = {arm.name: [results.against_leader(arm, here) for here in found.values()] for arm in others}
        split = {name: tuple(zip(*pairs, strict=True)) for name, pairs in apart.items()}
        document.only_html(f"<h3>{html.escape(title)}</h3>")
        document.markdown.append(f"### {title}")
        document.text(note, "note")
        document.figure(figures.groups(list(found), losses, split, results.colors, leader.name, axis), size=(9.5, 3.5))
        rows = [
            [
                label,
                f"{100 * here.mean():.1f} %",
                *(f"{losses[arm.name][i]:.3f}" for arm in results.finished),
                *(" \u00b1 ".join(statistics.rounded(*apart[arm.name][i])) for arm in others),
            ]
            for i, (label, here) in enumerate(found.items())
        ]
        header = [axis, "share", *losses, *(f"{arm.name} less {leader.name}" for arm in others)]
        document.only_html("<details><summary>the numbers</summary>")
        document.table(header, rows)
        document.only_html("</details>")
    if results.text is None:
        document.text(
            "The corpus could not be read again, or has changed since: nothing by token, and no shaded text.", "note"
        )


def shaded(document: Document, results: Results) -> None:
    if results.text is None or len(results.finished) < 2:
        return
    tokenizer, tokens, _ = results.text
    a, b = sorted(results.finished[:2], key=lambda arm: results.colors[arm.name])  # the cool shade is of the first
    gap = a.mean_nats - b.mean_nats
    length = min(PASSAGE, len(gap))
    low, high = analysis.most_different(gap, length)
    top = max(float(np.quantile(np.abs(gap), 0.99)), 1e-6)

    def passage(start: int) -> str:
        here = slice(start, start + length)
        pieces = [tokenizer.decode(tokens[i : i + 1]) for i in range(start + 1, start + length + 1)]
        tips = [
            f"{a.name} {x:.2f}, {b.name} {y:.2f}" for x, y in zip(a.mean_nats[here], b.mean_nats[here], strict=True)
        ]
        return pages.shaded(pieces, gap[here], top=top, two_sided=True, tips=tips)

    document.only_html(
        f"<h3>The same text under {html.escape(a.name)} and {html.escape(b.name)}</h3>",
        pages.paragraph(
            f"Validation text, shaded by who predicts each token better, mean over the seeds. Point at a token for its "
            f"nats. The full shade is {top:.2f} nats.",
            "note",
        ),
        pages.scale(f"{a.name} better", f"{b.name} better", two_sided=True),
        "<h4>The beginning</h4>",
        passage(0),
        f"<details><summary>where {html.escape(a.name)} gains most</summary>",
        passage(low),
        f"</details><details><summary>where {html.escape(b.name)} gains most</summary>",
        passage(high),
        "</details>",
    )


def samples(document: Document, results: Results) -> None:
    arms = [
        (arm, run)
        for arm in results.arms
        for run in arm.record["runs"][:]
        if run["status"] == "done" and run["samples"]
    ]
    first = {arm.name: run for arm, run in reversed(arms)}
    if not first:
        return
    first = {arm.name: first[arm.name] for arm in results.arms if arm.name in first}
    document.heading("Samples, side by side")
    seeds = {run["seed"] for run in first.values()}
    document.text(
        f"From the runs of seed {', '.join(map(str, sorted(seeds)))}, drawn with common random numbers: in all arms "
        "the same uniform number decides each token, so that what differs is the models' doing. Not selected."
    )
    keys = {(s["prompt"], s["temperature"]): None for run in first.values() for s in run["samples"]}
    for prompt, temperature in keys:
        document.only_html(f'<h4>temperature {temperature:g}</h4><div class="samples">')
        document.markdown.append(f"### Temperature {temperature:g}")
        for name, run in first.items():
            for s in run["samples"]:
                if (s["prompt"], s["temperature"]) == (prompt, temperature):
                    shown = f'<span class="given">{html.escape(prompt)}</span>{html.escape(s["text"])}'
                    document.only_html(f"<div><strong>{html.escape(name)}</strong><pre>{shown}</pre></div>")
                    quoted = "\n".join("    " + line for line in (prompt + s["text"]).split("\n"))
                    document.markdown.append(f"**{name}**\n\n{quoted}")
        document.only_html("</div>")
