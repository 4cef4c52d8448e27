"""The ledger, by hand."""

from __future__ import annotations

import itertools
import json
import math
import time

import numpy as np
import pytest

from harness.ledger import QUANTITIES, Ledger, forward_flops, total, training_flops
from harness.objectives import forward_kl
from harness.types import OffPolicy, Stage
from tests.harness.test_trainer import EXAMPLES, trainer
from tests.tiny import tiny_model


def test_what_has_a_key_is_charged_once_for_each_quantity() -> None:
    ledger = Ledger()
    ledger.charge("teacher_generated", 100, key="sample 1")
    ledger.charge("teacher_generated", 100, key="sample 1")
    ledger.charge("teacher_generated", 30, key="sample 2")
    ledger.charge("verifier_calls", 1, key="sample 1")
    ledger.charge("trained", 50)
    ledger.charge("trained", 50)
    charged = {name: amount for name, amount in ledger.charged.items() if amount}
    assert charged == {"teacher_generated": 130, "verifier_calls": 1, "trained": 100}
    assert not any(ledger.spent.values())


def heal() -> Ledger:
    ledger = Ledger()
    ledger.charge("teacher_generated", 40, "a", "base")
    ledger.charge("teacher_generated", 40, "a", "hint")  # paid: it stays base's
    ledger.charge("teacher_generated", 25, "b", "hint")
    ledger.charge("teacher_generated", 7, "c", "base")
    ledger.charge("teacher_generated", 3, "d")
    ledger.charge("teacher_generated", 0, "e", "repair")
    ledger.charge("teacher_scored", 11, "a", "scoring")
    ledger.spend("teacher_generated", 60)
    return ledger


PURPOSES = {"teacher_generated": {"base": 47, "hint": 25}, "teacher_scored": {"scoring": 11}}


def test_charges_that_count_are_told_by_purpose() -> None:
    ledger = heal()
    assert ledger.purposes == PURPOSES
    assert ledger.charged["teacher_generated"] == 75  # 3 of them without a purpose
    ledger.summary()["purposes"]["teacher_generated"]["base"] = 0
    assert ledger.purposes == PURPOSES


def test_purposes_are_kept_and_older_data_has_none() -> None:
    ledger = heal()
    again = Ledger.from_dict(json.loads(json.dumps(ledger.to_dict())))
    again.charge("teacher_generated", 25, "b", "hint")
    again.charge("teacher_generated", 2, "f", "hint")
    assert again.purposes["teacher_generated"] == {"base": 47, "hint": 27}
    assert Ledger.from_dict(ledger.summary()).purposes == ledger.purposes == PURPOSES
    again.load({column: ledger.summary()[column] for column in ("charged", "spent")})
    assert again.purposes == {}


def test_total_sums_purposes() -> None:
    other = Ledger()
    other.charge("teacher_generated", 5, "a", "hint")
    other.charge("teacher_generated", 6, "b", "repair")
    cells = [heal(), other]
    result = total(cells)
    assert result.purposes == {
        "teacher_generated": {"base": 47, "hint": 30, "repair": 6},
        "teacher_scored": {"scoring": 11},
    }
    assert result.charged["teacher_generated"] == 75 + 11
    assert cells[0].purposes == PURPOSES


def test_a_training_step_is_scored_for_training() -> None:
    run = trainer(1, training={"batch_size": 2})
    stage = Stage("s", OffPolicy(EXAMPLES[:2]), forward_kl)
    run.run(0, stage, tiny_model(1).freeze, {})
    assert run.ledger.purposes == {"teacher_scored": {"training": 3 + 9 + 5 + 2}}


def test_spending_is_counted_apart_and_every_time() -> None:
    ledger = Ledger({"steps": 5})
    ledger.spend("steps", 3)
    ledger.spend("steps", 3)
    assert ledger.spent["steps"] == 6 and ledger.charged["steps"] == 0
    assert ledger.left("steps") == 5 and ledger.exhausted() is None


def test_caps_look_at_what_is_charged() -> None:
    ledger = Ledger(caps={"teacher_generated": 100, "student_generated": 10})
    assert ledger.left("teacher_generated") == 100 and ledger.left("trained") == math.inf
    ledger.charge("teacher_generated", 60, key="a")
    ledger.charge("teacher_generated", 60, key="a")
    assert ledger.left("teacher_generated") == 40 and ledger.exhausted() is None
    ledger.charge("teacher_generated", 39.5)
    assert ledger.exhausted("teacher_generated", "student_generated") is None
    ledger.charge("teacher_generated", 60, key="b")
    assert ledger.left("teacher_generated") == 0
    assert ledger.exhausted() == "teacher_generated"
    assert ledger.exhausted("student_generated", "trained") is None
    assert ledger.exhausted("student_generated", "teacher_generated") == "teacher_generated"
    assert Ledger({"steps": 0}).exhausted() == "steps"


