"""LoRA: the update by hand, only it is trained, merged what is judged, the model under it whole, resumed to the bit."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from harness import cell, doctor, evaluation, models, problems, sizes
from harness.compare import compare
from harness.config import Adapter, Budget, Training, parse
from harness.ledger import Ledger, training_flops
from harness.models import adapters
from harness.models.hf import HFModel
from harness.objectives import forward_kl, nll, reverse_kl
from harness.reproduce import reproduce
from harness.trainer import Trainer
from harness.types import Batch, OffPolicy, OnPolicy, Problem, Request, Sampling, Stage
from tests.harness.test_trainer import EXAMPLES, no_teacher, trainer
from tests.tiny import tiny_model, tiny_network, tiny_path, tiny_tokenizer

ADAPTER = Adapter(r=2, alpha=3)
DROPOUT = Adapter(r=4, dropout=0.3, targets=["q_proj", "down_proj"])
BATCH = Batch(
    torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 256, 256]]),
    torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    torch.tensor([0, 3, 4, 6, 7]),
)
ASKED = [Request(text, Problem(text, text)) for text in ("1+1", "what", "a longer question")]


def tiny(adapter: Adapter | None = ADAPTER, seed: int = 0, **options: Any) -> HFModel:
    return HFModel.load(
        tiny_path(), device="cpu", name="tiny", adapter=adapter, seed=seed, **options
    )


def moved(lm: HFModel, size: float = 0.1) -> HFModel:
    """An adapter that does something."""
    with torch.no_grad():
        for name, tensor in lm.weights().items():
            if ".lora_B." in name:
                tensor.normal_(0, size)
    lm.touch()
    return lm


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# The update


def test_the_update_by_hand() -> None:
    """r = 2, alpha = 3: W + 1.5 B A, in one module; what is not adapted is not even copied."""
    lm = tiny(Adapter(r=2, alpha=3, targets=["q_proj"]))
    before = {name: tensor.clone() for name, tensor in tiny(None).writing_state().items()}
    layer = lm.model.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        layer.lora_A[adapters.NAME].weight.zero_()
        layer.lora_A[adapters.NAME].weight[0, 0] = 1.0
        layer.lora_A[adapters.NAME].weight[0, 1] = -2.0
        layer.lora_A[adapters.NAME].weight[1, 1] = 4.0
        layer.lora_B[adapters.NAME].weight[0, 0] = 3.0
        layer.lora_B[adapters.NAME].weight[5, 1] = 0.5
    state, name = lm.writing_state(), "model.layers.1.self_attn.q_proj.weight"
    expected = before[name].clone()
    expected[0, 0] += 1.5 * 3 * 1
    expected[0, 1] += 1.5 * 3 * -2
    expected[5, 1] += 1.5 * 0.5 * 4
    assert torch.allclose(state[name], expected, rtol=0, atol=1e-6)
    assert same({**state, name: before[name]}, before)
    base = lm.model.get_input_embeddings().weight
    assert state["model.embed_tokens.weight"].data_ptr() == base.data_ptr()


def test_alpha_is_twice_r_unless_it_is_said() -> None:
    scales = [
        {layer.scaling[adapters.NAME] for layer in adapters.layers(tiny(a).model).values()}
        for a in (Adapter(r=4), Adapter(r=4, alpha=1))
    ]
    assert scales == [{2.0}, {0.25}]


def test_the_training_seed_draws_it_and_nothing_else_moves() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, again, other = tiny(seed=0), tiny(seed=0), tiny(seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert same(one.weights(), again.weights()) and not same(one.weights(), other.weights())
    # B is zero, so it is its base to the bit, whatever A is: samples of it are shared
    plain = tiny(None)
    assert one.identity == other.identity == plain.identity
    assert torch.equal(one.hidden(BATCH), plain.hidden(BATCH))
    assert moved(one).identity != plain.identity
    assert not torch.equal(one.hidden(BATCH), plain.hidden(BATCH))


def test_what_decides_the_outputs_is_in_the_identity() -> None:
    one, two = tiny(), tiny(Adapter(r=2, alpha=4))  # the same tensors, another scale
    for lm in (one, two):
        torch.manual_seed(1)
        moved(lm)
    assert same(one.weights(), two.weights()) and one.identity != two.identity
    before = one.identity
    with torch.no_grad():
        next(iter(one.weights().values()))[0, 0] += 1
    assert one.identity != before


def test_it_counts() -> None:
    """Of width 32, one query projection of 32 x 32 and r = 2: 2 (32 + 32) in each of two layers."""
    lm, plain = tiny(Adapter(r=2, targets=["q_proj"])), tiny(None)
    assert lm.num_trained == 2 * 2 * (32 + 32) and plain.num_trained == plain.num_parameters
    assert lm.num_parameters == plain.num_parameters + lm.num_trained
    assert lm.base().num_parameters == plain.num_parameters
    # forward 2 N, gradients of activations 2 N, of weights 2 n
    assert training_flops(100, 7, 10) == (2 * 100 + 2 * 100 + 2 * 10) * 7
    assert training_flops(100, 7, 100) == training_flops(100, 7) == 6 * 100 * 7
    run = trainer(2, student=lm)
    run.run(0, Stage("s", OffPolicy(EXAMPLES), nll), no_teacher, {})
    n, tokens = lm.num_parameters, run.ledger.charged["trained"]
    assert run.ledger.charged["flops"] == (4 * n + 2 * lm.num_trained) * tokens


@pytest.mark.parametrize(
    ("targets", "wrong"),
    [(["q_proj", "query"], "query"), ("q_proj", "q_proj"), (["lm_head"], "lm_head"), (r".*norm", "norm"), (["embed_tokens"], "embed_tokens")],
)  # fmt: skip
def test_targets_that_are_none_are_refused(targets: Any, wrong: str) -> None:
    with pytest.raises(ValueError, match=rf"targets: .*{wrong}.*down_proj, gate_proj, .*v_proj"):
        tiny(Adapter(targets=targets))


def test_a_pattern_and_all_linear_name_the_same_modules() -> None:
    by_pattern = tiny(Adapter(targets=r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"))
    assert [*adapters.layers(by_pattern.model)] == [*adapters.layers(tiny().model)]
    assert len(adapters.layers(by_pattern.model)) == 2 * 7  # never the head


def test_a_tied_head_stays_what_it_was() -> None:
    network = tiny_network()
    network.config.tie_word_embeddings = True
    network.tie_weights()
    adapters.attach(network, ADAPTER, 0)
    lm = moved(HFModel(network, tiny_tokenizer(), adapter=ADAPTER))
    state = lm.writing_state()
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


def test_where_peft_is_missing_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "peft" else real(name)
    )
    spec = {"model": str(tiny_path()), "adapter": {}}
    for ask in (models.load, lambda spec: models.capabilities(spec, {})):
        with pytest.raises(ValueError, match=r"adapter needs peft, .*retort\[adapters\]"):
            ask(spec)


# Training


def test_only_the_adapter_is_trained() -> None:
    lm, plain = tiny(), tiny(None)
    run = trainer(3, student=lm)
    assert sum(p.numel() for p in run.parameters) == lm.num_trained
    assert all(p.dtype == torch.float32 for p in run.parameters)
    before = lm.state()
    run.run(0, Stage("s", OffPolicy(EXAMPLES), nll), no_teacher, {})
    assert same(adapters.base_state(lm.model), plain.writing_state())
    assert all(not torch.equal(before[k], v) for k, v in lm.state().items() if ".lora_B." in k)


def test_a_whole_rank_learns_what_the_gradient_says() -> None:
    """The first step moves B alone, along (alpha / r) G A', where G is the gradient of the whole weight."""
    lm, plain = tiny(Adapter(r=3, alpha=6, targets=["o_proj"])), tiny(None)
    for model in (lm, plain):
        run = trainer(1, student=model, training={"clip": 1e9})
        run.optimizer.step = lambda *given, **more: None  # type: ignore[method-assign]
        run.optimizer.zero_grad = lambda *given, **more: None  # type: ignore[method-assign]
        run.run(0, Stage("s", OffPolicy(EXAMPLES), nll), no_teacher, {})
    for mine, theirs in zip(lm.model.model.layers, plain.model.model.layers, strict=True):
        layer, whole = mine.self_attn.o_proj, theirs.self_attn.o_proj.weight.grad
        a, b = layer.lora_A[adapters.NAME].weight, layer.lora_B[adapters.NAME].weight
        assert torch.allclose(b.grad, 2.0 * whole @ a.T, rtol=1e-3, atol=1e-6)
        assert not a.grad.any()


