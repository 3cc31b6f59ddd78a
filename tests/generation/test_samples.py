"""A text's end, its recipe, and what the settings stand for."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import noisy_params, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from textgen import models, trained_model
from textgen.codecs import text as text_codec
from textgen.config import UserError
from textgen.generation import samples, transforms

ALPHABET = "abcdé\n"


def text_model(tokenizer, **overrides):
    config = tiny({"model.backbone": "lstm"} | overrides)
    model = models.build(config, tokenizer.vocab_size)
    return trained_model.TrainedModel(model, noisy_params(model), tokenizer, config, 7)


@pytest.fixture(scope="module")
def lm():
    return text_model(text_codec.CharacterTokenizer("".join(sorted(ALPHABET))))


def cut(text, stops, min_length):
    """The definition: at the first stop text that is complete at min_length characters or later."""
    ends = [(i + len(s), i) for s in stops for i in range(len(text)) if text.startswith(s, i)]
    ends = sorted((end, start) for end, start in ends if end >= max(min_length, 1))
    if not ends:
        return text, len(text)
    end = ends[0][0]
    return text[: min(start for e, start in ends if e == end)], end


@settings(max_examples=100, deadline=None)
@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
    st.integers(0, 9),
    st.sampled_from(["characters", "bytes"]),
)
def test_a_text_ends_at_its_first_stop_text_and_streams_to_the_same(text, stops, min_length, kind):
    text, stops = text.replace("a", "é"), [s.replace("a", "é") for s in stops]  # two bytes each
    tokenizer = text_codec.CharacterTokenizer("bé") if kind == "characters" else text_codec.ByteTokenizer()
    min_length = min_length if kind == "characters" else 0  # in tokens
    whole, streamed = (samples.Ending(tokenizer, stops, min_length) for _ in range(2))
    given = ""
    ids = tokenizer.encode(text) if text else []
    whole.add(ids)
    whole.finish()
    for i in ids:
        streamed.add([i])
        given += streamed.take()
        assert whole.text.startswith(given)
    streamed.finish()
    given += streamed.take(last=True)
    wanted, end = cut(text, stops, min_length)
    assert given == whole.text == wanted
    if kind == "characters":
        assert whole.count == end
        assert (whole.stopped is None) == (wanted == text)


def test_stop_texts_end_each_sample_on_its_own(lm):
    options = {"length": 120, "num_samples": 4, "seed": 2, "temperature": 2.0}
    free = lm.samples("ab", **options)
    for sample, whole in zip(lm.samples("ab", stop=["cd", "é"], min_length=5, **options), free, strict=True):
        text, end = cut(whole.text, ["cd", "é"], 5)
        assert sample.text == text
        np.testing.assert_array_equal(sample.tokens, whole.tokens[:end])
        assert len(sample.log_probability) == end
        assert sample.stopped in ("cd", "é")
    streamed = "".join(lm.stream("ab", length=120, seed=2, temperature=2.0, stop="cd", chunk=7))
    assert streamed == cut(free[0].text, ["cd"], 0)[0]


def assert_made_again(lm, sample):
    """By its record; another batch may round its figures otherwise."""
    again = lm.replay(json.loads(json.dumps(sample.record())))
    np.testing.assert_array_equal(again.tokens, sample.tokens)
    np.testing.assert_array_equal(lm.replay(sample).tokens, sample.tokens)
    np.testing.assert_allclose(again.log_probability, sample.log_probability, atol=1e-4)
    assert (again.text, again.recipe, again.stopped) == (sample.text, sample.recipe, sample.stopped)


def test_a_sample_is_made_again_from_its_record(lm):
    sampler = "repetition_penalty(1.2), temperature([0.5, 1, 1.5, 0.33333333, 0.7, 3]), banned('d')"
    options = {"stop": "aa", "min_length": 3, "guidance": 1.5, "second_prompt": "\n", "sampler": sampler}
    made = lm.samples(["ab", "c"], length=30, num_samples=3, seed=5, **options)
    for sample in made:
        assert_made_again(lm, sample)
    assert made[4].recipe["sample"] == 1
    assert made[4].recipe["sampler"] == "repetition_penalty(1.2), temperature(0.7), banned([4])"
    (third,) = lm.samples("ab", length=9, seed=5, first_sample=2)
    assert third.text == lm.samples("ab", length=9, seed=5, num_samples=3)[2].text


@pytest.mark.slow
def test_a_decoder_chooses_texts_and_its_record_makes_them_again(lm):
    options = {"length": 12, "seed": 3, "temperature": 1.3}
    (greedy,) = lm.samples("ab", length=12, temperature=0.0)
    assert lm.samples("ab", length=12, decoder="beam(1)")[0].text == greedy.text
    beams = lm.samples(["ab", "c"], decoder="beam(3, alpha=0.6)", **options)
    assert [s.prompt for s in beams] == ["ab"] * 3 + ["c"] * 3
    assert beams[0].score >= beams[1].score >= beams[2].score
    (best,) = lm.samples("ab", decoder="best_of(4)", **options)
    drawn = lm.samples("ab", num_samples=4, **options)
    assert best.text == max(drawn, key=lambda s: s.log_probability.mean()).text
    for sample in (*beams, best, *lm.samples("ab", decoder="arithmetic(2)", **options)):
        assert_made_again(lm, sample)
    ended = lm.samples("ab", decoder="beam(2)", stop="c", **options)
    for sample in ended:
        assert "c" not in sample.text
        assert (sample.stopped == "c") == (lm.tokenizer.decode(sample.tokens[-1:]) == "c")


@pytest.mark.slow
def test_a_draft_proposes_and_changes_no_greedy_text(lm):
    draft = text_model(lm.tokenizer, **{"model.width": 8})
    (plain,) = lm.samples("ab", length=20, temperature=0.0)
    (made,) = lm.samples("ab", length=20, temperature=0.0, draft=draft, gamma=3)
    np.testing.assert_array_equal(made.tokens, plain.tokens)
    assert 5 <= made.calls <= 20
    assert lm.samples("ab", length=20, temperature=0.0, draft=lm, gamma=4)[0].calls == 4  # all are kept
    ahead = text_model(lm.tokenizer, **{"model.predict_ahead": 2})
    options = {"length": 20, "num_samples": 3, "stop": "cd", "seed": 1}
    for sample in ahead.samples("ab", draft="heads", **options):
        assert sample.recipe["gamma"] == 2
        assert_made_again(ahead, sample)


def test_one_transformation_is_a_chain_too(lm):
    (made,) = lm.samples("ab", length=9, sampler=transforms.top_k(2))
    assert made.recipe["sampler"] == "top_k(2)"
    with pytest.raises(UserError, match="generate makes one text, and these settings make 2"):
        lm.generate("ab", num_samples=2)


def test_a_text_that_learned_positions_hold_is_scored_as_one(lm):
    text = "abcdé" * 3
    learned = text_model(
        lm.tokenizer,
        **{"model.backbone": "transformer", "model.transformer.positions": "learned", "model.context": 16},
    )
    logits, _ = learned.model.apply({"params": learned.params}, lm.tokenizer.encode(text)[None])
    told = jax.nn.log_softmax(logits[0, :-1])[np.arange(14), lm.tokenizer.encode(text)[1:]]
    np.testing.assert_allclose(learned.score(text), told, atol=1e-4)


def test_what_the_plain_settings_stand_for():
    assert str(samples.make_chain(temperature=0.8, top_p=0.9, top_k=5)) == "temperature(0.8), top_k(5), top_p(0.9)"
    assert str(samples.make_chain(typical=0.9, repetition_penalty=1.1)) == "repetition_penalty(1.1), typical(0.9)"
    assert str(samples.make_chain()) == "temperature(1)"
    assert str(samples.make_chain(transforms.chain(transforms.greedy()))) == "temperature(0)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": ["x"]}, "x"),
        ({"stop": [""]}, "A stop text is empty"),
        ({"min_length": 9, "length": 5, "stop": "a"}, "min_length must lie in 0 ... length = 5, got 9"),
        ({"min_length": 9}, "only holds back stop texts, and there is none"),
        ({"guidance": 2.0}, "guidance and second_prompt go together"),
        ({"guidance": 2.0, "second_prompt": ""}, "The prompt is empty"),
        ({"sampler": "banned(77)"}, "names token 77, and the vocabulary has 6 tokens"),
        ({"sampler": "allowed('a'), banned('a')"}, "bans every token"),
        ({"sampler": "temperature(1)", "top_k": 3}, "Give either a sampler or top_k"),
        ({"top_k": 0}, "top_k must be a whole number of 1 or more; to keep all, leave it out, got 0"),
        ({"first_sample": -1}, "first_sample must lie in 0"),
        ({"first_sample": 2**32}, "first_sample must lie in 0"),
        ({"decoder": "beem(3)"}, "Unknown decoder 'beem'. Did you mean 'beam'"),
        ({"decoder": "beam(3)", "num_samples": 2}, "does not go with num_samples"),
        ({"decoder": "beam(3)", "stop": ["a", "b"]}, "does not go with several stops"),
        ({"decoder": "beam(3)", "stop": "ab"}, "ends a text at one token, and 'ab' makes 2"),
        ({"draft": "heads"}, "This model has no heads for later tokens"),
        ({"draft": "tails"}, "A draft is 'heads' or a loaded model, got 'tails'"),
        ({"draft": "heads", "guidance": 2.0, "second_prompt": "a"}, "leave guidance out"),
        ({"num_samples": 0}, "num_samples must be 1 or more"),
        ({"temprature": 0.0}, "no option 'temprature' here. Did you mean 'temperature'"),
        ({"decoder": "beam(2)", "second_prompt": "a"}, "guidance and second_prompt go together"),
        (
            {"guidance": float("nan"), "second_prompt": "a"},
            r"guidance must be one number of 1e\+09 or less in size, got nan",
        ),
        ({"gamma": 0}, "gamma says how many tokens a draft proposes"),
        ({"temperature": [0.5, 0.7], "num_samples": 3}, "temperature has 2 settings, and there are 3 rows"),
        ({"temperature": [0.5, 0.7]}, "temperature has 2 settings, and there is 1 row"),
        ({"sampler": "temperature([[0.5, 0.7]])", "num_samples": 2}, "temperature"),
        ({"decoder": "beam(2)", "temperature": [0.5, 0.7]}, "there is 1 row"),
        ({"decoder": "best_of(3, 2)"}, "best_of"),
        ({"sampler": "temperature('b')"}, "temperature"),
        ({"sampler": "temperature(1) for x in y"}, "A sampler is written like"),
        ({"sampler": "temperature(1)][0"}, "A sampler is written like"),
        ({"sampler": "banned(4294967296)"}, "takes token ids"),
        ({"temperature": 1e39}, "temperature must be 0 or more"),
        ({"top_k": 10**400}, "top_k must be a whole number"),
        ({"seed": -1}, "seed must lie in"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(lm, options, message):
    with pytest.raises(UserError, match=message):
        lm.samples("ab", **options)


def test_an_option_is_never_told_to_be_itself(lm):
    for call, name in (
        (lambda: next(lm.stream("ab", num_samples=2)), "num_samples"),
        (lambda: lm.chain(seed=3), "seed"),
    ):
        with pytest.raises(UserError, match=f"There is no option '{name}' here.") as told:
            call()
        assert str(told.value).count(f"'{name}'") == 1
    with pytest.raises(UserError, match=r"no option 'chunks' here. Did you mean 'chunk'\?"):
        next(lm.stream("ab", chunks=2))


def test_a_file_of_samples_ends_its_lines_where_json_does(lm, tmp_path, monkeypatch, capsys):
    """A text may hold characters that Python takes for the ends of lines."""
    (sample,) = lm.samples("ab", length=3)
    made = dataclasses.replace(sample, prompt="a\u2028b")
    monkeypatch.setattr(trained_model, "load", lambda *_, **__: SimpleNamespace(replay=lambda record: made))
    line = json.dumps(made.record() | {"workdir": str(tmp_path)}, ensure_ascii=False)
    (tmp_path / "some.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")
    trained_model.replay_file(tmp_path / "some.jsonl")
    assert "2 made again, the same token by token" in capsys.readouterr().out
    (tmp_path / "some.jsonl").write_text(line.replace(str(tmp_path), "gone"), encoding="utf-8")
    with pytest.raises(UserError, match="the run in 'gone', which is not here: give --workdir=DIR"):
        trained_model.replay_file(tmp_path / "some.jsonl")


def test_records_that_are_none_are_refused(lm):
    sample = lm.samples("ab", length=3)[0]
    sample.recipe["seed"] = np.int64(0)  # as a caller's may be
    record = json.loads(json.dumps(sample.record()))
    for broken in ({"prompt": "a"}, record | {"recipe": None}):
        with pytest.raises(UserError, match="The record lacks length, sample, sampler, seed, step"):
            lm.replay(broken)
    with pytest.raises(UserError, match="The record has settings that there are not: heat"):
        lm.replay(record | {"recipe": record["recipe"] | {"heat": 8}})
    (chosen,) = lm.samples("ab", length=3, decoder="beam(1)")
    with pytest.raises(UserError, match="gives no text of number 3"):
        lm.replay(chosen.record() | {"recipe": chosen.recipe | {"sample": 3}})
    (drafted,) = lm.samples("ab", length=3, draft=lm)
    with pytest.raises(UserError, match="The draft was in no folder"):
        lm.replay(drafted.record())
    with pytest.raises(UserError, match="made at step 8, and these parameters are of step 7"):
        lm.replay(record | {"recipe": record["recipe"] | {"step": 8}})
