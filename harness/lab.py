"""The lab: what a method may look at, with every sample out of the store and on the ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from harness import problems as problem_sets
from harness import ranks, verifiers
from harness.config import SamplingSettings
from harness.ledger import Ledger, forward_flops
from harness.store import Store, digest
from harness.types import (
    Example,
    Ids,
    LanguageModel,
    Oracle,
    Problem,
    Request,
    RewardModel,
    Sampling,
    Scores,
    Trace,
    Verdict,
)

Report = Callable[[str, int, int], None]  # phase, done, total
Made = tuple[Sequence[dict[str, Any] | None], Mapping[str, float]]  # rows, and what they cost
SCORED = 2048  # responses scored between two writes to the store
REWARDED = 256  # the same of a reward model, which may be a server that fails


class Workbench:
    """The Lab of one cell: one method, one training seed, one data seed."""

    def __init__(
        self,
        student: LanguageModel,
        loaders: Mapping[str, Callable[[], LanguageModel]],
        problems: Sequence[Problem],
        store: Store,
        ledger: Ledger,
        sampling: SamplingSettings,
        *,
        seed: int = 0,
        data_seed: int = 0,
        oracle: Oracle | None = None,
        clock: Callable[[], tuple[int, int]] = lambda: (0, 0),
        consumed: Callable[[], float] = lambda: 0.0,
        report: Report | None = None,
    ) -> None:
        self.student, self.models = student, Loaded(loaders)
        self.problems, self.oracle = tuple(problems), oracle
        self.notes: dict[str, Any] = {}
        self._store, self._ledger, self._sampling = store, ledger, sampling
        self._seed, self._data_seed, self._clock = seed, data_seed, clock
        self._consumed = consumed
        self._report: Report = report or (lambda phase, done, total: None)
        self._vocabularies: dict[str, str] = {}  # an author's identity or version -> its vocabulary

    @property
    def base(self) -> LanguageModel:
        return self.models["base"]

    @property
    def teacher(self) -> LanguageModel:
        return self.models["teacher"]

    @property
    def consumed(self) -> float:
        return self._consumed()

    def prompt(self, problem: Problem, hint: str | None = None) -> str:
        return problem_sets.render(problem, hint)

    def samples(
        self,
        model: LanguageModel,
        n: int = 1,
        *,
        requests: Sequence[Request] | None = None,
        on_policy: bool = False,
        purpose: str = "samples",
        judge: bool | None = None,
        **sampling: Any,
    ) -> list[list[Trace]]:
        if requests is None:
            requests = [Request(self.prompt(problem), problem) for problem in self.problems]
        settings = self._settings(n, on_policy, sampling)
        author = getattr(model, "version", None) or model.identity
        self._vocabularies[author] = model.vocabulary_digest
        column = "student_generated" if self._is_student(model) else "teacher_generated"
        if on_policy:
            traces = self._written(model, requests, settings)
            written = [trace for group in traces for trace in group]
            self._spend(self._costs(column, model, written, requests))
            traces = self._charged(column, model, traces, None, purpose, requests)
            return self._verified(traces, verifiers.opens_think(model)) if judge else traces
        keys = [sample_keys(model, request, n) for request in requests]
        group = sample_group(model, settings)
        rows = self._stored(model, requests, settings, group, keys, column)
        traces = [
            [
                _trace(model, request, rows[key], index)
                for index, key in enumerate(mine)
                if key in rows
            ]
            for request, mine in zip(requests, keys, strict=True)
        ]
        name = digest(group)
        paid = [[name + key for key in mine] for mine in keys]
        traces = self._charged(column, model, traces, paid, purpose, requests)
        return traces if judge is False else self._verified(traces, verifiers.opens_think(model))

    def scores(
        self,
        model: LanguageModel,
        pairs: Sequence[tuple[Ids, Ids]],
        *,
        purpose: str = "scoring",
    ) -> list[Scores | None]:
        group, column = {"model": model.identity}, "teacher_scored"
        name = digest(group)
        student, parameters = self._is_student(model), getattr(model, "num_parameters", 0)
        keys = [digest([prompt, response]) for prompt, response in pairs]
        wanted: dict[str, tuple[Ids, Ids]] = {}
        for key, (prompt, response) in zip(keys, pairs, strict=True):
            if not student and self._beyond(column, name + key):
                continue
            tokens = len(prompt) + len(response)
            if not student:  # the ledger has no column for what the student scores, but its FLOPs
                self._ledger.charge(column, tokens, name + key, purpose)
            self._ledger.charge("flops", forward_flops(parameters, tokens), name + key)
            wanted[key] = (prompt, response)
        # Like lengths together; which pairs share a block is a function of the call alone.
        order = sorted(wanted, key=lambda key: (sum(map(len, wanted[key])), key))
        blocks = [order[i : i + SCORED] for i in range(0, len(order), SCORED)]

        def make(block: int, known: Collection[str]) -> Made:
            mine = [wanted[key] for key in blocks[block]]
            tokens = sum(len(prompt) + len(response) for prompt, response in mine)
            costs = {"flops": forward_flops(parameters, tokens)}
            if not student:
                costs[column] = tokens
            return [_view(scores) for scores in model.score(mine)], costs

        rows = ranks.agree(lambda: self._store.get("scores", group, wanted))
        self._fill(
            "scores",
            group,
            rows,
            blocks,
            set(wanted),
            make,
            f"{'student' if student else 'teacher'} scores",
        )
        found = {
            k: Scores(tuple(r["logprobs"]), tuple(r["entropies"]), _error(r))
            for k, r in rows.items()
        }
        return [found.get(key) for key in keys]

    def rewards(
        self, model: RewardModel, pairs: Sequence[tuple[str, str]], *, purpose: str = "scoring"
    ) -> list[float]:
        group = {"model": model.identity}
        name = digest(group)
        keys = [digest(list(pair)) for pair in pairs]
        wanted = dict(zip(keys, pairs, strict=True))
        lengths = model.lengths([*wanted.values()])
        flops = {
            key: forward_flops(model.num_parameters, length)
            for key, length in zip(wanted, lengths, strict=True)
        }
        for key in keys:
            self._ledger.charge("verifier_calls", 1, name + key, purpose)
            self._ledger.charge("flops", flops[key], name + key)
        order = sorted(wanted, key=lambda key: (sum(map(len, wanted[key])), key))
        blocks = [order[i : i + REWARDED] for i in range(0, len(order), REWARDED)]

        def make(block: int, known: Collection[str]) -> Made:
            mine = blocks[block]
            costs = {"verifier_calls": len(mine), "flops": sum(flops[key] for key in mine)}
            given = model.reward([wanted[key] for key in mine])
            return [{"reward": value} for value in given], costs

        rows = ranks.agree(lambda: self._store.get("rewards", group, wanted))
        self._fill("rewards", group, rows, blocks, set(wanted), make, "rewards")
        if unread := sum(ranks.gather(getattr(model, "unread", 0))):
            self.note(f"{model.name}: answers that were neither yes nor no", unread)
        return [rows[key]["reward"] for key in keys]

    def verify(self, problem: Problem, text: str) -> Verdict:
        return self._judge([(problem, text, True)])[0]

    def judged(self, traces: Sequence[Trace]) -> list[Trace]:
        return self._verified([list(traces)], verifiers.opens_think(self.student))[0]

    def pass_rates(self, model: LanguageModel, n: int, **sampling: Any) -> np.ndarray:
        traces = self.samples(model, n, **sampling)
        return np.array(
            [float(np.mean([t.correct for t in group])) if group else 0.0 for group in traces]
        )

    def references(
        self, weights: Sequence[float] | None = None, *, n: int = 1, verified: bool = True
    ) -> list[Example]:
        weight = self._by_id(weights)
        wanted = [problem for problem in self.problems if weight[problem.id] != 0]
        requests = [Request(self.prompt(problem), problem) for problem in wanted]
        found = dict(
            zip(
                (p.id for p in wanted),
                self.samples(self.teacher, n, requests=requests),
                strict=True,
            )
        )
        examples, counts = [], Counter[str]()
        for problem in self.problems:
            if weight[problem.id] == 0:
                examples.append(Example.zero(problem))
                counts["weight 0"] += 1
                continue
            traces = [t for t in found[problem.id] if t.correct or not verified]
            counts["kept" if traces else "no verified response"] += 1
            if traces:
                examples.append(self.example(traces[0], weight[problem.id]))
        self.note("references", dict(counts))
        return examples

    def rollouts(
        self, weights: Sequence[float] | None = None, **sampling: Any
    ) -> Callable[[Sequence[Problem]], list[Example]]:
        weight = self._by_id(weights)

        def make(problems: Sequence[Problem]) -> list[Example]:
            live = [problem for problem in problems if weight[problem.id] != 0]
            # A problem that is drawn twice gets two responses: samples of one request, not one seed twice.
            unique = {problem.id: problem for problem in live}
            repeats = max(Counter(problem.id for problem in live).values(), default=0)
            requests = [Request(self.prompt(problem), problem) for problem in unique.values()]
            drawn = (
                self.samples(self.student, repeats, requests=requests, on_policy=True, **sampling)
                if live
                else []
            )
            written = {name: iter(group) for name, group in zip(unique, drawn, strict=True)}
            examples = []
            for problem in problems:
                if weight[problem.id] == 0:
                    examples.append(Example.zero(problem))
                elif (trace := next(written[problem.id], None)) is not None:
                    examples.append(self.example(trace, weight[problem.id]))
            return examples

        return make

    def example(self, trace: Trace, weight: float = 1.0, **fields: Any) -> Example:
        prompt = self.student.encode(self.prompt(trace.problem))
        return Example(trace.problem.id, prompt, self._response(trace), weight, **fields)

    def rng(self, purpose: str, *, on_policy: bool = False) -> np.random.Generator:
        step = self._clock() if on_policy else ()
        return np.random.default_rng(int(digest(["rng", self._seed, purpose, *step])[:16], 16))

    def note(self, name: str, value: Any) -> None:
        self.notes[name] = value

    # -- sampling -------------------------------------------------------------------------------

    def _settings(self, n: int, on_policy: bool, given: Mapping[str, Any]) -> Sampling:
        seed = self._data_seed
        if on_policy:  # fresh at every step: the training seed and the step decide
            seed = int(digest(["on-policy", self._seed, self._data_seed, *self._clock()])[:15], 16)
        return Sampling(n=n, **{**self._sampling.model_dump(), "seed": seed, **given})

    def _stored(
        self,
        model: LanguageModel,
        requests: Sequence[Request],
        settings: Sampling,
        group: Mapping[str, Any],
        keys: Sequence[Sequence[str]],
        column: str,
    ) -> dict[str, dict[str, Any]]:
        """Rows of all keys; what is missing is sampled block by block, each by one process."""
        needed = {key for mine in keys for key in mine}
        rows = ranks.agree(lambda: self._store.get("samples", group, needed))
        plan = getattr(model, "plan", None)
        if plan is None:  # a model that replays
            traces = ranks.agree(lambda: model.generate(requests, settings))
            return {
                key: _row(trace)
                for mine, group_ in zip(keys, traces, strict=True)
                for key, trace in zip(mine, group_, strict=False)
            }
        blocks = plan(requests, settings)
        # A block may hold samples beyond n: they are kept, for when n is raised.
        starts = [mine[0].rpartition("-")[0] for mine in keys]
        wanted = [[f"{starts[place]}-{sample}" for place, sample in b.pairs] for b in blocks]

        def make(block: int, known: Collection[str]) -> Made:
            mine = wanted[block]
            made, failure = write_block(model, blocks[block], mine, known)
            asked = blocks[block].requests
            costs = self._costs(column, model, [*made.values()], asked, failure is not None)
            found = {key: _row(trace) for key, trace in made.items()}
            if failure is not None:
                self._spend(costs)
                self._store.put("samples", group, found)
                raise failure
            return [found.get(key) for key in mine], costs

        phase = f"{column.split('_')[0]} samples"
        self._fill("samples", group, rows, wanted, needed, make, phase)
        return rows

    def _fill(
        self,
        kind: str,
        group: Mapping[str, Any],
        rows: dict[str, dict[str, Any]],
        blocks: Sequence[Sequence[str]],
        needed: set[str],
        make: Callable[[int, Collection[str]], Made],
        phase: str,
    ) -> None:
        """Make the blocks of keys that lack a needed row, each by one process, and keep them.

        `make` is told which keys are known, and may leave those out (None). Every rank does its part of the blocks, and all get
        all rows and costs.
        """
        lacking = needed.difference(rows)
        missing = [b for b, mine in enumerate(blocks) if not lacking.isdisjoint(mine)]
        missing = missing[ranks.rank() :: ranks.world()]
        found: dict[str, dict[str, Any]] = {}
        paid: list[Mapping[str, float]] = []
        for wait in (False, True):  # first what nobody is at, then wait for the others
            for b in list(missing):
                self._report(phase, len(blocks) - len(missing), len(blocks))
                mine = blocks[b]
                with self._store.claim(kind, group, digest(mine)[:16], wait=wait) as claimed:
                    if not claimed:
                        continue
                    new = self._store.get(kind, group, mine)
                    if len(new) < len(set(mine)):
                        fresh, costs = make(b, new)
                        self._spend(costs)
                        paid.append(costs)
                        pairs = zip(mine, fresh, strict=True)
                        made = {k: r for k, r in pairs if r is not None and k not in new}
                        self._store.put(kind, group, made)
                        new = {**made, **new}
                found.update(new)
                missing.remove(b)
        for rank, (theirs, costly) in enumerate(ranks.gather((found, paid))):
            rows.update(theirs)
            for costs in costly if rank != ranks.rank() else ():
                self._spend(costs)
        if blocks:
            self._report(phase, len(blocks), len(blocks))

    def _written(
        self, model: LanguageModel, requests: Sequence[Request], settings: Sampling
    ) -> list[list[Trace]]:
        """Fresh traces: each block is written by one rank, and all get the same ones, at ties too."""
        plan = getattr(model, "plan", None)
        if ranks.world() == 1 or plan is None:
            return ranks.agree(lambda: model.generate(requests, settings))
        blocks = plan(requests, settings)
        written = ranks.shared(len(blocks), lambda b: model.generate_block(blocks[b]))  # type: ignore[attr-defined]
        traces: list[list[Trace]] = [[] for _ in requests]
        for block, made in zip(blocks, written, strict=True):
            for (place, sample), trace in zip(block.pairs, made, strict=True):
                if sample < settings.n:
                    traces[place].append(trace)
        return traces

    def _costs(
        self,
        column: str,
        model: LanguageModel,
        traces: Sequence[Trace],
        requests: Sequence[Request],
        failed: bool = False,
    ) -> dict[str, float]:
        tokens = sum(map(written_tokens, traces))
        read = sum(_given(model, request) for request in requests)
        parameters = getattr(model, "num_parameters", 0)
        costs: dict[str, float] = {}
        served = [trace.usage for trace in traces if trace.usage is not None]
        if served or failed:  # a server: replies that were paid for and could not be used count too
            served.append(model.take_lost())  # type: ignore[attr-defined]
            tokens += served[-1][1]
        for usage in served:
            for quantity, amount in bill(model, usage).items():
                costs[quantity] = costs.get(quantity, 0.0) + amount
        return {**costs, column: tokens, "flops": forward_flops(parameters, tokens + read)}

    def _spend(self, costs: Mapping[str, float]) -> None:
        for quantity, amount in costs.items():
            self._ledger.spend(quantity, amount)

    def _charged(
        self,
        column: str,
        model: LanguageModel,
        traces: list[list[Trace]],
        keys: Sequence[Sequence[str]] | None,
        purpose: str,
        requests: Sequence[Request],
    ) -> list[list[Trace]]:
        """Charge each trace once, in order; what a cap no longer allows is not handed out.

        FLOPs count what is written, and what stands before it once a request: its samples share that pass.
        """
        allowed: list[list[Trace]] = []
        parameters = getattr(model, "num_parameters", 0)
        for position, group in enumerate(traces):
            allowed.append([])
            for index, trace in enumerate(group):
                key = None if keys is None else keys[position][index]
                if self._beyond(column, key):
                    break
                tokens = written_tokens(trace)
                self._ledger.charge(column, tokens, key, purpose)
                if trace.usage is not None:
                    for quantity, amount in bill(model, trace.usage).items():
                        self._ledger.charge(quantity, amount, key, purpose)
                self._ledger.charge("flops", forward_flops(parameters, tokens), key)
                if not allowed[-1]:
                    read = forward_flops(parameters, _given(model, requests[position]))
                    shared = None if key is None else f"{key.rpartition('-')[0]} is read"
                    self._ledger.charge("flops", read, shared)
                allowed[-1].append(trace)
        return allowed

    def _beyond(self, column: str, key: str | None) -> bool:
        """Whether a cap forbids this; what was paid before it was spent stays there, also for a run that is taken up again."""
        if self._ledger.left(column) > 0 or self._ledger.paid(column, key):
            return False
        self.note(f"cut by the cap on {column}", True)
        return True

    def _verified(self, traces: list[list[Trace]], opened: bool) -> list[list[Trace]]:
        flat = [trace for group in traces for trace in group]
        verdicts = iter(self._judge([(t.problem, t.text, t.finished) for t in flat], opened))
        return [[replace(trace, verdict=next(verdicts)) for trace in group] for group in traces]

    def _judge(
        self, items: Sequence[tuple[Problem, str, bool]], opened: bool = False
    ) -> list[Verdict]:
        """Verdicts from the store, or fresh ones; costly verifiers only are stored."""
        keys = [digest([p.source, p.id, p.answer, p.tests, text, done]) for p, text, done in items]
        rows, calls = ranks.agree(lambda: self._judged(items, keys, opened))
        for key in keys:
            self._ledger.charge("verifier_calls", 1, key)
        self._ledger.spend("verifier_calls", calls)
        return [Verdict(rows[key]["status"], rows[key]["extracted"]) for key in keys]

    def _judged(
        self, items: Sequence[tuple[Problem, str, bool]], keys: Sequence[str], opened: bool
    ) -> tuple[dict[str, dict[str, Any]], int]:
        """Verdicts by key, and how many are new. One rank finds them: a timeout need not strike on another."""
        group = {"versions": self._versions, "opened": opened}
        known = self._store.get("verdicts", group, keys) if _costly(items) else {}
        todo = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
        fresh = verifiers.verify_many(list(todo.values()), opened=opened)
        made = {
            key: {"status": verdict.status, "extracted": verdict.extracted}
            for key, verdict in zip(todo, fresh, strict=True)
        }
        if made and _costly(items):
            # A timeout or a dead worker says something of the machine: it is not kept.
            lasting = {k: v for k, v in made.items() if v["status"] in ("ok", "wrong", "unparsed")}
            self._store.put("verdicts", group, lasting)
        return {**known, **made}, len(todo)

    @cached_property
    def _versions(self) -> Mapping[str, str]:
        return verifiers.versions()

    def _is_student(self, model: LanguageModel) -> bool:
        return model is self.student or model is self.models.loaded.get("base")

    def _by_id(self, weights: Sequence[float] | None) -> dict[str, float]:
        given = np.ones(len(self.problems)) if weights is None else np.asarray(weights, dtype=float)
        if given.shape != (len(self.problems),):
            raise ValueError(
                f"{given.shape} weights for {len(self.problems)} problems: give one a problem"
            )
        return dict(zip((problem.id for problem in self.problems), given.tolist(), strict=True))

    def _response(self, trace: Trace) -> Ids:
        """The trace's own tokens if the student shares the vocabulary, else its text encoded anew."""
        if self._vocabularies.get(trace.author) == self.student.vocabulary_digest:
            return trace.tokens
        return self.student.tokenize(trace.text, end=trace.finished)


