"""Rejection-sampling SFT: train on the teacher's verified responses (DeepSeek-R1-Distill, arXiv:2501.12948; open-r1).

Sample the teacher, keep verified responses of the right form (sec. 2.3.3 and 2.4), minimise their negative log-likelihood.
Left out: the generative judge that open-r1 runs beside math-verify, and near-duplicate removal by MinHash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from harness.config import search
from harness.objectives import nll
from harness.registry import Method, method
from harness.types import Example, Lab, OffPolicy, Request, Stage, Trace
from harness.verifiers import opens_think, rejection


@method("sft", paper="arXiv:2501.12948")
class SFT(Method):
    responses: Literal["teacher", "data"] = (
        "teacher"  # data: the problems' own solutions, unverified
    )
    samples: int = search(4, 1, 16, le=1024)  # n teacher samples a problem (open-r1: 4)
    more: int = search(0, 0, 64, le=4096)  # further samples of problems with few correct (no paper)
    more_at: float = search(0.0, 0.0, 0.2, le=1.0)  # teacher pass rate up to which they are drawn
    keep: int = search(1, 1, 16, le=1024)  # k at most, of the correct ones, a problem
    choose: Literal["first", "shortest", "random"] = "first"  # which k
    min_pass: float = search(0.0, 0.0, 0.5, le=1.0)  # least teacher pass rate of a problem
    max_pass: float = search(1.0, 0.5, 1.0, ge=0.0)  # largest teacher pass rate of a problem
    dedup: Literal["text", "none"] = "text"  # one problem for each normalised text
    loss_on: Literal["assistant", "all"] = "assistant"  # all: prompt tokens count too

    def stages(self, lab: Lab) -> Iterator[Stage]:
        examples = self._solutions(lab) if self.responses == "data" else self._selected(lab)
        yield Stage("sft", OffPolicy([self._under_loss(e) for e in examples]), nll)

    def _solutions(self, lab: Lab) -> list[Example]:
        given = [(p, p.solution) for p in lab.problems if p.solution is not None]
        lab.note("solutions", {"given": len(given), "missing": len(lab.problems) - len(given)})
        return [
            Example(p.id, lab.student.encode(lab.prompt(p)), lab.student.tokenize(solution))
            for p, solution in given
        ]

    def _selected(self, lab: Lab) -> list[Example]:
        counts: Counter[str] = Counter()
        seen: set[str] = set()
        examples: list[Example] = []
        rng = lab.rng("sft: choose")
        opened = opens_think(lab.teacher)  # then a response only closes its think
        for problem, traces in zip(lab.problems, self._drawn(lab), strict=True):
            text = " ".join(problem.prompt.lower().split())
            if self.dedup == "text" and text in seen:
                counts["duplicate problem"] += 1
                continue
            seen.add(text)
            reasons = [rejection(trace, opened) for trace in traces]
            good = [t for t, reason in zip(traces, reasons, strict=True) if reason is None]
            counts.update(reason for reason in reasons if reason)
            if good and not self.min_pass <= len(good) / len(traces) <= self.max_pass:
                counts["outside the difficulty band"] += len(good)
                continue
            if self.choose == "shortest":
                good = sorted(good, key=lambda trace: (len(trace.tokens), trace.index))
            elif self.choose == "random":
                good = [good[i] for i in rng.permutation(len(good))]
            counts["correct, beyond keep"] += len(good[self.keep :])
            counts["problems without a trace"] += not good
            examples += [lab.example(trace) for trace in good[: self.keep]]
        counts["kept"] = len(examples)
        lab.note("traces", dict(sorted(counts.items())))
        return examples

    def _drawn(self, lab: Lab) -> list[list[Trace]]:
        """n samples of each problem, and `more` of those that the teacher hardly solves: the control of methods that dwell on them."""
        drawn = lab.samples(lab.teacher, self.samples)
        rates = [sum(t.correct for t in traces) / max(1, len(traces)) for traces in drawn]
        few = [place for place, rate in enumerate(rates) if rate <= self.more_at + 1e-9]
        if self.more and few:
            chosen = [lab.problems[place] for place in few]
            requests = [Request(lab.prompt(problem), problem) for problem in chosen]
            again = lab.samples(lab.teacher, self.samples + self.more, requests=requests)
            for place, traces in zip(few, again, strict=True):
                drawn[place] = traces
            lab.note("problems sampled further", len(few))
        return drawn

    def _under_loss(self, example: Example) -> Example:
        if self.loss_on == "assistant":
            return example
        first, *rest = example.prompt  # nothing predicts the first token
        return Example(example.problem, (first,), (*rest, *example.response))
