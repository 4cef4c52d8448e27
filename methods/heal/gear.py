"""GEAR, guided entropy-assisted repair: find where a failed trace broke, go back, continue with the answer as a hint.

All formulas are [reading]: the paper's method section was not available to us.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.types import Ids, Lab, Problem, Request, Trace
from harness.verifiers import opens_think, rejection
from harness.verifiers.completion import CLOSE, OPEN
from harness.verifiers.steps import token_steps

if TYPE_CHECKING:
    from methods.heal import Heal

WINDOW = 8  # tokens of entropy: token_window
LEAK = re.compile(
    r"\b(?:(?:given|provided|supplied|reference|known) (?:final )?answer"
    r"|the hint\b|a hint (?:says|gives|was)|answer (?:(?:is|was) )?(?:given|provided|supplied|known)"
    r"|(?:told|given) (?:that )?the (?:final )?answer|for reference, the (?:final )?answer)",
    re.IGNORECASE,
)
INLINE = "Wait, the result should come to {answer}; let me find out why.\n"


def reader(lab: Lab, heal: Heal) -> Callable[[Trace], list[range]]:
    """The steps of a trace as ranges of its tokens; each token is decoded once."""
    pieces: dict[int, str] = {}

    def steps(trace: Trace) -> list[range]:
        for token in set(trace.tokens) - pieces.keys():
            pieces[token] = lab.teacher.decode((token,))
        return token_steps([pieces[t] for t in trace.tokens], heal.segment, heal.min_step)

    return steps


def entropies(lab: Lab, traces: Sequence[Trace]) -> list[Sequence[float]]:
    """H_{k,i} = -sum_v pi_T(v | x, s_<k, s_{k,<i}) ln pi_T(v | ...), one a token, nats, no hint, temperature 1.

    The teacher's own samples carry them; other traces are scored in one pass.
    """
    bare = [t for t in traces if t.entropies is None]
    pairs = [(lab.teacher.encode(lab.prompt(t.problem)), t.tokens) for t in bare]
    scored = iter(lab.scores(lab.teacher, pairs) if pairs else ())
    found: list[Sequence[float]] = []
    errors = [e for t in traces for e in t.entropy_error or ()]  # of a teacher that tells its top K
    for trace in traces:
        if trace.entropies is not None:
            found.append(trace.entropies)
        else:
            score = next(scored)
            found.append(() if score is None else score.entropies)
            errors += [] if score is None else score.entropy_error or ()
    if errors:
        lab.note("entropy known to within, nats, at worst", max(errors))
    return found


def step_entropies(values: Sequence[float], steps: Sequence[range], form: str) -> np.ndarray:
    """Hbar_k, [K]: the mean over the step's tokens, their maximum, or the largest mean of WINDOW neighbouring tokens."""
    table = np.asarray(values, dtype=float)
    cut = [table[step.start : step.stop] for step in steps]
    if form == "step_max":
        return np.array([part.max() for part in cut])
    if form == "token_window":
        windows = [np.ones(min(WINDOW, len(part))) / min(WINDOW, len(part)) for part in cut]
        return np.array(
            [np.convolve(p, w, "valid").max() for p, w in zip(cut, windows, strict=True)]
        )
    return np.array([part.mean() for part in cut])


def surges(means: np.ndarray, form: str, first: float | None) -> np.ndarray:
    """dH_k = Hbar_k - Hbar_{k-1} (delta_prev), - the mean of up to 3 before (delta_running_mean), or Hbar_k itself, [K].

    Step 1 has no predecessor: its surge is over `first`, the mean first-step entropy of solved problems, or -inf without one.
    """
    before = [np.nan if first is None else first]
    for k in range(1, len(means)):
        before.append(means[max(0, k - 3) : k].mean() if form.endswith("mean") else means[k - 1])
    deltas = means if form == "absolute" else means - np.array(before)
    return np.where((np.arange(len(means)) == 0) & (first is None), -np.inf, deltas)


def last_searched(steps: Sequence[range], fraction: float, unit: str) -> int:
    """The last step that may be the breakpoint, from 1: ceil(fraction K), or by tokens, but at least 2 where there are two."""
    count = ceil(round(fraction * len(steps), 9))
    if unit == "tokens":
        limit = steps[0].start + fraction * (steps[-1].stop - steps[0].start)
        count = sum(step.start < limit for step in steps)
    return min(max(count, 2), len(steps))


