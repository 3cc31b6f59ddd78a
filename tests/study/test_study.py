"""The study: a ladder in one batch, where it matches unseen text, and the page."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TEXT, noisy_params, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pages import read

from textgen import models, study, trained_model
from textgen.codecs import text as text_codec
from textgen.config import UserError
from textgen.data import dataset
from textgen.generation import transforms
from textgen.models import ngram
from textgen.study import ladder, measure

pytestmark = pytest.mark.slow  # runs are trained here

PROMPTS = ["The ", "So he mended"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def lm(file):
    config = tiny({"model.backbone": "lstm", "corpus.path": str(file)})
    tokenizer = text_codec.CharacterTokenizer("".join(sorted(set(TEXT))))
    model = models.build(config, tokenizer.vocab_size)
    return trained_model.TrainedModel(model, noisy_params(model), tokenizer, config, 7)


@pytest.fixture(scope="module")
def found(lm):
    return study.explore(lm, PROMPTS, study.chains([1.2, 0.1, 0.6]), length=60, num_samples=2, judges={"<other>": lm})


def test_every_setting_gets_the_texts_that_it_would_get_alone_in_one_compilation(lm):
    chains = study.chains(temperatures=["0", "0.7", "1.3"])
    made = ladder.samples(lm, PROMPTS, chains, length=20, num_samples=3, seed=5)
    sizes = lm._generator._prefill._cache_size(), lm._generator._decode._cache_size()
    ladder.samples(lm, PROMPTS, study.chains([0.1, 0.2, 2.5]), length=20, num_samples=3, seed=6)
    assert (lm._generator._prefill._cache_size(), lm._generator._decode._cache_size()) == sizes
    for chain, some in zip(chains, made, strict=True):
        alone = lm.samples(PROMPTS, length=20, num_samples=3, seed=5, sampler=chain)
        assert [s.text for s in some] == [s.text for s in alone]
        np.testing.assert_allclose(
            [s.log_probability for s in some], [s.log_probability for s in alone], rtol=0, atol=1e-4
        )


def test_chains_of_different_kinds_make_a_ladder_too(lm):
    texts = ["temperature(0.9), top_p(0.8)", "no_repeat_ngram(3)", "temperature(0.5), top_p(0.6)", "banned([0, 1])"]
    chains = study.chains(samplers=texts)
    made = ladder.samples(lm, PROMPTS[:1], chains, length=12, num_samples=2, seed=1)
    for chain, some in zip(chains, made, strict=True):
        alone = lm.samples(PROMPTS[0], length=12, num_samples=2, seed=1, sampler=chain)
        assert [s.text for s in some] == [s.text for s in alone]


@pytest.mark.parametrize(
    ("texts", "knob"),
    [
        (["temperature(0.5)", "temperature(1)"], ("temperature", [0.5, 1.0])),
        (["temperature(0.5), top_p(0.7)", "temperature(0.5), top_p(0.9)"], ("top_p", [0.7, 0.9])),
        (["temperature(0.5), top_p(0.7)", "temperature(1), top_p(0.9)"], None),
        (["temperature(0.5)", "top_p(0.5)"], None),
        (["temperature(0.5)"], None),
        (["banned([0, 1])", "banned([0, 2])"], None),
    ],
)
def test_the_knob_is_the_one_number_that_differs(texts, knob):
    assert ladder.knob(study.chains(samplers=texts)) == knob


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["0.5", "hot"], None), "--temperatures takes numbers with commas between, such as 0.5,0.8,1; got 'hot'."),
        ((["0.5", "-1"], None), "temperature must be 0 or more"),
        ((["0.5", "0.50"], None), "The setting temperature(0.5) comes twice"),
        (([], None), "--temperatures is empty"),
        ((["0.5"], ["top_p(0.5)"]), "Give either --temperatures or --sampler"),
        ((None, ["top_q(0.5)"]), "Did you mean 'top_p'"),
    ],
)
def test_a_mistake_in_the_ladder_is_told(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        study.chains(*arguments)


def test_a_ladder_may_name_tokens_by_their_texts():
    (chain,) = study.chains(samplers=["banned('c'), temperature(0.5)"], encode=lambda s: [ord(c) - ord("a") for c in s])
    assert str(chain) == "banned([2]), temperature(0.5)"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.25, 1.55), st.sampled_from([1, -1]))
def test_the_match_is_where_the_curve_crosses_unseen_text(seed, place, sign):
    values = np.linspace(0.2, 1.6, 8)
    random = np.random.default_rng(seed)
    noise = random.normal(size=(8, 200))
    exact = sign * np.interp(values, [0.2, 1.6], [1.0, 2.4])[:, None] + 0 * noise
    target = np.full(50, sign * np.interp(place, [0.2, 1.6], [1.0, 2.4]))
    match = study.matching(list(values), exact, target, draws=20)
    assert match.value == pytest.approx(place)
    assert match.low == pytest.approx(place)
    assert match.high == pytest.approx(place)
    noisy = study.matching(list(values), exact + 0.1 * noise, target, draws=200)
    quiet = study.matching(list(values), exact + 0.02 * noise, target, draws=200)
    assert abs(noisy.value - place) < 0.06
    assert noisy.low <= noisy.value <= noisy.high
    if 0.4 < place < 1.4:  # elsewhere the ladder's end cuts the interval
        assert quiet.high - quiet.low < noisy.high - noisy.low < 0.1


def test_a_ladder_that_does_not_reach_unseen_text_has_no_match():
    assert study.matching([0.5, 1.0], np.array([[1.0, 1.1], [2.0, 2.1]]), np.array([3.0, 3.1])) is None


def test_a_model_that_is_right_matches_at_temperature_one(tmp_path):
    """Independent letters, and the model knows their frequencies: its text is like the corpus at T = 1."""
    random = np.random.default_rng(0)
    text = "".join(random.choice(list("abcd \n"), 200_000, p=[0.5, 0.2, 0.12, 0.08, 0.07, 0.03]))
    (tmp_path / "text.txt").write_text(text)
    config = tiny({"model.backbone": "ngram", "model.ngram.order": 1, "corpus.path": str(tmp_path / "text.txt")})
    tokenizer = text_codec.CharacterTokenizer("".join(sorted(set(text))))
    tables = ngram.fit(tokenizer.encode(text[:180_000]), 1, tokenizer.vocab_size)
    lm = trained_model.TrainedModel(models.build(config, tokenizer.vocab_size), tables, tokenizer, config, 1)
    found = study.explore(lm, ["a"], study.chains([0.4, 0.7, 0.9, 1.1, 1.4, 2.0]), length=100, num_samples=30)
    for name in ("surprise", "entropy_drawn"):
        match = found.matches[name]
        assert match.low - 0.03 <= 1 <= match.high + 0.03
        assert abs(match.value - 1) < 0.08
    assert found.losses.mean() == pytest.approx(-np.mean(lm.score(text[180_000:])), abs=0.02)
    # A text of independent letters has the entropy that the distribution says, at every temperature.
    p = tables["unigram"]
    for setting in found.settings:
        q = p ** (1 / setting.value) / np.sum(p ** (1 / setting.value))
        assert setting.numbers["entropy_drawn"] == pytest.approx(-np.sum(q * np.log(q)), abs=1e-4)
        assert setting.numbers["surprise"] == pytest.approx(-np.sum(q * np.log(p)), abs=0.1)


def test_scores_of_many_rows_are_those_of_each(lm):
    rows = [lm.tokenizer.encode(text) for text in (TEXT[:40], TEXT[5:9], TEXT[100:102])]
    for row, nats in zip(rows, measure.score(lm.model, lm.params, rows), strict=True):
        np.testing.assert_allclose(nats, lm.nats(row, stream=True), rtol=0, atol=1e-5)


def test_a_model_with_a_longest_sequence_reads_windows(lm):
    config = tiny({"model.transformer.positions": "learned"})
    model = models.build(config, lm.tokenizer.vocab_size)
    params = noisy_params(model)
    other = trained_model.TrainedModel(model, params, lm.tokenizer, config, 0)
    rows = [lm.tokenizer.encode(text) for text in (TEXT[:61], TEXT[7:20])]
    for row, nats in zip(rows, measure.score(model, params, rows), strict=True):
        np.testing.assert_allclose(nats, other.nats(row, stream=False), rtol=0, atol=1e-5)


def test_a_judge_reads_each_text_after_its_prompt(lm):
    prompts, texts = ["The ", "So "], ["river went", "he mended."]
    own = [-lm.score(p + t)[len(p) - 1 :].sum() for p, t in zip(prompts, texts, strict=True)]
    nats = measure.judge(lm.model, lm.params, lm.tokenizer)(prompts, texts)
    assert nats == pytest.approx(sum(own) / sum(map(len, texts)), abs=1e-5)


def test_the_study_orders_the_ladder_and_judges_as_the_model_itself_does(found, lm):
    assert [(s.name, s.value) for s in found.settings] == [(f"temperature({t})", t) for t in (0.1, 0.6, 1.2)]
    for setting in found.settings:
        alone = lm.samples(PROMPTS, length=60, num_samples=2, temperature=setting.value)
        assert setting.texts == [s.text for s in alone]
    for texts in [*found.settings, found.unseen]:
        assert texts.numbers["judge/<other>"] == pytest.approx(texts.numbers["surprise"], abs=1e-4)
        assert all("".join(p) == text for p, text in zip(texts.pieces, texts.texts, strict=True))
        assert all(len(n) == len(text) == 60 for n, text in zip(texts.nats, texts.texts, strict=True))
    assert all(text in TEXT for text in found.unseen.texts)


def test_the_page_is_whole_and_shows_every_text(found):
    document = study.render(found)
    reader = read(document)
    shown = "".join(reader.text)
    for texts in [*found.settings, found.unseen]:
        for prompt, text in zip(texts.prompts, texts.texts, strict=True):
            assert prompt + text in shown
    passage = json.loads(re.search(r"const PASSAGE = (.*);\n", document)[1])
    for (ids, costs), token in zip(passage["places"], passage["tokens"], strict=True):
        assert token in ids
        assert costs == sorted(costs)
        assert np.exp(-np.array(costs) / 1000).sum() == pytest.approx(1, abs=1e-3)
    script = document[document.index("<script>") : document.index("</script>")]
    assert all(f'id="{name}"' in document for name in re.findall(r'\$\("(\w+)"\)', script))


def test_nothing_in_a_text_ends_the_script(found):
    passage = measure.Passage(
        ["</script>"], *(getattr(found.passage, k)[:1] for k in ("tokens", "log_probability")), found.passage.vocabulary
    )
    document = study.render(measure.dataclasses.replace(found, passage=passage))
    assert document.count("</script>") == 1
    read(document)


def test_what_is_written(found, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    for _ in range(2):  # a second study takes the place of the first
        study.publish(found, tmp_path / "explore.html", tmp_path / "explore")
    numbers = json.loads((tmp_path / "explore.json").read_text())
    assert [s["value"] for s in numbers["settings"]] == [0.1, 0.6, 1.2]
    assert numbers["settings"][0]["samples"][0]["text"] == found.settings[0].texts[0]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    rows = [json.loads(line) for line in (tmp_path / "explore" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 60, 120]
    assert rows[0]["explore/surprise"] == pytest.approx(found.settings[0].numbers["surprise"])
    assert "validation text" in study.as_text(found)
    small = [dataclasses.replace(s, value=s.value / 1000) for s in found.settings]
    study.publish(dataclasses.replace(found, settings=small), tmp_path / "explore.html", tmp_path / "explore")
    rows = [json.loads(line) for line in (tmp_path / "explore" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]  # not all at one


def test_a_study_without_a_knob_has_a_page_and_an_answer(lm):
    chains = study.chains(samplers=["temperature(0.5)", "top_p(0.5)"])
    found = study.explore(lm, PROMPTS[:1], chains, length=20, num_samples=1)
    assert found.knob is None
    assert not found.matches
    read(study.render(found))
    assert "comes nearest to unseen text" in study.as_text(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "words"])  # tokens below a character, and above
def test_any_tokenizer_and_a_model_with_a_longest_sequence(kind, tmp_path):
    text = TEXT.replace("river", "rivi\u00e8re")
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    overrides = {"corpus.path": str(tmp_path / "text.txt"), "tokenizer.kind": kind, "tokenizer.vocab_size": 300}
    config = tiny(overrides | {"model.transformer.positions": "learned"})
    tokenizer = dataset.load(config).tokenizer
    model = models.build(config, tokenizer.vocab_size)
    lm = trained_model.TrainedModel(model, noisy_params(model), tokenizer, config, 0)
    found = study.explore(lm, ["The "], study.chains([0.5, 1.0]), length=40, num_samples=2, judges={"self": lm})
    assert found.unit == "token"
    for texts in [*found.settings, found.unseen]:
        assert [len(p) for p in texts.pieces] == [len(n) for n in texts.nats]
        assert all(np.isfinite(n).all() for n in texts.nats)
    assert ["".join(p) for p in found.unseen.pieces] == found.unseen.texts
    read(study.render(found))


@pytest.mark.skipif(shutil.which("node") is None, reason="takes node")
def test_the_sliders_do_what_the_sampler_does():
    random = np.random.default_rng(0)
    logits = np.sort(random.normal(size=(1, 40)) * 3)[:, ::-1]
    costs = np.round(-1000 * np.asarray(jax.nn.log_softmax(logits))[0]).astype(int)
    numbers = [(0.0, 1.0, 0.0), (0.7, 0.9, 0.0), (1.3, 1.0, 0.2), (1.0, 0.6, 0.05), (2.0, 0.05, 0.5)]
    script = (Path(study.__file__).parent / "page.js").read_text()
    function = script[script.index("function reweighted") : script.index("const entropy")]
    call = f"JSON.stringify({json.dumps(numbers)}.map((n) => reweighted([[], {costs.tolist()}], ...n)))"
    done = subprocess.run(["node", "-p", f"{function}; {call}"], capture_output=True, text=True, check=True)
    for (t, p, m), got in zip(numbers, json.loads(done.stdout), strict=True):
        chain = transforms.chain(transforms.temperature(t), transforms.top_p(p), transforms.min_p(m))
        wanted = jax.nn.softmax(chain(jnp.asarray(-costs[None] / 1000, jnp.float32)))[0]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


def test_a_page_that_cannot_be_written_is_refused_first(tmp_path):
    study.check_page(tmp_path / "a.html")
    with pytest.raises(UserError, match=r"ends in \.html"):
        study.check_page(tmp_path / "a.json")
    with pytest.raises(UserError, match="There is no folder"):
        study.check_page(tmp_path / "none" / "a.html")


def test_shares_of_nothing_are_null_in_the_json(found):
    empty = measure.dataclasses.replace(found.unseen, numbers=found.unseen.numbers | {"zipf": math.nan})
    numbers = study.as_json(measure.dataclasses.replace(found, unseen=empty))
    assert numbers["validation"]["zipf"] is None
    json.dumps(numbers, allow_nan=False)
