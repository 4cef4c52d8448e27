"""Problem sets by name: from plug-ins (the micro world), the Hugging Face Hub, or files; splits, prompts, contamination.

    load("gsm8k", "train", n=500)
    load({"gsm8k": {"n": 500}, "math": {"levels": [4, 5]}}, "train")     a mixture
    load({"path": "mine.jsonl", "prompt": "question"}, "train")          a file of one's own
    load({"livecodebench": {"release": "v5", "start": "2024-08-01"}}, "test")
    every("mbpp")                                                        all rows, whatever their split

RETORT_DATA=DIR reads DIR/gsm8k/train.jsonl.gz and so on in place of the Hub.
"""

from __future__ import annotations

import datetime
import gzip
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from harness import coding
from harness.config import nearest
from harness.registry import plugins
from harness.types import Oracle, Problem, ProblemSet, Split
from harness.verifiers.completion import boxed, stub

Row = Mapping[str, Any]


class Absent(ValueError):
    """Rows that are neither on this machine nor brought by the network: nothing is wrong with the suite that asks for them."""


Source = str | Mapping[str, Any]
Rule = Literal["half", "any", "none"]

DEV_SHARE = 10  # one problem in so many of train is dev, where a set has no dev split
NGRAM = 8  # words
GROUP = "retort.problems"  # entry points

TEMPLATES = {
    "bare": "{prompt}",
    "math": "{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
    "code": "{prompt}\n\nPlease reason step by step, and end with the complete program in one ```python block.",
    "stub": (
        "Complete this function:\n\n```python\n{prompt}\n```\n\n"
        "Please reason step by step, and end with the complete program in one ```python block."
    ),
}
HINTS = {
    "bare": "\nhint: {hint}",
    "real": (
        "\n\nFor reference, the final answer is known to be: {hint}\n"
        "Derive it from the problem all the same, step by step, and do not mention that it was given."
    ),
}
FIELDS: Mapping[str, tuple[str, ...]] = {  # ours -> theirs, the first that a row has
    "id": ("unique_id", "task_id", "question_id", "id"),
    "prompt": ("problem", "question", "prompt"),
    "answer": ("final_answer", "answer"),
    "tests": ("tests",),
    "solution": ("solution",),
    "level": ("level",),
    "entry": ("entry", "entry_point"),
    "subject": ("subject", "type"),
}


@dataclass(frozen=True)
class TableSet:
    """A problem set whose rows lie on the Hub or in files."""

    name: str
    hub: str = ""  # dataset id, with its configuration after a colon
    splits: Mapping[Split, str] = field(default_factory=dict)  # ours -> the Hub's
    files: Mapping[Split, str] = field(default_factory=dict)  # ours -> under RETORT_DATA, or a path
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # where FIELDS does not fit
    domain: str = "math"
    verifier: str = "math"
    shape: Callable[[Row], Row] | None = None  # from a row of theirs to one with our fields
    mark: str = ""  # field that names a row's split, where one file holds them all
    whole: str = ""  # the Hub's expression for all splits, where test is not all that is asked for

    @property
    def oracle(self) -> Oracle | None:
        return None

    @property
    def revision(self) -> str:
        """Digest of the test problems (or of all, where there is no such split), wherever they come from."""
        splits = ("test",) if "test" in self.files else tuple(self.files)
        return contents(problem for split in splits for problem in _table(self, split))

    def rows(self, split: Split) -> Iterator[tuple[str, Row]]:
        """The rows of a split, each with its place."""
        folder = os.environ.get("RETORT_DATA")
        if self.hub and not folder:
            yield from _hub_rows(self, self.splits[split], self.files[split])
            return
        for place, row in _lines(Path(folder if self.hub and folder else "", self.files[split])):
            if not self.mark or row.get(self.mark) == self.splits[split]:
                yield place, row

    def every(self) -> list[Problem]:
        """All rows of the test problems' file, in whatever split."""
        split: Split = "test" if "test" in self.files else next(iter(self.files))
        if not self.mark:
            return list(_table(self, split))
        folder = os.environ.get("RETORT_DATA")
        rows = (
            _lines(Path(folder, self.files[split]))
            if folder
            else _hub_rows(self, self.whole, self.files[split])
        )
        return _problems(self, rows)

    def load(
        self,
        split: Split,
        n: int | None = None,
        *,
        levels: Sequence[int] | None = None,
        subjects: Sequence[str] | None = None,
        **options: Any,
    ) -> list[Problem]:
        """The first n problems of a split (of some levels or subjects); where there is no dev split, a tenth of train is dev."""
        if options:
            raise ValueError(
                f"{self.name} has no option {', '.join(sorted(options))}; it knows n, levels and subjects"
            )
        carved = split != "test" and "dev" not in self.files and "train" in self.files
        if split not in self.files and not carved:
            raise ValueError(f"{self.name} has no {split} split; it has {', '.join(self.files)}")
        table = _table(self, "train" if carved else split)
        known = sorted({problem.subject for problem in table if problem.subject})
        for subject in subjects or ():
            if subject not in known:
                raise ValueError(
                    f"{self.name} has no subject {subject!r}: {nearest(subject, known)}"
                )
        chosen = [
            problem
            for problem in table
            if (not carved or _is_dev(problem) == (split == "dev"))
            and (levels is None or problem.level in levels)
            and (subjects is None or problem.subject in subjects)
        ]
        if not chosen:
            raise ValueError(
                f"{self.name}: the {split} split has no problem"
                + (f" of levels {list(levels)}" if levels is not None else "")
                + (f" of subjects {', '.join(subjects)}" if subjects is not None else "")
            )
        return chosen[:n]


