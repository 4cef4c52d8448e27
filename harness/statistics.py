"""From samples to verdicts: avg@n, pass@k, maj@k, and paired comparisons that know about training seeds.

The score of arm a, training seed s, problem p is modelled as

    y_asp = mu_a + problem_p + (arm x problem)_ap + seed_as + noise_asp

with problems crossed with everything and shared by the arms (so comparisons are paired), and seeds nested in their arm. The
variance of a difference has a part from problems and a part from seeds; both are estimated from mean squares (Searle, Casella
and McCulloch 1992, "Variance Components", ch. 4), the second pooled over a benchmark's arms, because three seeds of one pair
alone say almost nothing about it. Any score in [0, 1] per seed and problem will do, so pass@k is compared like accuracy.
docs/statistics.md says what it comes to, with simulated coverage.

Legend: S training seeds, P problems, n samples per problem.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from harness import standing
from harness.verifiers.second import normalise

Array = NDArray[np.float64]
VerdictName = Literal["better", "worse", "cannot tell"]
Row = dict[str, Any]

ALPHA = 0.05  # two-sided
POWER = 0.80
ONE_SEED = "one training seed: the interval is about these checkpoints, and says nothing on methods"
ONE_PROBLEM = "one problem gives no interval"


# --- estimators from samples -------------------------------------------------------------------


def avg_at_n(correct: ArrayLike) -> float:
    """The mean over samples and problems: accuracy, called avg@n where n samples were drawn."""
    return float(np.mean(np.asarray(correct, dtype=np.float64)))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k samples is right, unbiased from c right ones among n.

    pass@k = 1 - C(n-c, k) / C(n, k)   (Chen et al. 2021, arXiv:2107.03374, eq. 1)
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n, got n={n} samples: draw more, or lower k")
    if not 0 <= c <= n:
        raise ValueError(f"{c} right ones among {n} samples")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int | None = None) -> float:
    """Chance that the majority of k of these samples is right: exact, over all subsets of size k.

    Right samples vote together, as they are all equivalent to the truth; wrong ones by their text; None does not vote.
    A tie goes to the answer seen first: over all orders of the samples, each of the tied ones in the same share of them.
    k defaults to all samples.
    """
    n = len(answers)
    if n != len(correct):
        raise ValueError(f"{n} answers but {len(correct)} judgements")
    k = n if k is None else k
    if not 1 <= k <= n:
        raise ValueError(f"maj@{k} needs 1 <= k <= n, got n={n} samples: draw more, or lower k")
    right = sum(map(bool, correct))
    votes = Counter(a for a, ok in zip(answers, correct, strict=True) if not ok and a is not None)
    abstain = n - right - sum(votes.values())
    won = sum(
        math.comb(right, c) * share
        for c in range(1, min(right, k) + 1)
        for share in [_share_of_wins(list(votes.values()), abstain, k - c, c)]
    )
    return float(won / math.comb(n, k))


def _share_of_wins(sizes: list[int], abstain: int, draws: int, c: int) -> float:
    """Ways to draw so many wrong samples that no class outvotes c, a tie of t + 1 counted as 1 / (t + 1)."""
    ways = {(j, 0): math.comb(abstain, j) for j in range(min(abstain, draws) + 1)}  # (drawn, tied)
    for size in sizes:
        grown: Counter[tuple[int, int]] = Counter()
        for (drawn, tied), count in ways.items():
            for j in range(min(size, c, draws - drawn) + 1):
                grown[drawn + j, tied + (j == c)] += count * math.comb(size, j)
        ways = grown
    return sum(count / (tied + 1) for (drawn, tied), count in ways.items() if drawn == draws)


# --- outcomes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcomes:
    """What one benchmark gave: for each arm an array [S, P, n] of 0 and 1, with problems in one common order."""

    benchmark: str
    arms: Mapping[str, ArrayLike]
    seeds: Mapping[str, Sequence[int]] = field(default_factory=dict)  # by default 0, 1, ...
    cells: Mapping[str, Sequence[Row]] = field(default_factory=dict)  # further keys of each cell

    def __post_init__(self) -> None:
        arms = {name: np.asarray(values, dtype=np.float64) for name, values in self.arms.items()}
        if not arms:
            raise ValueError(f"{self.benchmark}: no arms to compare")
        for name, values in arms.items():
            if values.ndim != 3 or 0 in values.shape:
                raise ValueError(
                    f"{self.benchmark}: arm {name!r} has shape {values.shape}; "
                    "expected [seeds, problems, samples], none of them 0"
                )
            if not ((values >= 0) & (values <= 1)).all():
                raise ValueError(f"{self.benchmark}: arm {name!r} has scores outside 0 to 1")
        sizes = {name: values.shape[1] for name, values in arms.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{self.benchmark}: arms differ in their problems: {sizes}")
        seeds = {name: tuple(self.seeds.get(name, range(len(y)))) for name, y in arms.items()}
        cells = {name: tuple(self.cells.get(name, ({},) * len(y))) for name, y in arms.items()}
        for name, values in arms.items():
            if not len(values) == len(seeds[name]) == len(cells[name]):
                raise ValueError(
                    f"{self.benchmark}: arm {name!r} has {len(values)} runs, "
                    f"{len(seeds[name])} seeds and {len(cells[name])} cells"
                )
        object.__setattr__(self, "arms", arms)
        object.__setattr__(self, "seeds", seeds)
        object.__setattr__(self, "cells", cells)

    def __getitem__(self, arm: str) -> Array:
        return self.arms[arm]  # type: ignore[return-value]  # made an array above

    def pass_at(self, k: int) -> Self:
        """The same arms scored by pass@k: each problem's estimate in place of each of its samples."""
        arms: dict[str, ArrayLike] = {}
        for name in self.arms:
            y = self[name]
            n = y.shape[2]
            table = np.array([pass_at_k(n, c, k) for c in range(n + 1)])
            arms[name] = np.broadcast_to(table[y.sum(2).round().astype(int)][..., None], y.shape)
        return type(self)(f"{self.benchmark} pass@{k}", arms, self.seeds, self.cells)


