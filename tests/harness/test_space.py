"""What a sweep explores: fields and their ranges, the suite's changes to them, and every way to get them wrong."""

from __future__ import annotations

from typing import Any

import optuna
import pytest

from harness import cell, registry
from harness.config import Experiment, parse
from harness.space import Dimension, changed, of, space

SUITE: dict[str, Any] = {
    "name": "s",
    "student": "micro/student",
    "teacher": "micro/teacher",
    "problems": {"micro_math": {"n": 40}},
    "benchmarks": {"micro_math": {"limit": 10}},
    "budget": {"steps": 80},
    "methods": {"sft": {}, "paced": {"rollouts": 4, "beta": 2.5}, "reverse": {"method": "rkl"}},
}


def suite(sweep: dict[str, Any] | None = None, **more: Any) -> Experiment:
    return parse({**SUITE, **more, "sweep": sweep or {}})


def test_the_fields_that_a_method_searches_at_the_ranges_it_gives() -> None:
    found = space(suite(), "paced")
    assert found.dimensions["alpha"].describe() == {
        "kind": "float",
        "low": 0.0,
        "high": 3.0,
        "log": False,
    }
    assert found.dimensions["rollouts"].describe() == {
        "kind": "int",
        "low": 4,
        "high": 32,
        "log": False,
    }
    assert "drop_zeros" not in found.dimensions
    assert found.default["beta"] == 2.5  # the suite's, not the method's 1.0
    assert found.default["alpha"] == 1.0 and found.default["rollouts"] == 4
    assert found.default_inside
    assert not space(suite(), "reverse").dimensions


def test_the_suite_narrows_fixes_adds_and_leaves_out() -> None:
    sweep = {
        "alpha": {"low": 0.5, "high": 2},  # of every method that has it
        "paced": {
            "smoothing": 0.25,
            "switch": None,
            "schedule": {"choices": ["fkl", "fkl_then_rkl"]},
            "reestimate_every": None,
            "references": None,
        },
        "training": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
        "budget": {"steps": {"low": 20, "high": 80}},
    }
    found = space(suite(sweep), "paced")
    assert (found.dimensions["alpha"].low, found.dimensions["alpha"].high) == (0.5, 2.0)
    assert found.fixed == {"smoothing": 0.25}
    assert not {"smoothing", "switch", "references"} & set(found.dimensions)
    assert found.dimensions["schedule"].choices == ("fkl", "fkl_then_rkl")
    rate = found.dimensions["training.learning_rate"]
    assert rate.log and rate.kind == "float" and found.default["training.learning_rate"] == 1e-3
    assert found.dimensions["budget.steps"].kind == "int"
    assert found.default["budget.steps"] == 80
    arm = found.arm(
        {"rollouts": 4}, {"alpha": 0.7, "training.learning_rate": 2e-3, "budget.steps": 40}
    )
    assert arm == {
        "method": "paced",
        "rollouts": 4,
        "smoothing": 0.25,
        "alpha": 0.7,
        "training": {"learning_rate": 2e-3},
        "budget": {"steps": 40},
    }
    assert set(space(suite(sweep), "sft").dimensions) >= {"samples", "training.learning_rate"}
    assert "alpha" not in space(suite(sweep), "sft").dimensions


def test_only_names_the_fields() -> None:
    assert set(space(suite({"only": ["alpha", "beta"]}), "paced").dimensions) == {"alpha", "beta"}
    mine = suite({"only": ["samples"], "paced": {"only": ["beta"]}})
    assert set(space(mine, "paced").dimensions) == {"beta"}
    assert set(space(mine, "sft").dimensions) == {"samples"}


def test_a_condition_decides_what_is_asked_for() -> None:
    sweep = {
        "paced": {
            "only": ["schedule", "switch"],
            "switch": {"when": {"schedule": ["fkl_then_rkl"]}},
            "schedule": {"choices": ["fkl", "fkl_then_rkl"]},
        }
    }
    found = space(suite(sweep), "paced")
    assert list(found.dimensions) == ["schedule", "switch"]  # conditions come first
    one = optuna.trial.FixedTrial({"schedule": "fkl", "switch": 0.4})
    two = optuna.trial.FixedTrial({"schedule": "fkl_then_rkl", "switch": 0.4})
    assert found.suggest(one) == {"schedule": "fkl"}
    assert found.suggest(two) == {"schedule": "fkl_then_rkl", "switch": 0.4}
    # A condition on a field that is not searched looks at the suite's value.
    fixed = {"paced": {"only": ["switch"], "switch": {"when": {"schedule": ["rkl"]}}}}
    assert space(suite(fixed), "paced").suggest(two) == {}