@dataclass(frozen=True)
class LiveCodeBench(TableSet):
    """Its data files grow by a release; problems are chosen by release and by the date of their contest.

    The Hub's files are read as they are, since the dataset's own loading script no longer loads. RETORT_DATA has the first
    release with public tests, and private ones where a second file has them.
    """

    RELEASES = ("v1", "v2", "v3", "v4", "v5", "v6")
    PRIVATE = "livecodebench/v1_leetcode_substitute_hidden_tests.jsonl.gz"

    def load(
        self,
        split: Split,
        n: int | None = None,
        *,
        levels: Sequence[int] | None = None,
        release: str = "v1",
        start: Any = None,
        end: Any = None,
        **options: Any,
    ) -> list[Problem]:
        """The problems of a release whose contest was on a day from start to end, both counted; ISO dates."""
        if options:
            raise ValueError(
                f"{self.name} has no option {', '.join(sorted(options))}; it knows n, levels, release, start and end"
            )
        if split != "test":
            raise ValueError(f"{self.name} has no {split} split; it has test")
        first, last = (self._day(name, day) for name, day in (("start", start), ("end", end)))
        days: list[str] = []

        def inside() -> Iterator[tuple[str, Row]]:  # a row at a time: a release holds gigabytes
            for place, row in self._released(release):
                days.append(str(_shaped(lambda row: row["contest_date"], row, place))[:10])
                if (first or days[-1]) <= days[-1] <= (last or days[-1]):
                    yield place, row

        found = _problems(self, inside())
        if days and not found:
            raise ValueError(
                f"{self.name}: no contest from {first or 'the first'} to {last or 'the last'}; "
                f"release {release} has those from {min(days)} to {max(days)}"
            )
        chosen = [p for p in found if levels is None or p.level in levels]
        if not chosen:
            raise ValueError(
                f"{self.name}: the test split has no problem of levels {list(levels or ())}; "
                f"known: {', '.join(f'{level} ({word})' for word, level in coding.DIFFICULTY.items())}"
            )
        return chosen[:n]

    def rows(self, split: Split) -> Iterator[tuple[str, Row]]:
        return self._released("v1")

    def _released(self, release: str) -> Iterator[tuple[str, Row]]:
        """The rows of all releases up to one."""
        if release not in self.RELEASES:
            raise ValueError(
                f"{self.name}: unknown release {release!r}: {nearest(str(release), self.RELEASES)}"
            )
        folder = os.environ.get("RETORT_DATA")
        if not folder:
            for number in range(1, self.RELEASES.index(release) + 2):
                name = f"test{number if number > 1 else ''}.jsonl"
                yield from _lines(_hub_file(self, name))
            return
        if release != "v1":
            raise Absent(
                f"{self.name}: RETORT_DATA holds release v1 only, and {release} was asked for; unset RETORT_DATA "
                "to read it from the Hub"
            )
        private = Path(folder, self.PRIVATE)
        more = {row["question_id"]: row for _, row in _lines(private)} if private.is_file() else {}
        kept = ("private_test_cases", "reference_solution")
        for place, row in _lines(Path(folder, self.files["test"])):
            hidden = more.get(row.get("question_id"), {})
            yield place, {**row, **{name: hidden[name] for name in kept if name in hidden}}

    def _day(self, name: str, value: Any) -> str | None:
        """A date of the window; YAML reads one that is not quoted as a date itself."""
        try:
            return value and datetime.date.fromisoformat(str(value)).isoformat()
        except ValueError:
            raise ValueError(
                f"{self.name}: {name}: a date such as 2023-09-01, got {value!r}"
            ) from None