def from_records(
    records: pa.Table | Iterable[Mapping[str, Any]], arms: Sequence[str] | None = None
) -> dict[str, Outcomes]:
    """Outcomes of each benchmark, from one row per sample; arms in the given order, else as they come.

    A run is a training seed and a data seed; each is a student of its own. Problems are sorted by id, so that the order of
    the rows changes nothing. Runs that did not answer the same problems, equally often, are refused.
    """
    runs: dict[str, dict[str, dict[tuple[int, int], dict[str, dict[int, Mapping[str, Any]]]]]] = {}
    for row in _rows(records):
        arm = runs.setdefault(row["benchmark"], {}).setdefault(row["method"], {})
        run = arm.setdefault((int(row.get("data_seed") or 0), int(row["seed"])), {})
        samples = run.setdefault(str(row["problem"]), {})
        if int(row["sample"]) in samples:
            raise ValueError(
                f"{row['benchmark']}: two rows for sample {row['sample']} of problem {row['problem']!r}, "
                f"method {row['method']!r}, seed {row['seed']}"
            )
        samples[int(row["sample"])] = row
    return {
        name: _aligned(name, {arm: by[arm] for arm in arms or by if arm in by})
        for name, by in runs.items()
    }


def _rows(records: pa.Table | Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    if not isinstance(records, pa.Table):
        return records
    wanted = "benchmark method seed data_seed problem sample correct status truncated extracted second domain"
    rows: list[Row] = records.select(
        [name for name in wanted.split() if name in records.column_names]
    ).to_pylist()
    return rows


def _aligned(
    benchmark: str,
    runs: Mapping[str, Mapping[tuple[int, int], Mapping[str, Mapping[int, Mapping[str, Any]]]]],
) -> Outcomes:
    problems = sorted({p for arm in runs.values() for run in arm.values() for p in run})
    arms: dict[str, ArrayLike] = {}
    for arm, by_seed in runs.items():
        sizes = set()
        for (_, seed), run in by_seed.items():
            lacking = [p for p in problems if p not in run]
            if lacking:
                raise ValueError(
                    f"{benchmark}: {arm!r} seed {seed} lacks {len(lacking)} of {len(problems)} problems that "
                    f"others answered, the first {lacking[0]!r}; paired statistics need the same problems"
                )
            sizes |= {len(samples) for samples in run.values()}
        if len(sizes) > 1:
            raise ValueError(
                f"{benchmark}: {arm!r} has {min(sizes)} samples of some problems and {max(sizes)} of others"
            )
        arms[arm] = [
            [[bool(run[p][i]["correct"]) for i in sorted(run[p])] for p in problems]
            for _, run in sorted(by_seed.items())
        ]
    return Outcomes(
        benchmark,
        arms,
        {arm: [seed for _, seed in sorted(by_seed)] for arm, by_seed in runs.items()},
        {
            arm: [{"data_seed": key[0], **_counts(run)} for key, run in sorted(by_seed.items())]
            for arm, by_seed in runs.items()
        },
    )


def _counts(run: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Row:
    """What stands beside a cell's accuracy: how many samples were cut, unreadable or disputed, and maj@k.

    Programs hold no vote: no two of them are alike, and equal ones need not look so.
    """
    rows = [row for samples in run.values() for row in samples.values()]
    statuses = Counter(row.get("status") for row in rows)
    counts: Row = {
        "truncated": sum(bool(row.get("truncated")) for row in rows),
        **{status: statuses[status] for status in ("unparsed", "timeout", "error")},
    }
    said = [row for row in rows if row.get("second")]
    if said:
        counts["disputed"] = sum(bool(r["correct"]) != (r["second"] == "ok") for r in said)
    n = min(map(len, run.values()))
    if n > 1 and not any(row.get("domain") == "code" for row in rows):
        votes = [
            (
                [
                    vote and normalise(vote)
                    for vote in (r.get("extracted") for r in samples.values())
                ],
                [bool(row["correct"]) for row in samples.values()],
            )
            for samples in run.values()
        ]
        counts["maj_at_k"] = {
            str(k): float(np.mean([maj_at_k(*vote, k) for vote in votes])) for k in sizes(n)
        }
    return counts


def sizes(n: int) -> list[int]:
    """The k that pass@k and maj@k are given for: 1, 2, 4, …, and n."""
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})


