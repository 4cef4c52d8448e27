"""What a suite will cost: predictions against ledgers that were measured, and the arithmetic by hand."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import SUITES
from harness import cli, config, plan, problems, sizes, standin
from harness.config import Experiment
from harness.ledger import Ledger
from harness.models.decoding import Block
from harness.models.hf import CACHE_BYTES
from harness.plan import forecast
from harness.probe import BLOCKS, Blocks, Costs, spread
from harness.report import plan as said
from harness.standin import StandIn
from harness.types import Example, OnPolicy, Problem, Request, Sampling
from tests.benches import without_weights

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
TOKENS = ("teacher_generated", "teacher_scored", "student_generated", "trained")
ALONE = (*TOKENS, "verifier_calls", "steps", "flops")
SHARED = (*TOKENS, "steps", "flops")  # two workers may judge the same text: their calls vary


# Against what was measured


def errors(
    ours: dict[str, Any], theirs: dict[str, Any], quantities: Sequence[str]
) -> dict[str, float]:
    """Relative errors; what was measured as none must be predicted as none."""
    found = {}
    for name in quantities:
        if theirs[name]:
            found[name] = ours[name] / theirs[name] - 1
        else:
            assert ours[name] == 0, name
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("suite", "sample", "bound"), [("quickstart", None, 0.25), ("paced-frontier", 128, 0.4)]
)
def test_a_plan_is_near_the_measured_ledger(suite: str, sample: int | None, bound: float) -> None:
    """No constant of the plan was fitted to these suites: all is from its walk. 128 problems keep the test short."""
    measured = json.loads((REFERENCE / suite / "summary.json").read_text(encoding="utf-8"))
    found = forecast(suite, num_problems=sample, quiet=True)
    arms = {row["method"]: row["ledger"] for row in measured["arms"] if row["method"] != "base"}
    assert set(arms) == set(found["arms"]) and len(arms) >= 5
    off = {
        f"{label}: {name}": error
        for label, ledger in arms.items()
        for name, error in errors(found["arms"][label]["charged"], ledger["charged"], ALONE).items()
    }
    for column in ("charged", "spent"):
        total = errors(found["total"][column], measured["ledger"][column], SHARED)
        off |= {f"all {column}: {name}": error for name, error in total.items()}
    assert len(off) > 30
    beyond = {name: round(error, 3) for name, error in off.items() if abs(error) > bound}
    assert not beyond


# A small suite, whole


def small(**changes: Any) -> Experiment:
    return Experiment.model_validate({
        "name": "small",
        "student": "micro/student",
        "teacher": "micro/teacher",
        "problems": {"micro_math": {"n": 96, "levels": [2, 3]}},
        "benchmarks": {"micro_math": {"limit": 20}},
        "seeds": 3,
        "budget": {"steps": 24},
        "methods": {"sft": {"samples": 2, "keep": 2}, "again": {"method": "sft", "samples": 4}, "rkl": {}},
        "training": {"batch_size": 16, "micro_tokens": 4096},
        "sampling": {"max_new_tokens": 120},
        "threads": 1,
        **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return forecast(small(), num_problems=32, quiet=True)


def test_what_is_shared_is_spent_once(found: dict[str, Any]) -> None:
    sft, again = found["arms"]["sft"], found["arms"]["again"]
    assert sft["first"]["teacher_generated"] == sft["cell"]["teacher_generated"] > 0
    assert sft["later"]["teacher_generated"] == 0  # a second seed has the first one's samples
    # Two of the four samples are those of sft.
    rest = again["cell"]["teacher_generated"] - sft["cell"]["teacher_generated"]
    assert again["first"]["teacher_generated"] == pytest.approx(rest)
    assert sft["charged"]["teacher_generated"] == pytest.approx(
        3 * sft["cell"]["teacher_generated"]
    )
    assert sft["spent"]["teacher_generated"] == sft["cell"]["teacher_generated"]


def test_on_policy_text_is_written_by_every_seed(found: dict[str, Any]) -> None:
    rkl = found["arms"]["rkl"]
    assert rkl["first"]["student_generated"] > 0 and rkl["later"]["student_generated"] > 0
    # All that is written is trained on and scored, its prompts besides.
    assert (
        rkl["cell"]["trained"] == rkl["cell"]["teacher_scored"] > rkl["cell"]["student_generated"]
    )
    assert rkl["cell"]["steps"] == 24 and rkl["charged"]["steps"] == 72
    # 24 steps of 16 responses of a dozen tokens and more, on prompts of a dozen
    assert 24 * 16 * 12 < rkl["cell"]["student_generated"] < 24 * 16 * 60


def test_a_third_of_the_problems_says_what_all_say(found: dict[str, Any]) -> None:
    whole = forecast(small(seeds=1), num_problems=96, quiet=True)["arms"]
    for label in ("sft", "again"):
        for name, amount in whole[label]["cell"].items():
            assert found["arms"][label]["cell"][name] == pytest.approx(amount, rel=0.1), name
    # Every problem is drawn twice or four times: the calls are counted, not estimated.
    assert (
        whole["again"]["cell"]["teacher_generated"]
        > 1.8 * whole["sft"]["cell"]["teacher_generated"]
    )


def test_data_seeds_share_nothing(found: dict[str, Any]) -> None:
    arm = forecast(small(data_seeds=[0, 1], methods={"sft": {"samples": 2, "keep": 2}}),
                   num_problems=32, quiet=True)["arms"]["sft"]  # fmt: skip
    assert (
        arm["spent"]["teacher_generated"] == 2 * found["arms"]["sft"]["spent"]["teacher_generated"]
    )
    assert arm["charged"]["steps"] == 24 * 3 * 2


def test_what_the_design_will_find(found: dict[str, Any]) -> None:
    """V = 2 I / P + 2 / S (seed + noise / P) of 3 seeds and 20 problems; 80 % power asks for 2.8 standard errors and a little more."""
    at = found["detectable"]["micro_math"]
    assert (at["problems"], at["samples"], at["seeds"]) == (20, 1, 3)
    variance = 2 * 0.039 / 20 + 2 / 3 * (0.000012 + 0.093 / 20)
    assert 2.8 < at["mde"] / variance**0.5 < 3.3
    assert f"in five: {100 * at['mde']:.1f} points on micro_math, with 3 seeds" in " ".join(
        said.sentences(found)
    )
    sft: dict[str, Any] = {"methods": {"sft": {"samples": 1}}, "seeds": 1}
    one = forecast(small(**sft), num_problems=8, quiet=True)
    assert one["detectable"]["micro_math"]["mde"] is None
    assert "One seed" in " ".join(said.sentences(one))
    two = forecast(small(**sft, data_seeds=[0, 1]), num_problems=8, quiet=True)
    assert two["detectable"]["micro_math"]["seeds"] == 2  # draws of the data are runs of their own


def test_a_plan_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    torch.manual_seed(7)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    forecast(small(methods={"sft": {"samples": 1}}, seeds=1), num_problems=16, quiet=True)
    assert torch.equal(torch.rand(1), drawn)  # nor does it move a generator
    assert not [*tmp_path.iterdir()]


def test_the_tables_fit_a_terminal(found: dict[str, Any]) -> None:
    rows = [*said.rows(found)]
    assert {len(row) for row in rows} == {len(said.HEADER)}
    assert [row[0] for row in rows if row[0]] == ["sft", "again", "rkl", "all cells"]
    assert (
        max(sum(max(len(row[i]) for row in rows) + 2 for i in range(len(row))) for row in rows)
        <= 100
    )
    text = " ".join(said.sentences(found))
    for words in ("10 students write", "on 32 of 96 training problems", "Peak memory", "Disk"):
        assert words in text


def test_a_row_of_the_table_is_a_line(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(cli, "out", Console(width=80, file=shown))
    monkeypatch.setattr(plan, "forecast", lambda *_, **__: found)
    cli.plan("small")
    lines = [line.split() for line in shown.getvalue().split("\n\n")[0].splitlines()]
    for row in said.rows(found):
        assert " ".join(row).split() in lines


# Models that are not here


def test_models_that_are_not_here_are_played(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(
        "\n".join(
            json.dumps({"id": f"p{i}", "prompt": f"How many are {i} apples and {i * i} pears together?", "answer": str(i + i * i)})
            for i in range(64)
        )
    )  # fmt: skip
    suite = small(
        student="nobody/Small-0.5B",
        teacher="nobody/Large-7B",
        problems={"p": {"path": str(tmp_path / "p.jsonl"), "domain": "math", "verifier": "math"}},
        methods={
            "sft": {"samples": 4, "keep": 4},
            "limo": {},
            "paced": {},
            "vcrd": {"rollouts": 1},
        },
        reference="sft",
        sampling={"max_new_tokens": 1200},
        seeds=1,
    )
    result = forecast(suite, tokens=400, gpu="h100", price=2.0, quiet=True)
    assert not [arm for arm in result["arms"].values() if "failed" in arm], result["arms"]
    sft = result["arms"]["sft"]["cell"]
    assert sft["teacher_generated"] == pytest.approx(64 * 4 * 400, rel=0.2)
    assert 24 * 16 * 350 < sft["trained"] < 24 * 16 * 500
    assert result["cost"] == pytest.approx(2.0 * result["hours"]["whole"]) and result["cost"] > 0
    text = " ".join(said.sentences(result))
    for words in (
        "nobody/Large-7B is not here",
        "responses of 400 tokens (as told)",
        "NVIDIA H100",
        "the size in its name",
    ):
        assert words in text


def test_a_model_of_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="its name says no size"):
        forecast(small(teacher="nobody/Large"), quiet=True)


def test_the_full_size_suite_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of its arms, from configurations alone: no weights, no data, no network."""
    monkeypatch.delenv("RETORT_DATA", raising=False)
    student, teacher = without_weights(tmp_path)
    keep = ["sft", "fkl"]
    data = config.load(
        SUITES / "qwen3-math.yaml",
        [f"student={student}", f"teacher={teacher}", "training.gradient_checkpointing=false"],
    ).model_dump()
    data["methods"] = {label: data["methods"][label] for label in keep}
    result = forecast(Experiment.model_validate(data), gpu="H100 SXM", price=2.5, num_problems=16, quiet=True)  # fmt: skip
    # Weights: a head, an embedding unless it is the head; in a layer q, k, v, o, the MLP's three, and norms.
    n, big = 151936 * 2048, 2 * 151936 * 4096
    n += 28 * (2 * 2048 * 16 * 128 + 2 * 2048 * 8 * 128 + 3 * 2048 * 6144 + 2 * 2048 + 2 * 128) + 2048  # fmt: skip
    big += 36 * (2 * 4096 * 32 * 128 + 2 * 4096 * 8 * 128 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128) + 4096  # fmt: skip
    assert (n, big) == (1_720_574_976, 8_190_735_360)
    memory = result["memory"]
    assert memory["student"] == 18 * n and memory["frozen"] == 2 * big  # nobody asks the base
    # An example of max_length has a pass of its own: 34 T H L, the chunks, the head's gradient, the teacher's layer.
    tokens = 18432
    passing = 34 * tokens * 2048 * 28 + 4 * 2**28 + 4 * 151936 * 2048 + 16 * tokens * 4096
    assert memory["training"] == passing
    # Keys and values of a sequence, 2 * 28 layers * 8 heads * 128 * 2 bytes a token: 4 of the student's are 8 GiB, 3 of the teacher's.
    row = 2 * 28 * 1024 * 2 * (16384 + 140)
    assert memory["writing"] == pytest.approx(CACHE_BYTES // row * row, rel=0.005)
    assert memory["peak"] == memory["student"] + memory["frozen"] + passing > result["gpu_memory"]
    # 2,000 problems, 4 samples of 4,096 tokens; 12,800 of those trained on, in fp32 6 N of FLOPs a token
    arm = result["arms"]["sft"]["cell"]
    assert arm["teacher_generated"] == pytest.approx(2000 * 4 * 4096, rel=0.1)
    assert arm["trained"] == pytest.approx(12800 * (4096 + 140), rel=0.1)
    asked = 2 * big * arm["teacher_generated"]
    assert arm["flops"] == pytest.approx(6 * n * arm["trained"] + asked, rel=0.05)
    # Training at 35 % of 989e12; writing reads 16.4e9 bytes of weights and the rows' caches a step.
    later = result["arms"]["sft"]["hours"]["later"]
    assert later == pytest.approx(6 * n * arm["trained"] / (989e12 * 0.35) / 3600, rel=0.02)
    rows = int(80e9 / 4 // (2 * 36 * 1024 * 2 * 4096))
    step = (2 * big + rows * 2 * 36 * 1024 * 2 * 2048) / 3.35e12 / 0.35
    wrote = arm["teacher_generated"] / rows * step / 3600
    assert result["arms"]["sft"]["hours"]["first"] - later == pytest.approx(wrote, rel=0.05)
    # As the suite has it: 34 T H of one layer and 2 T H at the border of each, which fits; and 2 N more FLOPs a token.
    data["training"]["gradient_checkpointing"] = True
    again = forecast(Experiment.model_validate(data), gpu="H100 SXM", num_problems=16, quiet=True)
    saved = 34 * tokens * 2048 * 28 - (34 + 2 * 28) * tokens * 2048
    held = again["memory"]
    assert held["training"] == passing - saved < held["writing"] == memory["writing"]
    assert held["peak"] == held["student"] + held["frozen"] + held["writing"] < again["gpu_memory"]
    assert again["arms"]["sft"]["cell"]["flops"] == arm["flops"]
    assert again["arms"]["sft"]["hours"]["later"] == pytest.approx(later * 8 / 6, rel=0.02)
    said_of = " ".join(said.sentences(result))
    for words in (
        "TOO LITTLE",
        "2,000 problems assumed",
        "without math500, aime24, aime25",
        "its config.json",
    ):
        assert words in said_of


@pytest.mark.parametrize(
    ("options", "words"),
    [({"gpu": "h1000"}, "did you mean 'h100'"), ({"utilisation": 35}, "a share of the data sheet")],
)
def test_mistakes(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        forecast(small(), quiet=True, **options)


def test_a_stand_in_is_as_long_and_as_right_as_assumed() -> None:
    model = StandIn("teacher", 10, 500, 0.7)
    items = [Problem(f"p{i}", "x", "math", "1") for i in range(300)]
    requests = [Request(problems.render(problem), problem) for problem in items]
    traces = [
        trace
        for group in model.generate(requests, Sampling(n=4, max_new_tokens=5000))
        for trace in group
    ]
    lengths = [len(trace.tokens) for trace in traces]
    assert sum(lengths) / len(lengths) == pytest.approx(500, rel=0.08)
    assert sum(t.text.endswith("right") for t in traces) / len(traces) == pytest.approx(
        0.7, abs=0.06
    )
    (first, _) = model.plan(requests, Sampling(n=2))
    assert isinstance(first, Block) and model.generate_block(first)[5].tokens == traces[20].tokens
    before = model.identity
    model.touch()
    assert model.identity != before


def test_difficulties_of_a_sample_leave_no_gap() -> None:
    items = [Problem(f"p{i}", "x", "math", "1") for i in range(32)]
    found = sorted(standin.spaced(items).values())
    assert max(b - a for a, b in itertools.pairwise([0.0, *found, 1.0])) < 2.5 / 32
    # Those of a smaller sample are as even, so that both see the same share of hard problems.
    assert abs(sum(value < 0.25 for value in found) - 8) <= 1
    hard = StandIn("teacher", 10, 500, 0.7, difficulty={"p0": 0.05, "p1": 0.95})

    def right(hint: str | None) -> list[int]:
        requests = [Request(problems.render(p, hint), p) for p in items[:2]]
        drawn = hard.generate(requests, Sampling(n=50, max_new_tokens=5000))
        return [sum(trace.text.endswith("right") for trace in group) for group in drawn]

    assert right(None)[0] < 5 and right(None)[1] > 45
    assert (
        25 < right("1")[0] < 45 < right("1")[1]
    )  # a hint helps where help is needed, at the assumed rate


# By hand


def test_the_sample_has_every_kind_in_proportion() -> None:
    items = [Problem(f"p{i}", "x" * (i % 7), "math", "1", level=i % 4) for i in range(400)]
    some = spread(items, 40)
    assert [sum(p.level == level for p in some) for level in range(4)] == [10, 10, 10, 10]
    assert [items.index(p) for p in some] == sorted(items.index(p) for p in some)
    assert spread(items, 1000) == items


def test_later_blocks_cost_what_the_first_did() -> None:
    items = [Problem(f"p{i}", "x", "math", "1") for i in range(4)]
    ledger = Ledger()
    seen = []

    def make(block: Sequence[Problem]) -> list[Example]:
        seen.append([problem.id for problem in block])
        ledger.charge("student_generated", 10 * len(seen))
        ledger.spend("student_generated", 5)
        return []

    blocks = Blocks(OnPolicy(items, make), ledger, whole=False)
    for _ in range(BLOCKS + 4):
        blocks([items[0], items[0], items[2]])
    assert len(seen) == 2 * BLOCKS and seen[:2] == [["p0", "p2"], ["p0"]]  # no problem twice
    # 10 + 20 + … + 120 = 780 for six blocks, and 130 for each of four more
    assert ledger.charged["student_generated"] == pytest.approx(780 + 4 * 130)
    assert ledger.spent["student_generated"] == pytest.approx(10 * 10)


def test_costs_add_and_scale() -> None:
    a, b = Costs({"charged flops": 2.0, "seconds": 1.0}), Costs({"charged flops": 3.0})
    assert (a + b)["charged flops"] == 5 and (a - b)["charged flops"] == -1
    assert (a * 4)["seconds"] == 4 and (a + b)["spent steps"] == 0
    assert a.column("charged")["flops"] == 2 and "seconds" not in a.column("charged")


def test_shapes_from_a_configuration_and_from_a_name() -> None:
    shape = sizes.shape("micro/student", problems.checkpoints())
    from tests.benches import model

    real = model("student")
    assert shape.parameters == real.num_parameters and shape.source == "its config.json"
    config = real.model.config
    assert (shape.layers, shape.hidden) == (config.num_hidden_layers, config.hidden_size)
    assert shape.kv == config.num_key_value_heads * config.head_dim
    named = sizes.named("some/Thing-7B-Instruct")
    # 12 L (128 L)^2 = 7e9: L = 33 (32.9), H = 4224
    assert (named.parameters, named.layers, named.hidden, named.kv) == (
        7_000_000_000,
        33,
        4224,
        1056,
    )
    assert sizes.named("x/y-1.5b").parameters == 1_500_000_000


SHAPE = sizes.Shape("one", 1000, layers=2, hidden=16, kv=8, vocabulary=100, source="")
WIDE = sizes.Shape("two", 5000, layers=3, hidden=32, kv=4, vocabulary=100, source="")


def test_memory_by_hand() -> None:
    assert SHAPE.cache(10, 2) == 2 * 2 * 8 * 10 * 2
    held = sizes.memory(SHAPE, {"teacher": WIDE}, micro_tokens=64, length=10, cuda=True)
    assert held.student == 18 * 1000 and held.frozen == 2 * 5000
    # 34 T H L, four chunks of 2^28, the head's gradient in fp32, and 16 T H of the teacher's layer
    assert held.training == 34 * 64 * 16 * 2 + 4 * 2**28 + 4 * 100 * 16 + 16 * 64 * 32
    assert held.writing == 512 * SHAPE.cache(10, 2)  # a row of it is larger than the teacher's
    assert held.peak == held.student + held.frozen + held.training


def test_a_long_example_has_a_pass_of_its_own() -> None:
    training = config.Training(micro_tokens=100, max_length=500)
    assert [sizes.pass_tokens(training, length) for length in (50, 300, 900)] == [100, 300, 500]


def test_a_gpu_may_be_written_as_its_maker_writes_it() -> None:
    names = ("h100", "H100 SXM", "RTX 4090", "A100-40")
    assert [sizes.gpu(name) for name in names] == [sizes.GPUS[k] for k in ("h100", "h100", "rtx4090", "a100-40")]  # fmt: skip


def test_writing_by_hand() -> None:
    on = sizes.GPU(1e9, flops=1e6, bandwidth=1e5, source="")
    # 4 rows, half of 20 tokens: 2 * 1000 + 4 * 640 = 4560 bytes at 1e5 a second; 8000 FLOPs at 1e6: the bytes are slower
    step = 4560 / 1e5 / 0.5
    assert sizes.writing_seconds(SHAPE, 800, 4, 20, on, 0.5) == pytest.approx(200 * step)
    fast = on._replace(bandwidth=1e9)
    assert sizes.writing_seconds(SHAPE, 800, 4, 20, fast, 0.5) == pytest.approx(
        200 * 8000 / 1e6 / 0.5
    )


def test_amounts_are_short() -> None:
    assert [said.amount(value) for value in (0, 97, 1950000, 5.24e12)] == [
        "0",
        "97",
        "1.95M",
        "5.24T",
    ]
    assert [said.hours(value) for value in (None, 0.001, 1.5, 1234.5)] == [
        "",
        "< 0.01",
        "1.50",
        "1,234.5",
    ]
    assert said.size(3 * 2**30) == "3 GiB" and plan.UTILISATION == 0.35