def test_a_grid_has_at_most_so_many_points() -> None:
    found = space(suite({"only": ["alpha", "beta"]}), "paced")
    assert found.grid(12) == {"alpha": [0.0, 1.5, 3.0], "beta": [0.0, 1.5, 3.0]}
    named = {"only": ["alpha", "beta"], "alpha": {"low": 0, "high": 3, "num": 4}}
    assert found.grid(4)["alpha"] == [0.0, 3.0]
    assert space(suite(named), "paced").grid(12)["alpha"] == [0.0, 1.0, 2.0, 3.0]
    logged = {"paced": {"only": [], "rollouts": {"low": 4, "high": 16, "log": True, "num": 3}}}
    assert space(suite(logged), "paced").grid(5) == {"rollouts": [4, 8, 16]}
    assert 1e-4 * (0.03 / 1e-4) ** 1.0 != 0.03  # and yet the last is exactly the end of the range
    assert Dimension("float", 1e-4, 0.03, log=True).values(2) == [1e-4, 0.03]
    with pytest.raises(ValueError, match="4 points at least, and there are 3 trials"):
        found.grid(3)
    when = {"paced": {"only": ["alpha"], "alpha": {"when": {"track": ["distillation"]}}}}
    with pytest.raises(ValueError, match="alpha is searched only when track"):
        space(suite(when), "paced").grid(9)


