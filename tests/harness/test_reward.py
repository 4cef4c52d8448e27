"""Process reward models: what is read, where, and as which probability; the lab keeps and charges each pair once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen3Config,
)

from harness import cell, models
from harness.lab import Workbench
from harness.ledger import Ledger, forward_flops
from harness.models.codec import Bytes
from harness.models.hf import HFModel
from harness.models.reward import RewardHF, YesNo
from harness.models.scripted import Scripted
from harness.store import Store
from harness.types import Ids, Scores
from tests.benches import SAMPLING
from tests.harness.test_lab import PROBLEMS
from tests.tiny import tiny_model, tiny_network, tiny_path, tiny_tokenizer

PAIRS = [
    ("1+1=?", "2"),
    ("1+1=?", "<think>\n1\n"),
    ("what is it?", "so long that it needs more than one block of thirty-two tokens\n"),
    ("1+1=?", "3"),
]
KINDS = {"token": AutoModelForTokenClassification, "sequence": AutoModelForSequenceClassification}


def classifier(kind: str = "token", labels: int = 2, names: Sequence[str] = ()) -> Any:
    """A tiny network with another head, of random weights; it knows no padding."""
    id2label = dict(enumerate(names or [f"LABEL_{i}" for i in range(labels)]))
    label2id = {name: i for i, name in id2label.items()}
    settings = {**tiny_network().config.to_dict(), "id2label": id2label, "label2id": label2id}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return KINDS[kind].from_config(Qwen3Config(**settings)).eval()


def prm(kind: str = "token", labels: int = 2, names: Sequence[str] = ()) -> RewardHF:
    return RewardHF(classifier(kind, labels, names), tiny_tokenizer(), name="prm")


def folder(path: Path, kind: str, labels: int = 2) -> Path:
    classifier(kind, labels).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def logits(model: RewardHF, turn: str, response: str) -> torch.Tensor:
    """The logits behind the last token of one unpadded sequence, [labels]."""
    tok = model.tokenizer
    text = f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n{response}"
    ids = torch.tensor([tok(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        states = model.model.model(input_ids=ids).last_hidden_state
        return model.model.score(states[0, -1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [1, 2])
def test_a_reward_is_read_at_the_last_token(kind: str, labels: int) -> None:
    model = prm(kind, labels)
    found = model.reward(PAIRS)
    for value, pair in zip(found, PAIRS, strict=True):
        scores = logits(model, *pair)
        expected = scores[0].sigmoid() if labels == 1 else scores.softmax(0)[1]
        assert value == pytest.approx(expected.item(), abs=1e-5)
    assert len({round(value, 4) for value in found}) == len(PAIRS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_does_not_depend_on_its_batch(kind: str) -> None:
    model = prm(kind)
    together = model.reward(PAIRS)
    assert together == pytest.approx([model.reward([pair])[0] for pair in PAIRS], abs=1e-5)
    assert model.reward(PAIRS[::-1])[::-1] == pytest.approx(together, abs=1e-5)
    assert model.reward([]) == []


@pytest.mark.parametrize(
    ("names", "positive"),
    [
        (["wrong", "right"], 1),
        (["Correct", "Incorrect"], 0),
        (["+", "-"], 0),
        (["LABEL_0", "LABEL_1"], 1),
        (["this", "that"], 1),
        (["yes", "good"], 1),
    ],
)
def test_which_label_is_right(names: list[str], positive: int) -> None:
    model = prm(names=names)
    expected = logits(model, *PAIRS[0]).softmax(0)[positive].item()
    assert model.reward(PAIRS[:1]) == pytest.approx([expected], abs=1e-5)


def test_without_a_template_the_turn_ends_a_line() -> None:
    model = prm()
    model.tokenizer.chat_template = None
    expected = tuple(model.tokenizer("1+1=?\n2")["input_ids"])
    assert model.encode(PAIRS[:1]) == [expected] and model.lengths(PAIRS[:1]) == [len(expected)]


def test_three_labels_and_empty_responses_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prm: a reward model has one label or two .* has 3"):
        prm(labels=3)
    with pytest.raises(ValueError, match=r"prm: .* last step of a response, and one is empty"):
        prm().reward([*PAIRS, ("1+1=?", "")])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_told_by_its_configuration(tmp_path: Path, kind: str) -> None:
    path = folder(tmp_path / kind, kind)
    known = {"my/prm": path}
    assert models.capabilities("my/prm", known) == {"reward"}
    assert models.capabilities(str(tiny_path()), {}) == {"generate", "score", "logits"}
    model = models.load("my/prm", checkpoints=known, device="cpu")
    assert isinstance(model, RewardHF) and model.name == "my/prm" and model.freeze() is model
    assert model.reward(PAIRS) == pytest.approx(prm(kind).reward(PAIRS), abs=1e-6)
    assert model.identity == prm(kind).identity
    assert isinstance(models.load(str(tiny_path()), device="cpu"), HFModel)
    with pytest.raises(ValueError, match="cannot be trained"):
        cell.student_model(str(path))


def test_the_identity_is_of_weights_kind_and_dtype(tmp_path: Path) -> None:
    path = folder(tmp_path, "token")
    half = RewardHF.load(path, device="cpu", dtype="bf16")
    others = [prm("sequence"), prm(labels=1), prm(names=["good", "bad"]), half]
    assert len({model.identity for model in [prm(), *others]}) == 5
    assert prm().num_parameters == sum(p.numel() for p in prm().model.parameters())
    with pytest.raises(ValueError, match=r"its config.json names Qwen3ForCausalLM"):
        RewardHF.load(tiny_path())
    with pytest.raises(ValueError, match="dtype 'half' is unknown"):
        RewardHF.load(path, dtype="half")


class Counting(RewardHF):
    """Counts the pairs that it reads."""

    read = 0

    def reward(self, pairs: Any) -> list[float]:
        self.read += len(pairs)
        return super().reward(pairs)


def test_rewards_are_kept_and_charged_once(tmp_path: Path) -> None:
    judge = Counting(classifier(), tiny_tokenizer(), name="prm")

    def bench() -> Workbench:
        loaders = {"judge": lambda: judge}
        return Workbench(tiny_model(), loaders, PROBLEMS, Store(tmp_path), Ledger(), SAMPLING)  # type: ignore[arg-type]

    one, two = bench(), bench()
    asked = [*PAIRS, PAIRS[0]]
    flops = sum(forward_flops(judge.num_parameters, n) for n in judge.lengths(PAIRS))
    found = one.rewards(one.models["judge"], asked)
    assert judge.read == 4 and found == pytest.approx(judge.reward(asked), abs=1e-5)
    judge.read = 0
    assert one.rewards(judge, asked) == two.rewards(judge, asked, purpose="doubt") == found
    assert judge.read == 0
    for lab, spent in ((one, 1), (two, 0)):
        assert lab._ledger.charged["verifier_calls"] == 4
        assert lab._ledger.charged["flops"] == flops
        assert lab._ledger.spent["verifier_calls"] == 4 * spent
        assert lab._ledger.spent["flops"] == flops * spent
    other = prm("sequence")
    assert one.rewards(other, PAIRS[:1]) == pytest.approx(other.reward(PAIRS[:1]), abs=1e-5)


def test_a_language_model_that_is_asked_yes_or_no() -> None:
    """P(yes) / (P(yes) + P(no)) from the scores of both answers, by hand."""
    nats = {"y": {"yes": -1.0, "no": -2.0}, "n": {"yes": -3.0, "no": -1.5}}

    def scores(prompt: Ids, response: Ids) -> Scores:
        value = nats[Bytes().decode(prompt)[-1]][Bytes().decode(response)]
        each = [value / len(response)] * len(response)
        return Scores(tuple(each), tuple(0.0 for _ in each))

    asked = Scripted({}, capabilities={"score"}, scores=scores)
    judge, rested = YesNo(asked), list[bool]()
    judge.rest()  # nothing to hand back
    asked.rest = lambda: rested.append(True)  # type: ignore[attr-defined]
    judge.rest()
    assert rested == [True]
    assert judge.reward([("y", ""), ("n", "")]) == pytest.approx(
        [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1.5))]
    )
    assert judge.lengths([("y", "")]) == [2 * len(Bytes().encode("y")) + 5]
    with pytest.raises(ValueError, match="whole question in the user turn"):
        judge.reward([("y", "x")])


def test_a_suite_can_ask_a_checkpoint() -> None:
    from benchmarks import CHECKPOINTS

    known = {"micro/student": CHECKPOINTS["micro/student"]}
    assert models.capabilities({"ask": "micro/student"}, known) == {"reward"}
    judge = models.load({"ask": "micro/student"}, checkpoints=known)
    (value,) = judge.reward([("Is it so? Answer yes or no.", "")])
    assert isinstance(judge, YesNo) and 0 <= value <= 1
