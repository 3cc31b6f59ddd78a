"""The strict border: every key typed, every mistake one helpful line."""

import dataclasses
import importlib
import json
import typing
from pathlib import Path

import pytest
from conftest import tiny

from configs import base
from textgen import config as config_lib
from textgen import errors, models
from textgen.config import UserError
from textgen.data import dataset

CONFIGS = sorted(p.stem for p in (Path(__file__).parents[1] / "configs").glob("*.py") if p.stem != "__init__")
ELSEWHERE = {
    "base",
    "ngram",
    "sweeps",
    "lstm_vs_transformer",
    "probes",
}  # no model for every backbone; tested where used


def changed(**flat):
    source = config_lib.to_dict(tiny())
    for key, value in flat.items():
        *groups, name = key.split("__")
        group = source
        for g in groups:
            group = group[g]
        group[name] = value
    return source


def test_base_holds_every_key_and_no_other():
    def keys(kind, prefix=""):
        for name, wanted in typing.get_type_hints(kind).items():
            yield from keys(wanted, f"{prefix}{name}.") if dataclasses.is_dataclass(wanted) else [prefix + name]

    assert sorted(config_lib.flatten(base.get_config().to_dict())) == sorted(keys(config_lib.Config))


def test_every_key_of_base_has_a_comment():
    lines = Path(base.__file__).read_text().splitlines()
    bare = [line for line in lines if line.strip().startswith("config.") and "=" in line and "ConfigDict()" not in line]
    assert bare
    assert all("#" in line for line in bare)


@pytest.mark.parametrize("name", [c for c in CONFIGS if c not in ELSEWHERE])
def test_every_config_file_builds_a_model_for_every_backbone(name):
    module = importlib.import_module(f"configs.{name}")
    for arg in models.BACKBONES:
        config = config_lib.from_dict(module.get_config(arg))
        assert config.model.backbone == arg
        models.build(config, 65)


def test_there_and_back_through_json():
    config = tiny({"sample.temperatures": (0.5, 1.0)})
    assert config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__widht": 4}, r"Unknown config key 'model.widht'. Did you mean 'width'\?"),
        ({"modle": {}}, r"Unknown config key 'modle'. Did you mean 'model'\?"),
        ({"model": 3}, "model must be a group of keys, got 3"),
        ({"model__width": "wide"}, "model.width must be of type int, got 'wide'"),
        ({"model__width": True}, "model.width must be of type int, got True"),
        ({"model__width": 0}, "model.width must be above 0, got 0"),
        ({"model__width": 18}, "heads=4 must divide model.width=18"),
        ({"model__width": 12}, "RoPE turns pairs"),
        ({"model__mingru__feed_forward_width": 0}, "model.mingru.feed_forward_width must be above 0, got 0"),
        ({"model__backbone": "hybrid", "model__width": 18}, "heads=4 must divide model.width=18"),
        ({"model__transformer__kv_heads": 3}, "kv_heads=3 must divide model.transformer.heads=4"),
        ({"model__backbone": "hybrid", "model__scan_layers": True}, "model.scan_layers goes with .* got 'hybrid'"),
        ({"model__recurrence": "cudnn"}, "model.recurrence='cudnn' goes with .*'lstm', got 'transformer'"),
        (
            {"model__backbone": "lstm", "model__recurrence": "associative"},
            "goes with .*'hybrid' or 'mingru', got 'lstm'",
        ),
        ({"model__dropout": 1.0}, r"model.dropout must lie in \[0, 1\), got 1.0"),
        ({"model__norm": "rmsnrm"}, "must be one of 'rmsnorm', 'layernorm', got 'rmsnrm'. Did you mean 'rmsnorm'"),
        ({"model__transformer__attention": "fusd"}, "must be one of 'auto', 'plain', 'fused', .* mean 'fused'"),
        ({"optimizer__learning_rate": -1.0}, "optimizer.learning_rate must be above 0"),
        ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate must be finite"),
        ({"optimizer__warmup_steps": 12}, "warmup_steps=12 must be below train.steps=12"),
        ({"optimizer__adam_learning_rate": 1.0}, "goes with optimizer.name='muon'"),
        ({"optimizer__final_fraction": 1.5}, r"final_fraction must lie in \[0, 1\], got 1.5"),
        ({"optimizer__weight_decay": -0.1}, "weight_decay must be 0 or more"),
        ({"train__accumulation": 3}, "train.accumulation=3 must divide data.batch_size=4"),
        ({"train__accumulation": 2, "data__order": "stream"}, "goes with train.accumulation=1"),
        ({"mesh__data": 3}, "= 4 does not divide by 3"),
        ({"sample__temperatures": [-1.0]}, "sample.temperatures must be 0 or more, got -1.0"),
        ({"sample__temperatures": []}, "sample.temperatures is empty"),
        ({"sample__temperatures": 0.5}, "must be a tuple, got 0.5"),
        ({"corpus__path": None}, "Which text[?]"),
        ({"corpus__validation_fraction": 0.0}, "validation_fraction must be above 0"),
        ({"corpus__test_fraction": 0.95}, "leave some to train on"),
        ({"tokenizer__kind": "file"}, "tokenizer.path goes with tokenizer.kind='file'"),
        ({"seed": -1}, r"seed must lie in \[0, 2\^32\), got -1"),
        ({"model__transformer__positions": "learned", "model__context": 8}, "Learned positions end at model.context=8"),
        ({"model__transformer__positions": "learned", "data__order": "stream"}, "runs past every position"),
    ],
)
def test_a_mistake_is_named(change, message):
    with pytest.raises(UserError, match=message) as caught:
        config_lib.from_dict(changed(**change))
    assert "\n" not in str(caught.value)