def test_a_base_in_bf16_keeps_an_adapter_in_fp32(tmp_path: Path) -> None:
    lm = tiny(dtype="bf16")
    run = trainer(2, student=lm, training={"learning_rate": 1e-3})
    run.run(0, Stage("s", OffPolicy(EXAMPLES), nll), no_teacher, {})
    assert {t.dtype for t in lm.weights().values()} == {torch.float32}
    assert {t.dtype for t in adapters.base_state(lm.model).values()} == {torch.bfloat16}
    assert lm.base().identity == tiny(None, dtype="bf16").identity
    name = "model.layers.0.mlp.up_proj"
    layer = adapters.layers(lm.model)[name]
    a, b = layer.lora_A[adapters.NAME].weight, layer.lora_B[adapters.NAME].weight
    exact = layer.base_layer.weight.float() + 1.5 * (b @ a)
    assert torch.allclose(lm.writing_state()[f"{name}.weight"], exact, rtol=0, atol=1e-7)
    saved = HFModel.load(
        lm.save(tmp_path / "m"), device="cpu"
    )  # merged in fp32: nothing is rounded
    assert torch.allclose(saved.writing_state()[f"{name}.weight"], exact, rtol=0, atol=1e-7)
    lm.merge()
    assert lm.identity == saved.identity


