"""HEAL: repair what the teacher fails at, with the answer in hindsight, and filter shortcuts (arXiv:2603.10359).

Fidelity: reconstruction from the abstract and second-hand descriptions; the paper's method section was not available to us. Each
field says what its default rests on: [paper], [secondary] (told by a third party), [reading] (ours), or [measured] (on the micro
world, where it departs from the paper's reading; paper.yaml keeps that one).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import model_validator

from harness.config import search
from harness.objectives import nll
from harness.registry import Method, method
from harness.types import Lab, Measure, OffPolicy, Problem, Request, Stage, Trace
from harness.verifiers import opens_think, rejection
from methods.heal import gear, pace, pure


@method("heal", paper="arXiv:2603.10359")
class Heal(Method):
    needs = frozenset({"teacher.generate", "teacher.score"})

    samples: int = search(30, 4, 64, ge=1, le=1024)  # N base samples a problem [secondary]
    hard: float = search(0.5, 0.1, 1.0, ge=0)  # hints below this pass rate [secondary]
    extreme: float = search(1 / 30, 0.0, 0.2, le=1)  # repair up to this one: 1 of 30 [secondary]
    parts: tuple[Literal["base", "hint", "repair"], ...] = (
        "base",
        "hint",
        "repair",
    )  # what the student is trained on, in order [paper]
    cap: int = search(30, 1, 64, le=1024)  # most traces a problem and part [reading]
    hints: int = search(30, 0, 64, le=1024)  # samples from scratch of a hard problem [reading]
    segment: Literal["blank", "line"] = "blank"  # what separates steps [secondary]
    min_step: int = search(10, 1, 32, le=1024)  # tokens; shorter steps are merged [reading]
    # GEAR
    paths: int = search(10, 1, 20, le=1024)  # failed traces to repair, a problem [secondary]
    candidates: int = search(20, 1, 64, le=1024)  # continuations of each [secondary]
    breakpoint: Literal["surge", "random", "start"] = (
        "surge"  # largest surge; start: repair from scratch [secondary]
    )
    entropy: Literal["step_mean", "step_max", "token_window"] = (
        "step_mean"  # of a step, from its tokens [reading]
    )
    surge: Literal["delta_prev", "delta_running_mean", "absolute"] = (
        "delta_prev"  # over what [reading]
    )
    search_fraction: float = search(
        1.0, 0.2, 1.0, ge=0
    )  # of the trace, from its start; 1/3 [secondary], ours [measured]
    search_unit: Literal["steps", "tokens"] = "steps"  # of that fraction [reading]
    first_step: Literal["reference", "never"] = (
        "reference"  # step 1 against solved problems' first steps [measured]
    )
    backup: int = search(1, 0, 2)  # steps taken back from the breakpoint [secondary]
    hint_mode: Literal["answer_in_prompt", "bridge_step", "inline_think"] = (
        "answer_in_prompt"  # how the teacher learns the answer [secondary]
    )
    leak_filter: bool = True  # drop texts that mention the given answer [reading]
    min_new_steps: int = search(2, 0, 4, le=1024)  # of a repaired trace [reading]
    # PURE
    anomaly: Literal["log_ratio", "ratio", "jump", "perplexity", "random"] = (
        "log_ratio"  # R of a step [measured]
    )
    uncertainty: Literal["gold_answer_nll", "entropy", "first_token"] = (
        "gold_answer_nll"  # U after a step [reading]
    )
    aggregate: Literal["max", "top10pct_mean"] = "max"  # of R over steps [reading]
    exclude_last: int = search(0, 0, 2, le=1024)  # last steps left out of R [measured]
    eps: float = search(
        0.01, 0.001, 0.1, log=True, ge=1e-9, le=10
    )  # added to U [secondary], its role [reading]
    keep_rule: Literal["reject_share", "log_threshold", "outlier_share", "all"] = (
        "reject_share"  # what lambda bounds [reading]
    )
    lmbda: float = search(0.2, 0.1, 0.5, ge=0, le=100)  # lambda [secondary], its role [reading]
    # PACE
    mode: Literal["sequential_increment", "sequential_cumulative", "data_only", "reversed"] = (
        "sequential_increment"  # stages and their data [reading]
    )
    replay: float = search(0.2, 0.0, 0.5, le=1.0)  # of earlier data, in increments [reading]

    @model_validator(mode="after")
    def _consistent(self) -> Heal:
        if "base" not in self.parts:
            raise ValueError(f"parts: base is always one of them, got {list(self.parts)}")
        if self.anomaly == "random" and self.keep_rule not in ("reject_share", "all"):
            raise ValueError(
                f"anomaly: random draws a share to drop, which keep_rule {self.keep_rule!r} does not; "
                "use reject_share"
            )
        if self.lmbda > 1 and self.keep_rule != "log_threshold":
            raise ValueError(
                f"lmbda: {self.lmbda:g} is no share; at most 1, or keep_rule log_threshold"
            )
        return self

    def stages(self, lab: Lab) -> Iterator[Stage]:
        parts = {
            name: [lab.example(trace) for group in groups.values() for trace in group]
            for name, groups in self.pools(lab).items()
        }
        for name, examples in parts.items():
            if not examples:  # refused at once, with the counts of all filters
                yield Stage(name, OffPolicy([]), nll)
        rng = lab.rng("heal: replay")
        for name, examples, share in pace.curriculum([*parts.items()], self.mode, self.replay, rng):
            yield Stage(name, OffPolicy(examples), nll, share=share)

    def pools(self, lab: Lab) -> dict[str, dict[str, list[Trace]]]:
        """The traces of each part by problem. A part that no problem is hard enough for is left out; a part all of whose
        candidates were dropped stays, empty, and ends the run with its counts."""
        drawn = lab.samples(lab.teacher, self.samples, purpose="base")
        pools = {"base": self._base(lab, drawn)}
        hard, extreme = self.selected(lab, drawn)
        if hard and "hint" in self.parts:
            pools["hint"] = self.kept(lab, "hint", self.hinted(lab, hard))
        if extreme and "repair" in self.parts:
            pools["repair"] = self.kept(lab, "repair", self.repaired(lab, drawn, extreme))
        return pools

    def selected(
        self, lab: Lab, drawn: Sequence[Sequence[Trace]]
    ) -> tuple[list[Problem], list[Problem]]:
        """Hard problems, p(x) = c(x) / N below `hard`, and those among them that are extremely hard, p(x) at most `extreme`."""
        hard, extreme, mute, unread = [], [], 0, 0
        for problem, traces in zip(lab.problems, drawn, strict=True):
            rate = sum(t.correct for t in traces) / max(1, len(traces))
            if rate >= self.hard or not traces:
                continue
            if not problem.answer:  # nothing to hint at
                mute += 1
                continue
            if all(t.verdict and t.verdict.status == "error" for t in traces):
                unread += 1  # no trace can ever be right
                continue
            hard.append(problem)
            if rate <= self.extreme + 1e-9:
                extreme.append(problem)
        lab.note("problems", {
            "hard": len(hard),
            "extremely hard": len(extreme),
            "hard, without an answer to hint at": mute,
            "with an answer that cannot be read": unread,
        })  # fmt: skip
        return hard, extreme

    def _base(self, lab: Lab, drawn: Sequence[Sequence[Trace]]) -> dict[str, list[Trace]]:
        opened, counts = opens_think(lab.teacher), Counter[str]()
        pool: dict[str, list[Trace]] = {}
        for problem, traces in zip(lab.problems, drawn, strict=True):
            reasons = [rejection(trace, opened) for trace in traces]
            good = [t for t, reason in zip(traces, reasons, strict=True) if reason is None]
            counts.update(reason or "verified" for reason in reasons)
            counts["beyond the cap"] += len(good[self.cap :])
            pool[problem.id] = good[: self.cap]
        lab.note("base", dict(sorted(counts.items())))
        return pool

    def hinted(self, lab: Lab, problems: Sequence[Problem]) -> dict[str, list[Trace]]:
        """Samples from scratch with the answer in the prompt."""
        requests = [Request(lab.prompt(p, p.answer), p) for p in problems]
        drawn = lab.samples(lab.teacher, self.hints, requests=requests, purpose="hint")
        return {problem.id: traces for problem, traces in zip(problems, drawn, strict=True)}

    def repaired(
        self, lab: Lab, drawn: Sequence[Sequence[Trace]], problems: Sequence[Problem]
    ) -> dict[str, list[Trace]]:
        """GEAR: the repaired candidates of each extremely hard problem, path by path."""
        wanted, counts = {problem.id for problem in problems}, Counter[str]()
        solved = [t for traces in drawn for t in traces if t.correct]
        failed = [t for traces in drawn for t in gear.broken(self, traces) if t.problem.id in wanted]  # fmt: skip
        cuts = gear.prefixes(lab, self, solved, failed)
        counts["failed traces"] = len(cuts)
        counts["of them from scratch"] = sum(kept == 0 for _, _, kept in cuts)
        shares = [kept / len(trace.tokens) for trace, _, kept in cuts if trace.tokens]
        tall, edges = np.histogram(shares, bins=10, range=(0, 1))
        lab.note(
            "gear: share of a failed trace that is kept",
            {"edges": edges.tolist(), "counts": tall.tolist()},
        )
        found: dict[str, list[Trace]] = {problem.id: [] for problem in problems}
        for (trace, _, _), group in zip(cuts, gear.repair(lab, self, cuts, counts), strict=True):
            found[trace.problem.id] += group
        lab.note("gear", dict(counts))
        return found

    def kept(
        self, lab: Lab, part: str, groups: Mapping[str, Sequence[Trace]]
    ) -> dict[str, list[Trace]]:
        """What survives the verifier, and of that what PURE keeps, at most `cap` a problem; counts what was dropped where."""
        counts = Counter[str](problems=len(groups), candidates=sum(map(len, groups.values())))
        verified = self.verified(lab, part, groups, counts)
        stays = self.filtered(lab, verified, counts)
        found = [trace for trace, stay in zip(verified, stays, strict=True) if stay]
        pool: dict[str, list[Trace]] = {name: [] for name in groups}
        for trace in sorted(found, key=lambda t: t.index):  # low sample indices of all paths first
            if len(pool[trace.problem.id]) < self.cap:
                pool[trace.problem.id].append(trace)
        solved = len({trace.problem.id for trace in verified})
        counts["kept by PURE"], counts["kept under the cap"] = len(found), sum(map(len, pool.values()))  # fmt: skip
        counts["different texts among them"] = len({t.text for traces in pool.values() for t in traces})  # fmt: skip
        counts["problems with a verified trace"] = solved
        counts["unrepairable problems"] = len(groups) - solved
        counts["problems with a kept trace"] = sum(map(bool, pool.values()))
        shares = {
            "share of problems with a verified trace": solved / max(1, len(groups)),
            "share of verified traces kept by PURE": len(found) / max(1, len(verified)),
        }
        lab.note(part, {**counts, **shares})
        return pool

    def verified(
        self, lab: Lab, part: str, groups: Mapping[str, Sequence[Trace]], counts: Counter[str]
    ) -> list[Trace]:
        """The candidates that pass everything but PURE."""
        least = self.min_new_steps if part == "repair" else 0
        return gear.survivors(lab, self, groups, least, counts)

    def filtered(self, lab: Lab, traces: Sequence[Trace], counts: Counter[str]) -> list[bool]:
        """Which traces PURE keeps; one that a cap left unscored goes."""
        if self.keep_rule == "all" or not traces:
            return [True] * len(traces)
        names = [trace.problem.id for trace in traces]
        if self.anomaly == "random":
            draws = lab.rng("heal: random in PURE's place").random(len(traces))
            return pure.kept(self, names, [*draws[:, None]]).tolist()
        values = pure.anomalies(lab, self, traces)
        counts["not scored, by a cap"] += sum(v is None for v in values)
        scored = [place for place, v in enumerate(values) if v is not None]
        stays = [False] * len(traces)
        decided = pure.kept(self, [names[i] for i in scored], [v for v in values if v is not None])
        for place, stay in zip(scored, decided.tolist(), strict=True):
            stays[place] = stay
        return stays

    def mechanisms(self, lab: Lab) -> Mapping[str, Measure | float]:
        from methods.heal.scorecard import scorecard

        return scorecard(lab, self)
