"""The report of a comparison: report.html and report.md, from the results in its folder."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from textgen import pages
from textgen.comparison import details, figures, statistics
from textgen.comparison.document import Document, listed
from textgen.comparison.results import Results

BUDGETS = {
    "parameters": "the same number of parameters",
    "flops": "the same training FLOPs",
    "tokens": "the same number of training tokens",
    "seconds": "the same training time",
}
STYLE = """
.verdict { border-left: 5px solid var(--c0); background: var(--card); padding: .9rem 1.2rem; margin: 1rem 0;
  border-radius: 0 8px 8px 0; box-shadow: 0 1px 3px rgb(0 0 0 / .08); font-size: 1.15rem; }
.verdict.better { border-color: #2b8a5b; } .verdict.unresolved { border-color: #c8851b; }
.verdict.none { border-color: #b3382c; } .verdict p { max-width: none; }
.apart { background: var(--card); border: 1px dashed var(--line); border-radius: 8px; padding: .2rem 1.2rem 1rem; }
.apart h2 { margin-top: 1rem; }
.samples { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr));
  margin: .6rem 0 1.4rem; }
.samples > div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .9rem; }
.samples pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; line-height: 1.45;
  margin: .3rem 0 0; }
.command { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem;
  overflow-x: auto; font-size: .86rem; }