# What is saved and judged


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "up_proj"], r".*\.[qk]_proj"])
def test_merged_it_is_a_plain_model_and_the_adapter_lies_beside(
    tmp_path: Path, targets: Any
) -> None:
    from peft import PeftModel

    lm = moved(tiny(Adapter(r=2, alpha=3, targets=targets)))
    unmerged, name = lm.hidden(BATCH), lm.identity
    path = lm.save(tmp_path / "model")
    assert lm.identity == name and torch.equal(lm.hidden(BATCH), unmerged)  # as it was
    saved = HFModel.load(path, device="cpu")
    assert same(saved.writing_state(), lm.writing_state())
    assert torch.allclose(saved.hidden(BATCH), unmerged, rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)
    again = PeftModel.from_pretrained(plain, path / "adapter").merge_and_unload()
    assert same(dict(again.state_dict()), saved.writing_state())
    lm.merge()
    assert lm.identity == saved.identity and lm.adapter is None
    assert torch.allclose(lm.hidden(BATCH), saved.hidden(BATCH), rtol=1e-4, atol=1e-4)
    second = lm.save(tmp_path / "second")
    for file in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "config.json"):  # fmt: skip
        assert (path / file).read_bytes() == (second / file).read_bytes(), file
    with pytest.raises(ValueError, match="an adapter without the model under it"):
        models.load(path / "adapter")


def test_what_an_engine_is_given_is_plain(tmp_path: Path) -> None:
    """The student's weights merged, its base's without the adapter; the student stays as it is."""
    lm = moved(tiny())
    for name, model in (("student", lm), ("base", lm.base())):
        model.save_weights(tmp_path / name)
        given = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        assert same(dict(given.state_dict()), model.writing_state())
        assert same(dict(given.state_dict()), tiny(None).writing_state()) == (name == "base")
    assert lm.adapter is not None and lm.weights()


