"""The table of probes: cells from a config, resume, failure, the report; and a tiny one end to end."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_params, tiny

from configs import probes as table
from textgen import models
from textgen.comparison import probes
from textgen.config import UserError
from textgen.data import tasks

pytestmark = pytest.mark.slow  # runs are trained here


def config_of(arg="parity,hidden_markov", overrides=None):
    config = table.get_config(arg)
    for name in config.probes.tasks:
        config.probes.tasks[name].data.window, config.probes.tasks[name].train.steps = 20, 6
    flat = {
        "model.width": 8,
        "model.layers": 1,
        "model.transformer.feed_forward_width": 8,
        "optimizer.warmup_steps": 2,
        "train.steps_per_dispatch": 4,
        "data.batch_size": 4,
        "probes.lengths": (1, 2),
        "probes.eval_windows": 64,
        "probes.backbones": ("lstm", "transformer"),
        "probes.learning_rates": (1e-3, 1e-2),
        "probes.seeds": 2,
    }
    config.update_from_flattened_dict(flat | (overrides or {}))
    return config


def test_the_table_that_ships_is_whole():
    cells = probes.cells_from(table.get_config())
    assert {cell.task for cell in cells} == set(tasks.TASKS)
    assert {cell.config.model.backbone for cell in cells} == set(models.BACKBONES)
    for cell in cells:  # attention sees the whole of the longest window
        assert cell.config.context >= cell.config.data.window * cell.probes.lengths[-1]


def test_a_table_end_to_end_and_again(tmp_path, monkeypatch):
    cells = probes.cells_from(config_of(overrides={"probes.backbones": ("lstm",)}))
    report = probes.Probes(cells, tmp_path).run()
    assert (tmp_path / "report.md").read_text() == report
    assert "| parity | 20 | lstm |" in report
    assert "| hidden_markov | 1.0947 | 20 | lstm |" in report
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"parity-lstm", "hidden_markov-lstm"}
    for name, result in results.items():
        assert [(r["seed"], r["learning_rate"]) for r in result["runs"]] == [(0, 1e-3), (0, 1e-2), (1, 1e-3), (1, 1e-2)]
        for run in result["runs"]:
            for score in run["lengths"].values():
                np.testing.assert_allclose(score["loss"] - score["optimum"], score["excess"], atol=1e-5)
                assert 0 < score["standard_error"] < 0.2
        assert ("parity" in name) == (result["runs"][0]["lengths"]["1"]["optimum"] == 0)
    # Finished cells are not run again: nothing is left that could train.
    monkeypatch.setattr(probes, "run_cell", None)
    assert probes.Probes(cells, tmp_path).run() == report


def test_an_excess_that_is_the_same_everywhere_has_no_error(monkeypatch):
    same = lambda model, params, windows, targets: (np.full(targets.shape, 0.5, np.float32), targets >= 0)
    monkeypatch.setattr(probes, "_predict", same)
    model = models.build(tiny({}), 8)
    for task in ("copy", "counting", "associative_recall"):  # windows of unequal numbers of targets
        found = probes.evaluate(model, None, task, 32, 512, 7)
        assert found["excess"] == pytest.approx(0.5)
        assert found["standard_error"] < 1e-9


def test_what_every_task_has_of_its_own_and_what_probes_do_not_read_is_refused():
    for key, message in (("train.steps", "set probes.tasks.parity.train.steps"), ("optimizer.learning_rate", "rates")):
        with pytest.raises(UserError, match=message):
            probes.cells_from(table.get_config("parity"), {key: 1})
    config = table.get_config("parity")
    config.seed = 7
    assert {seed for cell in probes.cells_from(config) for seed, _ in cell.members} == {7}


def test_a_failed_cell_is_reported_and_run_again(tmp_path, monkeypatch):
    cells = probes.cells_from(config_of("parity"))
    whole, broken = probes.run_cell, lambda *_: 1 / 0
    monkeypatch.setattr(probes, "run_cell", lambda cell, *rest: (broken if "lstm" in cell.name else whole)(cell, *rest))
    report = probes.Probes(cells, tmp_path).run()
    assert "| lstm | ZeroDivisionError: division by zero |" in report
    assert "| transformer | 0.0" in report
    ran = []
    monkeypatch.setattr(probes, "run_cell", lambda cell, *rest: ran.append(cell.name) or whole(cell, *rest))
    assert "ZeroDivisionError" not in probes.Probes(cells, tmp_path).run()
    assert ran == ["parity-lstm"]


def test_a_run_that_diverges_does_not_count(tmp_path):
    config = config_of("parity", {"probes.learning_rates": (1e-2, 1e30), "train.max_skipped_steps": 2})
    config.optimizer.name, config.optimizer.clip_norm = "sgd", None
    config.probes.backbones = ("lstm",)
    (cell,) = probes.cells_from(config)
    result = probes.run_cell(cell, lambda *_: None, lambda: False)
    assert ["diverged" in run for run in result["runs"]] == [False, True, False, True]
    assert {run["learning_rate"] for run in probes.chosen(result)} == {1e-2}


def test_evaluate_is_the_mean_over_what_is_scored():
    config = config_of("copy", {"probes.backbones": ("transformer",)})
    (cell,) = probes.cells_from(config)
    model = models.build(cell.config, tasks.find("copy").vocab_size)
    params = noisy_params(model)
    score = probes.evaluate(model, params, "copy", 12, 128, 7)
    batches = tasks.Batches("copy", window=12, batch_size=probes.ROWS, seed=7)
    tokens, targets, _ = (part.reshape(128, -1) for part in batches.with_best(0, 2))
    logits, _ = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens[:, :-1]))
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    rows, places = np.nonzero(targets >= 0)
    nats = -log_p[rows, places, targets[rows, places]]
    np.testing.assert_allclose(score["loss"], nats.mean(), rtol=1e-5)
    np.testing.assert_allclose(score["excess"], nats.mean(), rtol=1e-5)
    np.testing.assert_allclose(score["accuracy"], (log_p.argmax(-1) == targets)[rows, places].mean(), atol=1e-12)


def test_the_rate_is_chosen_by_the_mean_over_seeds_on_windows_of_its_own():
    run = lambda rate, seed, loss: {"learning_rate": rate, "seed": seed, "choosing": {"loss": loss}}
    runs = [run(1.0, 0, 0.1), run(2.0, 0, 0.3), run(1.0, 1, 0.9), run(2.0, 1, 0.4)]
    assert [r["seed"] for r in probes.chosen({"runs": runs})] == [0, 1]
    assert {r["learning_rate"] for r in probes.chosen({"runs": runs})} == {2.0}
    assert probes.chosen({"error": "none"}) == []


@pytest.mark.parametrize(
    ("arg", "overrides", "message"),
    [
        ("parety", {}, r"Unknown task 'parety'.* Did you mean 'parity'"),
        ("parity", {"probes.backbones": ("lsmt",)}, r"Unknown backbone 'lsmt'.* Did you mean 'lstm'"),
        ("parity", {"probes.lengths": (2, 4)}, r"begin with 1 and rise, got \(2, 4\)"),
        ("parity", {"probes.learning_rates": (-1.0,)}, r"must be above 0, got -1"),
        ("parity", {"probes.eval_windows": 100}, r"multiple of 64, got 100"),
        ("parity", {"model.width": 0}, r"model.width must be above 0"),
        ("associative_recall", {"probes.lengths": (1, 16)}, r"fills windows of 16 to 128 tokens, got 320"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(arg, overrides, message):
    with pytest.raises(UserError, match=message):
        probes.cells_from(config_of(arg, overrides))


def test_a_key_that_no_config_has_is_refused():
    config = config_of("parity").to_dict()
    config["probes"]["tasks"]["parity"]["train"]["stepps"] = 3
    with pytest.raises(UserError, match=r"probes.tasks.parity: unknown config key 'train.stepps'.* Did you mean"):
        probes.cells_from(config)


def test_a_workdir_of_something_else_is_refused(tmp_path):
    cells = probes.cells_from(config_of("parity", {"probes.backbones": ("lstm",)}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no probes"):
        probes.Probes(cells, tmp_path / "full")
    probes.Probes(cells, tmp_path / "run").run()
    other = probes.cells_from(config_of("parity", {"probes.backbones": ("lstm",), "model.width": 16}))
    with pytest.raises(UserError, match=r"holds parity-lstm with config.model.width 8, not 16"):
        probes.Probes(other, tmp_path / "run")
    kept = tmp_path / "run" / "cells" / "parity-lstm.json"
    saved = json.loads(kept.read_text())
    del saved["settings"]["config"]["model"]["scan_layers"]
    kept.write_text(json.dumps(saved))
    assert probes.Probes(cells, tmp_path / "run").results  # a key that was not there yet