TABLE = {
    table.name: table
    for table in (
        TableSet(
            "gsm8k",
            "openai/gsm8k:main",
            {"train": "train", "test": "test"},
            {"train": "gsm8k/train.jsonl.gz", "test": "gsm8k/test.jsonl.gz"},
            {"solution": ("answer",)},
        ),
        TableSet(
            "math",
            "DigitalLearningGmbH/MATH-lighteval",
            {"train": "train", "test": "test"},
            {"train": "math_train/train.jsonl.gz", "test": "math_test/test.jsonl.gz"},
            {"id": ("idx",)},
        ),
        TableSet(  # what the Hub has of 2024 is dropped where aime24 is a benchmark
            "aime",
            "di-zhang-fdu/AIME_1983_2024",
            {"train": "train"},
            {"train": "aime_1983_2023/train.jsonl.gz"},
            {"prompt": ("Question", "problem"), "answer": ("Answer", "answer"), "id": ("ID", "id")},
        ),
        TableSet(
            "math500", "HuggingFaceH4/MATH-500", {"test": "test"}, {"test": "math500/test.jsonl.gz"}
        ),
        TableSet(
            "aime24", "HuggingFaceH4/aime_2024", {"test": "train"}, {"test": "aime24/test.jsonl.gz"}
        ),
        TableSet("aime25", "math-ai/aime25", {"test": "test"}, {"test": "aime25/test.jsonl.gz"}),
        TableSet("amc23", "math-ai/amc23", {"test": "test"}, {"test": "amc23/test.jsonl.gz"}),
        TableSet(
            "humaneval",
            "openai/openai_humaneval",
            {"test": "test"},
            {"test": "humaneval/test.jsonl.gz"},
            domain="code",
            verifier="code",
            shape=coding.humaneval,
        ),
        TableSet(
            "mbpp",
            "google-research-datasets/mbpp:full",
            {"train": "train", "dev": "validation", "test": "test"},
            dict.fromkeys(("train", "dev", "test"), "mbpp/mbpp.jsonl.gz"),
            domain="code",
            verifier="code",
            shape=coding.mbpp,
            mark="split",
            whole="prompt+test+validation+train",
        ),
        LiveCodeBench(
            "livecodebench",
            "livecodebench/code_generation_lite",
            {"test": "test"},
            {"test": "livecodebench/v1_public_tests.jsonl.gz"},
            domain="code",
            verifier="code",
            shape=coding.livecodebench,
        ),
    )
}


def contents(found: Iterable[Problem]) -> str:
    """Digest of what a verdict on these problems rests on."""
    digest = hashlib.sha256()
    for p in found:
        parts = [p.id, p.prompt, p.answer, p.tests, p.solution, p.entry]
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()[:16]


# Finding sets ---------------------------------------------------------------------------------------------------------


@cache
def sets() -> dict[str, ProblemSet]:
    """Every problem set by name: the plug-ins' and the table's."""
    return {**TABLE, **_offered("PROBLEMS")}


def find(name: str, /, **options: Any) -> ProblemSet:
    """A set by its name, or the one that a file is."""
    path = options.get("path", name if name.endswith((".jsonl", ".jsonl.gz")) else None)
    if path is not None:
        return _own(Path(name).name.partition(".jsonl")[0], path, options)
    if name not in sets():
        raise ValueError(
            f"unknown problem set {name!r}: {nearest(name, sets())}; or give a .jsonl file"
        )
    return sets()[name]


