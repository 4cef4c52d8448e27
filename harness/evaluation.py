"""The lm-eval driver: any LanguageModel on any lm-eval task, ours or not, and one record a sample.

lm-eval asks for the answers and scores the tasks; what it lacks is done here: all samples of a problem count, finished blocks
are kept so that a killed evaluation goes on and a larger n adds to them, and answers are judged in parallel.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import random
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from harness import fewshot, models, problems, statistics, verifiers
from harness.config import nearest
from harness.lab import sample_group, sample_keys, write_block, written_tokens
from harness.store import Store, draft, short_digest
from harness.types import LanguageModel, Problem, Request, Sampling, Split, Trace, Verdict
from harness.verifiers import sandbox

Record = dict[str, Any]
Report = Callable[[str, int, int], None]  # phase, done, total

CHUNK = 64  # requests of a block, for models that do not plan their own
HEAT = 0.6  # temperature of several samples, where nobody names one
PAIRS = 512  # (context, continuation) pairs scored at a time
METRICS = (
    "acc",
    "exact_match",
    "accuracy",
    "pass@1",
)  # of other people's tasks, the first that there is
COLUMNS = {
    "benchmark": "string",
    "problem": "string",
    "prompt": "string",  # the problem's text; of others' tasks all that the model was given
    "sample": "int32",
    "correct": "bool",
    "status": "string",
    "extracted": "string",
    "second": "string",  # what the second extractor says: ok, wrong, or nothing
    "gold": "string",
    "text": "string",
    "tokens": "int32",
    "truncated": "bool",
    "level": "int32",
    "subject": "string",
    "domain": "string",
    "sampling_seed": "int64",
}


@dataclass(frozen=True)
class Setting:
    """How one benchmark is run; what is not given is as its task says."""

    n: int = 1  # samples a problem
    limit: int | None = None  # problems; None: all
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int | None = None
    levels: tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # further ones of the problem set
    split: Split = "test"  # dev, for tuning

    @classmethod
    def of(cls, name: str, given: Any) -> Setting:
        """From a mapping or a config object, whose fields these are; the task fills in how its problems are sampled."""
        values = {key: value for key, value in dict(given).items() if value is not None}
        values.pop("bands", None)  # of the report
        allowed = {each.name for each in fields(cls)}
        for key in values:
            if key not in allowed:
                raise ValueError(f"benchmarks.{name}: unknown key {key!r}: {nearest(key, allowed)}")
        if "levels" in values:
            values["levels"] = tuple(values["levels"])
        if "levels" in values.get("options", {}):
            raise ValueError(f"benchmarks.{name}.options: levels is a key of its own beside them")
        if "options" in values:  # YAML reads a date as one; the protocol and the task want text
            values["options"] = {
                key: value.isoformat() if isinstance(value, date) else value
                for key, value in values["options"].items()
            }
        usual = _usual(name)
        if values.get("temperature") == 0:
            usual.pop("n", None)  # greedy samples are equal, so one is meant
        setting = cls(**{**usual, **values})
        if setting.n > 1 and setting.temperature == 0:
            raise ValueError(
                f"benchmarks.{name}: n = {setting.n} greedy samples are equal: give a temperature above 0"
            )
        return setting

    @property
    def loading(self) -> dict[str, Any]:
        """Options of the problem set."""
        levels = {} if self.levels is None else {"levels": list(self.levels)}
        return {**self.options, **levels}


class Response(NamedTuple):
    """What is kept of one sample."""

    text: str
    tokens: int
    finished: bool


@runtime_checkable
class Planner(Protocol):
    """A model that says which samples it computes together, so that a resumed call computes the same batches."""

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[Any]: ...
    def generate_block(self, block: Any) -> list[Trace]: ...


def evaluate(
    model: LanguageModel,
    benchmarks: Mapping[str, Any],
    *,
    seed: int = 0,
    limit: int | None = None,
    progress: Report | None = None,
    cache: Store | None = None,
) -> dict[str, list[Record]]:
    """The records of every benchmark: one for each problem and sample, in their order."""
    settings = {name: Setting.of(name, given) for name, given in benchmarks.items()}
    if limit is not None:
        settings = {
            name: replace(s, limit=min(limit, s.limit or limit)) for name, s in settings.items()
        }
    for name in settings:
        check(name)
    from lm_eval import evaluator

    with _quiet():
        tasks = {name: _tasks(name, setting) for name, setting in settings.items()}
        student = _adapter()(model, tasks, settings, seed, progress or (lambda *event: None), cache)
        foreign = [name for name in tasks if name not in own()]
        with verifiers.graded(student.verdicts):
            result = evaluator.evaluate(
                student,
                {"tasks": {key: task for group in tasks.values() for key, task in group.items()}},
                samples={
                    key: list(
                        range(min(settings[name].limit or len(task.eval_docs), len(task.eval_docs)))
                    )
                    for name in foreign
                    for key, task in tasks[name].items()
                }
                or None,
                bootstrap_iters=0,
                log_samples=bool(foreign),
                confirm_run_unsafe_code=True,
            )
    for name in foreign:
        for key in tasks[name]:
            student.records[name] += _scored(
                name, key, result["samples"][key], student.responses, seed
            )
    return {name: student.records[name] for name in settings}


# Benchmarks -----------------------------------------------------------------------------------------------------------


@cache
def own() -> dict[str, Mapping[str, Any]]:
    """The configurations of our tasks by name, functions unresolved."""
    return {name: entry.cfg for name, entry in _own_tasks().task_index.items() if entry.cfg}


@cache
def _own_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(problems.task_folders()), include_defaults=False)


@cache
def _other_tasks() -> Any:
    """lm-eval's own tasks; their index takes seconds, so it is made only for a name that we do not know."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check(name: str) -> None:
    """Refuse a benchmark that neither we nor lm-eval know."""
    known = f"known: {', '.join(sorted(own()))}, and every lm-eval task"
    if name in own():
        if own()[name].get("unsafe_code"):
            sandbox.kind(source_of(name))  # where there is none for it, before anything is paid
        return
    if close := difflib.get_close_matches(name, own(), n=1, cutoff=0.8):
        # A slip in one of our names; reading lm-eval's index for it would take its seconds.
        raise ValueError(f"unknown benchmark {name!r}: did you mean {close[0]!r}? {known}")
    with _quiet():
        if name in _other_tasks().task_index:
            return
        hint = nearest(name, _other_tasks().all_tasks).partition("known:")[0]
    raise ValueError(f"unknown benchmark {name!r}: {hint}{known}")