# --- variance components and the paired comparison ---------------------------------------------


class SeedVariance(NamedTuple):
    """Variance between the training seeds of an arm, pooled over arms.

    between: mean square of cell means, E = sigma^2_seed + omega^2 / P
    within:  omega^2 / P, from the seed x problem residual
    """

    between: float
    within: float
    df: int  # sum over arms of S - 1
    df_within: int  # sum over arms of (S - 1)(P - 1)

    @property
    def component(self) -> float:
        """sigma^2_seed = between - within, at least 0."""
        return max(0.0, self.between - self.within)

    def draws(self, rng: np.random.Generator, count: int) -> Array:
        """What the component may be: between * df / chi^2_df - within, at least 0."""
        if not self.df:
            return np.zeros(count)
        drawn = self.between * self.df / rng.chisquare(self.df, count)
        return np.maximum(0.0, drawn - self.within)


NO_SEEDS = SeedVariance(0.0, 0.0, 0, 0)


def seed_variance(scores: Iterable[Array]) -> SeedVariance:
    """Pool over arms of scores [S, P]; arms of one seed, and benchmarks of one problem, say nothing."""
    between = within = 0.0
    df = df_within = 0
    for y in scores:
        seeds, problems = y.shape
        if seeds < 2 or problems < 2:
            continue
        means = y.mean(1, keepdims=True)
        residual = y - means - y.mean(0) + y.mean()
        between += float(((means - y.mean()) ** 2).sum())
        within += float((residual**2).sum()) / problems
        df += seeds - 1
        df_within += (seeds - 1) * (problems - 1)
    if df == 0:
        return NO_SEEDS
    return SeedVariance(between / df, within / df_within, df, df_within)


