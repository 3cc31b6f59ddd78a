"""What is compared: sweeps, overrides, and budgets brought to be equal."""

import pytest
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import base, lstm_vs_transformer, sweeps
from textgen.comparison import arms, budget
from textgen.config import UserError

V = 65


def source(flat=None, compare=None, arm_overrides=None):
    config = base.get_config()
    config.update_from_flattened_dict({"corpus.path": "unused"} | (flat or {}))
    chosen = arm_overrides or {"a": {"model.backbone": "lstm"}, "b": {"model.backbone": "transformer"}}
    config = sweeps.compare(config, chosen)
    config.update_from_flattened_dict({f"compare.{key}": value for key, value in (compare or {}).items()})
    return config


def test_what_training_takes_beside_a_window_is_counted():
    plain = tiny({"model.backbone": "transformer"})
    ahead = tiny({"model.backbone": "transformer", "model.predict_ahead": 3})
    stream = tiny({"model.backbone": "transformer", "data.order": "stream", "model.context": 512})
    flops = [budget.cost(config, 65).train_flops for config in (plain, ahead, stream)]
    width, tokens = plain.model.width, budget.cost(plain, 65).tokens
    assert flops[1] - flops[0] == 3 * tokens * 3 * 2 * width * (2 * width + 65)
    assert flops[2] > flops[0]


def test_an_arm_that_is_counted_and_not_trained_is_refused():
    config = sweeps.compare(base.get_config(), {"a": {}, "b": {"model.backbone": "ngram"}})
    config.corpus.name = "tiny_shakespeare"
    with pytest.raises(UserError, match="Arm 'b': an n-gram is counted and not trained"):
        arms.from_dict(config)


def test_a_sweep_has_settings_of_the_comparison_too():
    config = sweeps.from_text(base.get_config(), "compare.seeds=5 model.width=8,16 compare.learning_rates=1e-3,3e-3")
    assert config.compare.seeds == 5
    assert config.compare.learning_rates == (1e-3, 3e-3)
    assert sorted(config.compare.arms) == ["width=16", "width=8"]


def test_a_sweep_is_the_product_of_its_values():
    found = sweeps.parse("optimizer.learning_rate=1e-3,3e-3 model.backbone=lstm,transformer")
    assert list(found.values()) == [
        {"optimizer.learning_rate": rate, "model.backbone": name}
        for rate in (1e-3, 3e-3)
        for name in ("lstm", "transformer")
    ]
    assert list(found) == [f"learning_rate={r},{n}" for r in (0.001, 0.003) for n in ("lstm", "transformer")]


def test_zip_goes_in_step():
    found = sweeps.zip_({"model.layers": [2, 4], "model.width": [64, 32]})
    assert found == {
        "layers=2,width=64": {"model.layers": 2, "model.width": 64},
        "layers=4,width=32": {"model.layers": 4, "model.width": 32},
    }
    with pytest.raises(UserError, match="counts differ"):
        sweeps.zip_({"model.layers": [2, 4], "model.width": [64]})


@pytest.mark.parametrize("text", ["", "model.width", "model.width=", "model.width=1,,2", "=3"])
def test_a_sweep_that_says_nothing_is_refused(text):
    with pytest.raises(UserError, match="key=value,value"):
        sweeps.parse(text)


