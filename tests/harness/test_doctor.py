"""The pre-flight checks: every seeded defect is caught, its remedy said, and a healthy suite has none."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks import CHECKPOINTS, SUITES
from harness import doctor, sizes
from harness.config import Experiment, load
from harness.doctor import Finding, _losses, examine
from harness.models.hf import HFModel
from harness.types import Example
from tests.benches import FULL, model, without_weights

Defect = Callable[[Path, Path], dict[str, Any] | None]  # (student, teacher) -> changes of the suite


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("student", "teacher"):
        shutil.copytree(CHECKPOINTS[f"micro/{name}"], tmp_path / name)
    return tmp_path / "student", tmp_path / "teacher"


def suite(folders: tuple[Path, Path], **changes: Any) -> Experiment:
    return Experiment.model_validate({
        "name": "checked",
        "student": str(folders[0]),
        "teacher": str(folders[1]),
        "problems": {"micro_math": {"n": 60, "levels": [1, 2, 3]}},
        "benchmarks": {"micro_math": {"limit": 20}},
        "seeds": 1,
        "budget": {"steps": 4},
        "methods": {"sft": {}, "rkl": {}},
        "sampling": {"max_new_tokens": 120},
        "threads": 1,
        **changes,
    })  # fmt: skip


def edit(folder: Path, name: str, **values: Any) -> None:
    data = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps({**data, **values}), encoding="utf-8")


def tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def template(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# The defects


def reordered(student: Path, teacher: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        ids = data["model"]["vocab"]
        ids["1"], ids["2"] = ids["2"], ids["1"]

    tokenizer(teacher, change)


def reordered_for_text(student: Path, teacher: Path) -> dict[str, Any]:
    reordered(student, teacher)
    return {"methods": {"sft": {}}}


def no_think_token(student: Path, teacher: Path) -> dict[str, Any]:
    def change(data: dict[str, Any]) -> None:
        data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "<think>"]

    tokenizer(student, change)
    return {"methods": {"sft": {}}}


def hidden_think(student: Path, teacher: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        for token in data["added_tokens"]:
            token["special"] = token["special"] or "think>" in token["content"]

    for folder in (student, teacher):
        tokenizer(folder, change)


def text_as_end(student: Path, teacher: Path) -> None:
    edit(teacher, "generation_config.json", eos_token_id=[1, 22])


def other_end(student: Path, teacher: Path) -> None:
    edit(student, "tokenizer_config.json", eos_token="<|user|>")
    edit(student, "generation_config.json", eos_token_id=2)


def no_generation_prompt(student: Path, teacher: Path) -> None:
    for folder in (student, teacher):
        template(folder, lambda text: text.partition("{%- if add_generation_prompt")[0])


def no_template(student: Path, teacher: Path) -> None:
    (student / "chat_template.jinja").unlink()


def upper_case(student: Path, teacher: Path) -> None:
    for folder in (student, teacher):
        template(
            folder, lambda text: text.replace("message['content']", "message['content']|upper")
        )


def think_opened(student: Path, teacher: Path) -> None:
    template(teacher, lambda text: text.replace("'<|assistant|>' -", "'<|assistant|><think>' -"))


def other_template(student: Path, teacher: Path) -> None:
    template(teacher, lambda text: "{{- '<|system|>think' -}}" + text)


def other_template_for_text(student: Path, teacher: Path) -> dict[str, Any]:
    other_template(student, teacher)
    return {"methods": {"sft": {}}}


def bos(student: Path, teacher: Path, place: int = 0) -> None:
    def change(data: dict[str, Any]) -> None:
        added = {"SpecialToken": {"id": "<|system|>", "type_id": 0}}
        data["post_processor"]["single"].insert(place, added)
        data["post_processor"]["special_tokens"] = {
            "<|system|>": {"id": "<|system|>", "ids": [4], "tokens": ["<|system|>"]}
        }

    for folder in (student, teacher):
        tokenizer(folder, change)
        edit(folder, "tokenizer_config.json", bos_token="<|system|>")


def ends_texts(student: Path, teacher: Path) -> None:
    bos(student, teacher, place=1)


def padded_head(student: Path, teacher: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(teacher)
    lm.resize_token_embeddings(320)
    lm.save_pretrained(teacher)


def short_head(student: Path, teacher: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(student)
    lm.resize_token_embeddings(300)
    lm.save_pretrained(student)


def untied(student: Path, teacher: Path) -> None:
    edit(student, "config.json", tie_word_embeddings=False)


def not_finite(student: Path, teacher: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = float("nan")

    weights(teacher, change)


def few_positions(student: Path, teacher: Path) -> None:
    edit(teacher, "config.json", max_position_embeddings=64)


def few_new_tokens(student: Path, teacher: Path) -> dict[str, Any]:
    return {"sampling": {"max_new_tokens": 8}}


def short_examples(student: Path, teacher: Path) -> dict[str, Any]:
    return {"training": {"max_length": 64}}


def never_closes(student: Path, teacher: Path) -> None:
    """The end token takes the place of </think> in the teacher's head."""
    lm = AutoModelForCausalLM.from_pretrained(teacher)
    lm.config.tie_word_embeddings = False
    lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.detach().clone())
    with torch.no_grad():
        lm.lm_head.weight[1] = lm.lm_head.weight[262]
        lm.lm_head.weight[262] = 0
    lm.save_pretrained(teacher)


