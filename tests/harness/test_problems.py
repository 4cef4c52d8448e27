"""Problem sets by name, their splits, prompts, and the contamination gate."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from harness import problems
from harness.types import Problem

DATA = os.environ.get("RETORT_DATA")


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A RETORT_DATA folder with a little of everything."""
    train = [
        {"question": f"What is {i} and {i}?", "answer": f"It is\n#### 1,{i:03d}"}
        for i in range(200)
    ]
    test = [{"question": f"Test {i}", "answer": "x #### 5", "final_answer": "5"} for i in range(4)]
    write(tmp_path / "gsm8k/train.jsonl.gz", train)
    write(tmp_path / "gsm8k/test.jsonl.gz", test)
    levels = ["Level 1", "Level 5", "Level ?"]
    rows = [
        {
            "problem": f"P {i}",
            "level": levels[i % 3],
            "solution": rf"So \boxed{{{i}}}.",
            "idx": 10 * i,
        }
        for i in range(60)
    ]
    write(tmp_path / "math_train/train.jsonl.gz", rows)
    write(
        tmp_path / "math_test/test.jsonl.gz",
        [
            {**row, "answer": str(i), "type": "Algebra" if i % 4 else "Geometry"}
            for i, row in enumerate(rows)
        ],
    )
    write(
        tmp_path / "math500/test.jsonl.gz",
        [{"problem": "P", "answer": "1", "level": 3, "unique_id": "test/a/1.json"}],
    )
    write(
        tmp_path / "amc23/test.jsonl.gz",
        [{"id": 7, "question": "Q", "problem": "Q", "answer": 27.0}],
    )
    monkeypatch.setenv("RETORT_DATA", str(tmp_path))
    return tmp_path


# Sets


def test_plug_ins_and_the_table_are_known() -> None:
    assert {"micro_math", "micro_code", "gsm8k", "math", "math500", "aime24"} <= set(
        problems.sets()
    )
    assert problems.load("micro_math", "train", 3) == problems.sets()["micro_math"].load("train", 3)
    assert {p.level for p in problems.load("micro_math", "dev", 6, levels=[2])} == {2}
    assert problems.oracle(["micro_math"]) is not None
    assert problems.oracle(["micro_math", "micro_code"]) is None
    assert problems.oracle(["gsm8k"]) is None
    assert "micro/student" in problems.checkpoints()
    assert problems.suite_folders() and problems.task_folders() and problems.micro_version()


def test_fields_of_the_real_sets(data: Path) -> None:
    first = problems.load("gsm8k", "test")[0]
    assert first == Problem("gsm8k/0", "Test 0", "5", solution="x #### 5", source="gsm8k")
    answers = {p.id: p.answer for split in ("train", "dev") for p in problems.load("gsm8k", split)}
    assert answers == {f"gsm8k/{i}": f"1{i:03d}" for i in range(200)}
    boxed = {p.id: (p.answer, p.level) for p in problems.load("math", "train")}
    assert (
        boxed.items()
        <= {f"math/{10 * i}": (str(i), (1, 5, None)[i % 3]) for i in range(60)}.items()
    )
    assert problems.load("math500", "test")[0].id == "math500/test/a/1.json"
    assert problems.load("amc23", "test")[0].answer == "27"


def test_dev_is_a_tenth_of_train_and_stays(data: Path) -> None:
    train, dev = problems.load("gsm8k", "train"), problems.load("gsm8k", "dev")
    assert len(train) + len(dev) == 200 and 8 <= len(dev) <= 35
    assert not {p.prompt for p in train} & {p.prompt for p in dev}
    rows = [{"question": p.prompt.upper() + " ", "answer": "1"} for p in [*dev, *train][::-1]]
    copy = problems.load({"path": str(write(data / "copy.jsonl", rows))}, "dev")
    assert sorted(p.prompt.lower().strip() for p in copy) == sorted(p.prompt.lower() for p in dev)


def test_levels_and_n(data: Path) -> None:
    fives = problems.load("math", "test", levels=[5])
    assert {p.level for p in fives} == {5} and len(fives) == 20
    assert problems.load("math", "test", 3, levels=[5]) == fives[:3]
    assert problems.load({"math": {"levels": [5], "n": 2}}, "test") == fives[:2]
    with pytest.raises(ValueError, match=r"no problem of levels \[9\]"):
        problems.load("math", "test", levels=[9])


