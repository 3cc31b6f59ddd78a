"""A report says all that the results say, loads nothing, and puts up with runs that failed."""

import dataclasses
import json
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from comparisons import made_up
from conftest import tiny

from textgen import pages
from textgen.comparison import dynamic, report
from textgen.comparison.results import Results
from textgen.config import UserError

VOID = {"meta", "br", "hr", "img", "link", "input", "col"}


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Figures take seconds: they are left out, but where a test asks for `drawn`."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(pages, "figure", lambda draw, **_: "<figure></figure>")


@pytest.fixture
def drawn():
    """The figures are drawn."""


class Checker(HTMLParser):
    """Every element is closed, ids are unique, and nothing is loaded."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.words = [], set(), []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert tag not in {"link", "iframe", "img", "object", "embed"}, tag
        for name, value in attributes:
            assert name not in {"src", "srcset", "action"}, (tag, name)
            if name.endswith("href"):
                assert value.startswith("#"), value
        if "id" in given:
            assert given["id"] not in self.ids, given["id"]
            self.ids.add(given["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append(data)


def both(folder):
    """Writes the report; its words as HTML and as Markdown, after a look at the HTML."""
    report.write(folder)
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "@import" not in source
    assert "url(http" not in source
    checker = Checker()
    checker.feed(source)
    assert not checker.open
    return "".join(checker.words), (folder / "report.md").read_text(encoding="utf-8")


def test_a_clear_win_with_every_number(tmp_path, drawn):
    folder = made_up(tmp_path / "duel", {"transformer": 1.50, "lstm": 1.40})
    page, markdown = both(folder)
    results = Results(folder)
    assert [arm.name for arm in results.finished] == ["lstm", "transformer"]
    for text in (page, markdown):
        assert "lstm is better than transformer by 0.10" in text
        assert "nats per character (95 % interval over the text and 3 seeds of each)." in text
        for arm in results.arms:
            for loss in arm.losses:
                assert f"{loss:.4f}" in text
            for key in ("parameters", "non_embedding_parameters", "tokens", "steps"):
                assert f"{arm.record[key]:,}" in text
            assert f"{arm.record['train_flops']:,.0f}" in text or f"{arm.record['train_flops']:.3g}" in text
            assert f"{arm.record['seconds_per_run']:.3g}" in text
        assert "5-gram" in text
        assert "1.6000" in text
        assert "the same number of parameters" in text
        assert "runs/duel" in text
        assert "3e-03" in text or "0.003" in text
        assert "diverged" in text  # a trial of the sweep
        for section in ("Learning curves", "tuned", "Apart from", "Position", "Frequency", "Repetition", "Protocol"):
            assert section in text
    assert "And <so> on & on, seed 0" in page
    # The verdict stands before anything else that has a number.
    assert markdown.index("is better than") < markdown.index("|")


def test_ensembles_and_mixtures_are_marked_apart(tmp_path):
    folder = made_up(tmp_path / "duel", {"a": 1.50, "b": 1.40})
    _, markdown = both(folder)
    results = Results(folder)
    apart = markdown[markdown.index("## Apart") : markdown.index("## Where")]
    blends = {blend.models: blend for blend in results.blends()}
    assert list(blends) == ["b, its 3 seeds", "a, its 3 seeds", "b with a", "b with 5-gram", "a with 5-gram"]
    for blend in blends.values():
        assert f"| {blend.models} | {blend.kind} | {blend.loss:.4f} |" in apart
    nats = results.finished[0].nats.astype(np.float64)
    assert blends["b, its 3 seeds"].loss == pytest.approx(-np.log(np.exp(-nats).mean(0)).mean())
    assert blends["b, its 3 seeds"].gain == pytest.approx(nats.mean() - blends["b, its 3 seeds"].loss)
    assert "dynamic evaluation |" not in apart


def test_the_gain_of_a_mixture_is_that_of_the_seeds_that_both_have(tmp_path):
    folder = made_up(tmp_path / "duel", {"a": 1.50, "b": 1.40})
    results = Results(folder)
    b, a = results.finished
    one = dataclasses.replace(a, seeds=a.seeds[:1], nats=a.nats[:1])
    spoilt = dataclasses.replace(b, nats=np.concatenate([b.nats[:1], b.nats[1:] + 5]))
    blend = Results._mixture(spoilt, one)
    assert blend.gain == pytest.approx(float(min(b.nats[0].mean(), a.nats[0].mean())) - blend.loss, abs=1e-6)


def test_a_dynamic_column_when_there_is_one(tmp_path):
    folder = made_up(tmp_path / "duel", {"a": 1.50, "b": 1.40})
    nats = np.load(folder / "nats/a/0.npy") - 0.1
    np.save(folder / "nats/a/0.dynamic.npy", nats)
    rows = [{"arm": "a", "seed": 0, "rates": [1e-4, 1e-4], "nats": "nats/a/0.dynamic.npy"}]
    (folder / "dynamic.json").write_text(json.dumps(rows))
    _, markdown = both(folder)
    assert f"| a, learning as it reads | dynamic evaluation | {nats.mean(dtype=np.float64):.4f} |" in markdown


def test_a_tie_is_not_resolved(tmp_path):
    page, _ = both(made_up(tmp_path / "duel", {"a": 1.5001, "b": 1.50}, baseline=False))
    assert "Not resolved: the loss of b was lower than that of a by 0.0" in page
    assert "is better than" not in page


def test_a_diverged_run_is_told(tmp_path):
    page, markdown = both(made_up(tmp_path / "duel", {"a": 1.50, "b": (1.40, "diverged")}))
    for text in (page, markdown):
        assert "Not every run finished (1 of 3 of b)" in text
        assert "it diverged at step 7" in text
        assert "3 seeds of a and 2 of b" in text or "2 seeds of b and 3 of a" in text


@pytest.mark.slow
def test_an_arm_that_failed_and_three_that_did_not(tmp_path, drawn):
    folder = made_up(tmp_path / "four", {"a": 1.50, "b": 1.40, "c": 1.45, "d": None})
    page, markdown = both(folder)
    assert "b is better than c" in page
    assert "No comparison: d has no finished run." in page
    assert "out of <memory>" in page
    assert "Every pair" in page
    # Six pairs hold together: each interval is of 1 - 0.05 / 6.
    assert Results(folder).confidence == pytest.approx(1 - 0.05 / 6)
    assert "99.17 % each" in markdown


def test_nothing_finished(tmp_path, drawn):
    page, _ = both(made_up(tmp_path / "none", {"a": None, "b": None}, baseline=False))
    assert "No comparison: a and b has no finished run." in page


def test_one_seed_is_no_verdict(tmp_path, drawn):
    page, _ = both(made_up(tmp_path / "duel", {"a": 1.50, "b": 1.30}, seeds=1))
    assert "Not resolved" in page
    assert "Two seeds or more are needed" in page


def test_losses_per_character_with_tokens_that_are_longer(tmp_path):
    folder = made_up(tmp_path / "duel", {"a": 4.0, "b": 3.0}, kind="words", baseline=False)
    results = Results(folder)
    corpus = results.record["corpus"]
    assert results.scale == pytest.approx((corpus["validation_tokens"] - 1) / corpus["validation_characters"])
    assert results.scale < 0.6
    _, markdown = both(folder)
    assert f"{3.0 * results.scale:.4f}" in markdown
    (verdict,) = results.verdicts.values()
    assert verdict.difference.mean == pytest.approx(-1.0 * results.scale, rel=1e-3)


def test_the_corpus_may_be_gone(tmp_path):
    folder = made_up(tmp_path / "duel", {"a": 1.50, "b": 1.40})
    (folder / "text.txt").unlink()
    page, _ = both(folder)
    assert "could not be read again" in page
    assert "Position in the window" in page
    assert "The same text under" not in page


def test_the_report_is_the_same_when_written_again(tmp_path):
    folder = made_up(tmp_path / "duel", {"a": 1.50, "b": 1.40})
    first, second = both(folder), both(folder)
    assert first == second


def test_what_is_no_comparison(tmp_path):
    with pytest.raises(UserError, match=r"results\.json"):
        report.write(tmp_path)
    folder = made_up(tmp_path / "duel", {"a": 1.50, "b": 1.40})
    (folder / "nats/a/1.npy").unlink()
    with pytest.raises(UserError, match=r"1\.npy.*missing or damaged"):
        report.write(folder)


def test_dynamic_losses_are_made_once_for_every_finished_run(tmp_path, monkeypatch):
    folder = made_up(tmp_path / "duel", {"a": 1.50, "b": (1.40, "diverged")}, seeds=2)
    loaded = []

    def load(run):
        loaded.append(run.relative_to(folder).as_posix())
        config = tiny({"corpus.path": str(folder / "text.txt")})
        return SimpleNamespace(config=config, tokenizer=None)

    monkeypatch.setattr(dynamic.trained_model, "load", load)
    monkeypatch.setattr(dynamic, "chosen", lambda lm, tokens, history: (np.full(len(tokens) - 1, 1.25), [0.0, 1e-4]))
    dynamic.add(folder)
    dynamic.add(folder)
    assert loaded == ["a/0", "a/1", "b/0"]
    _, markdown = both(folder)
    assert "| a, learning as it reads | dynamic evaluation | 1.2500 | 0.249" in markdown
    assert "| b, learning as it reads | dynamic evaluation | 1.2500 | 0.148" in markdown