def test_order_and_sharing_change_no_charge() -> None:
    costs = [("a", 3), ("b", 5), ("a", 3), ("c", 7)]
    outcomes = set()
    for order in itertools.permutations(costs):
        ledger = Ledger({"teacher_generated": 15})
        for shared, (key, amount) in enumerate(order):
            ledger.charge("teacher_generated", amount, key)
            ledger.spend("teacher_generated", amount * (shared % 2))
        outcomes.add((ledger.charged["teacher_generated"], ledger.exhausted()))
    assert outcomes == {(15, "teacher_generated")}


def test_a_resumed_ledger_is_the_same_ledger() -> None:
    ledger = Ledger(caps={"teacher_scored": 1000})
    for i in range(500):
        ledger.charge("teacher_scored", 1, key=f"score {i}")
        ledger.charge("flops", 0.1 * i)
    ledger.spend("teacher_scored", 7)
    text = json.dumps(ledger.to_dict())
    assert len(text) < 500 * 17 + 600
    again = Ledger.from_dict(json.loads(text))
    assert json.dumps(again.to_dict()) == text
    assert (again.charged, again.spent, again.caps) == (ledger.charged, ledger.spent, ledger.caps)
    for i in range(0, 501):
        again.charge("teacher_scored", 1, key=f"score {i}")
    assert again.charged["teacher_scored"] == 501 and again.left("teacher_scored") == 499
    assert ledger.charged["teacher_scored"] == 500
    again.load(ledger.to_dict())
    assert json.dumps(again.to_dict()) == text


def test_equal_ledgers_are_written_alike_in_any_order() -> None:
    one, two = Ledger(), Ledger()
    for key in "abcdef":
        one.charge("steps", 1, key)
    for key in "fedcba":
        two.charge("steps", 1, key)
    assert json.dumps(one.to_dict()) == json.dumps(two.to_dict())


def test_a_summary_reads_back_without_keys_and_caps() -> None:
    ledger = Ledger({"steps": 2})
    ledger.charge("steps", 2, key="a")
    again = Ledger.from_dict(ledger.summary())
    again.charge("steps", 2, key="a")
    assert again.charged["steps"] == 4 and again.left("steps") == math.inf


def test_counts_out_of_numpy_are_written_as_numbers() -> None:
    ledger = Ledger()
    ledger.charge("trained", np.int64(3))
    ledger.spend("flops", np.float32(0.5))
    assert json.loads(json.dumps(ledger.to_dict()))["charged"]["trained"] == 3


def test_total_sums_cells_that_paid_for_the_same_sample() -> None:
    cells = [Ledger({"teacher_generated": 5}) for _ in range(3)]
    for cell in cells:
        cell.charge("teacher_generated", 10, key="shared")
    cells[0].spend("teacher_generated", 10)
    result = total(cells)
    assert result.charged["teacher_generated"] == 30 and result.spent["teacher_generated"] == 10
    assert result.caps == {} and cells[1].charged["teacher_generated"] == 10
    assert total([]).summary() == Ledger().summary()


def test_time_is_counted_once_also_when_nested_or_cut_short() -> None:
    ledger, begun = Ledger(), time.perf_counter()
    with pytest.raises(KeyError), ledger.timed(), ledger.timed():
        time.sleep(0.02)
        raise KeyError
    first = ledger.spent["seconds"]
    assert 0.02 <= first <= time.perf_counter() - begun
    assert ledger.charged["seconds"] == first
    with ledger.timed(charge=False):
        time.sleep(0.01)
    assert ledger.spent["seconds"] >= first + 0.01 and ledger.charged["seconds"] == first


def test_flops_of_a_seven_billion_model() -> None:
    assert training_flops(7_000_000_000, 1000) == 4.2e13
    assert forward_flops(7_000_000_000, 1000) == 1.4e13


def test_mistakes_are_named() -> None:
    calls = [
        lambda: Ledger().charge("tokens", 1),
        lambda: Ledger().spend("tokens", 1),
        lambda: Ledger().left("tokens"),
        lambda: Ledger().exhausted("steps", "tokens"),
        lambda: Ledger({"tokens": 1}),
        lambda: Ledger.from_dict({"charged": {"tokens": 1}, "spent": {}}),
        lambda: Ledger.from_dict({"charged": {}, "spent": {}, "purposes": {"tokens": {}}}),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="unknown quantity 'tokens'") as error:
            call()
        assert all(quantity in str(error.value) for quantity in QUANTITIES)
    with pytest.raises(ValueError, match="depend on the machine"):
        Ledger({"seconds": 60})
    with pytest.raises(AssertionError):
        Ledger().charge("steps", -1)