def dropout(student: Path, teacher: Path) -> None:
    edit(student, "config.json", attention_dropout=0.2)


def no_room(student: Path, teacher: Path) -> dict[str, Any]:
    return {"seeds": 50_000_000}


def no_memory(student: Path, teacher: Path) -> dict[str, Any]:
    return {"workers": 100_000}


def adapter(student: Path, teacher: Path) -> dict[str, Any]:
    return {"student": {"model": str(student), "adapter": {"targets": ["query"]}}}


def elsewhere(student: Path, teacher: Path) -> dict[str, Any]:
    return {"teacher": "nobody/Large-7B"}


def too_hard(student: Path, teacher: Path) -> dict[str, Any]:
    edit(teacher, "config.json", rope_parameters={"rope_theta": 3.0, "rope_type": "default"})
    return {"problems": {"micro_math": {"n": 60, "levels": [7]}}}


DEFECTS: list[tuple[Defect, str, str, str]] = [
    # defect, level, subject, words of the remedy
    (reordered, "problem", "suite", "use a method that trains on text alone"),
    (reordered_for_text, "note", "vocabulary", "keep to methods that train on text"),
    (no_think_token, "note", "thinking tags", "add them to its tokenizer"),
    (hidden_think, "problem", "student's tokenizer", '"special": false'),
    (text_as_end, "problem", "teacher's end tokens", "set eos_token_id in generation_config.json to 1"),
    (other_end, "problem", "end tokens", "add the teacher's to eos_token_id"),
    (no_generation_prompt, "problem", "chat template", "open the assistant's turn"),
    (no_template, "problem", "chat template", "put a chat_template.jinja into its folder"),
    (upper_case, "problem", "chat template", "repair chat_template.jinja"),
    (think_opened, "problem", "chat template", "give both the same chat_template.jinja"),
    (other_template, "problem", "chat template", "give both the teacher's chat_template.jinja"),
    (other_template_for_text, "note", "chat template", "give both the teacher's chat_template.jinja"),
    (bos, "note", "student's tokenizer", "put bos_token once at the start"),
    (ends_texts, "note", "student's tokenizer", "switch add_eos_token off"),
    (padded_head, "ok", "teacher's weights", "logits are cut to the 306 tokens"),
    (short_head, "problem", "models", "resize_token_embeddings"),
    (untied, "problem", "student's weights", "set tie_word_embeddings"),
    (not_finite, "problem", "teacher's weights", "fetch or convert the checkpoint again"),
    (few_positions, "problem", "training on micro_math", "lower sampling.max_new_tokens"),
    (few_new_tokens, "problem", "teacher's responses", "raise sampling.max_new_tokens"),
    (short_examples, "note", "training on micro_math", "raise it"),
    (never_closes, "problem", "teacher's responses", "take a model that writes </think>"),
    (dropout, "problem", "self-KL", "set the dropouts in its config.json to 0"),
    (no_room, "problem", "disk", "write elsewhere"),
    (no_memory, "problem", "memory", "lower workers"),
    (adapter, "problem", "suite", "the linear modules of this model are down_proj"),
    (elsewhere, "note", "models", "hf download"),
    (too_hard, "note", "teacher's responses", "take easier problems"),
]  # fmt: skip