def test_a_copy_has_an_adapter_of_its_own() -> None:
    lm = moved(tiny())
    twin = lm.clone()
    assert twin.identity == lm.identity and torch.equal(twin.hidden(BATCH), lm.hidden(BATCH))
    before = twin.state()
    moved(lm)
    assert same(twin.state(), before) and twin.identity != lm.identity
    lm.load_state(before)
    assert lm.identity == twin.identity
    with pytest.raises(ValueError, match="not the weights of its adapter"):
        lm.load_state(tiny(None).state())


# The model under it


def test_the_model_under_it_is_the_base_to_the_bit_without_a_copy(tmp_path: Path) -> None:
    lm, plain = moved(tiny(DROPOUT)), tiny(None).freeze()
    base = lm.base().freeze()
    for layer in lm.model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    lm.model.train()  # both dropouts are on in the student
    grads = [p.requires_grad for p in lm.model.parameters()]
    assert torch.equal(base.hidden(BATCH), plain.hidden(BATCH))
    assert torch.equal(base.head(base.hidden(BATCH)), plain.head(plain.hidden(BATCH)))
    assert not base.hidden(BATCH).requires_grad
    pairs = [(plain.encode("1+1"), plain.tokenize("2")), (plain.encode("x"), plain.tokenize("yes"))]
    assert base.score(pairs) == plain.score(pairs)
    sampling = Sampling(n=3, temperature=1.0, max_new_tokens=12)
    assert base.generate(ASKED, sampling) == plain.generate(ASKED, sampling)
    assert base.identity == plain.identity and base.capabilities == plain.capabilities
    for name, tensor in base.writing_state().items():
        assert tensor.data_ptr() == adapters.base_state(lm.model)[name].data_ptr()
    assert base.head_weight.data_ptr() == lm.head_weight.data_ptr()
    # the student is as it was: in training, with gradients, the adapter on
    assert lm.model.training and [p.requires_grad for p in lm.model.parameters()] == grads
    assert not torch.equal(lm.hidden(BATCH), lm.hidden(BATCH))  # dropout
    lm.model.eval()
    assert not torch.allclose(lm.hidden(BATCH), plain.hidden(BATCH), atol=1e-2)
    assert same(base.clone().writing_state(), plain.writing_state())
    lm.merge()
    with pytest.raises(RuntimeError, match="was merged"):
        base.hidden(BATCH)
    with pytest.raises(RuntimeError, match="was merged"):
        base.save_weights(tmp_path)  # what an engine would be sent


def test_an_error_inside_it_leaves_the_student_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = moved(tiny())
    lm.model.train()
    expected = lm.hidden(BATCH)
    broken = Batch(BATCH.ids, BATCH.mask, torch.tensor([99]))
    with pytest.raises(IndexError):
        lm.base().hidden(broken)
    assert lm.model.training and torch.equal(lm.hidden(BATCH), expected)


@pytest.mark.parametrize("objective", [forward_kl, reverse_kl])
def test_it_teaches_like_a_model_of_its_own(objective: Any) -> None:
    """Teacher and student take turns on the same weights within a step."""
    curves = []
    for shared in (True, False):
        lm = moved(tiny(DROPOUT))
        torch.manual_seed(3)
        run = trainer(3, student=lm, training={"micro_tokens": 64})
        teacher = lm.base() if shared else tiny(None).freeze()
        run.run(0, Stage("s", OffPolicy(EXAMPLES), objective), lambda t=teacher: t, {})  # type: ignore[misc]
        curves.append(run.state.curve)
        torch.manual_seed(0)
    assert len({json.dumps(curve) for curve in curves}) <= 2
    for one, two in zip(*curves, strict=True):
        assert one == two
    assert curves[0][0]["loss"] > 1e-3