def check(name: str, /, **options: Any) -> None:
    """Refuse an unknown name or a file that is not there, before anything is loaded."""
    found = find(name, **options)
    if isinstance(found, TableSet) and not found.hub:
        for path in found.files.values():
            if not Path(path).is_file():
                raise ValueError(f"problem set {name!r}: there is no file {path}")


def whereabouts(name: str) -> str:
    """Where the rows of a set come from, without reading them."""
    found = find(name)
    if not isinstance(found, TableSet):
        return f"generated, {found.revision}"
    local = os.environ.get("RETORT_DATA")
    file = found.files.get("test", "")
    return str(Path(local, file)) if local else f"{found.hub} on the Hub"


def checkpoints() -> dict[str, Path]:
    """The model checkpoints that come with the plug-ins, by name."""
    return _offered("CHECKPOINTS")


def suite_folders() -> list[Path]:
    return [module.SUITES for module in plugins(GROUP)]


def task_folders() -> list[Path]:
    return [module.TASKS for module in plugins(GROUP)]


def micro_version() -> list[int]:
    """What decides the plug-ins' generated problems and their checkpoints."""
    return [module.MICRO_VERSION for module in plugins(GROUP)]


def oracle(names: Iterable[str]) -> Oracle | None:
    """The oracle of a single set; None for a mixture, as an oracle judges only its own problems."""
    found = [sets()[name].oracle if name in sets() else None for name in names]
    return found[0] if len(found) == 1 else None


def _offered(attribute: str) -> dict[str, Any]:
    """What the plug-ins export under a name, in one mapping."""
    return {
        key: value for module in plugins(GROUP) for key, value in getattr(module, attribute).items()
    }


def _own(name: str, path: str | Mapping[Split, str], options: Mapping[str, Any]) -> TableSet:
    """The set that somebody's own files make; the options name its fields."""
    settings = {key: options[key] for key in ("domain", "verifier") if key in options}
    if settings.get("domain") == "code":
        settings.setdefault("verifier", "code")
    files: dict[Split, str] = {"train": path} if isinstance(path, str) else dict(path)
    fields = {key: (options[key],) for key in FIELDS if key in options}
    return TableSet(options.get("name", name), files=files, fields=fields, **settings)


# Loading --------------------------------------------------------------------------------------------------------------


def load(
    source: Source | Sequence[Source], split: Split, n: int | None = None, **options: Any
) -> list[Problem]:
    """The first n problems of a set, a file, or a mixture: its parts in proportion, in every prefix."""
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}: {nearest(split, get_args(Split))}")
    parts = _parts(source)
    if len(parts) == 1 and n is not None:
        options["n"] = n
    loaded = [_load(name, split, {**given, **options}) for name, given in parts]
    mixed = sorted(
        ((place + 0.5) / len(part), which, place)
        for which, part in enumerate(loaded)
        for place in range(len(part))
    )
    return [loaded[which][place] for _, which, place in mixed[:n]]


def every(name: str) -> list[Problem]:
    """All rows of the file that a set's test problems are in, whatever their split, under the data's own ids."""
    found = find(name)
    if not isinstance(found, TableSet):
        return found.load("test")
    if not found.hub:
        return found.every()
    key = json.dumps([name, "every", os.environ.get("RETORT_DATA")])
    if key not in _kept:
        _kept[key] = found.every()
    return list(_kept[key])


def _parts(source: Source | Sequence[Source]) -> list[tuple[str, dict[str, Any]]]:
    """The sets of a mixture, by name, with their options."""
    if isinstance(source, str):
        return [(source, {})]
    if not isinstance(source, Mapping):
        return [part for one in source for part in _parts(one)]
    if "path" in source:
        return [(source.get("name", Path(str(source["path"])).name), dict(source))]
    return [(name, dict(options or {})) for name, options in source.items()]


def _load(name: str, split: Split, options: Mapping[str, Any]) -> list[Problem]:
    found = find(name, **options)
    own = isinstance(found, TableSet) and not found.hub
    describing = ("path", "name", "domain", "verifier", *FIELDS) if own else ()
    given = {key: value for key, value in options.items() if key not in describing}
    if own:
        return found.load(split, **given)
    key = json.dumps(
        [name, split, given, os.environ.get("RETORT_DATA")], sort_keys=True, default=str
    )
    if key not in _kept:
        _kept[key] = found.load(split, **given)
    return list(_kept[key])