def breakpoint_of(heal: Heal, trace: Trace, steps: Sequence[range], deltas: np.ndarray) -> int:
    """k* = argmax dH_k over the searched steps, from 1; `random` draws among the same steps; 1 where there is nothing to search."""
    first = 1 if heal.first_step == "reference" else 2
    last = last_searched(steps, heal.search_fraction, heal.search_unit)
    if heal.breakpoint == "start" or last < 2:
        return 1
    if heal.breakpoint == "random":
        # Not of the training seed: all seeds repair the same prefixes and share the teacher's samples.
        return random.Random(f"{trace.problem.id} {trace.index}").randint(first, last)
    return int(np.argmax(deltas[first - 1 : last])) + first


def kept_tokens(steps: Sequence[range], k: int, backup: int) -> int:
    """How many tokens stand before the repair: s_1 .. s_{k - backup}, nothing if that is no step."""
    kept = min(k - backup, len(steps))
    return steps[kept - 1].stop if kept > 0 else 0


def broken(heal: Heal, traces: Sequence[Trace]) -> list[Trace]:
    """The failed traces to repair: the first by sample index (samples are exchangeable), truncated ones last."""
    failed = [trace for trace in traces if not trace.correct]
    return sorted(failed, key=lambda t: (not t.finished, t.index))[: heal.paths]


def prefixes(
    lab: Lab, heal: Heal, solved: Sequence[Trace], failed: Sequence[Trace]
) -> list[tuple[Trace, int, int]]:
    """(failed trace, k* from 1, tokens kept) of each failed trace; entropies are looked at only where they decide."""
    steps, reference = reader(lab, heal), None
    values: list[Sequence[float]] = [()] * len(failed)
    if heal.breakpoint == "surge":
        values = entropies(lab, failed)
        if heal.first_step == "reference":
            starts = [
                step_entropies(entropy, mine, heal.entropy)[0]
                for trace, entropy in zip(solved, entropies(lab, solved), strict=True)
                if (mine := steps(trace)[:1]) and entropy
            ]
            reference = float(np.mean(starts)) if starts else None
    found = []
    for trace, entropy in zip(failed, values, strict=True):
        mine, k = steps(trace), 1
        if mine and (entropy or heal.breakpoint == "random"):
            deltas = np.zeros(len(mine))
            if entropy:
                deltas = surges(step_entropies(entropy, mine, heal.entropy), heal.surge, reference)
            k = breakpoint_of(heal, trace, mine, deltas)
        whole = heal.breakpoint == "start" or len(mine) < 2  # nothing stands before the repair
        found.append((trace, k, 0 if whole else kept_tokens(mine, k, heal.backup)))
    return found


def sampled(
    lab: Lab, requests: Sequence[Request], n: int, *, taken: int = 0, **how: Any
) -> list[list[Trace]]:
    """n samples of each request; requests that are alike get different ones, the first `taken` of them none's."""
    places: dict[tuple[str, str, Ids], list[int]] = defaultdict(list)
    for place, request in enumerate(requests):
        places[request.problem.id, request.prompt, request.prefix].append(place)
    found: dict[int, list[Trace]] = {}
    for times in sorted({len(group) for group in places.values()}):
        groups = [group for group in places.values() if len(group) == times]
        asked = [requests[group[0]] for group in groups]
        drawn = lab.samples(lab.teacher, taken + n * times, requests=asked, **how)
        for group, traces in zip(groups, drawn, strict=True):
            for turn, place in enumerate(group):
                found[place] = traces[taken + turn * n : taken + (turn + 1) * n]
    return [found[place] for place in range(len(requests))]