def several(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given for a benchmark, None left out; several samples of a task that is greedy are drawn at 0.6."""
    check(name)
    found = {key: value for key, value in given.items() if value is not None}
    usual = own().get(name, {}).get("generation_kwargs", {}).get("temperature", 0.0)
    if found.get("n", 1) > 1 and usual == 0:
        found.setdefault("temperature", HEAT)
    return found


def problems_of(name: str, **settings: Any) -> list[Problem]:
    """The problems of one of our benchmarks; none for other people's tasks."""
    if name not in own():
        check(name)
        return []
    setting = Setting.of(name, settings)
    return problems.load(source_of(name), setting.split, setting.limit, **setting.loading)


def is_raw(name: str) -> bool:
    """Whether a benchmark's prompts are text to continue, for base models: no chat template."""
    return name in own() and bool(own()[name]["dataset_kwargs"].get("raw"))


def _usual(name: str) -> dict[str, Any]:
    """How one of our tasks samples its problems, as its YAML file says."""
    task = own().get(name, {})
    decoding = task.get("generation_kwargs", {})
    wanted = ("temperature", "top_p", "top_k")
    return {
        "n": task.get("repeats", 1),
        **{key: decoding[key] for key in wanted if key in decoding},
    }


def source_of(name: str) -> str:
    """The problem set behind one of our benchmarks."""
    return str(own()[name]["dataset_kwargs"]["problems"])


def score(
    model: LanguageModel,
    benchmarks: Mapping[str, Any],
    *,
    seed: int,
    cache: Store,
    progress: Report,
    folder: Path,
) -> list[dict[str, Any]]:
    """One row a benchmark: accuracy with its 95 % interval over problems, what was cut or unreadable, and how it was sampled.

    The samples go to FOLDER/eval/MODEL/BENCHMARK--DIGEST.parquet, the digest one of weights, protocol and seed.
    """
    found = evaluate(model, benchmarks, seed=seed, cache=cache, progress=progress)
    place = folder / "eval" / re.sub(r"[^\w.-]+", "--", model.name).strip(".-")
    rows = []
    for name, records in found.items():
        said = protocol({name: benchmarks[name]}, model)
        of = short_digest([model.identity, said["hash"], seed])
        marked = [{**r, "method": model.name, "seed": 0, "data_seed": 0} for r in records]
        file = place / f"{name}--{of}.parquet"
        write_records(file, marked, {"protocol": json.dumps(said), "model": model.identity})
        (cell,) = statistics.summarise_records(marked, None).cells
        rows.append({**cell, "file": str(file), "decoding": decoding(said["benchmarks"][name])})
    return rows


def noise(
    model: LanguageModel,
    benchmarks: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    seed: int,
    progress: Report,
) -> dict[str, dict[str, float]]:
    """An A/A run: the same samples drawn again in other batches, held against those of `rows`, which `score` gave.

    Of each benchmark how many samples there are, how many texts and verdicts differ, and the difference in accuracy.
    """
    usual = getattr(model, "rows", None)
    if usual is None:
        raise ValueError(f"{model.name}: an A/A run changes the batches of a Transformers model")
    found = {}
    for row in rows:
        name = str(row["benchmark"])
        try:
            # Batches of at most a third of the problems: none is as it was.
            model.rows = max(1, min(usual // 2, row["n_problems"] // 3))  # type: ignore[attr-defined]
            again = evaluate(model, {name: benchmarks[name]}, seed=seed, progress=progress)[name]
        finally:
            model.rows = usual  # type: ignore[attr-defined]
        pairs = list(zip(read_records(Path(row["file"])), again, strict=True))
        found[name] = {
            "samples": len(pairs),
            "texts": sum(a["text"] != b["text"] for a, b in pairs),
            "verdicts": sum(a["correct"] != b["correct"] for a, b in pairs),
            "delta": sum(b["correct"] - a["correct"] for a, b in pairs) / len(pairs),
        }
    return found


def _tasks(name: str, setting: Setting) -> dict[str, Any]:
    """The lm-eval tasks of a benchmark: one of ours, or all that another name stands for."""
    if name in own():
        tasks = _own_tasks().load([{"group": "retort", "task": [_overrides(name, setting)]}])[
            "tasks"
        ]
    else:
        if setting.n > 1 or setting.loading or setting.split != "test":
            raise ValueError(
                f"benchmarks.{name}: an lm-eval task of others knows no n, levels, options or split"
            )
        try:
            tasks = _other_tasks().load(name)["tasks"]
        except Exception as error:  # whatever its data set, the Hub or a missing package may raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"benchmark {name!r}: lm-eval cannot load it: {reason}") from None
        for key, task in tasks.items():
            _acceptable(name, key, task)
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    return dict(tasks)


def _overrides(name: str, setting: Setting) -> dict[str, Any]:
    """What of our task's configuration a setting changes."""
    return {
        "task": name,
        "repeats": setting.n,
        "filter_list": [
            {"name": "samples", "filter": [{"function": "take_first_k", "k": setting.n}]}
        ],
        "dataset_kwargs": {
            **own()[name]["dataset_kwargs"],
            "split": setting.split,
            "n": setting.limit,
            "options": setting.loading,
        },
    }


def _acceptable(name: str, key: str, task: Any) -> None:
    """Refuse what would be unsafe here, or scored wrongly."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(
            f"benchmark {name!r}: {key} runs programs that models wrote, without isolation; "
            f"ours are isolated: {', '.join(sorted(own()))}"
        )
    metrics = {str(metric["metric"]) for metric in task.get_config("metric_list") or ()}
    greedy = task.OUTPUT_TYPE == "loglikelihood" or (
        task.OUTPUT_TYPE == "multiple_choice" and "exact_match" in metrics
    )
    if greedy:
        raise ValueError(
            f"benchmark {name!r}: {key} asks whether a continuation is the greedy one, which scores do not tell; "
            "use a multiple-choice or generation task"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its log, its warnings and its bars, and with no mark on Python's random numbers."""
    from lm_eval.api import task

    logger, state = logging.getLogger("lm_eval"), random.getstate()
    level, bar = logger.level, task.tqdm
    logger.setLevel(logging.ERROR)
    task.tqdm = lambda items, **_: items
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(lm_eval|datasets|evaluate)(\.|$)")
            yield
    finally:
        task.tqdm = bar
        logger.setLevel(level)
        random.setstate(state)


# Answers --------------------------------------------------------------------------------------------------------------


@cache
def _adapter() -> Any:
    """The class that lm-eval talks to; made on first use, as lm-eval is slow to import."""
    from lm_eval.api.model import LM

    class Adapter(LM):
        """A LanguageModel as an lm-eval model. It gets bare user turns: the model applies its own chat template, if any."""

        def __init__(
            self,
            model: LanguageModel,
            tasks: Mapping[str, Mapping[str, Any]],
            settings: Mapping[str, Setting],
            seed: int,
            report: Report,
            store: Store | None,
        ) -> None:
            super().__init__()
            self.model, self.settings, self.seed = model, settings, seed
            self.report, self.store = report, store
            self.benchmark = {key: name for name, group in tasks.items() for key in group}
            self.verdicts: dict[verifiers.Key, Verdict] = {}
            self.responses: dict[tuple[str, int], list[Response]] = {}
            self.records: dict[str, list[Record]] = defaultdict(list)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """One text a request; a request that is repeated asks for several samples."""
            counts: dict[int, int] = defaultdict(int)
            instances = {id(instance): instance for instance in requests}
            for instance in requests:
                counts[id(instance)] += 1
            calls: dict[Sampling, list[int]] = defaultdict(list)
            for key, instance in instances.items():
                calls[self._sampling(instance, counts[key])].append(key)
            written: dict[int, list[Response]] = {}
            for sampling, keys in calls.items():
                asked = [
                    Request(
                        instances[k].args[0],
                        self._problem(instances[k]),
                        raw=is_raw(self.benchmark[instances[k].task_name]),
                    )
                    for k in keys
                ]
                answers = respond(self.model, asked, sampling, self.store, self.report)
                written.update(zip(keys, answers, strict=True))
            self._grade([instances[key] for key in instances], [written[key] for key in instances])
            rest = {key: iter(responses) for key, responses in written.items()}
            return [next(rest[id(instance)]).text for instance in requests]

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            """Log-probability of each continuation; whether it is the greedy one is not known."""
            pairs = [_pair(self.model, *request.args[:2]) for request in requests]
            return [(total, False) for total in self._score(pairs)]

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            """Log-probability of each text, after the end-of-text token."""
            start = self.model.tokenize("", end=True)
            pairs = [
                (start, self.model.tokenize(request.args[0], end=False)) for request in requests
            ]
            return self._score(pairs)

        def _score(self, pairs: Sequence[tuple[Any, Any]]) -> list[float]:
            totals: list[float] = []
            for first in range(0, len(pairs), PAIRS):
                self.report("scoring", first, len(pairs))
                scores = self.model.score(pairs[first : first + PAIRS])
                totals += [float(sum(score.logprobs)) for score in scores]
            self.report("scoring", len(pairs), len(pairs))
            return totals

        def _sampling(self, instance: Any, n: int) -> Sampling:
            setting = self.settings[self.benchmark[instance.task_name]]
            given = instance.args[1]
            until = given.get("until") or []
            return Sampling(
                n=n,
                temperature=setting.temperature,
                top_p=setting.top_p,
                top_k=setting.top_k,
                max_new_tokens=setting.max_new_tokens or int(given.get("max_gen_toks", 256)),
                stop=(until,) if isinstance(until, str) else tuple(until),
                seed=self.seed,
            )

        def _problem(self, instance: Any) -> Problem:
            if self.benchmark[instance.task_name] in own():
                return Problem(**instance.doc)
            name = f"{instance.task_name}/{instance.doc_id}"
            return Problem(name, instance.args[0], source=instance.task_name)

        def _grade(self, instances: Sequence[Any], written: Sequence[Sequence[Response]]) -> None:
            """Judge the samples of our tasks, and record them."""
            items: list[tuple[str, int, Problem, Response]] = []
            for instance, responses in zip(instances, written, strict=True):
                name = self.benchmark[instance.task_name]
                if name in own():
                    problem = self._problem(instance)
                    items += [(name, i, problem, r) for i, r in enumerate(responses)]
                else:
                    self.responses[instance.task_name, instance.doc_id] = list(responses)
            self.report("verdicts", 0, len(items))
            verdicts: dict[int, Verdict] = {}
            for raw in (False, True):
                mine = {i: item for i, item in enumerate(items) if is_raw(item[0]) == raw}
                if mine:
                    judged = verifiers.verify_many(
                        [(problem, r.text, r.finished) for _, _, problem, r in mine.values()],
                        opened=not raw and verifiers.opens_think(self.model),
                    )
                    verdicts.update(zip(mine, judged, strict=True))
            self.report("verdicts", len(items), len(items))
            for place, (name, index, problem, response) in enumerate(items):
                verdict = verdicts[place]
                self.verdicts[problem.source, problem.id, response.text] = verdict
                self.records[name].append(
                    _record(name, problem, index, response, verdict, self.seed)
                )

    return Adapter


def respond(
    model: LanguageModel,
    requests: Sequence[Request],
    sampling: Sampling,
    store: Store | None,
    report: Report = lambda phase, done, total: None,
) -> list[list[Response]]:
    """`sampling.n` responses to each request; each block is stored as soon as it is finished."""
    group = sample_group(model, sampling)
    keys = [sample_keys(model, request, sampling.n) for request in requests]
    wanted = {key for mine in keys for key in mine}
    rows = store.get("responses", group, wanted) if store else {}
    for block, write in _blocks(model, requests, sampling, keys):
        if wanted.intersection(block) <= rows.keys():
            continue
        report("answers", len(wanted & rows.keys()), len(wanted))
        made, failure = write(block, rows.keys())
        new = {key: _row(trace) for key, trace in made.items()}
        if store:
            store.put("responses", group, new)
        if failure is not None:
            raise failure
        rows.update(new)
    report("answers", len(wanted), len(wanted))
    return [
        [Response(rows[key]["text"], rows[key]["tokens"], rows[key]["finished"]) for key in mine]
        for mine in keys
    ]


def _blocks(
    model: LanguageModel,
    requests: Sequence[Request],
    sampling: Sampling,
    keys: Sequence[Sequence[str]],
) -> Iterator[tuple[list[str], Callable[..., tuple[dict[str, Trace], Exception | None]]]]:
    """The keys of each block of samples, and what writes them."""
    if isinstance(model, Planner):
        starts = [mine[0].rpartition("-")[0] for mine in keys]
        for block in model.plan(requests, sampling):
            names = [f"{starts[place]}-{sample}" for place, sample in block.pairs]
            yield names, partial(write_block, model, block)
        return
    for first in range(0, len(requests), CHUNK):
        part = slice(first, first + CHUNK)
        names = [key for mine in keys[part] for key in mine]
        yield names, partial(_generate, model, requests[part], sampling)


def _generate(
    model: LanguageModel,
    requests: Sequence[Request],
    sampling: Sampling,
    names: Sequence[str],
    known: object,
) -> tuple[dict[str, Trace], None]:
    traces = model.generate(requests, sampling)
    return dict(zip(names, (t for group in traces for t in group), strict=True)), None


def _row(trace: Trace) -> dict[str, Any]:
    return {
        "text": trace.text,
        "tokens": trace.prefix + written_tokens(trace),
        "finished": trace.finished,
    }


def _pair(model: LanguageModel, context: str, continuation: str) -> tuple[Any, Any]:
    """Token ids of a context and what continues it; spaces at the seam belong to the continuation."""
    cut = len(context.rstrip())
    context, continuation = context[:cut], context[cut:] + continuation
    prompt = model.tokenize(context, end=False)
    whole = model.tokenize(context + continuation, end=False)
    if not prompt:
        return model.tokenize("", end=True), whole
    return prompt, whole[len(prompt) :]


# Records --------------------------------------------------------------------------------------------------------------


def _record(
    name: str, problem: Problem, index: int, response: Response, verdict: Verdict, seed: int
) -> Record:
    return {
        "benchmark": name,
        "problem": problem.id,
        "prompt": problem.prompt,
        "sample": index,
        "correct": verdict.correct,
        "status": verdict.status,
        "extracted": verdict.extracted,
        "second": verdict.second,
        "gold": problem.answer,
        "text": response.text,
        "tokens": response.tokens,
        "truncated": not response.finished,
        "level": problem.level,
        "subject": problem.subject,
        "domain": problem.domain,
        "sampling_seed": seed,
    }


def _scored(
    name: str,
    key: str,
    samples: Sequence[Mapping[str, Any]],
    responses: Mapping[tuple[str, int], Sequence[Response]],
    seed: int,
) -> list[Record]:
    """Records of a task of others, by its first accuracy and its first filter."""
    metric = next((m for m in METRICS if m in samples[0]["metrics"]), None)
    if metric is None:
        raise ValueError(
            f"benchmark {name!r}: {key} reports {', '.join(samples[0]['metrics'])}, none of which is an accuracy "
            f"({', '.join(METRICS)})"
        )
    records = []
    for sample in samples:
        if sample["filter"] != samples[0]["filter"]:
            continue
        correct = float(sample[metric]) == 1.0
        response = responses.get((key, sample["doc_id"]), [Response("", 0, True)])[0]
        prompt = str(sample["arguments"][0][0])
        problem = Problem(f"{key}/{sample['doc_id']}", prompt, domain=key)
        verdict = Verdict("ok" if correct else "wrong")
        records.append(_record(name, problem, 0, response, verdict, seed))
    return records


def write_records(
    path: Path, records: Iterable[Mapping[str, Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Records as a Parquet file, all or nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = list(records)
    columns = {
        name: pa.array([row[name] for row in rows], kind) for name, kind in _types(pa).items()
    }
    for name in rows[0] if rows else ():
        if name not in columns:
            columns[name] = pa.array([row[name] for row in rows])
    table = pa.table(columns).replace_schema_metadata(dict(metadata or {}))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = draft(path)
    try:
        pq.write_table(table, partial, compression="zstd")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_records(path: Path) -> list[Record]:
    """The records of a Parquet file."""
    import pyarrow.parquet as pq

    rows: list[Record] = pq.ParquetFile(path).read().to_pylist()
    return rows


def _types(pa: Any) -> dict[str, Any]:
    return {name: pa.type_for_alias(alias) for name, alias in COLUMNS.items()}


# Protocol -------------------------------------------------------------------------------------------------------------


def protocol_of(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What of a benchmark, under options of its problem set, decides a score, but for how it is sampled."""
    check(name)
    common = {"lm_eval": metadata.version("lm-eval")}
    if name not in own():
        return {**common, "task": f"lm-eval {name}"}
    config = own()[name]
    source = source_of(name)
    first = problems.load(source, "test", 1)[0]
    template = problems.TEMPLATES[problems.template(first)]
    if is_raw(name):
        # All of them: a set may have problems of several shapes, each with its own examples.
        prompts = [fewshot.prompt(p) for p in problems.load(source, "test", **(options or {}))]
        template = f"few-shot {short_digest(prompts)}"
    chosen = {}
    if options:
        chosen["chosen"] = problems.contents(problems.load(source, "test", **options))
    if first.verifier == "code":
        chosen["sandbox"] = sandbox.kind(source)
    return {
        **common,
        "task": name,
        "problems": source,
        "revision": problems.find(source).revision,
        **chosen,
        "template": template,
        "generation": {key: config["generation_kwargs"][key] for key in ("max_gen_toks", "until")},
        "verifier": first.verifier,
        "versions": verifiers.versions(),
    }


def protocol(benchmarks: Mapping[str, Any], model: Any = None) -> dict[str, Any]:
    """Everything that decides the scores, but for the weights; `hash` is its digest."""
    settings = {name: Setting.of(name, given) for name, given in benchmarks.items()}
    found = {
        "benchmarks": {
            name: {"sampling": _said(setting), **protocol_of(name, setting.options)}
            for name, setting in settings.items()
        },
        "engine": engine(model),
    }
    return {**found, "hash": protocol_hash(found)}


def _said(setting: Setting) -> dict[str, Any]:
    """A setting; options that none were given say nothing, so an old protocol stays what it was."""
    return {key: value for key, value in asdict(setting).items() if value or key != "options"}


def decoding(benchmark: Mapping[str, Any]) -> dict[str, Any]:
    """How a benchmark of a protocol is sampled, in the words of a table."""
    sampling, generation = benchmark.get("sampling", {}), benchmark.get("generation", {})
    return {
        "n": sampling.get("n", 1),
        "temperature": sampling.get("temperature", 0.0),
        "top_p": sampling.get("top_p", 1.0),
        "top_k": sampling.get("top_k", 0),
        "max_tokens": sampling.get("max_new_tokens") or generation.get("max_gen_toks"),
    }


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """Rows with different hashes never share a table."""
    return short_digest({key: value for key, value in protocol.items() if key != "hash"})


def engine(model: Any) -> dict[str, str]:
    """What computes, of a model or a suite's line; a name or a folder is computed by Transformers."""
    said = getattr(getattr(model, "engine", model), "said", None)
    if said is None and isinstance(model, Mapping):
        said = models.said(model)
    if said is not None:
        return dict(said)
    backend = type(model).__module__ if hasattr(model, "generate") else "harness.models.hf"
    packages = {"harness.models.hf": ("torch", "transformers")}
    network = getattr(model, "model", None)  # a name stands for a student, which is loaded in fp32
    kind = str(getattr(network, "dtype", "float32")).removeprefix("torch.")
    return {
        "backend": backend,
        **{name: metadata.version(name) for name in packages.get(backend, ())},
        **({"dtype": kind} if backend in packages else {}),
    }