def test_a_missing_key_and_an_unknown_backbone_are_named():
    source = config_lib.to_dict(tiny())
    del source["model"]["width"]
    with pytest.raises(UserError, match=r"lacks the key 'model.width'"):
        config_lib.from_dict(source)
    with pytest.raises(UserError, match=r"Unknown model.backbone 'lsmt'. Did you mean 'lstm'\?"):
        models.build(tiny({"model.backbone": "lsmt"}), 5)


def test_ints_become_floats_and_nothing_else_is_bent():
    assert config_lib.from_dict(changed(optimizer__learning_rate=1)).optimizer.learning_rate == 1.0
    with pytest.raises(UserError, match="must be of type int"):
        config_lib.from_dict(changed(train__steps=1.0))


def test_resuming_refuses_what_changes_the_model_and_allows_what_does_not():
    saved = tiny()
    config_lib.check_resume(saved, tiny({"train.steps": 99, "log.every_steps": 7, "eval.batch_size": 2}))
    with pytest.raises(UserError, match=r"model.width was 16, is 32; seed was 0, is 1"):
        config_lib.check_resume(saved, tiny({"model.width": 32, "seed": 1}))


def test_a_flag_of_another_backbone_is_refused():
    config = tiny({"model.backbone": "lstm"})
    config_lib.check_overrides(config, {"model.width": 4})
    with pytest.raises(UserError, match=r"--config.model.transformer.heads belongs to the transformer"):
        config_lib.check_overrides(config, {"model.transformer.heads": 2})
    config_lib.check_overrides(tiny({"model.backbone": "hybrid"}), {"model.transformer.heads": 2})


def test_the_split_of_tiny_shakespeare_is_nanogpts():
    corpus = tiny().corpus
    assert dataset.bounds(1_115_394, corpus)[:2] == (1_003_854, 1_115_394)


def test_base_has_every_key_and_a_saved_config_may_lack_the_youngest():
    source = base.get_config()
    source.corpus.name = "tiny_shakespeare"
    whole = config_lib.to_dict(config_lib.from_dict(source))
    assert set(config_lib.flatten(source.to_dict())) == set(config_lib.flatten(whole))
    del whole["model"]["ngram"], whole["train"]["loss_chunk"]
    assert config_lib.from_dict(whole) == config_lib.from_dict(source)
    del whole["model"]["width"]
    with pytest.raises(UserError, match=r"The config lacks the key .model\.width."):
        config_lib.from_dict(whole)


@pytest.mark.parametrize(("steps", "warmup"), [(20, 2), (100, 10), (101, 100), (9, 0), (1, 0)])
def test_a_warm_up_that_does_not_fit_is_shortened_and_says_so(steps, warmup, capsys):
    errors.note.cache_clear()
    source = base.get_config()
    source.corpus.path, source.train.steps = "unused", steps
    config = config_lib.from_dict(config_lib.shorten_warmup(source))
    assert config.optimizer.warmup_steps == warmup
    assert source.optimizer.warmup_steps == 100
    lines = capsys.readouterr().err.splitlines()
    short = [f"optimizer.warmup_steps=100 is shortened to {warmup}: train.steps={steps}."]
    assert lines == (short if warmup < 100 else [])
    saved = config_lib.from_dict(config_lib.to_dict(config))
    config_lib.check_resume(saved, config_lib.from_dict(config_lib.shorten_warmup(source)))


def test_a_warm_up_that_was_set_on_the_command_line_is_refused_and_not_shortened():
    source = base.get_config()
    source.corpus.path, source.train.steps = "unused", 20
    with pytest.raises(config_lib.UserError, match="warmup_steps=100 must be below"):
        config_lib.from_dict(config_lib.shorten_warmup(source, {"optimizer.warmup_steps": 100}))