def test_at_the_start_it_is_no_farther_than_rounding_from_its_base() -> None:
    lm = tiny()
    run = trainer(1, student=lm)
    run.run(0, Stage("s", OffPolicy(EXAMPLES), forward_kl), lm.base, {})
    assert abs(run.state.curve[0]["loss"]) < 1e-6


# Resumed


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3, 5, 8])
def test_a_run_that_was_cut_ends_in_the_same_bits(tmp_path: Path, at: int) -> None:
    """Two stages with dropout, the base as the teacher of the second, cut at any step."""
    seen: list[list[str]] = []

    def make(lm: HFModel) -> OnPolicy:
        def write(block: Any) -> list[Any]:
            drawn = lm.generate([Request(p.id, p) for p in block], Sampling(max_new_tokens=5))
            return [EXAMPLES[0].__class__(t.problem.id, (1, 2), t.tokens) for (t,) in drawn]

        return OnPolicy([Problem(name, name) for name in "abcd"], write)

    def stages(run: Trainer) -> Iterator[Stage]:
        seen.append([run.student.identity])
        yield Stage("off", OffPolicy(EXAMPLES), nll, share=0.5)
        seen[-1].append(run.student.identity)
        base = run.student.base()
        yield Stage("on", make(run.student), reverse_kl, share=0.5, optimizer="reset", teacher=base)
        seen[-1].append(run.student.identity)

    def go(run: Trainer) -> Trainer:
        run.resume()
        for index, stage in enumerate(stages(run)):
            run.run(index, stage, no_teacher, {})
        return run

    def begin(**more: Any) -> Trainer:
        torch.manual_seed(5)
        lm = tiny(DROPOUT, seed=4)
        training = {"checkpoint_every": 2}
        return trainer(
            8, student=lm, training=training, checkpoint=tmp_path / more.pop("name"), **more
        )

    def cut(phase: str, done: int, total: int) -> None:
        if done == at:
            raise Killed

    whole = go(begin(name="whole.pt"))
    with pytest.raises(Killed):
        go(begin(name="cut.pt", report=cut))
    again = go(begin(name="cut.pt"))
    assert again.state.curve == whole.state.curve and len(whole.state.curve) == 8
    assert same(again.student.state(), whole.student.state())
    assert seen[-1] == seen[0] and len(set(seen[0])) == 3
    assert again.ledger.charged == whole.ledger.charged
    for file in ("whole.pt", "whole-1.pt"):  # no more than the adapter and its moments
        held = torch.load(tmp_path / file, weights_only=False)
        assert (
            held["model"] if file == "whole.pt" else held
        ).keys() == whole.student.weights().keys()


# A comparison