def test_subjects(data: Path) -> None:
    geometry = problems.load("math", "test", subjects=["Geometry"])
    assert {p.subject for p in geometry} == {"Geometry"} and len(geometry) == 15
    both = problems.load("math", "test", levels=[5], subjects=["Geometry"])
    assert both == [p for p in geometry if p.level == 5] and both
    with pytest.raises(
        ValueError, match=r"math has no subject 'Geometri': did you mean 'Geometry'"
    ):
        problems.load("math", "test", subjects=["Geometri"])
    with pytest.raises(ValueError, match=r"no problem of levels \[9\] of subjects Geometry"):
        problems.load("math", "test", levels=[9], subjects=["Geometry"])


def test_what_a_set_lacks_is_said(data: Path) -> None:
    with pytest.raises(ValueError, match="math500 has no train split; it has test"):
        problems.load("math500", "train")
    with pytest.raises(ValueError, match="did you mean 'train'"):
        problems.load("gsm8k", "trian")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no option colour"):
        problems.load("gsm8k", "test", colour="red")
    with pytest.raises(ValueError, match=r"aime24/test\.jsonl\.gz: cannot be read: No such file"):
        problems.load("aime24", "test")


@pytest.mark.parametrize("name", ["gsm8", "micro-math"])
def test_unknown_names_get_the_nearest_and_all(name: str) -> None:
    with pytest.raises(ValueError, match=r"did you mean '(gsm8k|micro_math)'\? known: .*math500"):
        problems.load(name, "train")
    with pytest.raises(ValueError, match="did you mean"):
        problems.check(name)


def test_without_the_hub_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETORT_DATA", raising=False)
    with pytest.raises(
        ValueError, match=r"openai/gsm8k cannot be loaded .* RETORT_DATA=DIR to read DIR/gsm8k/test"
    ):
        problems.load("gsm8k", "test")


def test_rows_that_no_network_brings_are_told_from_mistakes(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(problems.Absent, match="holds release v1 only"):
        problems.load("livecodebench", "test", release="v6")
    with pytest.raises(ValueError, match="unknown release") as error:
        problems.load("livecodebench", "test", release="v66")
    assert not isinstance(error.value, problems.Absent)
    monkeypatch.delenv("RETORT_DATA")
    with pytest.raises(problems.Absent):
        problems.load("math500", "test")


def test_aime_is_read_as_the_hub_has_it() -> None:
    rows = [{"ID": "1983-1", "Year": 1983, "Problem Number": 1, "Question": "Q", "Answer": "60", "Part": None}]  # fmt: skip
    (found,) = problems._problems(problems.TABLE["aime"], (("place", row) for row in rows))
    assert (found.id, found.prompt, found.answer, found.domain) == ("aime/1983-1", "Q", "60", "math")  # fmt: skip


def test_the_revision_is_of_the_rows(data: Path) -> None:
    table = problems.TABLE["math500"]
    before = table.revision
    problems._loaded.clear()
    write(
        data / "math500/test.jsonl.gz",
        [{"problem": "P", "answer": "2", "unique_id": "test/a/1.json"}],
    )
    assert table.revision != before


# Files


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    rows = [{"q": f"Q {i}", "a": i, "key": f"k{i}", "hard": i % 2} for i in range(40)]
    path = str(write(tmp_path / "mine.jsonl", rows))
    source = {
        "path": path,
        "prompt": "q",
        "answer": "a",
        "id": "key",
        "level": "hard",
        "name": "mine",
    }
    problems.check("mine", **{"path": path})
    found = problems.load(source, "train") + problems.load(source, "dev")
    assert {p.id: (p.prompt, p.answer, p.level) for p in found} == {
        f"mine/k{i}": (f"Q {i}", str(i), i % 2) for i in range(40)
    }
    assert {p.level for p in problems.load({**source, "levels": [1]}, "train")} == {1}
    assert problems.load(path, "train", prompt="q")[0].answer is None
    assert problems.load("mine", "train", **{k: v for k, v in source.items() if k != "name"})
    splits = {"path": {"train": path, "test": path}, "prompt": "q"}
    assert len(problems.load(splits, "test")) == 40
    with pytest.raises(ValueError, match="mine has no test split"):
        problems.load(path, "test", prompt="q")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "a"}, "\n", '{"problem": \n'], r"bad\.jsonl:3: not JSON: .* column"),
        ([{"problem": "a"}, "[1]\n"], r"bad\.jsonl:2: a row is an object of fields, got list"),
        ([{"problem": "a"}, {"text": "b"}], r"bad\.jsonl:2: no field 'problem' or 'question' or 'prompt'; the row has text"),
        ([{"problem": 3}], r"bad\.jsonl:1: the problem's text is no string: 3"),
        ([{"problem": "a", "id": 1}, {"problem": "b", "id": "1"}], r"bad\.jsonl:2: the id '1' occurs twice"),
        (["{}\n"], r"bad\.jsonl:1: no field .* the row has none"),
    ],
)  # fmt: skip
def test_a_broken_row_is_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        problems.load(str(path), "train")