_kept: dict[str, list[Problem]] = {}  # generated problems and large files cost seconds


def _table(table: TableSet, split: Split) -> list[Problem]:
    """All rows of a split as problems."""
    if not table.hub:
        return _problems(table, table.rows(split))
    key = (table.name, split, os.environ.get("RETORT_DATA"))
    if key not in _loaded:
        _loaded[key] = _problems(table, table.rows(split))
    return _loaded[key]


_loaded: dict[tuple[str, Split, str | None], list[Problem]] = {}


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a JSON Lines file, each with its place."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                place = f"{path}:{number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{place}: not JSON: {error.msg} at column {error.colno}"
                    ) from None
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{place}: a row is an object of fields, got {type(row).__name__}"
                    )
                yield place, row
    except (OSError, UnicodeDecodeError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be read: {reason}") from None


def _hub_rows(table: TableSet, split: str, file: str) -> Iterator[tuple[str, Row]]:
    """The rows of a dataset on the Hub, each with its place; `file` would have them under RETORT_DATA."""
    import datasets

    name, _, configuration = table.hub.partition(":")
    with _from_hub(table, name, file):
        rows = datasets.load_dataset(name, configuration or None, split=split)
    for number, row in enumerate(rows, 1):
        yield f"{name}:{number}", row


def _hub_file(table: TableSet, name: str) -> Path:
    """A data file of a dataset on the Hub."""
    from huggingface_hub import hf_hub_download

    with _from_hub(table, f"{table.hub}/{name}", table.files["test"]):
        return Path(hf_hub_download(table.hub, name, repo_type="dataset"))


@contextmanager
def _from_hub(table: TableSet, what: str, file: str) -> Iterator[None]:
    """One line for whatever the Hub, the network or the cache may raise."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Absent(
            f"problem set {table.name!r}: {what} cannot be loaded from the Hub: {reason} "
            f"(or set RETORT_DATA=DIR to read DIR/{file})"
        ) from None


def _problems(table: TableSet, rows: Iterable[tuple[str, Row]]) -> list[Problem]:
    """Rows as problems; an id is the row's own, else its number from 0, behind the set's name."""
    problems: dict[str, Problem] = {}
    for number, (place, row) in enumerate(rows):
        if table.shape is not None:
            row = _shaped(table.shape, row, place)
        own = {name: _field(table, name, row, place) for name in FIELDS}
        if not isinstance(own["prompt"], str):
            raise ValueError(f"{place}: the problem's text is no string: {own['prompt']!r}")
        solution = own["solution"] if isinstance(own["solution"], str) else None
        key = f"{table.name}/{number if own['id'] is None else own['id']}"
        if key in problems:
            raise ValueError(f"{place}: the id {own['id']!r} occurs twice")
        problems[key] = Problem(
            id=key,
            prompt=own["prompt"],
            answer=_answer(own["answer"], solution),
            tests=_text(own["tests"]),
            domain=table.domain,
            level=_level(own["level"]),
            solution=solution,
            source=table.name,
            verifier=table.verifier,
            entry=_text(own["entry"]),
            subject=_text(own["subject"]),
        )
    return list(problems.values())


def _shaped(shape: Callable[[Row], Any], row: Row, place: str) -> Any:
    """What is made of a row; an error names the row's place."""
    try:
        return shape(row)
    except KeyError as error:
        raise ValueError(f"{place}: no field {error}; the row has {', '.join(row)}") from None
    except (ValueError, TypeError, SyntaxError, RecursionError) as error:
        raise ValueError(f"{place}: {error}") from None


def _field(table: TableSet, name: str, row: Row, place: str) -> Any:
    """A row's value of one of our fields; None where it may lack."""
    for theirs in table.fields.get(name, FIELDS[name]):
        if theirs in row:
            return row[theirs]
    if name == "prompt" or (name in table.fields and not table.hub):
        wanted = " or ".join(repr(theirs) for theirs in table.fields.get(name, FIELDS[name]))
        raise ValueError(
            f"{place}: no field {wanted}; the row has {', '.join(map(str, row)) or 'none'}"
        )
    return None


def _answer(value: Any, solution: str | None) -> str | None:
    """The final answer: as given, what follows #### (as GSM8K writes it), or what the solution boxes."""
    text = _text(value)
    if text is None:
        return ", ".join(boxed(solution or "")) or None
    return text.rpartition("####")[2].strip().replace(",", "") if "####" in text else text


def _text(value: Any) -> str | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return None if value is None else str(value)


def _level(value: Any) -> int | None:
    """A level as a number: 3, "3" or "Level 3"."""
    found = re.search(r"[0-9]+", str(value))
    return int(found[0]) if found else None


def _is_dev(problem: Problem) -> bool:
    """Whether a training problem is held out, by its text, so that duplicates stay together."""
    return int(hashlib.sha256(normalise(problem.prompt).encode()).hexdigest(), 16) % DEV_SHARE == 0


# Prompts --------------------------------------------------------------------------------------------------------------


def template(problem: Problem) -> str:
    """The name of the problem's prompt template: problems that say all themselves are bare."""
    if problem.verifier == "exact" or problem.source.startswith("micro_"):
        return "bare"
    return "stub" if stub(problem) else problem.domain


def render(problem: Problem, hint: str | None = None) -> str:
    """The user turn of a problem, the same in training, pass rates and evaluation; a hint is the known answer."""
    kind = template(problem)
    turn = TEMPLATES[kind].format(prompt=problem.prompt)
    if hint is None:
        return turn
    return turn + HINTS["bare" if kind == "bare" else "real"].format(hint=hint)


# Contamination --------------------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Lower case, and one space between words."""
    return " ".join(text.lower().split())


def compact(text: str) -> str:
    """Lower case without any space: copies differ in the spaces around mathematics, and 17 of 321 would be missed for them."""
    return "".join(text.lower().split())


def ngrams(text: str) -> set[str]:
    """The distinct 8-grams of words of a normalised text; a shorter text has none."""
    words = text.split()
    return {" ".join(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def decontaminate(
    train: Sequence[Problem], tests: Mapping[str, Sequence[Problem]], rule: Rule = "half"
) -> tuple[list[Problem], dict[str, Any]]:
    """The training problems that overlap no test problem, and the counts.

    Each rule drops exact matches. "half" also drops a problem with at least half of its 8-grams in one test problem, "any" one
    that shares a single 8-gram; "none" drops nothing. What every rule would drop is counted, in all and by benchmark.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"unknown contamination rule {rule!r}: {nearest(rule, get_args(Rule))}")
    indexes = {name: _Index(problems) for name, problems in tests.items()}
    kept: list[Problem] = []
    dropped: list[Problem] = []
    total: Counter[str] = Counter()
    counts: dict[str, Counter[str]] = {name: Counter() for name in tests}
    for problem in train:
        text = normalise(problem.prompt)
        grams = ngrams(text)
        overlaps = {name: index.overlap(text, grams) for name, index in indexes.items()}
        hits = {
            name: [r for r in RULES if overlap >= RULES[r]] for name, overlap in overlaps.items()
        }
        for name, mine in hits.items():
            counts[name].update(mine)
        found = set().union(*hits.values())
        total.update(found)
        (dropped if rule in found else kept).append(problem)
    report = {
        "rule": rule,
        "dropped": len(dropped),
        **{name: total[name] for name in RULES},
        "benchmarks": {name: {r: counts[name][r] for r in RULES} for name in tests},
        "dropped_ids": [problem.id for problem in dropped],
    }
    return kept, report


RULES = {"exact": 2.0, "half": 0.5, "any": 1e-9}  # least overlap that a rule drops


class _Index:
    """The 8-grams of a benchmark's problems, and where they occur."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        texts = [normalise(problem.prompt) for problem in problems]
        self.texts = {compact(text) for text in texts}
        self.places: dict[str, list[int]] = {}
        for place, text in enumerate(texts):
            for gram in ngrams(text):
                self.places.setdefault(gram, []).append(place)

    def overlap(self, text: str, grams: set[str]) -> float:
        """2 for an exact match, else the largest share of the 8-grams that one test problem has."""
        if compact(text) in self.texts:
            return 2.0
        shared = Counter(place for gram in grams for place in self.places.get(gram, ()))
        return max(shared.values()) / len(grams) if shared else 0.0