SUITE: dict[str, Any] = {
    "name": "lora",
    "student": {"model": "micro/student", "adapter": {"r": 4}},
    "teacher": "micro/teacher",
    "problems": {"micro_math": {"n": 24, "levels": [1, 2]}},
    "benchmarks": {"micro_math": {"limit": 12, "levels": [1, 2, 3], "max_new_tokens": 48}},
    "seeds": 1,
    "budget": {"steps": 4},
    "reference": "own",
    "methods": {
        "own": {"method": "rkl"},
        "self": {"method": "paced", "track": "self_distillation", "schedule": "rkl", "rollouts": 4},
    },
    "training": {"batch_size": 6, "checkpoint_every": 2, "learning_rate": 1e-3},
    "sampling": {"max_new_tokens": 48},
    "threads": 1,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lora") / "results"
    compare(parse(SUITE), results=root, quiet=True, track=False)
    return root


def test_a_comparison_with_adapters(results: Path, tmp_path: Path) -> None:
    """Each student is a plain folder, and what was judged in the run is that folder."""
    home = results / "lora"
    plain = HFModel.load(problems.checkpoints()["micro/student"], device="cpu", dtype="fp32")
    for label in ("own", "self"):
        record = json.loads((home / f"runs/{label}/0/run.json").read_text())
        folder = home / f"models/{label}/0"
        saved = cell.student_model(str(folder))
        assert record["student"] == saved.identity != record["start"] == plain.identity
        assert (folder / "adapter/adapter_config.json").is_file()
        assert record["ledger"]["charged"]["trained"] > 0
        judged = evaluation.read_records(home / f"samples/micro_math--{label}--0.parquet")
        again = evaluation.evaluate(saved, {"micro_math": parse(SUITE).benchmarks["micro_math"]})
        assert [r["text"] for r in judged] == [r["text"] for r in again["micro_math"]]
        assert not list((home / f"runs/{label}").rglob("*.pt"))
    other = json.loads((home / "runs/self/0/run.json").read_text())
    assert other["models"]["base"] == plain.identity
    found = reproduce(
        "lora/self/0", results=results, into=tmp_path / "again", tier="T1", say=lambda _: None, quiet=True
    )  # fmt: skip
    assert found.identical, found.lines()


def test_who_shares_the_weights() -> None:
    """The base, and a teacher on the same line; as two models, as the ledger tells them apart."""
    line = {"model": "micro/student", "adapter": {"r": 4}}
    for teacher, shared in (("micro/student", True), ({"model": "micro/student", "dtype": "bf16"}, False), ("micro/teacher", False)):  # fmt: skip
        setting = parse({**SUITE, "student": line, "teacher": teacher})
        student = cell.student_model(setting.student, 0)
        load = cell.loaders(setting, student)
        base, model = load["base"](), load["teacher"]()
        assert isinstance(base, HFModel) and isinstance(model, HFModel) and base is not model
        assert base.model is student.model and (model.model is student.model) == shared
        assert student.model.training or any(p.requires_grad for p in student.model.parameters())
    ordinary = cell.student_model("micro/student")
    load = cell.loaders(parse({**SUITE, "student": "micro/student"}), ordinary)
    assert load["base"]().model is not ordinary.model  # type: ignore[attr-defined]


def test_options_are_in_the_key_and_their_defaults_are_not(results: Path) -> None:
    def key(student: Any, **training: Any) -> str:
        given = {**SUITE, "student": student, "training": {**SUITE["training"], **training}}
        setting = parse(given)
        jobs = cell.jobs(setting, ["own"], results / "lora", results / "store")
        return cell.key(jobs[1], setting)

    bare = key("micro/student")
    assert (
        bare == key({"model": "micro/student"}) == key({"model": "micro/student", "offload": False})
    )
    told = {"model": "micro/student", "adapter": {"r": 4}}
    others = [key(told), key({**told, "adapter": {"r": 8}}), key("micro/student", packing=True)]
    others += [key({"model": "micro/student", "attn_implementation": "eager"})]
    assert len({bare, *others}) == 5
    plain = Training().model_dump(mode="json")
    assert "packing" not in plain and "gradient_checkpointing" not in plain
    assert Training(packing=True).model_dump()["packing"] is True
    assert Training.model_validate(Training(packing=True).model_dump()).packing


def test_adapters_are_charged_and_budgeted_as_they_train() -> None:
    lm = tiny()
    run = Trainer(lm, Training(batch_size=4), Budget(flops=2e8), 0, Ledger())
    run.run(0, Stage("s", OffPolicy(EXAMPLES), nll), no_teacher, {})
    full = Trainer(tiny_model(), Training(batch_size=4), Budget(flops=2e8), 0, Ledger())
    full.run(0, Stage("s", OffPolicy(EXAMPLES), nll), no_teacher, {})
    assert len(run.state.curve) > len(full.state.curve)


# What it will cost


def test_a_plan_counts_what_an_adapter_needs() -> None:
    """Micro student: N weights below in fp32, n of the adapter with gradients and two moments, and no second base."""
    known = problems.checkpoints()
    line = {"model": "micro/student", "adapter": {"r": 4, "targets": ["q_proj", "up_proj"]}}
    shape = sizes.shape(line, known)
    lm = cell.student_model(line)
    n, below = lm.num_trained, lm.num_parameters - lm.num_trained
    assert (shape.adapter, shape.trained, shape.parameters) == (n, n, below)
    setting = parse({**SUITE, "student": line})
    teacher = sizes.shape("micro/teacher", known)
    others = {"base": shape, "teacher": teacher}
    held = cell.memory(setting, shape, others, 100, cuda=False)
    assert held.student == 16 * n + 4 * below and held.frozen == 4 * teacher.parameters
    plain = sizes.shape("micro/student", known)
    full = cell.memory(parse({**SUITE, "student": "micro/student"}), plain, {"base": plain}, 100, cuda=True)  # fmt: skip
    assert full.student == 18 * plain.parameters and full.frozen == 2 * plain.parameters


def test_a_plan_knows_types_and_what_is_offloaded() -> None:
    student, frozen = sizes.named("x-1B"), sizes.named("y-7B")
    n = frozen.parameters
    known: dict[str, Path] = {}
    for line, cuda in (({}, 2 * n), ({"dtype": "fp32"}, 4 * n), ({"quantize": "8bit"}, n), ({"quantize": "4bit"}, n / 2), ({"offload": True}, 0)):  # fmt: skip
        shape = sizes.shape({"model": "y-7B", **line}, known)
        held = sizes.memory(student, {"teacher": shape}, 1024, 100, True)
        assert held.frozen == cuda, line
    adapted = sizes.shape({"model": "x-1B", "adapter": {"r": 8}}, known)
    assert adapted.adapter == 19 * 8 * student.layers * student.hidden
    held = sizes.memory(adapted, {}, 1024, 100, True)
    assert held.student == 2 * student.parameters + 18 * adapted.adapter
    # 1 G weights of 2 bytes beside a GiB or two of activations, then merged in 4 bytes beside the caches of its samples
    assert (
        held.merged == 4 * student.parameters
        and sizes.memory(student, {}, 1024, 100, True).merged == 0
    )
    tight = held._replace(training=1e9, writing=3e9)
    assert tight.peak == 4 * student.parameters + 3e9
    assert tight._replace(frozen=5e9).peak == max(4 * student.parameters + 5e9, held.student + 8e9)
    # 2 T H at the border of each layer and 34 T H inside one, instead of 34 T H in each
    less, more = (
        sizes.memory(student, {}, 1024, 100, True, flag).training for flag in (True, False)
    )
    saved = 2 * 1024 * student.hidden * (17 * student.layers - 17 - student.layers)
    assert more - less == saved > 0


def test_doctor_and_plan_take_a_suite_with_adapters() -> None:
    small = {
        **SUITE,
        "budget": {"steps": 8},
        "problems": {"micro_math": {"n": 32, "levels": [1, 2]}},
    }
    findings = doctor.examine(parse(small))
    trouble = [each for each in findings if each.level == "problem"]
    assert not [each for each in trouble if "weights" in each.subject or each.subject == "self-KL"]
    assert any("an adapter, are trained" in each.text for each in findings)
    wrong = {**small, "student": {"model": "micro/student", "adapter": {"targets": ["query"]}}}
    (said,) = doctor.examine(parse(wrong))
    assert (
        said.level == "problem" and "query cannot be adapted" in said.text and "q_proj" in said.text
    )


def test_doctor_names_a_missing_extra_before_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else real(name)
    )
    setting = parse({**SUITE, "teacher": {"model": "somebody/else-7B", "quantize": "4bit"}})
    (said,) = doctor.examine(setting)
    assert said.level == "problem" and "pip install 'retort[quantized]'" in said.text
