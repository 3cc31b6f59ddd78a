"""What a comparison adds to a config: arms, written out or as a sweep, and every key of `compare` with its unit.

    config = sweeps.compare(config, {"lstm": {"model.backbone": "lstm"}, "deep": {"model.layers": 8}})
    config = sweeps.compare(config, sweeps.product({"model.layers": [2, 4], "model.backbone": ["lstm", "transformer"]}))

An arm is a name and the keys in which it departs from the config, dotted. Arms stand in the order of their names.
"""

import ast
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from textgen.config import did_you_mean, flatten, require

Arms = Mapping[str, Mapping[str, Any]]


def product(settings: Mapping[str, Sequence[Any]]) -> Arms:
    """An arm for every combination of the values: {"model.layers": [2, 4], "model.backbone": [...]}."""
    return _named(settings, itertools.product(*settings.values()))


def zip_(settings: Mapping[str, Sequence[Any]]) -> Arms:
    """An arm for the first values, one for the second, and so on; every key has as many."""
    counts = {key: len(values) for key, values in settings.items()}
    require(len(set(counts.values())) == 1, f"zip_ goes through its values in step, and their counts differ: {counts}.")
    return _named(settings, zip(*settings.values(), strict=True))


def parse(text: str) -> Arms:
    """The product that a flag describes: "optimizer.learning_rate=1e-3,3e-3 model.backbone=lstm,transformer"."""
    settings = {}
    for part in text.split():
        key, equals, values = part.partition("=")
        require(key and equals and all(values.split(",")), f"A sweep is written 'key=value,value ...', got '{part}'.")
        require(key not in settings, f"The sweep names {key} twice.")
        settings[key] = [_value(value) for value in values.split(",")]
    require(settings, "The sweep is empty: write 'key=value,value ...'.")
    return product(settings)


def from_text(config: ConfigDict, text: str) -> ConfigDict:
    """The config with the arms that a flag describes; what it says of `compare.` are settings, of one value each.

    Raises:
      UserError: what is no sweep, a key that there is not, or several values of a setting.
    """
    parts = text.split()
    config = compare(config, parse(" ".join(part for part in parts if not part.startswith("compare."))))
    known = flatten(config.compare.to_dict(), "compare.")
    for part in parts:
        key, _, value = part.partition("=")
        if part.startswith("compare."):
            require(key in known, f"The sweep: unknown config key '{key}'.{did_you_mean(key, known)}")
            value = _value(value)
            whole = isinstance(known[key], float) and isinstance(value, int)
            try:
                config.update_from_flattened_dict({key: float(value) if whole else value})
            except TypeError:
                require(False, f"The sweep: {key} is {known[key]!r} by default, and takes no {value!r}.")
    return config


def compare(config: ConfigDict, arms: Arms) -> ConfigDict:
    """The config with a section `compare`; a section that is there keeps all but its arms.

    Raises:
      UserError: an arm overrides a key that no config has.
    """
    known = flatten(config.to_dict())
    for name, overrides in arms.items():
        for key in overrides:
            require(key in known, f"Arm '{name}': unknown config key '{key}'.{did_you_mean(key, known)}")
    with config.unlocked():
        if "compare" not in config:
            config.compare = _defaults()
        trees = {name: _nest(overrides) for name, overrides in arms.items()}
        config.compare.arms = ConfigDict(trees, allow_dotted_keys=True)  # names with numbers such as 0.001
    return config


def _defaults() -> ConfigDict:
    compare = ConfigDict()
    compare.title = ""  # heads the report; empty: the names of the arms
    compare.arms = ConfigDict()  # name -> overrides of the config
    compare.seeds = 3  # runs of each arm: seed, seed + 1, ...
    compare.at_once = placeholder(int)  # runs trained in one program; None: as many as the device likes
    compare.learning_rates = ()  # tried for each arm, each with a full run; empty: no tuning
    compare.tuning_seeds = 1  # runs for each learning rate
    compare.dev_fraction = 0.05  # of the training text, cut from its end: tuning trains without it and selects on it
    compare.ngram_orders = (5, 7)  # baselines without a gradient; empty: none

    compare.budget = ConfigDict()
    compare.budget.kind = "tokens"  # held equal: parameters, flops, tokens, seconds; all of one run's training
    compare.budget.value = placeholder(float)  # of that kind; None: what the config takes without any arm's overrides
    compare.budget.solve_for = placeholder(str)  # width, steps; None: width for parameters, else steps
    compare.budget.tolerance = 0.02  # relative; how far a width may miss

    compare.rule = ConfigDict()  # of the verdict, fixed before the run
    compare.rule.confidence = 0.95  # of intervals
    compare.rule.block = 512  # tokens that count as one: neighbours are alike
    compare.rule.smallest_difference = 0.01  # nats per character; less is of no interest
    return compare


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _named(settings: Mapping[str, Sequence[Any]], rows: Any) -> Arms:
    """Names from the values: 'lstm', or 'layers=2,lstm'."""
    arms = {}
    for row in rows:
        overrides = dict(zip(settings, row, strict=True))
        name = ",".join(v if isinstance(v, str) else f"{k.split('.')[-1]}={v}" for k, v in overrides.items())
        require(name not in arms, f"Two arms are the same: {name}.")
        arms[name] = overrides
    return arms


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{'a.b': 1} -> {'a': {'b': 1}}."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, last = key.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return tree
