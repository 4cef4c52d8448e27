"""Signal-to-noise of distillation gradients against the student's pass rate: is PACED's bell curve there?

PACED (arXiv:2603.11178) claims that the gradient's signal-to-noise vanishes where the student always or never solves a problem,
and derives its weight p^alpha (1-p)^beta from that. The paper's own definition was not available to us; this protocol is our
reading. The student is frozen. Each problem has its pass rate p over K rollouts, and the gradient g_i of its loss (the mean over
the response's tokens) on one response: forward KL on the teacher's, reverse KL on a fresh one of the student's that does not
count in p. In a bin of n problems of like p, over pairs i != j:

    signal  U = mean g_i . g_j = |g|^2 - V / n          |g|: norm of the mean gradient, its noise taken off
    noise   V = mean |g_i - g_j|^2 / 2 = sum |g_i - g|^2 / (n - 1)
    SNR     = max(0, U) / V

Gradients are of all parameters, through one fixed random projection. Intervals are 95 %, from resampling the problems of each
bin; a problem is never paired with itself there either, as such a pair would pass for signal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from harness import cell, report
from harness.capsule import environment
from harness.cell import Job, write_json
from harness.compare import (
    Silent,
    check_models,
    check_writable,
    experiment,
    prepare,
    use_data,
)
from harness.config import Experiment
from harness.lab import Workbench
from harness.ledger import Ledger, forward_flops, training_flops
from harness.models.collate import collate
from harness.models.hf import HFModel
from harness.objectives import forward_kl, reverse_kl
from harness.objectives.chunked import chunked_loss
from harness.progress import Display, throttled
from harness.store import Store, digest, writing
from harness.types import Example, LanguageModel, Objective, Request

PLAIN: Any = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # the student's own distribution
INTERIOR = 8  # bins of 0 < p < 1; p = 0 and p = 1 have one each
LEAST = 50  # problems of a bin that is fitted or compared
MIDDLE = (0.25, 0.75)  # of the bell
RESAMPLES = 2000
LOSSES: Mapping[str, tuple[Objective, str]] = {
    "forward KL, teacher's response": (forward_kl, "teacher"),
    "reverse KL, student's response": (reverse_kl, "student"),
}
KEPT = ("vectors", "losses", "norms")
Progress = Callable[[str, int, int], None]  # phase, done, total


# -- measuring ----------------------------------------------------------------------------------


def measure(
    suite: str | Path | Experiment,
    *,
    rollouts: int = 32,
    per_bin: int = 200,
    references: int = 4,
    dimensions: int = 8191,  # a prime, so that the rows of a matrix fall on different sums
    limit: int | None = None,
    overrides: Sequence[str] = (),
    results: Path = Path("results"),
    store: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure, fit and judge; write results/NAME/snr.json and return what it holds. A bin that was finished is read."""
    setting = experiment(suite, overrides)
    use_data(setting)
    if per_bin < LEAST:
        raise ValueError(
            f"per_bin = {per_bin}: a bin counts from {LEAST} problems on; take at least {LEAST}"
        )
    check_models(setting, {"snr": frozenset({"teacher.generate", "teacher.logits"})})
    results = Path(results)
    folder = results / setting.name
    store = store or Path(os.environ.get("RETORT_STORE", results / "store"))
    check_writable(folder, store)
    prepare(setting, folder)
    torch.set_num_threads(setting.threads or os.cpu_count() or 1)
    job = Job(setting.model_dump(mode="json"), "snr", 0, setting.data_seeds[0], folder, store)
    student, ledger = cell.student_model(cell.plain(setting.student)), Ledger()
    student.model.eval()
    losses: dict[str, Any] = {}
    longest = setting.training.max_length
    with Display(1) if not quiet else Silent() as display, ledger.timed():
        progress = throttled(lambda event: display(*event), "snr")
        lab = Workbench(
            student,
            cell.loaders(setting, student),
            cell.training_problems(job)[:limit],
            Store(store),
            ledger,
            setting.sampling,
            data_seed=job.data_seed,
            report=progress,
        )
        rates = lab.pass_rates(student, rollouts, **PLAIN)
        chosen, lacking = choose(lab, rates, rollouts, per_bin, references, longest)
        project = Projection(student.model, dimensions)
        for name, (objective, author) in LOSSES.items():
            bins = []
            for index, written in chosen.items():
                places = [*written]
                examples = [*written.values()] if author == "teacher" else _fresh(lab, places)
                models = [student.identity, lab.teacher.identity]
                texts = [[each.prompt, each.response] for each in examples]
                key = digest([models, name, texts, dimensions])[:20]
                path = folder / "snr" / f"{key}.npz"
                charge(ledger, student, lab.teacher, examples, fresh=not path.is_file())
                if not path.is_file():
                    student.rest()  # it has written
                    phase = f"bin {index}, {objective.name}"
                    made = gradients(
                        student, lab.teacher, examples, objective, project, progress, phase
                    )
                    _keep(path, *made)
                with np.load(path) as held:
                    bins.append(Bin(index, rates[places], *(held[k] for k in KEPT)))
            losses[name] = judge(bins)
        display.finish("snr")
    found = {
        "name": setting.name,
        "rollouts": rollouts,
        "problems": len(lab.problems),
        "without_reference": lacking,
        "dimensions": project.dimensions,
        "parameters": project.parameters,
        "losses": losses,
        "ledger": ledger.summary(),
        "environment": environment(),
    }
    write_json(folder / "snr.json", found)
    (folder / "snr.html").write_text(report.snr.page(found), encoding="utf-8")
    if (folder / "summary.json").is_file():
        report.write(folder)
    return found