class Loaded(Mapping[str, LanguageModel]):
    """Models by name, each loaded when a method first asks for it."""

    def __init__(self, loaders: Mapping[str, Callable[[], LanguageModel]]) -> None:
        self.loaders, self.loaded = loaders, dict[str, LanguageModel]()

    def __getitem__(self, name: str) -> LanguageModel:
        if name not in self.loaded:
            self.loaded[name] = self.loaders[name]()
        return self.loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.loaders)

    def __len__(self) -> int:
        return len(self.loaders)


def sample_group(model: LanguageModel, sampling: Sampling) -> dict[str, Any]:
    """What all samples of one store group share; n is not in it, so raising n adds samples."""
    settings = {k: getattr(sampling, k) for k in sampling.__slots__ if k != "n"}
    return {"model": model.identity, "sampling": settings}


def sample_keys(model: LanguageModel, request: Request, n: int) -> list[str]:
    """The store keys of a request's samples."""
    start = digest([request.encoded(model), request.prefix])
    return [f"{start}-{index}" for index in range(n)]


def write_block(
    model: Any, block: Any, keys: Sequence[str], known: Collection[str]
) -> tuple[dict[str, Trace], Exception | None]:
    """A block's traces by key, and what ended it early. Where samples do not depend on each other, known ones are not drawn again."""
    if not block.apart:
        return dict(zip(keys, model.generate_block(block), strict=True)), None
    names = dict(zip(block.pairs, keys, strict=True))
    skip = {pair for pair, key in names.items() if key in known}
    try:
        traces = model.generate_block(block, skip)
    except ConnectionError as failure:
        kept: dict[Any, Trace] = getattr(failure, "traces", {})
        return {names[pair]: trace for pair, trace in kept.items()}, failure
    todo = [key for pair, key in names.items() if pair not in skip]
    return dict(zip(todo, traces, strict=True)), None