class Estimate(NamedTuple):
    """A mean or a difference with its standard error and the degrees of freedom of its t."""

    value: float
    se: float
    df: float

    @property
    def p(self) -> float:
        """Two-sided p-value of no difference."""
        if self.value == 0 or self.df == 0:
            return 1.0
        return float(2 * special.stdtr(self.df, -abs(self.value) / self.se))

    @property
    def ci95(self) -> list[float]:
        """Symmetric interval, cut to what a difference of fractions can be."""
        if self.df == 0:
            return [-1.0, 1.0]
        half = float(special.stdtrit(self.df, 1 - ALPHA / 2)) * self.se
        return [max(-1.0, self.value - half), min(1.0, self.value + half)]

    @property
    def mde(self) -> float | None:
        """The smallest true difference that this design finds with 80 % power at a two-sided 5 %.

        mde = se * nc,  P(T > t_{.975, df}) = 0.8 for T noncentral t with df and nc   (Cohen 1988, ch. 2)
        """
        if self.df == 0:
            return None
        critical = float(special.stdtrit(self.df, 1 - ALPHA / 2))

        def excess_power(nc: float) -> float:
            return 1 - POWER - float(special.nctdtr(self.df, nc, critical))

        return float(optimize.brentq(excess_power, critical / 2, 3 * critical + 3)) * self.se


def estimate(
    per_problem: Array, seeds: SeedVariance = NO_SEEDS, runs: float = 0.0, step: float = 0.0
) -> Estimate:
    """The mean over problems, its variance from problems and from seeds.

    `step` is one outcome turned on one problem: V is at least its variance, so that an interval does not close because nothing
    happened to differ. `runs` is the sum of 1 / S over the trained arms that take part.
    """
    problems = len(per_problem)
    value = float(per_problem.mean())
    if problems < 2:
        return Estimate(value, 0.0, 0.0)
    least = (step / problems) ** 2
    return _estimate(
        value, max(float(per_problem.var(ddof=1)) / problems, least), problems, seeds, runs, least
    )


_V, _W = np.polynomial.legendre.leggauss(32)
_Q = ((_V + 1) / 2) ** 3  # quantiles of chi^2, dense where the seeds' variance is large
_W = _W / 2 * 3 * ((_V + 1) / 2) ** 2


def _estimate(
    value: float,
    by_problem: float,  # s^2 / P
    problems: int,
    seeds: SeedVariance,
    runs: float,
    least: float = 0.0,
) -> Estimate:
    """V = (s^2/P - runs * within) + runs * between: the first part, of arms by problems, at least 0 (a quasi-F's; Clark 1973).

    s^2/P holds the noise of the seeds that were run, which between has too, hence the difference. With so few seeds `between` may
    be small by luck, and Satterthwaite's degrees of freedom are then too many: two arms of two seeds were covered 92 %. The
    interval is therefore that of the generalised pivot (Weerahandi 1993), which leaves open what the seeds' variance may be,

        P(|D| > h) = E_x[ P(|t_df(x)| > h / sqrt(V(x))) ],  V(x) with between * df_between / x,  x ~ chi^2_{df_between}

    with df(x) = (P-1) max(1, V(x) / (s^2/P))^2 for the part from problems, and df is that of the t which has its 95 % half-width.
    """
    if not (seeds.df and runs):
        return Estimate(value, math.sqrt(by_problem), problems - 1.0 if by_problem else 0.0)
    rest = max(0.0, by_problem - runs * seeds.within)
    se = math.sqrt(max(least, rest + runs * seeds.between))
    if se == 0:
        return Estimate(value, 0.0, 0.0)
    between = seeds.between * seeds.df / (2 * special.gammaincinv(seeds.df / 2, _Q))
    variance = np.maximum(max(least, 1e-9 * se * se), rest + runs * between)
    floor = max(by_problem, 1e-9 * se * se)
    df = (problems - 1) * np.maximum(1.0, variance / floor) ** 2

    def excess(ratio: float) -> float:
        return float(_W @ (2 * special.stdtr(df, -ratio * se / np.sqrt(variance)))) - ALPHA

    widest = 20 * float(special.stdtrit(min(seeds.df, problems - 1), 1 - ALPHA / 2))
    ratio = float(optimize.brentq(excess, 0.5, widest, xtol=1e-9))
    most = float(df.max())
    if ratio <= float(special.stdtrit(most, 1 - ALPHA / 2)):
        return Estimate(value, se, most)
    return Estimate(value, se, float(special.stdtridf(1 - ALPHA / 2, ratio)))