@pytest.mark.parametrize(
    ("overrides", "compare", "message"),
    [
        ({"a": {"model.layers": 2}, "b": {"model.layers": 2}}, {}, "'a' and 'b' do not differ"),
        ({"a": {"model.layers": 2}}, {}, "two arms or more, got 1"),
        ({"a": {}, "b": {"model.layers": 0}}, {}, "Arm 'b': model.layers must be above 0"),
        ({"a": {}, "b": {"model.layers": "two"}}, {}, "Arm 'b': model.layers must be of type int"),
        ({"a": {}, "b": {"corpus.path": "x"}}, {}, "Arm 'b': corpus.path must be the same for all arms"),
        ({"a": {}, "b": {"seed": 3}}, {}, "Arm 'b': seed must be the same for all arms"),
        ({"a": {}, "b": {"data.window": 64}}, {}, "windows of different lengths"),
        (
            {"a": {}, "b": {"train.steps": 640}},
            {},
            "Arm 'b': train.steps is what the budget of equal tokens solves for",
        ),
        ({"a": {}, "b": {"optimizer.learning_rate": 1e-2}}, {"learning_rates": (1e-3,)}, "leave out one of the two"),
        (
            {"a": {}, "b": {"model.backbone": "lstm", "model.transformer.heads": 2}},
            {},
            "Arm 'b': --config.model.transformer.heads belongs to the transformer",
        ),
        ({"a": {}, "b/c": {"model.layers": 2}}, {}, "An arm's name is that of a folder"),
        (None, {"seeds": 1}, "compare.seeds=1: intervals and a verdict take 2 seeds or more"),
        (None, {"budget.kind": "parameter"}, "Did you mean 'parameters'"),
        (None, {"budget.kind": "tokens", "budget.solve_for": "width"}, "solving for steps, not width"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(overrides, compare, message):
    with pytest.raises(UserError, match=message):
        arms.from_dict(source(compare=compare, arm_overrides=overrides))


def test_an_override_that_no_config_has_is_refused():
    with pytest.raises(UserError, match=r"Arm 'b': unknown config key 'model.widht'. Did you mean 'model.width'"):
        source(arm_overrides={"a": {}, "b": {"model.widht": 3}})
    with pytest.raises(UserError, match=r"unknown config key 'model.widht'. Did you mean 'model.width'"):
        arms.overlay(tiny(), {"model.widht": 3})
    with pytest.raises(UserError, match="no section 'compare'"):
        arms.from_dict(base.get_config())


@pytest.mark.parametrize("arg", ["cpu", "gpu"])
def test_the_duel_is_of_equal_parameters(arg):
    asked = arms.from_dict(lstm_vs_transformer.get_config(arg))
    _, solved = budget.solve(asked.base, asked.configs, asked.compare.budget, V, lambda config: 0.0)
    sizes = [budget.cost(config, V).parameters for config in solved.values()]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02
    assert len({budget.cost(config, V).tokens for config in solved.values()}) == 1


def solve(kind, value=None, solve_for=None, tolerance=0.02, step_seconds=lambda config: 0.0):
    value = None if value is None else float(value)
    wanted = arms.BudgetConfig(kind=kind, value=value, solve_for=solve_for, tolerance=tolerance)
    configs = {name: tiny({"model.backbone": name, "model.width": 64}) for name in ("transformer", "lstm")}
    value, solved = budget.solve(configs["transformer"], configs, wanted, V, step_seconds)
    return value, {name: budget.cost(config, V) for name, config in solved.items()}


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["parameters", "flops"]), st.floats(1.0, 100.0))
def test_a_width_meets_the_budget(kind, factor):
    least = {"parameters": 3e4, "flops": 2e8}[kind]
    value, costs = solve(kind, least * factor, "width", 0.25)
    for cost in costs.values():
        assert abs({"parameters": cost.parameters, "flops": cost.train_flops}[kind] / value - 1) <= 0.25


def test_without_a_value_the_config_stays_as_it_is():
    value, costs = solve("parameters")
    assert costs["transformer"].width == 64
    assert costs["transformer"].parameters == value
    assert costs["lstm"].width != 64
    assert abs(costs["lstm"].parameters / value - 1) < 0.02
    _, costs = solve("parameters", tolerance=0.2)
    assert costs["lstm"].width % 8 == 0  # a round one is near enough


def test_steps_meet_the_budget():
    value, costs = solve("flops", 1e10)
    for cost in costs.values():
        assert cost.width == 64
        assert abs(cost.train_flops / value - 1) < 0.02
    _, costs = solve("tokens", 64 * 100)
    assert {cost.steps for cost in costs.values()} == {100}
    times = {"transformer": 0.5, "lstm": 0.25}
    _, costs = solve("seconds", 100.0, step_seconds=lambda config: times[config.model.backbone])
    assert {name: cost.steps for name, cost in costs.items()} == {"transformer": 200, "lstm": 400}
    value, costs = solve("seconds", step_seconds=lambda config: times[config.model.backbone])
    assert (value, costs["lstm"].steps) == (6.0, 24)


def test_a_budget_that_cannot_be_met_names_the_nearest_widths():
    with pytest.raises(UserError, match=r"no width comes within 0.1% of 20,000.*width \d+ has .*; width \d+ has .*\+"):
        solve("parameters", 20_000, tolerance=0.001)
    with pytest.raises(UserError, match=r"no number of steps comes within 2.0% of 100 tokens; nearest are 2"):
        solve("tokens", 100)
    with pytest.raises(UserError, match="whose budget leaves it 1 steps: optimizer"):
        solve("tokens", 64)


def test_costs_are_counted():
    cost = budget.cost(tiny({"model.width": 16, "train.steps": 10}), V)
    layer = 16 * (3 * 16 + 16 + 2 * 32) + 2 * 16  # attention and feed-forward, two norms
    assert cost.non_embedding_parameters == layer + 16
    assert cost.parameters == layer + 16 + 2 * V * 16
    assert cost.tokens == 10 * 4 * 16