def written_tokens(trace: Trace) -> int:
    """Tokens that were written for a trace: by the server's count, which knows of reasoning that is not shown, or its own."""
    return len(trace.tokens) - trace.prefix if trace.usage is None else trace.usage[1]


def bill(model: Any, usage: tuple[int, int]) -> dict[str, float]:
    """What a server's (prompt, written) tokens add to the ledger besides: each sample is a request and pays for its prompt."""
    price = getattr(model, "price", {})
    money = usage[0] * price.get("input", 0.0) + usage[1] * price.get("output", 0.0)
    return {"teacher_read": usage[0], "cost": money / 1e6}


def _given(model: LanguageModel, request: Request) -> int:
    """Tokens that a model reads before it writes."""
    return len(request.encoded(model)) + len(request.prefix)


def _row(trace: Trace) -> dict[str, Any]:
    return {
        "tokens": list(trace.tokens),
        "text": trace.text,
        "finished": trace.finished,
        "logprobs": None if trace.logprobs is None else list(trace.logprobs),
        "entropies": None if trace.entropies is None else list(trace.entropies),
        **_bounded(trace),
        **({} if trace.usage is None else {"usage": list(trace.usage)}),
    }


def _view(scores: Scores) -> dict[str, Any]:
    return {
        "logprobs": list(scores.logprobs),
        "entropies": list(scores.entropies),
        **_bounded(scores),
    }


def _bounded(seen: Trace | Scores) -> dict[str, list[float]]:
    """Exact entropies say nothing, so rows are what they were before there were others."""
    return {} if seen.entropy_error is None else {"entropy_error": list(seen.entropy_error)}


def _error(row: Mapping[str, Any]) -> tuple[float, ...] | None:
    return None if row.get("entropy_error") is None else tuple(row["entropy_error"])


def _trace(model: LanguageModel, request: Request, row: Mapping[str, Any], index: int) -> Trace:
    return Trace(
        problem=request.problem,
        tokens=tuple(row["tokens"]),
        text=row["text"],
        finished=row["finished"],
        prefix=len(request.prefix),
        index=index,
        author=model.identity,
        logprobs=None if row["logprobs"] is None else tuple(row["logprobs"]),
        entropies=None if row["entropies"] is None else tuple(row["entropies"]),
        entropy_error=_error(row),
        usage=None if row.get("usage") is None else tuple(row["usage"]),
    )


def _costly(items: Sequence[tuple[Problem, str, bool]]) -> bool:
    return any(problem.verifier != "exact" for problem, _, _ in items)