def bin_of(rate: float, rollouts: int) -> int:
    """0 holds p = 0 and INTERIOR + 1 p = 1; bin b between them holds (b - 1) / INTERIOR < p <= b / INTERIOR."""
    right = round(rate * rollouts)
    return INTERIOR + 1 if right >= rollouts else -(-right * INTERIOR // rollouts)


def choose(
    lab: Workbench,
    rates: np.ndarray,
    rollouts: int,
    per_bin: int,
    references: int,
    longest: int,
) -> tuple[dict[int, dict[int, Example]], int]:
    """Up to so many problems of each bin, at random, that have a usable response of the teacher: {bin: {place: it}}.

    Both losses are taken on these problems. Also how many were passed over, because none of the teacher's responses is
    correct or the first that is is too long.
    """
    order = np.random.default_rng(0).permutation(len(rates)).tolist()
    candidates: dict[int, list[int]] = {}
    for place in order:
        candidates.setdefault(bin_of(float(rates[place]), rollouts), []).append(place)
    asked = [place for places in candidates.values() for place in places[: 2 * per_bin]]
    requests = _requests(lab, asked)
    drawn = lab.samples(lab.teacher, references, requests=requests)
    usable: dict[int, Example] = {}
    for place, group in zip(asked, drawn, strict=True):
        if trace := next((each for each in group if each.correct), None):
            example = lab.example(trace)
            if len(example.prompt) + len(example.response) <= longest:
                usable[place] = example
    chosen = {
        index: {p: usable[p] for p in [p for p in places if p in usable][:per_bin]}
        for index, places in sorted(candidates.items())
    }
    return {index: mine for index, mine in chosen.items() if len(mine) > 1}, len(asked) - len(
        usable
    )


def _fresh(lab: Workbench, places: Sequence[int]) -> list[Example]:
    """A response of the student to each problem, none of those behind its pass rate."""
    drawn = lab.samples(lab.student, 1, requests=_requests(lab, places), on_policy=True, **PLAIN)
    return [lab.example(group[0]) for group in drawn]


def _requests(lab: Workbench, places: Sequence[int]) -> list[Request]:
    return [Request(lab.prompt(lab.problems[place]), lab.problems[place]) for place in places]


def charge(
    ledger: Ledger,
    student: HFModel,
    teacher: LanguageModel,
    examples: Sequence[Example],
    fresh: bool,
) -> None:
    """What the gradients of these examples cost; spent only when they are taken."""
    tokens = sum(len(each.prompt) + len(each.response) for each in examples)
    flops = training_flops(student.num_parameters, tokens)
    flops += forward_flops(getattr(teacher, "num_parameters", 0), tokens)
    for quantity, amount in (("teacher_scored", tokens), ("flops", flops)):
        ledger.charge(quantity, amount)
        if fresh:
            ledger.spend(quantity, amount)


def gradients(
    student: HFModel,
    teacher: LanguageModel,
    examples: Sequence[Example],
    objective: Objective,
    project: Projection,
    progress: Progress = lambda phase, done, total: None,
    phase: str = "gradients",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each example's gradient [n, d], projected, its loss [n] and its gradient's own norm [n]."""
    vectors = np.empty((len(examples), project.dimensions), dtype=np.float32)
    losses, norms = np.empty(len(examples)), np.empty(len(examples))
    for row, example in enumerate(examples):
        progress(phase, row, len(examples))
        batch, tokens, _ = collate([example], student.pad).to(student.device)
        seen = collate([example], student.pad, teacher=True).to(student.device).batch
        with torch.no_grad():
            teacher_hidden = teacher.hidden(seen)
        student.model.zero_grad(set_to_none=True)
        loss, _ = chunked_loss(
            student.hidden(batch),
            student.head_weight,
            student.head_bias,
            tokens,
            objective,
            torch.full_like(tokens.weights, 1 / len(tokens.weights)),
            teacher_hidden,
            teacher.head,
            student.vocabulary,
        )
        loss.backward()
        vectors[row], norms[row] = project()
        losses[row] = float(loss.detach())
    student.model.zero_grad(set_to_none=True)
    progress(phase, len(examples), len(examples))
    return vectors, losses, norms


def _keep(path: Path, *arrays: np.ndarray) -> None:
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial.npz")
    try:
        with writing(path):
            named: Any = dict(zip(KEPT, arrays, strict=True))
            np.savez(partial, **named)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class Projection:
    """A fixed random map of a model's gradient, [D] -> [d], that keeps inner products in expectation.

    Every entry gets a random sign, and every d-th is added up (a count sketch); where d >= D it is exact.
    """

    def __init__(self, model: nn.Module, dimensions: int, seed: int = 0) -> None:
        self.tensors = [p for p in model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in self.tensors)
        self.dimensions = min(dimensions, self.parameters)
        generator = torch.Generator().manual_seed(seed)
        self.signs = [
            (torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8) * 2 - 1).to(
                p.device
            )
            for p in self.tensors
        ]

    def __call__(self) -> tuple[np.ndarray, float]:
        """The projected gradient [d] and the gradient's norm."""
        d = self.dimensions
        total = torch.zeros(d, device=self.tensors[0].device)
        offset, square = 0, 0.0
        for tensor, sign in zip(self.tensors, self.signs, strict=True):
            if tensor.grad is not None:
                flat = tensor.grad.float().flatten()
                square += float(flat @ flat)
                start = offset % d
                padded = torch.zeros(-(-(start + len(flat)) // d) * d, device=flat.device)
                padded[start : start + len(flat)] = flat * sign.flatten()
                total += padded.view(-1, d).sum(0)
            offset += tensor.numel()
        return total.cpu().numpy(), square**0.5


# -- estimating ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bin:
    """The problems of like pass rate."""

    index: int
    rates: np.ndarray  # [n]
    vectors: np.ndarray  # [n, d], projected gradients
    losses: np.ndarray  # [n], nats a token
    norms: np.ndarray  # [n]

    @property
    def rate(self) -> float:
        return float(self.rates.mean())

    @property
    def edges(self) -> tuple[float, float]:
        inside = 0 < self.index <= INTERIOR
        low = (self.index - 1) / INTERIOR if inside else float(self.index > 0)
        return low, (self.index / INTERIOR if inside else low)

    @cached_property
    def unit(self) -> Bin:
        """The same gradients at length 1: only where they point. One of length 0 points nowhere."""
        lengths = np.linalg.norm(self.vectors.astype(np.float64), axis=1)
        some = lengths > 0
        vectors = self.vectors[some] / lengths[some, None]
        return Bin(self.index, self.rates[some], vectors, self.losses[some], self.norms[some])

    @cached_property
    def estimates(self) -> tuple[np.ndarray, np.ndarray]:
        """Signal and noise, [1 + R]: of the problems themselves, then of resamples."""
        n = len(self.vectors)
        vectors = self.vectors.astype(np.float64)
        rng = np.random.default_rng([0, self.index])
        weights = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)])
        return signal_and_noise(vectors @ vectors.T, weights)

    @cached_property
    def snr(self) -> np.ndarray:
        """U / V, [1 + R]; below 0 where the signal is lost in the noise, NaN where there is no noise."""
        signal, noise = self.estimates
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(noise > 0, signal / noise, np.nan)

    @cached_property
    def pull(self) -> np.ndarray:
        """sqrt(U) / V, [1 + R]: what the best weight follows if signals point one way; NaN without signal."""
        signal, noise = self.estimates
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt(signal) / noise


def signal_and_noise(gram: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """U and V under each row of problem weights, [R, n] -> [R], over pairs of different problems.

    U = sum_{i != j} w_i w_j g_i.g_j / sum_{i != j} w_i w_j;  V the same of |g_i - g_j|^2 / 2
    """
    squares, own = np.diagonal(gram), weights**2
    count = weights.sum(1)
    pairs = count**2 - own.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        signal = (((weights @ gram) * weights).sum(1) - own @ squares) / pairs
        mean_square = (count * (weights @ squares) - own @ squares) / pairs
        return signal, mean_square - signal


def judge(bins: Sequence[Bin]) -> dict[str, Any]:
    """The table of bins, the fitted exponents, and what the extremes say against the middle; the same of unit gradients."""
    table = [
        {
            "low": each.edges[0],
            "high": each.edges[1],
            "p": each.rate,
            "n": len(each.rates),
            "counts": len(each.rates) >= LEAST,
            **_estimate("snr", "ci95", each),
            **_estimate("unit_snr", "unit_ci95", each.unit),
            "loss": float(each.losses.mean()),
            "norm": float(each.norms.mean()),
            "norm_spread": float(np.log(np.maximum(each.norms, 1e-30)).std()),
        }
        for each in bins
    ]
    found: dict[str, Any] = {"bins": table}
    for name, mine in (("", bins), ("unit_", [each.unit for each in bins])):
        enough = [b for b in mine if len(b.rates) >= LEAST and np.isfinite(b.snr[0])]
        inside = [each for each in enough if 0 < each.index <= INTERIOR]
        found[f"{name}fit"] = fit(inside, [each.snr for each in inside])
        found |= {f"{name}{key}": value for key, value in extremes(enough).items()}
        if not name:
            found["best_weight"] = fit(inside, [each.pull for each in inside])
    return found


def _estimate(value: str, ci95: str, each: Bin) -> dict[str, Any]:
    """null where all gradients are alike: no noise, no ratio."""
    if len(each.rates) < 2 or not np.isfinite(each.snr[0]):
        return {value: None, ci95: None}
    bounds = [max(0.0, bound) for bound in interval(each.snr[1:])]
    return {value: max(0.0, float(each.snr[0])), ci95: bounds}


def interval(values: np.ndarray) -> list[float]:
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def fit(bins: Sequence[Bin], values: Sequence[np.ndarray]) -> dict[str, Any] | None:
    """log y = c + alpha log p + beta log(1 - p) over interior bins, by least squares weighted with y^2 / var(y).

    None where fewer than four bins have a positive value. `delta` is half the range of a kernel's residuals over the bins whose
    interval lies above 0 (a factor common to all weights changes nothing), and `lost` = tanh^2(delta) bounds the
    efficiency that it loses if y is what the weight should follow. The noise of the bins is in delta too.
    """
    used = [place for place, each in enumerate(values) if each[0] > 0]
    if len(used) < 4:
        return None
    rates = np.array([bins[place].rate for place in used])
    draws = np.stack([values[place] for place in used], axis=1)  # [1 + R, bins]
    positive = draws > 0
    logs = np.log(np.where(positive, draws, 1.0))
    # 1 / var(log y), by the delta method: a bin that is positive by luck alone hardly counts.
    precision = (draws[0] / np.maximum(np.nanstd(draws[1:], axis=0), 1e-12)) ** 2
    sure = np.nanpercentile(draws[1:], 2.5, axis=0) > 0
    design = np.stack([np.ones_like(rates), np.log(rates), np.log1p(-rates)], axis=1)
    found = np.full((len(logs), 3), np.nan)
    for row, (log, good) in enumerate(zip(logs, positive, strict=True)):
        if good.sum() >= 3:
            root = np.sqrt(precision[good])
            found[row] = np.linalg.lstsq(design[good] * root[:, None], log[good] * root)[0]
    kernels = {"fitted": found[0, 1:], "alpha = beta = 1": (1, 1), "uniform": (0, 0)}
    deltas = {
        name: float(np.ptp((logs[0] - design[:, 1:] @ np.asarray(exponents))[sure])) / 2
        if sure.any()
        else 0.0
        for name, exponents in kernels.items()
    }
    return {
        "scale": float(np.exp(found[0, 0])),
        "alpha": float(found[0, 1]),
        "alpha_ci95": interval(found[1:, 1]),
        "beta": float(found[0, 2]),
        "beta_ci95": interval(found[1:, 2]),
        "bins": len(used),
        "skipped": [bins[place].rate for place in range(len(bins)) if place not in used],
        "kernels": {
            name: {"delta": delta, "lost": float(np.tanh(delta) ** 2)}
            for name, delta in deltas.items()
        },
    }


def extremes(bins: Sequence[Bin]) -> dict[str, Any]:
    """SNR at p = 0 and at p = 1 less the mean of the middle bins; the bell is there if it is lower at both."""
    middle = [each.snr for each in bins if MIDDLE[0] <= each.rate <= MIDDLE[1]]
    ends = {
        name: [e.snr for e in bins if e.index == at]
        for name, at in (("p = 0", 0), ("p = 1", INTERIOR + 1))
    }
    found: dict[str, Any] = {"middle": None, "ends": {}}
    if middle:
        values = np.mean(middle, axis=0)
        found["middle"] = {"snr": float(values[0]), "ci95": interval(values[1:])}
        for name, end in ends.items():
            if end:
                difference = end[0] - values
                low, high = interval(difference[1:])
                state = "lower" if high < 0 else "higher" if low > 0 else "cannot tell"
                found["ends"][name] = {
                    "difference": float(difference[0]),
                    "ci95": [low, high],
                    "is": state,
                }
    said: list[str] = [end["is"] for end in found["ends"].values()]
    bell = "no" if "higher" in said else "cannot tell"
    return {**found, "bell": "yes" if said == ["lower", "lower"] else bell}
