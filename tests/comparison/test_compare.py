"""The comparison as its user meets it: stopped, taken up, failing in part, and refused."""

import json
import shutil
import signal

import numpy as np
import pytest
from conftest import TEXT

import textgen
from configs import base, sweeps
from textgen import logs
from textgen.comparison import arms, compare, dynamic, jobs, report
from textgen.config import UserError
from textgen.training import loop

pytestmark = pytest.mark.slow  # runs are trained here

FLAT = {
    "data.batch_size": 4,
    "data.window": 16,
    "model.width": 16,
    "model.layers": 1,
    "model.transformer.heads": 2,
    "model.transformer.feed_forward_width": 32,
    "optimizer.warmup_steps": 2,
    "train.steps": 12,
    "train.steps_per_dispatch": 3,
    "train.max_skipped_steps": 3,
    "eval.every_steps": 6,
    "eval.batch_size": 4,
    "checkpoint.every_steps": 6,
    "log.every_steps": 3,
    "sample.prompt": "The ",
    "sample.length": 8,
    "sample.temperatures": (0.5, 1.0),
}
ARMS = {"lstm": {"model.backbone": "lstm"}, "transformer": {"model.backbone": "transformer"}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


def asked(text, changes=None, chosen=None):
    config = base.get_config()
    config.update_from_flattened_dict(FLAT | {"corpus.path": text})
    config = sweeps.compare(config, ARMS if chosen is None else chosen)
    config.update_from_flattened_dict(
        {
            "compare.seeds": 2,
            "compare.learning_rates": (1e-3, 1e-2),
            "compare.dev_fraction": 0.2,
            "compare.ngram_orders": (3,),
            "compare.rule.block": 32,
            "compare.budget.kind": "parameters",
            "compare.budget.tolerance": 0.1,
        }
        | (changes or {})
    )
    return arms.from_dict(config)


@pytest.fixture(scope="module")
def done(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "duel"
    return folder, compare.Session(asked(text), folder).run()


def without_times(results):
    """As JSON, with the seconds left out."""
    plain = json.loads(json.dumps(results))
    for arm in plain["arms"]:
        del arm["seconds_per_run"]
    return plain


def test_every_run_is_there_with_its_losses(done):
    folder, results = done
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    sizes = [arm["parameters"] for arm in results["arms"]]
    assert abs(sizes[0] / sizes[1] - 1) < 0.1
    for arm in results["arms"]:
        assert [(row["learning_rate"], row["seed"]) for row in arm["tuning"]] == [(1e-3, 0), (1e-2, 0)]
        best = min(arm["tuning"], key=lambda row: row["dev_loss"])
        assert arm["learning_rate"] == best["learning_rate"]
        assert arm["seconds_per_run"] > 0
        for seed, run in enumerate(arm["runs"]):
            assert (run["seed"], run["status"]) == (seed, "done")
            nats = np.load(folder / run["nats"])
            assert nats.dtype == np.float32
            assert len(nats) == results["corpus"]["validation_tokens"] - 1
            np.testing.assert_allclose(nats.mean(dtype=np.float64), run["loss"])
            assert [step for step, _ in run["curve"]] == [6, 12]
            assert [s["temperature"] for s in run["samples"]] == [0.5, 1.0]
    assert [b["name"] for b in results["baselines"]] == ["3-gram", "3-gram, whole context"]
    assert (folder / "report.html").exists()
    assert not list((folder / "jobs").iterdir())  # the checkpoints of all together are gone


def test_a_run_is_an_ordinary_one(done):
    folder, results = done
    run = results["arms"][0]["runs"][1]
    lm = textgen.load(folder / "lstm" / "1")
    assert lm.config.seed == 1
    assert lm.config.optimizer.learning_rate == results["arms"][0]["learning_rate"]
    sample = run["samples"][1]
    made = lm.samples("The ", length=8, num_samples=2, temperature=[0.5, 1.0], seed=0)
    assert made[1].text == sample["text"]
    rows = logs.read_metrics(folder / "lstm" / "1")
    assert [row["step"] for row in rows if "train/loss" in row] == [3, 6, 9, 12]
    assert list((folder / "lstm" / "1").glob("events.out.tfevents.*"))


def test_the_report_of_a_real_comparison(done, tmp_path):
    """With the column of dynamic evaluation, made from the runs' own checkpoints."""
    folder = tmp_path / "duel"
    shutil.copytree(done[0], folder)
    dynamic.add(folder)
    report.write(folder)
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert (folder / "report.html").stat().st_size > 50_000
    for arm in done[1]["arms"]:
        assert f"| {arm['name']}, learning as it reads | dynamic evaluation |" in markdown
        for run in arm["runs"]:
            assert f"{run['seed']}: {run['loss']:.4f}" in markdown
    for section in ("3-gram", "Position", "Frequency", "Repetition", "Samples", "tuned", "Protocol"):
        assert section in markdown


def test_what_is_done_is_not_done_again(done, text, monkeypatch):
    folder, results = done
    monkeypatch.setattr(jobs.Job, "train", lambda *_, **__: pytest.fail("trained again"))
    assert compare.Session(asked(text), folder).run() == json.loads(json.dumps(results))


def test_a_comparison_killed_again_and_again_goes_on_to_the_same_results(done, text, tmp_path, monkeypatch):
    """Killed without warning behind a checkpoint, at a run's end, and before the first checkpoint; then stopped
    by a signal; then killed between two seeds' results; then let be."""
    begun, when, original = [0], [None], jobs.Job.train

    class Killed(BaseException):
        pass

    def train_a_while(self, *, on_step, **rest):
        begun[0] += 1

        def dying(step, *others):
            if (begun[0], step) == when[0]:
                raise Killed
            if when[0] == "signal" and begun[0] == 1:
                signal.raise_signal(signal.SIGTERM)
            on_step(step, *others)

        return original(self, on_step=dying, **rest)

    monkeypatch.setattr(jobs.Job, "train", train_a_while)
    monkeypatch.setattr(compare.report, "write", lambda folder: [])
    folder = tmp_path / "duel"
    # At a step of the nth job of each launch: lstm's tuning, lstm's runs, the transformer's runs.
    for when[0], end in (((1, 9), Killed), ((3, 12), Killed), ((2, 3), Killed), ("signal", loop.Interrupted)):
        begun[0] = 0
        with pytest.raises(end):
            compare.Session(asked(text), folder).run()
    finish, finished = compare.Session._finish, []

    def finish_one(self, job, index, run):
        if finished and when[0] == "between results":
            raise Killed
        finished.append(run)
        return finish(self, job, index, run)

    monkeypatch.setattr(compare.Session, "_finish", finish_one)
    begun[0], when[0] = 0, "between results"
    with pytest.raises(Killed):
        compare.Session(asked(text), folder).run()
    begun[0], when[0] = 0, None
    results = compare.Session(asked(text), folder).run()
    assert begun[0] == 1
    assert without_times(results) == without_times(done[1])
    for path in (folder / "nats").rglob("*.npy"):
        np.testing.assert_array_equal(np.load(path), np.load(done[0] / path.relative_to(folder)))
    for run in ("lstm/0", "transformer/1"):
        steps = lambda where: [r["step"] for r in logs.read_metrics(where)]
        assert steps(folder / run) == steps(done[0] / run)


def test_an_arm_that_fails_and_one_that_diverges_are_reported(text, tmp_path, monkeypatch):
    original = jobs.Job.train

    def train_or_fail(self, **rest):
        if self.config.model.backbone == "lstm":
            raise RuntimeError("RESOURCE_EXHAUSTED: out\nof memory")
        return original(self, **rest)

    monkeypatch.setattr(jobs.Job, "train", train_or_fail)
    monkeypatch.setattr(compare.report, "write", lambda folder: [])
    chosen = ARMS | {"wild": {"optimizer.name": "sgd", "optimizer.weight_decay": 1e30}}
    changes = {"compare.learning_rates": (), "compare.budget.kind": "tokens"}
    results = compare.Session(asked(text, changes, chosen), tmp_path / "duel").run()
    status = {arm["name"]: [(run["status"], run["error"]) for run in arm["runs"]] for arm in results["arms"]}
    assert status["lstm"] == [("failed", "RESOURCE_EXHAUSTED: out of memory")] * 2
    assert status["transformer"] == [("done", None)] * 2
    assert [s for s, _ in status["wild"]] == ["diverged"] * 2
    assert "not finite for 3 steps in a row" in status["wild"][0][1]
    monkeypatch.setattr(jobs.Job, "train", original)  # a failed arm is tried again, the others are not
    again = compare.Session(asked(text, changes, chosen), tmp_path / "duel").run()
    assert [run["status"] for run in again["arms"][0]["runs"]] == ["done"] * 2


@pytest.mark.slow
def test_a_loss_that_is_not_finite_counts_as_diverged(text, tmp_path, monkeypatch):
    """Also where the steps that blow up are too few to give up."""
    monkeypatch.setattr(compare.report, "write", lambda folder: [])
    chosen = {
        "good": {"model.layers": 1},
        "wild": {"model.layers": 1, "optimizer.name": "sgd", "optimizer.weight_decay": 1e30},
    }
    rates = {"compare.learning_rates": (1e-3,), "compare.budget.kind": "tokens", "train.max_skipped_steps": 500}
    results = compare.Session(asked(text, rates, chosen), tmp_path / "tuned").run()
    assert [[row["dev_loss"] is None for row in arm["tuning"]] for arm in results["arms"]] == [[False], [True]]
    assert results["arms"][1]["runs"][0]["error"] == "it diverged with every learning rate"
    results = compare.Session(asked(text, rates | {"compare.learning_rates": ()}, chosen), tmp_path / "fixed").run()
    assert [[run["status"] for run in arm["runs"]] for arm in results["arms"]] == [["done"] * 2, ["diverged"] * 2]
    assert "not finite at the last step" in results["arms"][1]["runs"][0]["error"]


def test_a_stop_while_the_folder_is_made_and_another_tokenizer_change_nothing(done, text, tmp_path):
    folder, names = tmp_path / "r", ("plan.json", "tokenizer.json", "corpus.json", "comparison.json")
    for made in range(1, 4):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in names[:made]:
            shutil.copy(done[0] / name, folder)
        compare.Session(asked(text), folder)
        assert {path.name for path in folder.iterdir()} == set(names)
    kept = json.loads((folder / "tokenizer.json").read_text())
    other = kept | {"alphabet": kept["alphabet"][::-1]}  # as a tokenizer of the user's might have changed
    (folder / "tokenizer.json").write_text(json.dumps(other))
    assert compare.Session(asked(text), folder).dataset.tokenizer.state() == other


def test_arms_that_differ_in_the_rate_alone_are_one_program(text, tmp_path, monkeypatch):
    seen = []
    original = jobs.Job.__init__
    monkeypatch.setattr(
        jobs.Job, "__init__", lambda self, runs, *a, **k: (seen.append(len(runs)), original(self, runs, *a, **k))[1]
    )
    monkeypatch.setattr(compare.report, "write", lambda folder: [])
    chosen = sweeps.product({"optimizer.learning_rate": [1e-3, 3e-3]})
    changes = {"compare.learning_rates": (), "compare.budget.kind": "tokens", "compare.ngram_orders": ()}
    results = compare.Session(asked(text, changes, chosen), tmp_path / "sweep").run()
    assert seen == [4]
    assert [arm["learning_rate"] for arm in results["arms"]] == [1e-3, 3e-3]


def test_a_folder_of_another_comparison_is_refused(done, text, tmp_path):
    folder, _ = done
    with pytest.raises(UserError, match=r"another comparison: compare.rule.block was 32, is 64; train.steps was 12"):
        compare.Session(asked(text, {"compare.rule.block": 64, "train.steps": 24}), folder)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    compare.Session(asked(text, {"compare.title": "Another heading", "log.every_steps": 6}), copy)  # may change
    saved = json.loads((copy / "comparison.json").read_text())
    del saved["config"]["model"]["scan_layers"]
    (copy / "comparison.json").write_text(json.dumps(saved))
    compare.Session(asked(text), copy)  # a key that was not there yet
    plan = json.loads((copy / "plan.json").read_text())
    name, count = next(iter(plan["parameters"].items()))
    plan["parameters"][name] += 1
    (copy / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match=f"'{name}' with {count + 1:,} parameters, and the code now makes {count:,}"):
        compare.Session(asked(text), copy)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no comparison"):
        compare.Session(asked(text), tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "chosen", "message"),
    [
        ({"compare.budget.value": 3.0}, None, "no width comes within"),
        ({"compare.dev_fraction": 0.9999}, None, "A window takes"),
        ({"sample.prompt": "\u2603"}, None, "sample.prompt"),
        ({"sample.prompt": ""}, None, "sample.prompt: The prompt is empty"),
        ({"eval.window": 9999}, None, "eval.window=9999 takes 10000 tokens"),
        ({"mesh.fsdp": 2}, None, "whole on every device"),
        (
            {"compare.budget.kind": "tokens", "compare.budget.value": 768.0},
            {"a": {"model.layers": 1}, "b": {"model.layers": 1, "model.transformer.heads": 2}},
            "do not differ",
        ),
    ],
)
def test_what_cannot_be_compared_leaves_no_folder(text, tmp_path, changes, chosen, message):
    with pytest.raises(UserError, match=message):
        compare.Session(asked(text, changes, chosen), tmp_path / "no")
    assert not (tmp_path / "no").exists()
