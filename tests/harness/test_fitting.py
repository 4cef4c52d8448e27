"""What makes a suite fit a GPU changes no result: checkpointing, packing, kernels of attention, quantised and offloaded models."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from harness import models, problems
from harness.config import Adapter, Budget
from harness.ledger import Ledger
from harness.models.collate import collate
from harness.models.hf import HFModel, quantization
from harness.objectives import forward_kl, nll
from harness.trainer import plan
from harness.types import OffPolicy, Problem, Request, Sampling, Stage
from tests.harness.test_trainer import EXAMPLES, example, losses, no_teacher, trainer, weights
from tests.tiny import tiny_model, tiny_network, tiny_path, tiny_tokenizer

ASKED = [Request(text, Problem(text, text)) for text in ("1+1", "what", "a longer question")]
SIX = {"batch_size": 6, "clip": 1e9}


def gradients(**training: Any) -> list[torch.Tensor]:
    """Of one step on all examples, before the optimizer takes it."""
    student = training.pop("student", None) or tiny_model()
    run = trainer(1, student=student, training={**SIX, **training})
    run.optimizer.step = lambda *given, **more: None  # type: ignore[method-assign]
    run.optimizer.zero_grad = lambda *given, **more: None  # type: ignore[method-assign]
    run.run(0, Stage("s", OffPolicy(EXAMPLES), nll), no_teacher, {})
    return [p.grad for p in run.parameters if p.grad is not None]


def close(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) > 0 and all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(one, two, strict=True)
    )


# Gradient checkpointing


@pytest.mark.parametrize("adapter", [None, Adapter(r=2, dropout=0.2)])
def test_checkpointing_changes_no_gradient(
    adapter: Adapter | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under an adapter nothing that enters the first layer has a gradient, and dropout is drawn again alike."""
    calls: list[int] = []
    layer = type(tiny_network().model.layers[0].mlp)
    real = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, x: calls.append(1) or real(self, x))
    found = []
    for on in (False, True):
        torch.manual_seed(1)
        student = HFModel.load(tiny_path(), device="cpu", adapter=adapter)
        calls.clear()
        found.append((gradients(student=student, gradient_checkpointing=on), len(calls)))
    (plain, once), (again, twice) = found
    assert close(plain, again)
    assert twice > once  # the layers' forward was computed again


def test_checkpointing_is_off_while_it_writes() -> None:
    student = tiny_model()
    expected = student.generate(ASKED, Sampling(max_new_tokens=6))
    run = trainer(1, student=student, training={"gradient_checkpointing": True})
    assert student.model.is_gradient_checkpointing and student.model.training
    steps: list[int] = []
    real = student.model.forward
    student.model.forward = lambda *a, **k: steps.append(k["input_ids"].shape[1]) or real(*a, **k)
    assert student.generate(ASKED, Sampling(max_new_tokens=6)) == expected
    assert steps.count(1) >= 5  # with its cache: a token at a time
    assert run.student.model.training


# Packing


def test_a_packed_row_by_hand() -> None:
    one, two = example("a", 2, 3), example("b", 3, 2, loss=(False, True))
    batch, tokens, sequence = collate([one, two], 256, packed=True)
    assert batch.ids.tolist() == [[*one.prompt, *one.response, *two.prompt, *two.response]]
    assert batch.positions is not None and batch.positions.tolist() == [[0, 1, 2, 3, 4] * 2]
    assert batch.mask.tolist() == [[1] * 10]
    assert batch.index.tolist() == [1, 2, 3, 5 + 3 + 1 - 1]
    assert tokens.targets.tolist() == [*one.response, two.response[1]]
    assert sequence.tolist() == [0, 0, 0, 1]
    teacher = replace(one, teacher_prompt=(9, 9, 9, 9))
    told = collate([teacher, two], 256, packed=True, teacher=True).batch
    assert told.index.tolist() == [3, 4, 5, 7 + 3 + 1 - 1] and told.ids.shape == (1, 12)


