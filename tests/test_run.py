"""A run as its user meets it: launched, interrupted, resumed, damaged, read back."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest
from conftest import TEXT, tiny
from ml_collections import ConfigDict

import textgen
from textgen import checkpoints, config, logs
from textgen import session as session_lib
from textgen.config import UserError
from textgen.evaluation import summary
from textgen.training import loop

# Libraries below warn of what is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def configured(text_file, overrides=None):
    return tiny({"corpus.path": str(text_file)} | (overrides or {}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run, for every test that only reads."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(TEXT)
    workdir = folder / "runs" / "one"
    final = session_lib.Session(configured(folder / "text.txt"), workdir, {"data.window": 16}).run()
    return workdir, final


def copied(finished, workdir, *, back_to=None):
    """A copy of the finished run and its config; with `back_to`, as it was at that checkpoint."""
    shutil.copytree(finished[0], workdir)
    if back_to is not None:
        for step in checkpoints.Checkpoints(workdir, read_only=True).steps():
            if step > back_to:
                shutil.rmtree(workdir / "checkpoints" / str(step))
    return checkpoints.load_config(workdir)


def params_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def curve(workdir):
    return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in logs.read_metrics(workdir)]


def test_from_python_a_configdict_will_do_and_the_session_has_the_trained_model(tmp_path):
    given = ConfigDict(config.to_dict(configured(tmp_path / "text.txt", {"train.steps": 4})))
    (tmp_path / "text.txt").write_text(TEXT)
    session = session_lib.open_session(given, tmp_path / "run")
    session.run()
    assert session.model.step == 4
    params_equal(session.model.params, textgen.load(tmp_path / "run").params)


# --- what a run leaves behind


def test_a_run_leaves_its_config_its_curve_and_its_checkpoints(finished):
    workdir, final = finished
    assert {p.name for p in workdir.iterdir()} >= {"config.json", "overrides.json", "tokenizer.json", "metrics.jsonl"}
    rows = logs.read_metrics(workdir)
    assert [r["step"] for r in rows if "train/loss" in r] == [3, 6, 9, 12]
    evaluations = [r for r in rows if "eval/loss" in r]
    assert [r["step"] for r in evaluations] == [6, 12]
    for key in ("eval/bits_per_character", "eval/bits_per_byte", "eval/perplexity"):
        assert evaluations[-1][key] == final[key]
    assert any(k.startswith("parameter_norm/") for k in evaluations[0])
    assert {"train/learning_rate", "train/grad_norm", "speed/tokens_per_second"} <= set(rows[0])
    assert all(0 <= row["speed/waiting_for_data"] <= 1 for row in rows if "train/loss" in row)
    assert rows[-1]["speed/compile_seconds"] > 0
    steps_a_second = 1000 / rows[0]["speed/step_milliseconds"]
    np.testing.assert_allclose(rows[0]["speed/tokens_per_second"], 4 * 16 * steps_a_second, rtol=1e-6)
    np.testing.assert_allclose(final["eval/bits_per_character"], final["eval/loss"] / math.log(2))
    assert "validation_stream/loss" in final
    assert json.loads((workdir / "overrides.json").read_text()) == {"data.window": 16}


def test_the_phases_of_a_run_add_up_to_its_time(monkeypatch):
    clock, compiled = [100.0], []
    monkeypatch.setattr(session_lib.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(session_lib, "_compiling", compiled)

    def spend(seconds, compiling=0.0):
        clock[0] += seconds
        compiled.append(compiling)

    timer = session_lib.PhaseTimer("set up")
    spend(3)
    with timer.phase("train"):
        spend(10, compiling=4)
        with timer.phase("evaluate"):
            spend(2, compiling=1)
        spend(5)
    timer.switch("finish")
    assert timer.seconds == {"set up": 3, "compile": 5, "train": 11, "evaluate": 1}
    with timer.phase("sample"):
        spend(1, compiling=8)  # by several threads
    timer.switch("end")
    assert sum(timer.seconds.values()) == clock[0] - 100
    assert timer.seconds["sample"] == 0


def test_where_the_peak_is_known_the_curve_has_model_flop_utilization(tmp_path, monkeypatch):
    monkeypatch.setattr(session_lib.parallel, "peak_flops", lambda: 1e9)
    (tmp_path / "text.txt").write_text(TEXT)
    config = configured(tmp_path / "text.txt", {"train.steps": 4})
    session = session_lib.open_session(config, tmp_path / "run")
    session.run()
    row = logs.read_metrics(tmp_path / "run")[0]
    flops = 3 * session.model.model.flops_per_token(config.data.window)
    np.testing.assert_allclose(row["speed/model_flops_utilization"] * 1e9, flops * row["speed/tokens_per_second"])


def test_tensorboard_reads_back_curves_texts_and_final_metrics(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    workdir, final = finished
    board = EventAccumulator(str(workdir), size_guidance={"tensors": 0, "scalars": 0})
    board.Reload()
    assert [e.step for e in board.Scalars("train/loss")] == [3, 6, 9, 12]
    np.testing.assert_allclose(board.Scalars("eval/loss")[-1].value, final["eval/loss"], rtol=1e-6)
    texts = [t for t in board.Tags()["tensors"] if t.startswith("samples/temperature 1")]
    assert [e.step for e in board.Tensors(texts[0])] == [6, 12]
    assert b"The " in board.Tensors(texts[0])[0].tensor_proto.string_val[0]
    started = plugin_data_pb2.HParamsPluginData.FromString(
        board.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    )
    assert started.session_start_info.hparams["model.width"].number_value == 16
    assert not {"checkpoint.keep", "log.every_steps", "sample.length"} & set(started.session_start_info.hparams)
    assert not list(workdir.glob("1*/"))  # no run beside the run


@pytest.mark.slow
def test_a_loaded_model_generates_streams_and_scores(finished):
    workdir, final = finished
    lm = textgen.load(workdir)
    text = lm.generate("The river", length=20, temperature=0.8, seed=3)
    assert text.startswith("The river")
    assert len(text) == 29
    assert text == "The river" + "".join(lm.stream("The river", length=20, temperature=0.8, seed=3))
    a, b, c = lm.samples(["The river", "mill"], length=20, temperature=0.8, seed=3) + lm.samples(
        "mill", length=20, seed=4
    )
    assert a.prompt + a.text == text
    assert b.text == lm.samples("mill", length=20, temperature=0.8, seed=3)[0].text != c.text
    np.testing.assert_allclose(lm.score(a.prompt + a.text)[-20:], a.log_probability, atol=1e-4)
    stream = summary.evaluate_model(lm)["stream"]
    np.testing.assert_allclose(stream.loss, final["validation_stream/loss"], rtol=1e-6)
    assert lm.config == checkpoints.load_config(workdir)
    assert lm.step == 12
    logits, _ = jax.jit(lm.model.apply)({"params": lm.params}, lm.tokenizer.encode("mill")[None])
    assert logits.shape == (1, 4, lm.tokenizer.vocab_size)


def test_checkpoints_are_chosen_by_name(finished):
    workdir, _ = finished
    losses = {r["step"]: r["eval/loss"] for r in logs.read_metrics(workdir) if "eval/loss" in r}
    assert textgen.load(workdir, checkpoint="best").step == min(losses, key=losses.get)
    assert textgen.load(workdir, checkpoint=6).step == 6
    with pytest.raises(UserError, match=r"no checkpoint '7': it has latest, best, \[6, 12\]"):
        textgen.load(workdir, checkpoint=7)


@pytest.mark.parametrize(
    ("losses", "kept", "best"),
    [
        ([2.0, 1.0, 1.5, 1.6], [2, 4], 2),
        ([2.0, 1.0, math.nan, None, math.inf], [2, 5], 2),
        ([math.nan, None], [2], None),
    ],
)
def test_the_best_checkpoint_stays_whatever_comes_after_it(tmp_path, losses, kept, best):
    made = checkpoints.Checkpoints(tmp_path, keep=1)
    state = dataclasses.make_dataclass("State", ["eval_params"])({"w": np.zeros(2, np.float32)})
    for step, loss in enumerate(losses, 1):
        made.save(step, state, loss)
        made.wait()
    assert (made.steps()[-len(kept) :], made.best_step()) == (kept, best)
    made.close()


def test_evaluation_of_a_file(finished, tmp_path):
    workdir, _ = finished
    lm = textgen.load(workdir)
    (tmp_path / "a.txt").write_text("The river went by the mill.")
    report = summary.evaluate_model(lm, text=str(tmp_path / "a.txt"))["stream"]
    np.testing.assert_allclose(report.loss, -lm.score("The river went by the mill.").mean(), rtol=1e-5)
    assert json.loads(summary.reports_as_json({"stream": report}))["stream"]["tokens"] == 26
    with pytest.raises(UserError, match="There is no file"):
        summary.evaluate_model(lm, text=str(tmp_path / "absent"))
    with pytest.raises(UserError, match="has no test split"):
        summary.evaluate_model(lm, split="test")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "The prompt is empty"),
        ("déjà", {}, "no character 'é'"),
        ("The", {"temperature": -1.0}, "temperature must be 0 or more, got -1"),
        ("The", {"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0"),
        ("The", {"top_p": 1.1}, r"top_p must lie in \(0, 1\], got 1.1"),
        ("The", {"top_k": 0}, "to keep all, leave it out, got 0"),
        ("The", {"length": 0}, "length must be 1 or more"),
        ("The", {"seed": -1}, "seed must lie in"),
        ("The", {"sampler": "greedy()", "top_k": 2}, "either a sampler or top_k"),
    ],
)
def test_bad_requests_of_a_loaded_model(finished, prompt, options, message):
    with pytest.raises(UserError, match=message):
        textgen.load(finished[0]).generate(prompt, **options)


# --- interrupted and resumed


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("transformer", "signal"),
        pytest.param("lstm", "crash", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_one_that_was_not_interrupted(text_file, tmp_path, name, how, monkeypatch):
    settings = configured(text_file, {"model.backbone": name, "data.order": "stream", "train.ema_decay": 0.9})
    session_lib.Session(settings, tmp_path / "whole").run()

    original, calls = loop.Trainer.dispatch, []

    def interrupting(self, state, windows, fresh):
        calls.append(1)
        if len(calls) == (4 if how == "crash" else 3):
            if how == "crash":  # after rows and texts beyond the last checkpoint have been logged
                raise RuntimeError("power cut")
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, state, windows, fresh)

    monkeypatch.setattr(loop.Trainer, "dispatch", interrupting)
    with pytest.raises(RuntimeError if how == "crash" else loop.Interrupted):
        session_lib.Session(settings, tmp_path / "cut").run()
    monkeypatch.undo()
    assert 0 < checkpoints.Checkpoints(tmp_path / "cut", read_only=True).steps()[-1] < 12
    session_lib.Session(settings, tmp_path / "cut").run()

    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    states = []
    for workdir in ("whole", "cut"):
        kept = checkpoints.Checkpoints(tmp_path / workdir, read_only=True)
        states.append(kept.restore_state(12, session_lib.Session(settings, tmp_path / workdir).trainer.abstract))
        kept.close()
    unkeyed = [jax.tree.leaves(s.replace(key=jax.random.key_data(s.key))) for s in states]
    params_equal(*unkeyed)


def test_no_ghost_points_after_a_resume(text_file, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = configured(text_file, {"train.steps": 12, "checkpoint.every_steps": 6, "eval.every_steps": 4})

    def crash(self, *args):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        # Dies at the very end, with its last checkpoint lost.
        patch.setattr(session_lib.Session, "_finish", crash)
        with pytest.raises(RuntimeError):
            session_lib.Session(settings, tmp_path / "r").run()
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "12")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("stop here")))
        with pytest.raises(RuntimeError):
            session_lib.Session(settings, tmp_path / "r").run()
    board = EventAccumulator(str(tmp_path / "r"))
    board.Reload()
    assert [e.step for e in board.Scalars("eval/loss")] == [4]
    assert [e.step for e in board.Scalars("train/loss")] == [3, 6]
    assert max(row["step"] for row in logs.read_metrics(tmp_path / "r")) == 6


@pytest.mark.slow
def test_more_steps_may_be_asked_for_and_another_model_may_not(finished, tmp_path):
    settings = copied(finished, tmp_path / "r")
    longer = dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=18))
    assert math.isfinite(session_lib.Session(longer, tmp_path / "r").run()["eval/loss"])
    assert textgen.load(tmp_path / "r").step == 18
    wider = dataclasses.replace(settings, model=dataclasses.replace(settings.model, width=32))
    with pytest.raises(UserError, match=r"This workdir holds another run: model.width was 16, is 32"):
        session_lib.Session(wider, tmp_path / "r")


def test_fewer_steps_than_there_are_and_another_text_are_refused(finished, tmp_path, capsys):
    settings = copied(finished, tmp_path / "r")
    for steps, message in ((6, "has come to step 12, and train.steps is 6: give 12 or more"), (12, None), (13, None)):
        other = dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=steps))
        with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
            session_lib.Session(other, tmp_path / "r")
    assert capsys.readouterr().err.count("the learning rate is that of the new schedule") == 1
    text = tmp_path / "text.txt"
    text.write_text(TEXT + "\u2603")  # a character that the vocabulary lacks is the smaller news
    elsewhere = dataclasses.replace(settings, corpus=dataclasses.replace(settings.corpus, path=str(text)))
    with pytest.raises(UserError, match="The text is not the one"):
        checkpoints.load_text(tmp_path / "r", elsewhere, checkpoints.load_tokenizer(tmp_path / "r"))
    checkpoints.write_json(tmp_path / "r" / "corpus.json", {"sha256": "0" * 64})
    with pytest.raises(UserError, match=r"The text is not the one that .* began with: its sha256 was 000000000000"):
        session_lib.Session(settings, tmp_path / "r")
    with pytest.raises(UserError, match="The text is not the one"):
        summary.evaluate_model(textgen.load(tmp_path / "r"))


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(finished, tmp_path):
    settings = copied(finished, tmp_path / "four", back_to=6)
    four = dataclasses.replace(settings, mesh=dataclasses.replace(settings.mesh, data=2, fsdp=2))
    session = session_lib.Session(four, tmp_path / "four")
    np.testing.assert_allclose(session.run()["eval/loss"], finished[1]["eval/loss"], rtol=1e-4)


# --- what can go wrong with a workdir


def test_workdirs_that_are_no_runs_are_refused(text_file, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        session_lib.Session(configured(text_file), tmp_path / "full")
    (tmp_path / "full" / "thesis.tex").rename(tmp_path / "full" / "tokenizer.json")  # of the user's
    with pytest.raises(UserError, match="is not empty and holds no run"):
        session_lib.Session(configured(text_file), tmp_path / "full")
    with pytest.raises(UserError, match="is a file"):
        session_lib.Session(configured(text_file), text_file)
    with pytest.raises(UserError, match=r"There is no workdir"):
        textgen.load(tmp_path / "absent")
    with pytest.raises(UserError, match="is no run of this project"):
        textgen.load(tmp_path / "full")


def test_a_stop_while_the_folder_is_made_costs_nothing(text_file, tmp_path):
    settings, folder = configured(text_file), tmp_path / "r"
    session_lib.Session(settings, folder)._save_setup()
    assert session_lib.Session(settings, folder).resumed  # no checkpoints yet
    (folder / "config.json").rename(folder / "config.json.tmp")
    assert not session_lib.Session(settings, folder).resumed
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        session_lib.Session(settings, folder)


def test_a_finished_run_logs_its_end_once_and_says_what_it_can_no_longer_do(finished, tmp_path, capsys):
    settings = copied(finished, tmp_path / "r")
    settings = dataclasses.replace(settings, log=dataclasses.replace(settings.log, profile_step=3))
    before = logs.read_metrics(tmp_path / "r")
    assert [sum(key in row for row in before) for key in ("validation_stream/loss", "speed/compile_seconds")] == [1, 1]
    assert session_lib.Session(settings, tmp_path / "r").run() == finished[1]
    assert logs.read_metrics(tmp_path / "r") == before
    assert "No profile: the run goes on from step 12, and log.profile_step=3" in capsys.readouterr().err


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Orbax leaves its readers to the collector
def test_damaged_runs_are_named_and_left_as_they_are(finished, tmp_path):
    damages = {
        "config.json": ("{", "its config.* is damaged"),
        "tokenizer.json": ('{"kind": "characters"}', "its tokenizer.* is damaged"),
    }
    for name, (content, message) in damages.items():
        workdir = tmp_path / name
        shutil.copytree(finished[0], workdir)
        (workdir / name).write_text(content)
        with pytest.raises(UserError, match=message):
            textgen.load(workdir)
    workdir = tmp_path / "truncated"
    shutil.copytree(finished[0], workdir)
    for file in (workdir / "checkpoints" / "12").rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"checkpoint of step 12 .* is damaged, or not of the model"):
        textgen.load(workdir)
    assert textgen.load(workdir, checkpoint=6).step == 6
    foreign = tmp_path / "foreign"
    shutil.copytree(finished[0], foreign)
    saved = json.loads((foreign / "config.json").read_text())
    saved["model"]["width"] = 32
    (foreign / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"is damaged, or not of the model"):
        textgen.load(foreign)
    shutil.rmtree(foreign / "checkpoints")
    with pytest.raises(UserError, match="no checkpoints yet"):
        textgen.load(foreign)


def test_a_full_disk_ends_in_one_line_and_keeps_what_was_saved(text_file, tmp_path, monkeypatch):
    settings = configured(text_file)
    original, calls = checkpoints.Checkpoints.save, []

    def full(self, step, state, eval_loss):
        calls.append(step)
        if len(calls) == 2:
            self.wait()
            broken = lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
            monkeypatch.setattr(self._manager, "save", broken)
        original(self, step, state, eval_loss)

    monkeypatch.setattr(checkpoints.Checkpoints, "save", full)
    with pytest.raises(UserError, match=r"could not be written .*No space left.* Whole and kept: step 6"):
        session_lib.Session(settings, tmp_path / "r").run()
    monkeypatch.undo()
    assert textgen.load(tmp_path / "r").step == 6
    session_lib.Session(settings, tmp_path / "r").run()
    assert textgen.load(tmp_path / "r").step == 12


@pytest.mark.slow
def test_a_diverged_run_names_its_last_good_checkpoint(finished, tmp_path):
    copied(finished, tmp_path / "r")
    saved = json.loads((tmp_path / "r" / "config.json").read_text())
    saved["optimizer"]["learning_rate"] = 1e30
    (tmp_path / "r" / "config.json").write_text(json.dumps(saved))
    wild = config.from_dict(saved | {"train": saved["train"] | {"steps": 40, "max_skipped_steps": 2}})
    with pytest.raises(UserError, match=r"The last good checkpoint in .* is step"):
        session_lib.Session(wild, tmp_path / "r").run()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(textgen.load(tmp_path / "r", checkpoint=12).params))


def test_two_ctrl_c_stop_at_once(text_file, tmp_path, monkeypatch):
    session = session_lib.Session(configured(text_file), tmp_path / "r")
    original = loop.Trainer.dispatch

    def slow(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        time.sleep(2)
        return original(self, *args)

    monkeypatch.setattr(loop.Trainer, "dispatch", slow)
    with pytest.raises(KeyboardInterrupt):
        session.run()


@pytest.mark.slow
def test_tokens_of_several_characters_train_and_report_bits_of_text(text_file, tmp_path):
    settings = configured(text_file, {"tokenizer.kind": "bpe", "tokenizer.vocab_size": 300})
    final = session_lib.Session(settings, tmp_path / "r").run()
    assert 0 < final["eval/bits_per_character"] < 9
    assert textgen.load(tmp_path / "r").generate("The river", length=5).startswith("The river")


@pytest.mark.slow
def test_histograms_and_a_profile_on_request(text_file, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    settings = configured(text_file, {"log.histograms": True, "log.profile_step": 4, "log.profile_steps": 2})
    session_lib.Session(settings, tmp_path / "r").run()
    board = EventAccumulator(str(tmp_path / "r"))
    board.Reload()
    (*_, last) = board.Tensors("parameters/embedding")
    low, high, count = make_ndarray(last.tensor_proto).T
    embedding = np.asarray(textgen.load(tmp_path / "r").params["embedding"])
    assert count.sum() == embedding.size
    np.testing.assert_allclose((low[0], high[-1]), (embedding.min(), embedding.max()), rtol=1e-6)
    assert list((tmp_path / "r" / "plugins" / "profile").rglob("*.xplane.pb"))
