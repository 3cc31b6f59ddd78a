"""The strict border between what a person wrote and what the library runs on.

A ConfigDict (or a run's config.json) comes in; the frozen dataclasses of textgen/schema.py go
out. Every refusal is one line that says what was wanted, what was given and what to do.
`configs/base.py` gives each key its value and unit.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from textgen.errors import UserError, did_you_mean, note, require
from textgen.schema import (
    CheckpointConfig,
    Config,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    MinGRUConfig,
    ModelConfig,
    NGramConfig,
    OptimizerConfig,
    SampleConfig,
    TokenizerConfig,
    TrainConfig,
    TransformerConfig,
)

__all__ = [
    "CheckpointConfig", "Config", "CorpusConfig", "DataConfig", "EvalConfig", "LogConfig", "MeshConfig",
    "MinGRUConfig", "ModelConfig", "NGramConfig", "OptimizerConfig", "SampleConfig", "TokenizerConfig",
    "TrainConfig", "TransformerConfig", "UserError", "check_overrides", "check_resume", "did_you_mean",
    "differences", "flatten", "from_dict", "require", "to_dict",
]  # fmt: skip

# What may differ when a run is resumed: how long, how often, where, but never what is learned.
MAY_CHANGE = (
    "train.steps",
    "train.steps_per_dispatch",
    "train.max_skipped_steps",
    "eval.",
    "sample.",
    "checkpoint.",
    "log.",
    "mesh.",
)

READ_BY_NGRAM = ("seed", "corpus.", "tokenizer.", "data.window", "model.backbone", "model.ngram.", "eval.", "sample.")


def _convert(value: Any, wanted: Any, path: str) -> Any:
    """`value` as the annotated type, or UserError. Ints become floats; nothing else is bent."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, next(a for a in args if a is not type(None)), path)
    if dataclasses.is_dataclass(wanted):
        return build(value, wanted, path + ".")
    if origin is Literal:
        require(
            value in args,
            f"{path} must be one of {', '.join(map(repr, args))}, got {value!r}."
            + (did_you_mean(value, args) if isinstance(value, str) and value not in args else ""),
        )
        return value
    if origin is tuple:
        require(isinstance(value, (tuple, list)), f"{path} must be a tuple, got {value!r}.")
        return tuple(_convert(v, args[0], f"{path}[{i}]") for i, v in enumerate(value))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    right = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
    require(right, f"{path} must be of type {wanted.__name__}, got {value!r}.")
    require(wanted is not float or math.isfinite(value), f"{path} must be finite, got {value}.")
    return value


def build(source: Any, kind: type, prefix: str) -> Any:
    """The frozen dataclass `kind` from a mapping with exactly its keys; `prefix` names them in refusals."""
    require(isinstance(source, Mapping), f"{prefix[:-1]} must be a group of keys, got {source!r}.")
    fields = typing.get_type_hints(kind)
    for key in source:
        require(key in fields, f"Unknown config key '{prefix}{key}'.{did_you_mean(str(key), fields)}")
    known = {field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
    for key in fields:
        # A key with a default is younger than some saved runs, which did what its default says.
        require(key in source or key in known, f"The config lacks the key '{prefix}{key}': start from configs/base.py.")
    given = {key: wanted for key, wanted in fields.items() if key in source}
    return kind(**{key: _convert(source[key], wanted, prefix + key) for key, wanted in given.items()})


def from_dict(source: ConfigDict | Mapping) -> Config:
    """The frozen Config for a ConfigDict or for what `to_dict` gave.

    Raises:
      UserError: an unknown or missing key, a wrong type, an impossible value or relation.
    """
    if isinstance(source, ConfigDict):
        source = source.to_dict()
    for section in ("compare", "probes"):
        require(section not in source, f"The config has a section '{section}': it is for experiments.{section}.")
    return build(source, Config, "")


def shorten_warmup(source: ConfigDict, overrides: Iterable[str] = ()) -> ConfigDict:
    """Return `source` with a warm-up that ends before the last step, and say so on stderr where it was too long.

    A Config itself refuses such a warm-up. This is for what a user wrote: a config whose train.steps alone was
    lowered. It is a function of the config, so the same command resumes the same run.

    Args:
      source: the user's config; it is left as it is.
      overrides: the keys set on the command line. A warm-up that was set there is not changed.
    """
    flat = flatten(source.to_dict())
    warmup, steps = flat.get("optimizer.warmup_steps"), flat.get("train.steps")
    checked = isinstance(warmup, int) and isinstance(steps, int)  # other types are refused by from_dict
    if not checked or not 0 < steps <= warmup or "optimizer.warmup_steps" in overrides:
        return source
    note(f"optimizer.warmup_steps={warmup} is shortened to {steps // 10}: train.steps={steps}.")
    shortened = source.copy_and_resolve_references()
    shortened.optimizer.warmup_steps = steps // 10
    return shortened


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict, equal after a trip through JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def differences(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, as key -> (old, new)."""
    old, new = flatten(old), flatten(new)
    return {k: (old.get(k), new.get(k)) for k in sorted({*old, *new}) if old.get(k) != new.get(k)}


READ_WITH = {  # key -> (the key that decides whether it is read, with which of its values; (): with any but None)
    "optimizer.momentum": ("optimizer.name", ("muon", "sgd")),
    "optimizer.newton_schulz_steps": ("optimizer.name", ("muon",)),
    "optimizer.beta1": ("optimizer.name", ("adamw", "muon", "lion")),
    "optimizer.beta2": ("optimizer.name", ("adamw", "muon", "lion")),
    "optimizer.final_fraction": ("optimizer.schedule", ("cosine", "linear", "wsd")),
    "optimizer.decay_fraction": ("optimizer.schedule", ("wsd",)),
    "tokenizer.vocab_size": ("tokenizer.kind", ("words", "bpe")),
    "model.context": ("model.backbone", ("transformer", "hybrid")),
    "model.transformer.rope_base": ("model.transformer.positions", ("rope",)),
    "log.profile_steps": ("log.profile_step", ()),
}


def check_overrides(config: Config, overrides: Mapping[str, Any]) -> None:
    """Refuses a flag that nothing would read: no setting is skipped in silence."""
    for key in overrides:
        require(
            config.model.backbone != "ngram" or key.startswith(READ_BY_NGRAM),
            f"--config.{key} belongs to models that are trained, and an n-gram is counted: leave it out.",
        )
        group = key.split(".")[1] if key.startswith("model.") and key.count(".") == 2 else None
        require(
            group is None or group in config.model.groups,
            f"--config.{key} belongs to the {group}, and model.backbone is '{config.model.backbone}'.",
        )
        if key in READ_WITH:
            decides, values = READ_WITH[key]
            chosen = flatten(to_dict(config))[decides]
            where = f"with {decides}={' or '.join(values)}" if values else f"where {decides} is set"
            require(
                chosen in values if values else chosen is not None,
                f"--config.{key} is read {where}, and it is {chosen}: leave it out.",
            )


def check_resume(saved: Config, given: Config) -> None:
    """Raises UserError when `given` would train something other than the run that `saved` began."""
    contradictions = {
        k: v for k, v in differences(to_dict(saved), to_dict(given)).items() if not k.startswith(MAY_CHANGE)
    }
    listed = "; ".join(f"{k} was {old!r}, is {new!r}" for k, (old, new) in contradictions.items())
    require(not contradictions, f"This workdir holds another run: {listed}. Give a new --workdir, or the old values.")