def test_packed_batches_are_bounded_by_their_tokens() -> None:
    data = [example(name, 4, n) for name, n in zip("abcdef", (6, 6, 6, 20, 30, 90), strict=True)]
    sizes = [[len(e.response) + 4 for e in batch] for batch in plan(data, 64, True)]
    assert sizes == [[10, 10, 10, 24], [34], [94]]
    other = [replace(data[0], term="x"), data[1]]
    assert len(plan(other, 64, True)) == 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_token_sees_a_packed_neighbour(attention: str) -> None:
    lm = HFModel.load(tiny_path(), device="cpu", attn_implementation=attention)
    mine = example("m", 4, 20)
    found = []
    for neighbour in (example("n", 9, 31), example("o", 9, 31)):
        batch, _, sequence = collate([neighbour, mine, neighbour], lm.pad, packed=True)
        found.append(lm.hidden(batch)[sequence == 1])
    assert torch.equal(*found)
    alone = lm.hidden(collate([mine], lm.pad).batch)
    assert torch.allclose(found[0], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_packing_changes_no_loss_and_no_gradient(mean: Any) -> None:
    curves = []
    for packing in (False, True):
        run = trainer(4, training={**SIX, "packing": packing, "micro_tokens": 96})
        teacher = tiny_model(1).freeze()
        data = [
            *EXAMPLES[:4],
            replace(EXAMPLES[4], weight=0.3, teacher_prompt=(7, 8, 9)),
            EXAMPLES[5],
        ]
        run.run(0, Stage("s", OffPolicy(data), forward_kl, mean=mean), lambda t=teacher: t, {})  # type: ignore[misc]
        curves.append((losses(run), weights(run.student), run.ledger.charged["trained"]))
    (plain, left, paid), (packed, right, pays) = curves
    assert packed == pytest.approx(plain, rel=1e-4) and paid == pays
    assert torch.allclose(left, right, rtol=1e-2, atol=1e-3)
    assert close(gradients(), gradients(packing=True))


def test_an_architecture_that_mixes_packed_sequences_is_refused() -> None:
    """A recurrent state runs on from one sequence into the next."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=0, mlp_only_layers=[0, 1], initializer_range=0.2,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    lm = HFModel(Qwen3NextForCausalLM(config).eval(), tiny_tokenizer(), name="recurrent")
    batch = collate(EXAMPLES[:2], lm.pad, packed=True).batch
    with pytest.raises(
        ValueError, match=r"recurrent: .*packed sequences apart; set training\.packing"
    ):
        lm.hidden(batch)


# How a model is run


def test_attention_by_another_kernel_is_another_model_with_nearly_its_numbers() -> None:
    spec = {"model": "micro/student", "attn_implementation": "eager"}
    known = problems.checkpoints()
    plain, eager = (
        models.load(s, checkpoints=known, device="cpu") for s in ("micro/student", spec)
    )
    assert (
        eager.model.config._attn_implementation
        == "eager"
        != plain.model.config._attn_implementation
    )
    assert eager.identity != plain.identity
    pair = (plain.encode("What is 2+3?"), plain.tokenize("5"))
    assert eager.score([pair])[0].logprobs == pytest.approx(
        plain.score([pair])[0].logprobs, abs=1e-4
    )
    assert eager.clone().identity == eager.identity
    with pytest.raises(ValueError, match=r"FlashAttention2 .* be installed"):
        models.load({**spec, "attn_implementation": "flash_attention_2"}, checkpoints=known)


def test_a_line_says_the_type_of_its_weights() -> None:
    lm = models.load(
        {"model": "micro/student", "dtype": "bf16"}, checkpoints=problems.checkpoints()
    )
    assert lm.model.dtype == torch.bfloat16


@pytest.mark.parametrize("where", [cpu_offload, disk_offload])
def test_an_offloaded_teacher_says_what_it_always_did(where: Any, tmp_path: Path) -> None:
    """Weights lie elsewhere and come when they are needed; the head's too."""
    plain, moved = tiny_model(1).freeze(), tiny_model(1).freeze()
    more = {"offload_dir": str(tmp_path)} if where is disk_offload else {}
    where(moved.model, execution_device=torch.device("cpu"), **more)
    assert all(p.is_meta for p in moved.model.parameters()) and moved.device.type == "cpu"
    assert moved.identity == plain.identity and moved.num_parameters == plain.num_parameters
    batch = collate(EXAMPLES[:3], plain.pad).batch
    with torch.no_grad():
        ours, theirs = (lm.head(lm.hidden(batch)) for lm in (moved, plain))
    # Products differ in their last bits by where in memory a weight lies.
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    drawn, expected = (lm.generate(ASKED, Sampling(max_new_tokens=5)) for lm in (moved, plain))
    assert [[t.tokens for t in g] for g in drawn] == [[t.tokens for t in g] for g in expected]
    traces = []
    for teacher in (plain, moved):
        run = trainer(2)
        run.run(0, Stage("s", OffPolicy(EXAMPLES), forward_kl), lambda t=teacher: t, {})  # type: ignore[misc]
        traces.append(losses(run))
    assert traces[0] == pytest.approx(traces[1], rel=1e-5)


def test_offload_where_all_fits_is_the_model_itself() -> None:
    lm = models.load({"model": str(tiny_path()), "offload": True}, device="cpu")
    assert lm.identity == tiny_model().identity
    batch = collate(EXAMPLES[:2], lm.pad).batch
    assert torch.equal(lm.hidden(batch), tiny_model().hidden(batch))


def test_how_a_model_is_quantised() -> None:
    eight, four = quantization("8bit", torch.bfloat16), quantization("4bit", torch.bfloat16)
    assert eight.load_in_8bit and not eight.load_in_4bit and four.load_in_4bit
    assert four.bnb_4bit_quant_type == "nf4" and four.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.parametrize(("kind", "nats"), [("8bit", 0.05), ("4bit", 0.5)])
def test_a_quantised_teacher_is_near_the_whole_one(kind: str, nats: float) -> None:
    known = problems.checkpoints()
    plain = models.load("micro/teacher", checkpoints=known, device="cpu")
    lm = models.load({"model": "micro/teacher", "quantize": kind}, checkpoints=known, device="cpu")
    assert lm.num_parameters == plain.num_parameters and lm.identity != plain.identity
    assert sum(t.nbytes for t in lm.model.state_dict().values()) < 0.6 * sum(
        t.nbytes for t in plain.model.state_dict().values()
    )
    pairs = [(plain.encode("What is 2+3?"), plain.tokenize(t)) for t in ("5", "<think>\n2+3=5\n")]
    for one, two in zip(lm.score(pairs), plain.score(pairs), strict=True):
        off = sum(abs(a - b) for a, b in zip(one.logprobs, two.logprobs, strict=True))
        assert 0 < off / len(one.logprobs) < nats
    student = models.load("micro/student", checkpoints=known, device="cpu", dtype="fp32")
    run = trainer(1, student=student, budget=Budget(steps=1), ledger=Ledger())
    data = [replace(EXAMPLES[0], prompt=pairs[0][0], response=pairs[0][1])] * 4
    run.run(0, Stage("s", OffPolicy(data), forward_kl), lambda: lm.freeze(), {})
    assert losses(run)[0] > 0


def test_where_bitsandbytes_is_missing_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else real(name)
    )
    with pytest.raises(ValueError, match=r"quantize needs bitsandbytes, .*retort\[quantized\]"):
        models.load({"model": str(tiny_path()), "quantize": "4bit"})