summary { cursor: pointer; color: var(--soft); margin: .5rem 0; }
"""


def write(folder: str | Path) -> list[str]:
    """Writes report.html (which loads nothing) and report.md beside results.json; returns the verdicts.

    Raises:
      UserError: no results there, or damaged ones.
    """
    results = Results(folder)
    document = Document()
    parts = [_verdict, _arms, _losses, _pairs, _curves, _tuning]
    parts += [details.apart, details.where, details.shaded, details.samples, _lost, _protocol]
    for part in parts:
        part(document, results)
    title = results.record["title"]
    page = pages.page(title, *document.html, style=STYLE)
    (results.folder / "report.html").write_text(page, encoding="utf-8")
    (results.folder / "report.md").write_text(
        f"# {title}\n\n" + "\n\n".join(document.markdown) + "\n", encoding="utf-8"
    )
    return [verdict.text for verdict in results.verdicts.values()]


def _verdict(document: Document, results: Results) -> None:
    names, corpus, record = [arm.name for arm in results.arms], results.record["corpus"], results.record
    both = "both" if len(names) == 2 else "all"
    document.text(
        f"Which predicts {corpus['name']} better, {listed(names, 'or')}, when {both} have "
        f"{BUDGETS[record['budget']['kind']]}?",
        "lead",
    )
    leader = results.finished[0].name if results.finished else None
    for (a, _), verdict in results.verdicts.items():
        if a == leader or leader is None:
            document.only_html(f'<div class="verdict {verdict.outcome}">{pages.paragraph(verdict.text)}</div>')
            document.markdown.append(f"**{verdict.text}**")
    lost = [
        f"{len(arm.unfinished())} of {len(arm.record['runs'])} of {arm.name}"
        for arm in results.arms
        if arm.unfinished()
    ]
    if lost:
        document.text(
            f"Not every run finished ({'; '.join(lost)}): the verdict is on those that did. They are listed below."
        )
    if results.finished and results.best_baseline:
        best = results.best_baseline
        below = [arm.name for arm in results.finished if arm.loss < best.loss]
        document.text(
            f"For scale: {best.name}, which counts and learns no weights, reaches {best.loss * results.scale:.4f} on "
            f"this text; {listed(below) or 'no arm'} {'do' if len(below) > 1 else 'does'} better."
        )
    if results.finished:
        loss = results.finished[0].loss * results.scale
        each = results.unit.split()[-1]
        document.text(
            f"The loss is how surprised a model is by text that it was not trained on, in {results.unit}: lower is "
            f"better. {loss:.3f} is the surprise of guessing among {math.exp(loss):.2f} equally likely {each}s each "
            f"time, and 0.01 less makes that 1 % fewer. The \u00b1 says how far chance reaches: in "
            f"{results.confidence * 100:.3g} of 100 such comparisons, with other seeds and other "
            "text of the same kind, the true difference lies within it.",
            "note",
        )


def _amount(value: float | int | None) -> str | None:
    """12,345 or 1.23e+12, for people."""
    if value is None:
        return None
    return f"{value:,.0f}" if value < 1e10 else f"{value:.3g}"


def _arms(document: Document, results: Results) -> None:
    document.heading("The arms, and what each was given")
    held = results.record["budget"]["kind"]
    columns = {
        "parameters": "parameters",
        "non_embedding_parameters": "without embedding",
        "train_flops": "training FLOPs",
        "tokens": "training tokens",
        "seconds_per_run": "seconds per run",
    }
    mark = {"parameters": "parameters", "flops": "train_flops", "tokens": "tokens", "seconds": "seconds_per_run"}[held]
    header = [title + (" (held equal)" if key == mark else "") for key, title in columns.items()]
    mfu = any(arm.record.get("mfu") for arm in results.arms)
    rows = []
    for arm in results.arms:
        r = arm.record
        seconds = None if r["seconds_per_run"] is None else f"{r['seconds_per_run']:,.3g}"
        row = [r["name"], *(_amount(r[key]) for key in list(columns)[:-1]), seconds]
        row += [f"{100 * r['mfu']:.1f} %" if r.get("mfu") else None] * mfu
        row += [str(r["width"]), f"{r['steps']:,}", _rate(r["learning_rate"]), f"{len(arm.seeds)} of {len(r['runs'])}"]
        rows.append(row)
    tail = ["MFU"] * mfu + ["width", "steps", "learning rate", "runs finished"]
    document.table(["arm", *header, *tail], rows)
    document.table(
        ["arm", "what sets it apart"],
        [
            [arm.name, ", ".join(f"{k}={v}" for k, v in arm.record["overrides"].items()) or "nothing"]
            for arm in results.arms
        ],
    )
    uneven = []
    for key, title in columns.items():
        values = [arm.record[key] for arm in results.arms if arm.record[key]]
        if key != "non_embedding_parameters" and values and max(values) > 1.1 * min(values):
            most, least = (next(a.name for a in results.arms if a.record[key] == f(values)) for f in (max, min))
            uneven.append(f"{title}: {most} took {max(values) / min(values):.2g} times what {least} took")
    if uneven:
        document.text("Not equal here, and worth a thought: " + "; ".join(uneven) + ".", "note")


def _rate(value: float | int | None) -> str | None:
    return None if value is None else f"{value:g}"


def _losses(document: Document, results: Results) -> None:
    if not results.finished:
        return
    document.heading("Losses")
    rule, scale = results.record["rule"], results.scale
    rows, intervals = [], {}
    for arm in results.finished:
        losses = [loss * scale for loss in arm.losses]
        wide = statistics.seed_interval(losses, rule["confidence"])
        intervals[arm.name] = wide
        low, high = statistics.text_interval(arm.mean_nats * scale, block=rule["block"], confidence=rule["confidence"])
        mean = arm.loss * scale
        rows.append(
            [
                arm.name,
                f"{mean:.4f}",
                f"\u00b1 {wide:.4f}" if math.isfinite(wide) else None,
                f"{low:.3f} to {high:.3f}",
                f"{mean / math.log(2):.4f}",
                f"{math.exp(mean):.3f}",
                ", ".join(f"{s}: {loss:.4f}" for s, loss in zip(arm.seeds, losses, strict=True)),
            ]
        )
    for b in results.baselines:
        loss = b.loss * scale
        low, high = statistics.text_interval(b.nats * scale, block=rule["block"], confidence=rule["confidence"])
        rows.append(
            [
                b.name,
                f"{loss:.4f}",
                None,
                f"{low:.3f} to {high:.3f}",
                f"{loss / math.log(2):.4f}",
                f"{math.exp(loss):.3f}",
                "no gradient, no seed",
            ]
        )
    header = ["model", results.unit, "over seeds", "over the text", "bits", "perplexity", "by seed"]
    colors, baselines = results.colors, {b.name: b.loss * scale for b in results.baselines}
    by_arm = {arm.name: [loss * scale for loss in arm.losses] for arm in results.finished}
    document.figure(
        figures.losses(by_arm, intervals, colors, baselines, results.unit),
        size=(9.5, 1.3 + 0.55 * len(by_arm)),
        caption="A dot for each seed, a stroke at their mean, a band for its interval over the seeds.",
    )
    document.table(header, rows)
    document.text(
        "Over seeds: Student's t on this text; with few seeds it is wide, and weak evidence of anything but that. "
        "Over the text: a bootstrap of blocks. It is wide because some passages are hard for every model: do not "
        "compare two models by it. The verdict does not: it pairs the arms block by block.",
        "note",
    )


def _pairs(document: Document, results: Results) -> None:
    if len(results.arms) < 3:
        return
    document.heading("Every pair")
    document.table(["pair", "verdict"], [[f"{a} and {b}", v.text] for (a, b), v in results.verdicts.items()])
    document.text(
        f"All {len(results.verdicts)} intervals hold together with {results.record['rule']['confidence'] * 100:.3g} % "
        f"(Bonferroni: {results.confidence * 100:.4g} % each).",
        "note",
    )


def _curves(document: Document, results: Results) -> None:
    finite = lambda curve: [(s, x) for s, x in curve if x is not None and math.isfinite(x)]
    arms = {a.name: [c for run in a.record["runs"] if (c := finite(run["curve"]))] for a in results.arms}
    arms = {name: seeds for name, seeds in arms.items() if seeds}
    if arms:
        document.heading("Learning curves")
        document.figure(
            figures.curves(arms, results.colors, "nats per token"), caption="Validation loss; a line for each seed."
        )


def _tuning(document: Document, results: Results) -> None:
    trials: dict[str, dict[float, list[float]]] = {}
    initial: dict[str, float] = {}
    for arm in results.arms:
        for row in arm.record["tuning"]:
            loss = math.nan if row["dev_loss"] is None else row["dev_loss"]
            trials.setdefault(arm.name, {}).setdefault(row["learning_rate"], []).append(loss)
            initial[arm.name] = row["initial_loss"]
    if not trials:
        return
    document.heading("How they were tuned")
    document.text(
        f"Every arm had the same trials. They were judged on a slice cut from the end of the training text "
        f"({100 * results.record['dev_fraction']:.3g} %), never on the validation text."
    )
    document.figure(figures.tuning(trials, initial, results.colors), size=(9.5, 3.8))
    rates = sorted({rate for some in trials.values() for rate in some})
    shown = lambda some: "diverged" if not some or math.isnan(np.mean(some)) else f"{np.mean(some):.4f}"
    rows = []
    for name, some in trials.items():
        counts = [np.fmin(loss, initial[name]) for losses in some.values() for loss in losses]
        best = statistics.best_of_k(counts)
        spread = statistics.rate_sensitivity(some, initial[name])
        rows.append(
            [name, *(shown(some.get(rate, [])) for rate in rates), f"{spread:.4f}", f"{best[0]:.4f}", f"{best[-1]:.4f}"]
        )
    document.table(
        ["arm", *(f"rate {rate:g}" for rate in rates), "sensitivity", "one trial", f"best of {len(counts)}"],
        rows,
        caption="Loss on that slice, nats per token; mean over the seeds of the trial.",
    )
    at_edge = [name for name, some in trials.items() if len(some) > 2 and _best_rate(some) in (min(some), max(some))]
    if at_edge:
        document.text(
            f"The best rate of {', '.join(at_edge)} is the least or the largest that was tried: beyond it may lie a "
            "better one. A wider grid would say (compare.learning_rates).",
        )
    document.text(
        "Sensitivity: how much the loss suffers, on average over these rates, for not taking the best one "
        "(Wortsman et al. 2023). One trial, best of k: the least loss to expect from so many of these trials in "
        "random order (Tang et al. 2020). An arm that is better only after many trials is better tuned, not better.",
        "note",
    )


def _best_rate(trials: Mapping[float, Sequence[float]]) -> float:
    means = {rate: np.mean(losses) for rate, losses in trials.items() if losses and not np.isnan(np.mean(losses))}
    return min(means, key=means.__getitem__, default=math.nan)


def _lost(document: Document, results: Results) -> None:
    lost = [[arm.name, run["seed"], run["status"], run["error"]] for arm in results.arms for run in arm.unfinished()]
    if lost:
        document.heading("Runs that did not finish")
        document.table(["arm", "seed", "what happened", "message"], [[a, str(s), w, m] for a, s, w, m in lost])


def _protocol(document: Document, results: Results) -> None:
    record, corpus, rule = results.record, results.record["corpus"], results.record["rule"]
    document.heading("Protocol")
    smallest = rule["smallest_difference"]
    lines = [
        f"Text: {corpus['name']}, {corpus['characters']:,} characters, sha256 {corpus['sha256'][:16]}; tokens: "
        f"{corpus['tokenizer']}, a vocabulary of {corpus['vocabulary']:,}.",
        f"Split, in order: {corpus['train_tokens']:,} tokens to train (the last {corpus['dev_tokens']:,} of them held "
        f"back for tuning), {corpus['validation_tokens']:,} to validate.",
        f"Loss: every validation token but the first, predicted once, in windows of {corpus['window']} that know "
        "nothing of what came before them. The last step counts, not the best: no checkpoint was chosen on that text.",
        f"Rule, fixed before the run: intervals of {rule['confidence'] * 100:.3g} %; blocks of {rule['block']} tokens; "
        + (
            f"a difference below {smallest:g} {results.unit} does not matter."
            if smallest
            else "any difference matters."
        ),
        "Interval: the arms are paired token by token. The variance over the text comes from that of the blocks, "
        "that over the seeds from their spread; both are added, what they share counted once, and Student's t "
        "(Satterthwaite's degrees of freedom) makes the interval. On simulated ties it holds zero in 94 to 96 of 100.",
        f"Budget: {BUDGETS[record['budget']['kind']]}, {record['budget']['value']:,.6g}.",
        *([f"Device: {record['device']}."] if record.get("device") else []),
    ]
    document.only_html("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>")
    document.markdown.append("\n".join(f"- {line}" for line in lines))
    if record.get("command"):
        document.text("To repeat it:")
        document.only_html(f'<pre class="command">{html.escape(record["command"])}</pre>')
        document.markdown.append(f"```\n{record['command']}\n```")
