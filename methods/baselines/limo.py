"""LIMO: few hard problems, each with its best-written chain (version 2, arXiv:2502.03387v3).

Difficulty band by the student's and the teacher's pass rates, a quality score of each correct chain, the best chain of each
problem, the top k of all. The student stands for the paper's weak filter (Qwen2.5-Math-7B-Instruct), the teacher for its strong
filter (R1-Distill-Qwen-32B) and for its three reasoners. How features of different scale are combined is our reading (z-scores).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from harness.config import search
from harness.objectives import nll
from harness.registry import Method, method
from harness.types import Lab, OffPolicy, Stage

WORDS: dict[str, tuple[str, ...]] = {  # sec. 3.1.2; the paper introduces the list with "e.g."
    "verification": ("check", "verify"),
    "exploration": ("perhaps", "might"),
    "granularity": ("therefore", "since"),
}


@method("limo", paper="arXiv:2502.03387")
class LIMO(Method):
    weak_k: int = search(
        4, 1, 8, le=1024
    )  # student attempts; one success drops the problem (sec. 3.1.1)
    weak_max: int = search(0, 0, 3, le=1024)  # student successes that a problem may have
    strong_k: int = search(32, 4, 64, ge=1, le=1024)  # teacher attempts (sec. 3.1.1)
    strong_min: int = search(1, 1, 4, ge=0, le=1024)  # least teacher successes
    strong_max: int = search(3, 1, 32, le=1024)  # most teacher successes
    weights: tuple[float, float, float, float] = (0.30, 0.20, 0.25, 0.25)  # of f1..f4
    words: dict[str, tuple[str, ...]] = WORDS  # counted for f2, f3, f4
    normaliser: Literal["zscore", "minmax", "none"] = "zscore"  # over all candidates (reading)
    require_correct: bool = True  # only chains with the right answer are candidates
    one_per_problem: bool = True  # the best chain of each problem
    keep: int = search(800, 100, 2000, ge=1, log=True, le=10**9)  # chains in the end

    def stages(self, lab: Lab) -> Iterator[Stage]:
        weak = lab.samples(lab.base, self.weak_k)
        strong = lab.samples(lab.teacher, self.strong_k)
        counts: Counter[str] = Counter()
        candidates = []
        for student, teacher in zip(weak, strong, strict=True):
            solved = sum(trace.correct for trace in teacher)
            if sum(trace.correct for trace in student) > self.weak_max:
                counts["problems the student solves"] += 1
            elif not self.strong_min <= solved <= self.strong_max:
                counts["problems outside the teacher's band"] += 1
            else:
                counts["problems in the pool"] += 1
                candidates += [t for t in teacher if t.correct or not self.require_correct]
        candidates = [t for t in candidates if t.text.split()]
        counts["candidate chains"] = len(candidates)
        scores = self.scores([trace.text for trace in candidates])
        order = sorted(
            range(len(candidates)),
            key=lambda i: (-scores[i], candidates[i].problem.id, candidates[i].index),
        )
        chosen, taken = [], set()
        for trace in (candidates[i] for i in order):
            if not (self.one_per_problem and trace.problem.id in taken):
                taken.add(trace.problem.id)
                chosen.append(trace)
        counts["kept"] = len(chosen[: self.keep])
        lab.note("selection", dict(counts))
        if len(chosen) < self.keep:
            lab.note("keep", f"{self.keep} chains wanted, the whole pool of {len(chosen)} taken")
        yield Stage("sft", OffPolicy([lab.example(t) for t in chosen[: self.keep]]), nll)

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """score = .30 z(f1) + .20 z(f2) + .25 z(f3) + .25 z(f4)   (sec. 3.1.2), [chains]"""
        if not texts:
            return np.zeros(0)
        table = np.array([self.features(text) for text in texts])
        centre, scale = np.zeros(4), np.ones(4)
        if self.normaliser == "zscore":
            centre, scale = table.mean(0), table.std(0)
        elif self.normaliser == "minmax":
            centre, scale = table.min(0), np.ptp(table, 0)
        flat = scale < 1e-12  # a feature that never varies ranks nothing
        return np.where(flat, 0.0, (table - centre) / np.where(flat, 1.0, scale)) @ np.array(
            self.weights
        )

    def features(self, text: str) -> list[float]:
        """f1 = W words; f2..f4 = counts of whole words, any case, over W   (sec. 3.1.2)"""
        length = len(text.split())
        counts = [
            len(
                re.findall(
                    rf"(?<!\w)(?:{'|'.join(map(re.escape, group))})(?!\w)", text, re.IGNORECASE
                )
            )
            for group in self.words.values()
        ]
        return [float(length), *(count / length for count in counts)]