def test_a_named_field_must_be_there(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.jsonl",
        [{"problem": f"a {i}", "answer": "1"} for i in range(30)] + [{"problem": "b"}],
    )
    assert len(problems.load(str(path), "train")) + len(problems.load(str(path), "dev")) == 31
    with pytest.raises(ValueError, match=r"bad\.jsonl:31: no field 'answer'"):
        problems.load({"path": str(path), "answer": "answer"}, "train")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        problems.check(str(tmp_path / "none.jsonl"))
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"problem": "a"}\n' * 999)[:40])
    with pytest.raises(ValueError, match=r"torn\.jsonl\.gz: cannot be read"):
        problems.load(str(torn), "train")
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl: cannot be read"):
        problems.load(str(tmp_path / "latin.jsonl"), "train")


# Mixtures


def test_a_mixture_holds_its_parts_in_proportion(data: Path) -> None:
    source = {"math": {"n": 30}, "gsm8k": {"n": 10}}
    mixed = problems.load(source, "train")
    assert len(mixed) == 40 and len({p.id for p in mixed}) == 40
    for n in (4, 8, 20):
        assert sum(p.source == "gsm8k" for p in mixed[:n]) == n // 4
    assert problems.load(source, "train", 12) == mixed[:12]
    assert problems.load([{"math": {"n": 30}}, {"gsm8k": {"n": 10}}], "train") == mixed
    assert [p for p in mixed if p.source == "math"] == problems.load("math", "train", 30)
    assert len(problems.load(["math", "gsm8k"], "test", 5)) == 5


# Prompts