def planned(
    problems: int,
    seeds: int,
    samples: int = 1,
    *,
    arms: int = 2,
    interaction: float,
    seed: float,
    noise: float = 0.0,
    sampling: float = 0.0,
) -> Estimate:
    """The difference of two trained arms as a design will estimate it, before anything is run; `.mde` is what it will find.

    V = 2 interaction / P + (2/S) (seed + (noise + sampling / n) / P)

    The variances are stated, or those of a summary: an arm's `variance` and a pair's `interaction`. `noise` is seed by problem,
    `sampling` that of one sample; `arms` are the trained arms whose seeds are pooled.
    """
    within = (noise + sampling / samples) / problems
    by_problem = 2 * interaction / problems + 2 / seeds * within
    if seeds < 2:
        return Estimate(0.0, math.sqrt(by_problem), problems - 1.0)
    df = arms * (seeds - 1)
    pooled = SeedVariance(seed + within, within, df, df * (problems - 1))
    return _estimate(0.0, by_problem, problems, pooled, 2 / seeds)


def difference(
    a: Array, b: Array, seeds: SeedVariance = NO_SEEDS, trained: tuple[bool, bool] = (True, True)
) -> Estimate:
    """Mean score of a less that of b, arrays [S, P, n], paired by problem; an untrained arm has no seed variance."""
    runs = _runs(a, b, trained)
    step = min(1 / (y.shape[0] * y.shape[2]) for y in (a, b))
    return estimate(a.mean((0, 2)) - b.mean((0, 2)), seeds, runs, step)


def _runs(a: Array, b: Array, trained: tuple[bool, bool]) -> float:
    return sum(1 / len(y) for y, has_seeds in zip((a, b), trained, strict=True) if has_seeds)


def mcnemar(a: Array, b: Array) -> Row:
    """Problems that only a, or only b, answered right, [1, P, 1] each, and the exact two-sided p   (McNemar 1947)"""
    only_a, only_b = (int((x > y).sum()) for x, y in ((a, b), (b, a)))
    return {"b": only_a, "c": only_b, "p": _binomial(only_a, only_b)}


def sign_test(a: Array, b: Array) -> Row:
    """Problems on which a, or b, scores higher over all its samples, and the exact two-sided p."""
    gap = (a.mean((0, 2)) - b.mean((0, 2))).round(12)
    wins, losses = int((gap > 0).sum()), int((gap < 0).sum())
    return {"wins": wins, "losses": losses, "p": _binomial(wins, losses)}


def _binomial(wins: int, losses: int) -> float:
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def interval(y: Array, seeds: SeedVariance = NO_SEEDS) -> list[float]:
    """95 % interval of an arm's accuracy, scores [S, P, n].

    Wilson's interval at the effective sample size n' = a (1 - a) / V (Korn and Graubard 1998), with V from problems (clusters
    of their samples) and seeds, and t in place of z where V was estimated. One sample of each problem: Wilson's own.
    """
    s, problems, n = y.shape
    per_problem = y.mean((0, 2))
    accuracy = float(per_problem.mean())
    spread = accuracy * (1 - accuracy)
    variance = float(per_problem.var()) / problems + (seeds.component / s if seeds.df else 0.0)
    df = estimate(per_problem, seeds, 1 / s).df
    size = (
        float(problems)
        if spread == 0
        else min(spread / variance, s * problems * n)
        if variance
        else s * problems * n
    )
    if (s, n) == (1, 1) and not seeds.df:
        critical = float(special.ndtri(1 - ALPHA / 2))
    else:
        critical = float(special.stdtrit(df or max(1, problems - 1), 1 - ALPHA / 2))
    return _wilson(accuracy, size, critical)