def troubles(findings: list[Finding]) -> list[Finding]:
    return [each for each in findings if each.level != "ok"]


def test_the_disk_is_that_of_the_results(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the nearest folder that is there; the disk of where the command is given may be another."""
    full = folders[0].parent / "full"
    full.mkdir()
    free = {str(full): 1.0, str(Path.cwd()): 1e15}
    monkeypatch.setattr(doctor.psutil, "disk_usage", lambda at: SimpleNamespace(free=free[at]))
    (said,) = (f for f in examine(suite(folders), results=full / "not/yet") if f.subject == "disk")
    assert said.level == "problem" and f"free at {full} for" in said.text


@pytest.mark.parametrize(
    ("defect", "level", "subject", "remedy"), DEFECTS, ids=[row[0].__name__ for row in DEFECTS]
)
def test_a_defect_is_caught_and_its_remedy_said(
    folders: tuple[Path, Path], defect: Defect, level: str, subject: str, remedy: str
) -> None:
    findings = examine(suite(folders, **(defect(*folders) or {})))
    said = [(each.level, each.subject) for each in findings if remedy in each.text]
    assert (level, subject) in said, findings
    assert all("\n" not in each.text for each in findings)
    if level == "problem":
        assert not [each for each in findings if each.level == "problem" and len(each.text) < 40]


def test_a_healthy_suite_has_no_trouble(folders: tuple[Path, Path]) -> None:
    findings = examine(suite(folders))
    assert not troubles(findings)
    subjects = {each.subject for each in findings}
    for name in (
        "student's weights",
        "vocabulary",
        "end tokens",
        "chat template",
        "self-KL",
        "loss",
        "memory",
        "disk",
    ):
        assert name in subjects


def test_traces_as_a_teacher_are_examined(folders: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "traces.jsonl"
    file.write_text('{"problem": "1+1=?", "response": "<think>\\n2\\n</think>\\n2"}\n')
    findings = examine(suite(folders, teacher={"traces": str(file)}, methods={"sft": {}}))
    assert not [each for each in findings if each.level == "problem"]


def test_the_student_is_as_it_was_after_its_losses() -> None:
    student = model("student")
    before = student.identity
    examples = [
        Example("a", student.encode("1+1=?"), student.tokenize("2")),
        Example("b", student.encode("1+2=?"), student.tokenize("<think>\n3\n</think>\n3")),
    ]
    setting = suite((CHECKPOINTS["micro/student"], CHECKPOINTS["micro/teacher"]))
    levels = [each.level for each in _losses(setting, student, examples)]
    assert levels == ["ok", "ok"] and student.identity == before


def test_a_loss_that_depends_on_the_batch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model that routes over its batch: hidden states that know how many sequences there are."""
    student = model("student")
    plain = HFModel.hidden
    monkeypatch.setattr(
        HFModel, "hidden", lambda self, batch: plain(self, batch) * (1 + 0.01 * len(batch.ids))
    )
    examples = [
        Example(str(k), student.encode(f"{k}+1=?"), student.tokenize(str(k + 1))) for k in range(4)
    ]
    setting = suite((CHECKPOINTS["micro/student"], CHECKPOINTS["micro/teacher"]))
    told = [each for each in _losses(setting, student, examples) if each.level == "problem"]
    assert [each.subject for each in told] == ["loss"] and "micro_tokens" in told[0].text


def test_memory_is_that_of_the_plan(folders: tuple[Path, Path]) -> None:
    shape = sizes.shape(str(folders[0]), {})
    assert shape.parameters == model("student").num_parameters


# Models and data that are not here


def full(name: str, *overrides: str) -> dict[str, list[Finding]]:
    """What is said of a full-size suite, by subject."""
    found: dict[str, list[Finding]] = {}
    for each in examine(name, overrides):
        assert "\n" not in each.text
        found.setdefault(each.subject, []).append(each)
    return found


@pytest.mark.parametrize("name", FULL)
def test_a_full_size_suite_is_accepted_without_its_models_and_data(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RETORT_DATA", raising=False)
    found = full(name)
    assert not [each for group in found.values() for each in group if each.level == "problem"]
    setting = load(SUITES / f"{name}.yaml")
    for subject in (
        *(f"training on {each}" for each in setting.problems),
        *(f"benchmark {each}" for each in setting.benchmarks),
    ):
        (told,) = found[subject]
        assert told.level == "note" and "could not be looked at" in told.text
        assert "RETORT_DATA=DIR" in told.text
    assert ["student" in each.text for each in found["models"]] == [True, False]
    assert "GiB of a GPU for one worker" in found["memory"][0].text


def test_vllm_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of models that are elsewhere it is a note; a run with those that are here is refused before it begins."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "vllm" else real(name)
    )
    monkeypatch.delenv("RETORT_VLLM", raising=False)
    (said,) = full("heal-paper")["vllm"]
    assert said.level == "note" and "pip install 'retort[vllm]'" in said.text
    assert "vllm" not in full("qwen3-math")
    (refused,) = examine("quickstart", ["teacher={model: micro/teacher, engine: vllm}"])
    assert (refused.level, refused.text) == ("problem", said.text)


def test_what_configurations_and_tokenizers_tell_without_weights(tmp_path: Path) -> None:
    student, teacher = without_weights(tmp_path)
    pair = (f"student={student}", f"teacher={teacher}")
    found = full("qwen3-math", *pair)
    assert found["student's positions"] == [
        Finding("ok", "student's positions", "40960 for prompt and response")
    ]
    (vocabulary,) = found["vocabulary"]
    assert vocabulary.level == "note"
    assert vocabulary.text.startswith("heads of 151936 (student) and 151936 rows (teacher)")
    # 18 and 2 N of the student (it is the base, too), 2 N of the teacher; a checkpointed pass of training.max_length is less than keys
    # and values of 4 samples of 16,384 and 512 tokens
    training = (34 + 2 * 28) * 18432 * 2048 + 4 * 2**28 + 4 * 151936 * 2048 + 16 * 18432 * 4096
    writing = 4 * 2 * 28 * 1024 * 2 * (16384 + 512)
    need = 20 * 1_720_574_976 + 2 * 8_190_735_360 + max(training, writing)
    (held,) = found["memory"]
    assert held.text.startswith(f"about {need / 2**30:.0f} GiB of a GPU")
    for folder in (student, teacher):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(CHECKPOINTS["micro/student"] / file, folder)
    assert full("qwen3-math", *pair)["vocabulary"] == [
        Finding("ok", "vocabulary", "the same for both")
    ]
    reordered(Path(student), Path(teacher))
    (vocabulary,) = full("qwen3-math", *pair)["vocabulary"]
    assert vocabulary.level == "problem" and vocabulary.text.startswith("fkl, gkd, hard-filter, paced, vcrd: ")  # fmt: skip
    text = ("methods={sft: {}}", "reference=sft")
    assert "vocabulary" not in full("qwen3-math", *pair, *text)  # nobody compares token by token


def test_positions_of_a_model_without_weights(tmp_path: Path) -> None:
    student, teacher = without_weights(tmp_path, max_position_embeddings=8192)
    found = full("qwen3-math", f"student={student}", f"teacher={teacher}")
    (told,) = found["teacher's positions"]
    assert told.level == "problem" and told.text.endswith("lower sampling.max_new_tokens")
    assert found["student's positions"][0].level == "ok"


def test_a_mistake_is_found_beside_data_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETORT_DATA", raising=False)
    for wrong, words in (
        ("problems={maths: {}}", "did you mean 'math'"),
        ("benchmarks.mth500={}", "did you mean 'math500'"),
        ("methods.paced.alpha=99", "alpha"),
    ):
        (told,) = examine("qwen3-math", [wrong])
        assert told.level == "problem" and words in told.text


def test_a_healthy_pair_is_looked_at_without_a_benchmarks_data(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RETORT_DATA", raising=False)
    findings = examine(suite(folders, benchmarks={"micro_math": {"limit": 20}, "aime24": {}}))
    assert [(each.level, each.subject) for each in troubles(findings)] == [("note", "benchmark aime24")]  # fmt: skip
    assert "self-KL" in {each.subject for each in findings}