def test_prompts() -> None:
    real = Problem("m", "What is {x}?", "42", source="math")
    assert problems.render(real) == (
        "What is {x}?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    hinted = problems.render(real, "{42}")
    assert hinted.startswith(problems.render(real)) and "{42}" in hinted
    micro = Problem("x", "1+1=?", "2", source="micro_math", verifier="exact")
    assert problems.render(micro) == "1+1=?"
    assert problems.render(micro, "2") == "1+1=?\nhint: 2"
    code = Problem("c", "def f(xs):", tests="", domain="code", source="micro_code", verifier="code")
    assert problems.render(code, "double") == "def f(xs):\nhint: double"
    real_code = Problem("c", "Write f.", tests="", domain="code", source="mbpp", verifier="code")
    assert "```python" in problems.render(real_code) and "boxed" not in problems.render(real_code)


# Contamination

WORDS = "the quick brown fox jumps over the lazy dog near a quiet river bank at dawn today"


def texts(*prompts: str) -> list[Problem]:
    return [Problem(str(i), prompt) for i, prompt in enumerate(prompts)]


def gate(train: str, *tests: str, rule: str = "half") -> tuple[bool, dict[str, Any]]:
    kept, report = problems.decontaminate(texts(train), {"bench": texts(*tests)}, rule)  # type: ignore[arg-type]
    return not kept, report


def test_a_planted_copy_is_dropped_and_a_clean_problem_kept() -> None:
    assert gate(f"  {WORDS.upper()}\n", WORDS) == (
        True,
        {
            "rule": "half",
            "dropped": 1,
            "exact": 1,
            "half": 1,
            "any": 1,
            "benchmarks": {"bench": {"exact": 1, "half": 1, "any": 1}},
            "dropped_ids": ["0"],
        },
    )
    clean = "seven painters bought eleven brushes and shared them among the four new apprentices"
    assert not gate(clean, WORDS)[0] and gate(clean, WORDS)[1]["any"] == 0


def test_half_of_the_8_grams_in_one_test_problem() -> None:
    words = WORDS.split()  # 17 words, 10 8-grams
    half = " ".join(words[:12]) + " w x y z v"  # 5 of its 10 are shared
    less = " ".join(words[:11]) + " w x y z v u"  # 4 of its 10
    assert gate(half, WORDS)[0]
    dropped, report = gate(less, WORDS)
    assert not dropped and (report["half"], report["any"]) == (0, 1)
    assert gate(less, WORDS, rule="any")[0]
    assert (
        not gate(WORDS, WORDS, rule="none")[0] and gate(WORDS, WORDS, rule="none")[1]["half"] == 1
    )
    first, second = (
        " ".join(words[:10]),
        " ".join(words[4:14]),
    )  # 3 each: half only when put together
    assert not gate(WORDS, first, second)[0]


def test_short_texts_match_only_exactly() -> None:
    assert gate("What is 2 + 2?", "what is 2 + 2?")[0]
    assert not gate("What is 2 + 2?", "What is 2 + 2? Explain it to a child in words.")[0]
    assert not gate("What is 2 + 2?", "What is 2 + 3?", rule="any")[0]
    assert gate("a b c d e f g h", "x a b c d e f g h y", rule="any")[0]  # 8 words are one 8-gram


def test_spaces_do_not_hide_a_copy() -> None:
    assert gate("What is $2+2$ ?", "what is $2 + 2$?")[1]["exact"] == 1


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'half'"):
        problems.decontaminate([], {}, "halve")  # type: ignore[arg-type]


def test_the_gate_is_fast() -> None:
    def many(count: int, salt: int) -> list[Problem]:
        return texts(
            *(
                " ".join(f"w{(i * 31 + j * 7 + salt) % 997}" for j in range(60))
                for i in range(count)
            )
        )

    start = time.monotonic()
    problems.decontaminate(many(2000, 0), {"a": many(1000, 3), "b": many(500, 5)})
    assert time.monotonic() - start < 10  # 1 s


# Real data

if DATA:

    @pytest.mark.parametrize(
        ("name", "train", "test"),
        [
            ("gsm8k", 7473, 1319), ("math", 7500, 5000), ("math500", 0, 500), ("aime24", 0, 30), ("aime25", 0, 30), ("amc23", 0, 40),
            ("humaneval", 0, 164), ("mbpp", 374 + 90, 500), ("livecodebench", 0, 400),
        ],
    )  # fmt: skip
    def test_real_data_sizes(name: str, train: int, test: int) -> None:
        assert len(problems.load(name, "test")) == test
        if train:
            assert sum(len(problems.load(name, split)) for split in ("train", "dev")) == train  # type: ignore[arg-type]

    def test_real_data_aime_of_the_years_before() -> None:
        found = problems.load("aime", "train") + problems.load("aime", "dev")
        assert len(found) == 975 and all(p.answer and p.answer.isdigit() for p in found)
        assert not problems.decontaminate(found, {"aime24": problems.load("aime24", "test")})[1][
            "dropped"
        ]

    def test_real_data_subjects_of_math() -> None:
        found = problems.load("math", "test")
        assert len({p.subject for p in found}) == 7
        geometry = problems.load("math", "test", subjects=["Geometry"])
        assert len(geometry) == sum(p.subject == "Geometry" for p in found) > 400

    def test_real_data_contamination_of_math() -> None:
        train = problems.load("math", "train") + problems.load("math", "dev")
        kept, report = problems.decontaminate(train, {"math": problems.load("math", "test")})
        assert 0.26 < report["any"] / len(train) < 0.28  # the figure that made "half" the rule
        assert len(train) - len(kept) == report["half"] < 0.05 * len(train)

    def test_real_data_copies_that_the_sources_count() -> None:
        """SOURCES.md counts exact copies after removing white space; lower case and single spaces would miss some."""
        train = problems.load("math", "train") + problems.load("math", "dev")
        tests = {
            "test": problems.load("math", "test"),
            "train": train,
            "math500": problems.load("math500", "test"),
        }

        def copies(file: str) -> dict[str, int]:
            rows = problems.every(str(Path(str(DATA), file)))
            counts = problems.decontaminate(rows, tests)[1]["benchmarks"]
            return {name: count["exact"] for name, count in counts.items()}

        assert copies("aime_1983_2023/train.jsonl.gz") == {"test": 21, "train": 300, "math500": 4}
        of_s1k = copies("s1k_problems/train.jsonl.gz")
        assert (of_s1k["test"], of_s1k["math500"]) == (36, 3)

    @pytest.mark.parametrize(
        ("name", "rows"),
        [("gsm8k", 1319), ("math", 5000), ("aime25", 30), ("humaneval", 164), ("mbpp", 974), ("livecodebench", 400)],
    )  # fmt: skip
    def test_real_data_every_row(name: str, rows: int) -> None:
        every = {p.id: p for p in problems.every(name)}
        assert len(every) == rows
        assert all(every[p.id] == p for p in problems.load(name, "test"))