def _wilson(accuracy: float, n: float, z: float) -> list[float]:
    """(a + z^2/2n -+ z sqrt(a(1-a)/n + z^2/4n^2)) / (1 + z^2/n)   (Wilson 1927)"""
    centre = accuracy + z * z / (2 * n)
    half = z * math.sqrt(accuracy * (1 - accuracy) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    return [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: the i-th smallest of m times m - i + 1, never falling, at most 1   (Holm 1979)"""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


class Bootstrap(NamedTuple):
    """A resampled difference of two arms."""

    delta: float
    se: float
    ci95: tuple[float, float]


def bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    statistic: Callable[[Array], float] = avg_at_n,
    *,
    trained: tuple[bool, bool] = (True, True),
    samples: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> Bootstrap:
    """Paired hierarchical bootstrap of statistic(a) - statistic(b), for statistics that are no mean over problems.

    Problems are drawn once for both arms, S - 1 of S seeds within each trained arm (which makes the variance of a mean over
    seeds unbiased; Rao and Wu 1988), and, if asked, samples within each problem. The interval is the standard error times t
    at the seeds' own degrees of freedom: percentiles covered 79-88 % at 2 to 5 seeds. It errs to the wide side, as noise
    is drawn with the problems and again with the seeds (Owen 2007, arXiv:0712.1111).
    """
    arms = [np.asarray(y, dtype=np.float64) for y in (a, b)]
    problems = arms[0].shape[1]
    if arms[1].shape[1] != problems:
        raise ValueError(f"arms differ in their problems: {problems} and {arms[1].shape[1]}")
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        chosen = rng.integers(problems, size=problems)
        values = []
        for y, has_seeds in zip(arms, trained, strict=True):
            runs = len(y)
            drawn = y
            if has_seeds and runs > 1:
                drawn = y[rng.integers(runs, size=runs - 1)]
            drawn = drawn[:, chosen]
            if samples:
                drawn = np.take_along_axis(drawn, rng.integers(y.shape[2], size=drawn.shape), 2)
            values.append(statistic(drawn))
        draws[i] = values[0] - values[1]
    delta = statistic(arms[0]) - statistic(arms[1])
    se = float(draws.std(ddof=1))
    df = sum(len(y) - 1 for y, has_seeds in zip(arms, trained, strict=True) if has_seeds)
    half = float(special.stdtrit(df or max(1, problems - 1), 1 - ALPHA / 2)) * se
    return Bootstrap(delta, se, (delta - half, delta + half))


# --- the summary -------------------------------------------------------------------------------


class Summary(NamedTuple):
    """Rows of summary.json: a cell is one trained student, an arm all seeds of a method, a pair two arms."""

    cells: list[Row]
    arms: list[Row]
    pairs: list[Row]


def summarise(outcomes: Outcomes, reference: str | None, base: str = "base") -> Summary:
    """Everything that one benchmark's outcomes say.

    The family of pairs that Holm's method corrects for is every arm against `reference` and every arm against `base`; the
    others are exploratory: judged by their own p-value, and marked so.
    """
    names = list(outcomes.arms)
    if reference is not None and reference not in names:
        raise ValueError(
            f"{outcomes.benchmark}: the reference {reference!r} is not among the arms {', '.join(names)}"
        )
    seeds = _pooled(outcomes, base)
    rows = pairs(outcomes, reference, base)
    arms = [_arm(outcomes, name, NO_SEEDS if name == base else seeds) for name in names]
    places = standing.ranks({arm["method"]: arm["accuracy"] for arm in arms}, rows)
    best: Mapping[str, float | None] = dict.fromkeys(names)
    if rows and not any("note" in row for row in rows):
        best = standing.chance_of_best(
            {name: outcomes[name].mean((0, 2)) for name in names},
            {name: 0.0 if name == base else 1 / len(outcomes[name]) for name in names},
            seeds.draws,
        )
    for arm in arms:
        arm |= {**places[arm["method"]], "p_best": best[arm["method"]]}
    return Summary([row for name in names for row in _cells(outcomes, name)], arms, rows)


def summarise_records(
    records: pa.Table | Iterable[Mapping[str, Any]],
    reference: str | None,
    base: str = "base",
    arms: Sequence[str] | None = None,
) -> Summary:
    """`summarise` of every benchmark in a table of samples; Holm's correction stays within each."""
    parts = [summarise(o, reference, base) for o in from_records(records, arms).values()]
    return Summary(*([row for part in parts for row in part[i]] for i in range(3)))


def _scores(y: Array) -> Row:
    row: Row = {"n_problems": y.shape[1], "n_samples": y.shape[2], "accuracy": avg_at_n(y)}
    n = y.shape[2]
    if n > 1:
        counts = Counter(y.sum(2).round().astype(int).ravel().tolist())
        row["pass_at_k"] = {
            str(k): sum(m * pass_at_k(n, c, k) for c, m in counts.items()) / (y.size // n)
            for k in sizes(n)
        }
    return row


def _cells(outcomes: Outcomes, name: str) -> list[Row]:
    return [
        {
            "method": name,
            "seed": seed,
            "benchmark": outcomes.benchmark,
            **_scores(y[None]),
            "ci95": interval(y[None]),
            **extra,
        }
        for y, seed, extra in zip(
            outcomes[name], outcomes.seeds[name], outcomes.cells[name], strict=True
        )
    ]


def _arm(outcomes: Outcomes, name: str, seeds: SeedVariance) -> Row:
    y = outcomes[name]
    row: Row = {
        "method": name,
        "benchmark": outcomes.benchmark,
        "seeds": len(y),
        **_scores(y),
        "ci95": interval(y, seeds),
        "seed_sd": float(y.mean((1, 2)).std(ddof=1)) if len(y) > 1 else None,
    }
    if seeds.df:
        row["variance"] = {"seed": seeds.component, "noise": seeds.within * y.shape[1]}
    if all("maj_at_k" in cell for cell in outcomes.cells[name]):
        majorities = [cell["maj_at_k"] for cell in outcomes.cells[name]]
        row["maj_at_k"] = {k: float(np.mean([m[k] for m in majorities])) for k in majorities[0]}
    for count in ("truncated", "unparsed", "timeout", "error", "disputed"):
        values = [cell[count] for cell in outcomes.cells[name] if count in cell]
        if values:
            row[count] = sum(values)
    return row


def _pooled(outcomes: Outcomes, base: str) -> SeedVariance:
    return seed_variance(outcomes[name].mean(2) for name in outcomes.arms if name != base)


def pairs(outcomes: Outcomes, reference: str | None, base: str = "base") -> list[Row]:
    """Every pair of arms once, with its verdict."""
    seeds = _pooled(outcomes, base)
    rows = [
        _pair(outcomes, a, b, family, base, seeds)
        for a, b, family in _families(list(outcomes.arms), reference, base)
    ]
    family = [row for row in rows if not row["exploratory"]]
    for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
        row["p_holm"] = p
    claims = [1.0 if "note" in row else row["p"] for row in rows]
    for row, p in zip(rows, holm(claims), strict=True):
        row["verdict"] = _verdict(row)
        row["p_all"] = p
    return rows


def _families(
    names: list[str], reference: str | None, base: str
) -> list[tuple[str, str, str | None]]:
    """Each pair once as (a, b, family): the arms against the reference, against base, then the others."""
    against_reference = [
        (a, reference, "reference")
        for a in names
        if reference not in (None, base) and a not in (reference, base)
    ]
    against_base = [(a, base, "base") for a in names if base in names and a != base]
    rest = [a for a in names if a not in (reference, base)]
    exploratory = [(a, b, None) for i, a in enumerate(rest) for b in rest[i + 1 :]]
    return [*against_reference, *against_base, *exploratory]


def _pair(
    outcomes: Outcomes, a: str, b: str, family: str | None, base: str, seeds: SeedVariance
) -> Row:
    trained = (a != base, b != base)
    found = difference(outcomes[a], outcomes[b], seeds, trained)
    row: Row = {
        "a": a,
        "b": b,
        "benchmark": outcomes.benchmark,
        "delta": found.value,
        "ci95": found.ci95,
        "p": found.p,
        "p_holm": None,
        "mde": found.mde,
        "verdict": "cannot tell",
        "family": family,
        "exploratory": family is None,
        "se": found.se,
        "df": found.df,
    }
    if found.df == 0:
        row["note"] = ONE_PROBLEM
    elif any(has and len(outcomes[arm]) < 2 for arm, has in zip((a, b), trained, strict=True)):
        row["note"] = ONE_SEED
    y, z = outcomes[a], outcomes[b]
    runs = _runs(y, z, trained)
    if seeds.df and all(trained):
        gap = (y.mean((0, 2)) - z.mean((0, 2))).var(ddof=1)
        row["interaction"] = max(0.0, float(gap) - runs * seeds.within * y.shape[1]) / 2
    if len(y) == len(z) == 1:
        single = y.shape[2] == z.shape[2] == 1
        row |= {"mcnemar": mcnemar(y, z)} if single else {"sign": sign_test(y, z)}
    return row


def _verdict(row: Row) -> VerdictName:
    """Said of a; where a note stands, nothing is claimed."""
    p = row["p"] if row["exploratory"] else row["p_holm"]
    if "note" in row or p >= ALPHA:
        return "cannot tell"
    return "better" if row["delta"] > 0 else "worse"