@pytest.mark.parametrize(
    "sweep, said",
    [
        ({"alhpa": {"low": 0, "high": 1}}, "sweep.alhpa: not a setting.*did you mean 'alpha'"),
        ({"paced": {"alhpa": {"low": 0}}}, "sweep.paced.alhpa: .*did you mean 'alpha'"),
        ({"paced": 3}, "sweep.paced: a mapping of fields to ranges, got 3"),
        ({"paced": {"only": ["x"]}}, "paced has no field 'x'"),
        ({"drop_zeros": {"low": 0, "high": 1}}, r"drop_zeros is one of False, True: give choices"),
        ({"schedule": {"low": 0, "high": 1}}, "schedule is one of fkl"),
        ({"schedule": {"choices": ["fkl", "kl"]}}, "'kl' is out of the field's bounds"),
        ({"alpha": {"low": 0, "high": 21}}, "21.* is out of the field's bounds.*20"),
        ({"alpha": {"low": -1}}, "-1.* is out of the field's bounds"),
        ({"rollouts": {"low": 4.5, "high": 8}}, "4.5 is out of the field's bounds"),
        ({"alpha": {"low": 2, "high": 2}}, "low must be below high, got 2 and 2"),
        ({"alpha": {"log": True}}, "a logarithmic range is above 0, got low 0"),
        ({"alpha": {"lo": 1}}, "sweep.alpha: unknown key 'lo'"),
        ({"alpha": {"low": 1, "choices": [1]}}, "either choices, or low, high and log"),
        ({"alpha": "wide"}, "'wide' is out of the field's bounds"),
        ({"switch": {"when": {"schedul": ["fkl"]}}}, "another field.*did you mean 'schedule'"),
        ({"training": {"learning_rat": {"low": 1}}}, "training has no field 'learning_rat'"),
        ({"training": {"learning_rate": {"high": 1}}}, "give low and high"),
        (
            {"budget": {"steps": {"choices": [1, 90]}}},
            "at most the steps.*which has 80; got up to 90",
        ),
        ({"budget": {"steps": 90}}, "at most the steps.*which has 80; got up to 90"),
        ({"budget": {"steps": {"low": 0, "high": 9}}}, "0 is out of the field's bounds.*than 0"),
        (
            {"training": {"betas": {"choices": [[0.9, 0.95], [0.9, 0.99]]}}},
            "choices are numbers, text, true or false",
        ),
        ({"budget": {"steps": {"low": 1, "high": 90}}}, "at most the steps.*which has 80"),
        (
            {"training": {"batch_size": {"low": 8, "high": 65}}},
            "at most the suite's batch size of 64, as the budget is in steps; got up to 65",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(sweep: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        space(suite(sweep), "paced")
    assert "\n" not in str(error.value)


def test_a_field_that_is_not_searched_can_only_be_fixed() -> None:
    with pytest.raises(ValueError, match=r"limo does not search .*searchable are weak_k"):
        limo = {"methods": {"limo": {}}, "reference": "limo"}
        space(suite({"words": {"low": 0, "high": 1}}, **limo), "limo")


def test_a_paper_budgets_own_setting_is_the_papers() -> None:
    """Its learning rate and fields are the default that a sweep starts from, and its steps are the most."""
    more = {"methods": {"fkl": {}}, "reference": "fkl", "budget": "paper"}
    recipe = registry.paper_recipe(registry.get("fkl"))
    rate, steps = recipe["training"]["learning_rate"], recipe["budget"]["steps"]
    ranges = {
        "training": {"learning_rate": {"low": 1e-7, "high": 1e-2, "log": True}},
        "budget": {"steps": {"low": 100, "high": steps}},
    }
    found = space(suite({"only": [], **ranges}, **more), "fkl")
    assert rate != suite().training.learning_rate
    assert found.default == {"training.learning_rate": rate, "budget.steps": steps}
    ranges["budget"]["steps"]["high"] += 1
    with pytest.raises(ValueError, match=f"at most the steps of the budget, which has {steps}"):
        space(suite(ranges, **more), "fkl")


def test_an_arm_whose_paper_has_no_budget_states_its_own() -> None:
    """Beside arms at their papers' recipes; fields and training are still the paper's, where it has them."""
    methods: dict[str, Any] = {"fkl": {}, "heal": {"budget": {"steps": 70}, "training": {"clip": 0.5}}}  # fmt: skip
    setting = suite(methods=methods, reference="fkl", budget="paper")
    heal, training, budget = cell.recipe(setting, "heal")
    assert (budget.steps, training.batch_size, training.clip) == (70, 8, 0.5)
    assert (
        heal.model_dump()["first_step"] == "never"
    )  # the paper's; the method's own is "reference"
    assert cell.recipe(setting, "fkl")[2].steps == 820
    for wrong, words in (
        ({"heal": {}}, "this one has none, so give the arm its own"),
        ({"heal": {"budget": {"stepz": 70}}}, "did you mean 'steps'"),
        ({"fkl": {"budget": {"steps": 821}}}, "at most the suite's"),
        ({"gkd": {"budget": {"steps": 5}}}, "needs a paper.yaml with a budget beside gkd"),
    ):
        (label,) = wrong
        with pytest.raises(ValueError, match=words):
            cell.recipe(suite(methods=wrong, reference=label, budget="paper"), label)


def test_what_decides_a_trial_holds_the_arms_own_training() -> None:
    """Whoever says it: the arm, or the sweep that fixes it."""
    plain = of(suite(), "paced")
    assert not any("." in name for name in plain["arm"])  # all as the suite has it
    methods = {**SUITE["methods"], "paced": {"rollouts": 4, "beta": 2.5}}
    methods["paced"] |= {"training": {"learning_rate": 0.25}, "budget": {"steps": 60}}
    for own in (
        suite(methods=methods),
        suite({"training": {"learning_rate": 0.25}, "budget": {"steps": 60}}),
    ):
        lines = changed(plain, of(own, "paced"))
        assert "arm.training.learning_rate was not there, is 0.25" in lines
        assert "arm.budget.steps was not there, is 60" in lines
    lines = changed(plain, of(suite({"dev_problems": 50}), "paced"))
    assert lines == ["sweep.dev_problems was 200, is 50"]


def test_what_an_arm_says_of_training_wins() -> None:
    everyones = {"training": {"learning_rate": {"low": 1e-4, "high": 1e-2}}}
    own = {"paced": {"only": [], "training": {"learning_rate": {"low": 1e-3, "high": 2e-3}}}}
    assert space(suite({**everyones, **own}), "paced").dimensions[
        "training.learning_rate"
    ] == Dimension("float", 1e-3, 2e-3)
    assert space(suite({**everyones, **own}), "sft").dimensions[
        "training.learning_rate"
    ] == Dimension("float", 1e-4, 1e-2)
    assert 1 not in Dimension("choice", choices=(True, False))


def test_a_trials_values_join_the_arms_own() -> None:
    given = {"rollouts": 4, "training": {"batch_size": 8, "learning_rate": 0.5}}
    arm = space(suite(), "paced").arm(given, {"alpha": 0.25, "training.learning_rate": 0.125})
    assert arm == {
        "method": "paced",
        "rollouts": 4,
        "alpha": 0.25,
        "training": {"batch_size": 8, "learning_rate": 0.125},
    }


def test_what_changed_is_named() -> None:
    old = {"alpha": {"low": 0.0, "high": 3.0}, "beta": 1, "gone": None}
    new = {"alpha": {"low": 0.0, "high": 2.0}, "beta": 1, "rollouts": {"low": 4}}
    assert changed(old, new) == ["alpha.high was 3, is 2", "rollouts was not there, is {'low': 4}"]


def test_an_arm_has_training_of_its_own_and_takes_no_more_than_the_budget() -> None:
    arms = {"sft": {"training": {"learning_rate": 0.5}, "budget": {"steps": 30}}, "paced": {}}
    setting = suite(methods=arms)
    _, training, budget = cell.recipe(setting, "sft")
    assert (training.learning_rate, budget.steps) == (0.5, 30)
    _, training, budget = cell.recipe(setting, "paced")
    assert (training.learning_rate, budget.steps) == (1e-3, 80)
    for own, said in (
        ({"budget": {"steps": 81}}, "at most the suite's .which is 80 steps., got {'steps': 81}"),
        ({"budget": {"flops": 1}}, "{steps: N}"),
        ({"training": {"learning": 1}}, "methods.sft.training: unknown key 'learning'"),
    ):
        with pytest.raises(ValueError, match=said):
            cell.recipe(suite(methods={"sft": own}), "sft")