def repair(
    lab: Lab, heal: Heal, cuts: Sequence[tuple[Trace, int, int]], counts: Counter[str]
) -> list[list[Trace]]:
    """The candidates of each cut trace: its kept prefix, continued by a teacher who knows the answer."""
    problems = [trace.problem for trace, _, _ in cuts]
    kept = [trace.tokens[:tokens] for trace, _, tokens in cuts]
    hinted = [lab.prompt(problem, problem.answer) for problem in problems]
    if heal.hint_mode == "bridge_step":
        return _bridged(lab, heal, problems, hinted, kept, counts)
    if heal.hint_mode == "inline_think":
        said = [INLINE.format(answer=problem.answer) for problem in problems]
        notes = [lab.teacher.tokenize(text, end=False) for text in said]
        starts = [prefix or opening(lab) for prefix in kept]
        requests = [
            Request(lab.prompt(problem), problem, (*start, *note))
            for problem, start, note in zip(problems, starts, notes, strict=True)
        ]
        drawn = sampled(lab, requests, heal.candidates, purpose="repair")
        return [
            [_without(lab, trace, len(start), len(note), len(prefix)) for trace in group]
            for group, start, note, prefix in zip(drawn, starts, notes, kept, strict=True)
        ]
    requests = [
        Request(turn, problem, prefix)
        for turn, problem, prefix in zip(hinted, problems, kept, strict=True)
    ]
    # Where nothing is kept this is the request of the hint part, whose samples are in use already.
    scratch = [place for place, prefix in enumerate(kept) if not prefix]
    rest = [place for place, prefix in enumerate(kept) if prefix]
    used = heal.hints if "hint" in heal.parts else 0
    found: dict[int, list[Trace]] = {}
    for places, taken in ((scratch, used), (rest, 0)):
        asked = [requests[place] for place in places]
        drawn = sampled(lab, asked, heal.candidates, taken=taken, purpose="repair")
        found.update(zip(places, drawn, strict=True))
    return [found[place] for place in range(len(cuts))]


def opening(lab: Lab) -> Ids:
    """What stands before the first step where nothing is kept."""
    return () if opens_think(lab.teacher) else lab.teacher.tokenize(f"{OPEN}\n", end=False)


def _bridged(
    lab: Lab,
    heal: Heal,
    problems: Sequence[Problem],
    hinted: Sequence[str],
    kept: Sequence[Ids],
    counts: Counter[str],
) -> list[list[Trace]]:
    """One step by the teacher who knows the answer, the rest by the teacher who does not."""
    teacher, stop = lab.teacher, "\n" if heal.segment == "line" else "\n\n"
    starts = [prefix or opening(lab) for prefix in kept]  # a bridge is a step inside the think
    requests = [Request(*request) for request in zip(hinted, problems, starts, strict=True)]
    bridges = sampled(lab, requests, heal.candidates, purpose="repair", stop=(stop,))
    going: list[tuple[int, Request]] = []
    for place, (problem, group) in enumerate(zip(problems, bridges, strict=True)):
        for bridge in group:
            step = bridge.text.removeprefix(teacher.decode(starts[place]))  # cut before the stop
            if not step.strip() or CLOSE in step or not bridge.finished:
                counts["bridge is no step"] += 1
            elif re.search(rf"(?<!\w){re.escape(problem.answer or '')}(?!\w)", step):
                counts["bridge states the answer"] += 1
            else:
                prefix = (*starts[place], *teacher.tokenize(step + stop, end=False))
                going.append((place, Request(lab.prompt(problem), problem, prefix)))
    drawn = sampled(lab, [request for _, request in going], 1, purpose="repair")
    found: list[list[Trace]] = [[] for _ in problems]
    for (place, _), traces in zip(going, drawn, strict=True):
        found[place] += [
            _from(trace, len(kept[place]), index=len(found[place])) for trace in traces
        ]
    return found


def _from(trace: Trace, prefix: int, **changed: Any) -> Trace:
    """The trace as new from another token on, without the records that were aligned to the old one."""
    return replace(
        trace, prefix=prefix, logprobs=None, entropies=None, entropy_error=None, **changed
    )


def _without(lab: Lab, trace: Trace, start: int, length: int, prefix: int) -> Trace:
    """The trace without the sentence that was put into it."""
    tokens = (*trace.tokens[:start], *trace.tokens[start + length :])
    return _from(trace, prefix, tokens=tokens, text=lab.teacher.decode(tokens))


def survivors(
    lab: Lab,
    heal: Heal,
    groups: Mapping[str, Sequence[Trace]],
    least: int,
    counts: Counter[str],
) -> list[Trace]:
    """The candidates that are right, do not mention the hint, and have at least so many new steps."""
    steps, opened = reader(lab, heal), opens_think(lab.teacher)
    kept = []
    for traces in groups.values():
        for trace in traces:
            reason = rejection(trace, opened)
            written = lab.teacher.decode(trace.tokens[trace.prefix :])
            if reason is None and heal.leak_filter and LEAK.search(written):
                reason = "mentions the answer it was given"
            if reason is None and least:
                new = sum(step.stop > trace.prefix for step in steps(trace))
                reason = "too few new steps" if new < least else None
            counts[reason or "verified"] += 1
            kept += [trace] if reason is None else []
    return kept
