"""Small charts as inline SVG: no scripts, no fonts, colours from the page's style sheet, the same bytes every time.

A chart is 360 units wide, so that its 12-unit text is 12 pixels on a phone; the page puts several side by side. Each method has
one colour and one marker, everywhere; the untrained student is grey.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from scipy.spatial import Delaunay

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 30, 42
NUM_COLOURS = 8  # --c0 to --c7 in the style sheet
NUM_BANDS = 7  # --r0 to --r6, from low to high
MOST_PLACES = 12  # ticks of an axis of whole numbers, if there is one for each
DASHES = ("", "6 3", "2 3")
# Markers around the origin, about 9 units across: circle, square, triangle, diamond, cross.
SHAPES = (
    "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0 -8.4 0z",
    "M-3.8 -3.8h7.6v7.6h-7.6z",
    "M0 -5L4.6 3.8H-4.6z",
    "M0 -5.2L5.2 0L0 5.2L-5.2 0z",
    "M-4.6 -1.6h3v-3h3.2v3h3v3.2h-3v3h-3.2v-3h-3z",
)


@dataclass(frozen=True)
class Style:
    """How a method looks: a colour variable, a marker, a dash pattern."""

    colour: str
    shape: int
    dash: str

    @classmethod
    def of(cls, index: int | None) -> Style:
        """The index-th method's; None: the untrained student's."""
        if index is None:
            return cls("var(--base)", 0, "2 3")
        turn = index // NUM_COLOURS
        return cls(
            f"var(--c{index % NUM_COLOURS})",
            (index + turn) % len(SHAPES),
            DASHES[turn % len(DASHES)],
        )

    def marker(self, x: float = 0, y: float = 0, title: str = "") -> Markup:
        return Markup(
            '<path d="{}" transform="translate({} {})" style="fill:{}"><title>{}</title></path>'
        ).format(SHAPES[self.shape], _n(x), _n(y), self.colour, title)


@dataclass(frozen=True)
class Series:
    """Points of one method, drawn as a line, as markers, or both; with an interval (low, high) at each point or none."""

    name: str
    style: Style
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()
    line: bool = True
    markers: bool = True
    shift: float = 0.0  # pixels to the right


@dataclass(frozen=True)
class Scale:
    """Values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log(self.low), math.log(self.high), math.log(value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside: 1, 2 or 5 times a power of ten."""
        if self.log:
            exponents = range(
                math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1
            )
            for steps in ((1, 2, 5), (1, 3), (1,)):
                values = [step * 10.0**e for e in exponents for step in steps]
                values = [
                    v for v in values if self.low <= v * 1.0000001 and v <= self.high * 1.0000001
                ]
                if len(values) <= most:
                    break
            return values
        step = _round_step((self.high - self.low) / (most - 1))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def linear(values: Sequence[float], start: float, end: float, least: float = 0.0) -> Scale:
    """A scale around the values, with round ends, at least so wide."""
    low, high = min(values), max(values)
    if high - low < least:
        middle = (low + high) / 2
        low, high = middle - least / 2, middle + least / 2
    if high == low:
        high = low + (abs(low) or 1.0)
    step = _round_step((high - low) / 5)
    return Scale(
        math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, start, end
    )


def share_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """A scale for fractions, never beyond 0 to 1."""
    scale = linear(values, start, end, least=0.1)
    return Scale(max(0.0, scale.low), min(1.0, scale.high), start, end)


def xy(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    shares: bool = False,
    log_x: bool = False,
    whole_x: bool = False,
    x_names: Sequence[str] = (),  # of the places 0, 1, ... on a categorical axis
    level: tuple[str, float] | None = None,  # a dashed horizontal line and its name
    marks: Sequence[tuple[float, str]] = (),  # named vertical lines
    ringed: Sequence[str] = (),  # series whose points have a ring
) -> Markup:
    """Lines or points over x and y."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + [
        v for s in series for pair in s.intervals for v in pair
    ]
    if level:
        ys.append(level[1])
    left, right, bottom, top = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP
    if log_x:
        x = Scale(min(xs) / 1.25, max(xs) * 1.25, left, right, log=True)
    elif x_names:
        x = Scale(-0.5, len(x_names) - 0.5, left, right)
    elif whole_x:
        x = Scale(min(xs) - 0.3, max(xs) + 0.3, left, right)
    else:
        x = linear(xs, left, right)
    y = (share_scale if shares else linear)(ys, bottom, top)
    places = sorted(set(xs))
    x_ticks = places if whole_x and len(places) <= MOST_PLACES else x.ticks(5)
    named = [(v, _tick(v)) for v in x_ticks]
    if x_names:
        most = max(3, 46 // len(x_names))
        named = [(float(at), shorten(name, most)) for at, name in enumerate(x_names)]
    parts = [_axes(x, y, named, shares, x_label, y_label)]
    for at, name in marks:
        parts.append(_rule(x(at), name))
    if level:
        parts.append(_level(y(level[1]), level[0]))
    for s in series:
        parts.append(_series(s, x, y, shares))
        if s.name in ringed:
            parts += [_ring(x(a), y(b)) for a, b in s.points]
    return _titled(title, HEIGHT, parts)


def forest(title: str, rows: Sequence[tuple[str, Style, float, tuple[float, float]]]) -> Markup:
    """One line a method: a point and its 95 % interval, fractions."""
    label_width, row = 118, 24
    height = TOP + row * len(rows) + 30
    bottom = height - 26
    values = [v for _, _, value, interval in rows for v in (value, *interval)]
    x = share_scale(values, label_width, WIDTH - RIGHT - 4)
    parts = []
    for tick in x.ticks(5):
        parts.append(
            Markup(
                '<path class="grid" d="M{0} {1}V{2}"/><text class="tick" x="{0}" y="{3}" text-anchor="middle">{4}</text>'
            ).format(_n(x(tick)), TOP - 4, bottom, bottom + 15, _percent(tick))
        )
    for index, (name, style, value, (low, high)) in enumerate(rows):
        at = TOP + row * (index + 0.5)
        said = f"{name}: {100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        parts.append(
            Markup(
                '<text x="{}" y="{}" text-anchor="end">{}<title>{}</title></text>'
                '<path d="M{} {}H{}" style="stroke:{};stroke-width:2"/>{}'
            ).format(
                label_width - 10,
                _n(at + 4),
                shorten(name, 17),
                name,
                _n(x(low)),
                _n(at),
                _n(x(high)),
                style.colour,
                style.marker(x(value), at, said),
            )
        )
    return _titled(title, height, parts)


def histogram(title: str, edges: Sequence[float], counts: Sequence[float], style: Style) -> Markup:
    """Counts between edges."""
    height = 170
    x = linear(list(edges), LEFT, WIDTH - RIGHT)
    y = linear([0.0, *counts], height - 28, TOP)
    bars = [
        Markup(
            '<rect x="{}" y="{}" width="{}" height="{}" style="fill:{}"><title>{}</title></rect>'
        ).format(
            _n(x(low) + 0.5),
            _n(y(count)),
            _n(max(1.0, x(high) - x(low) - 1)),
            _n(y(0) - y(count)),
            style.colour,
            f"{low:g} to {high:g}: {count:g}",
        )
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    axes = _axes(x, y, [(v, _tick(v)) for v in x.ticks(6)], False, "", "")
    return _titled(title, height, [axes, *bars])


def bars(title: str, rows: Sequence[tuple[str, float]], style: Style) -> Markup:
    """One bar a row, shares of a whole."""
    label_width, row = 118, 24
    height = TOP + row * len(rows) + 8
    x = Scale(0, max(value for _, value in rows) or 1.0, label_width, WIDTH - RIGHT - 40)
    parts = [
        Markup(
            '<text x="{}" y="{}" text-anchor="end">{}<title>{}</title></text>'
            '<rect x="{}" y="{}" width="{}" height="{}" style="fill:{}"/><text class="tick" x="{}" y="{}">{}</text>'
        ).format(
            label_width - 10,
            _n(at + 4),
            shorten(name, 17),
            name,
            label_width,
            _n(at - 7),
            _n(x(value) - label_width),
            14,
            style.colour,
            _n(x(value) + 6),
            _n(at + 4),
            f"{100 * value:.0f} %",
        )
        for at, (name, value) in ((TOP + row * (i + 0.5), each) for i, each in enumerate(rows))
    ]
    return _titled(title, height, parts)


@dataclass(frozen=True)
class Spot:
    """A point of a surface; without a value it is drawn hollow and shapes nothing."""

    x: float
    y: float
    value: float | None  # a fraction
    said: str
    best: bool = False
    default: bool = False


Vertex = tuple[float, float, float]  # x, y, value


def contour(
    title: str,
    spots: Sequence[Spot],
    x_label: str,
    y_label: str,
    *,
    x_range: Sequence[float] = (),  # shown at least
    y_range: Sequence[float] = (),
    log_x: bool = False,
    log_y: bool = False,
    note: str = "",
) -> Markup:
    """Spots coloured by value over bands of the piecewise linear surface through them; nothing outside their hull."""
    bottom = TOP + 200
    x = _searched([*x_range, *(s.x for s in spots)], LEFT, WIDTH - RIGHT, log_x)
    y = _searched([*y_range, *(s.y for s in spots)], bottom, TOP, log_y)
    measured = [(s, s.value) for s in spots if s.value is not None]
    parts = [
        _axes(x, y, [(v, _tick(v)) for v in x.ticks(5)], False, x_label, ""),
        _upright(y_label, (TOP + bottom) / 2),
    ]
    if measured:
        low, high = min(v for _, v in measured), max(v for _, v in measured)
        flat = triangles([(x(s.x), y(s.y), v) for s, v in measured], x, y)
        if high > low:
            parts += _bands(flat, low, high)
            parts.append(_colour_scale(bottom + 52, low, high))
    drawn = sorted(spots, key=lambda s: (s.best, s.default, s.value is not None))
    parts += [
        _spot(s, x(s.x), y(s.y), _colour(s.value, low, high) if measured else "") for s in drawn
    ]
    under = bottom + 92
    parts.append(_spot_legend(spots, under))
    lines = textwrap.wrap(note, 62)
    parts += [
        Markup('<text class="tick" x="4" y="{}">{}</text>').format(under + 22 + 14 * i, line)
        for i, line in enumerate(lines)
    ]
    return _titled(title, under + 14 + 14 * len(lines), parts)


def triangles(points: Sequence[Vertex], x: Scale, y: Scale) -> list[tuple[Vertex, Vertex, Vertex]]:
    """Delaunay's, of pixels stretched to the unit square, where equal points count once with their mean value.

    None where fewer than four points differ, or all lie on a line.
    """
    at: dict[tuple[float, float], list[float]] = {}
    for a, b, value in points:
        at.setdefault((a, b), []).append(value)
    corners = [(a, b, sum(values) / len(values)) for (a, b), values in at.items()]
    unit = np.array(
        [
            ((a - x.start) / (x.end - x.start), (b - y.start) / (y.end - y.start))
            for a, b, _ in corners
        ]
    )
    if len(corners) < 4 or np.linalg.matrix_rank(unit - unit.mean(0), tol=1e-6) < 2:
        return []
    return [(corners[i], corners[j], corners[k]) for i, j, k in Delaunay(unit).simplices.tolist()]


def above(corners: Sequence[Vertex], level: float) -> list[tuple[float, float]]:
    """The part of a triangle where its plane is at least `level`, as a polygon; empty if there is none."""
    found: list[tuple[float, float]] = []
    for (ax, ay, a), (bx, by, b) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if a >= level:
            found.append((ax, ay))
        if (a >= level) != (b >= level):
            t = (level - a) / (b - a)
            found.append((ax + t * (bx - ax), ay + t * (by - ay)))
    return found if len(found) > 2 else []


def reliability(
    name: str, said: str, bins: Sequence[Mapping[str, Any]], style: Style, *, width: int = 240
) -> Markup:
    """A reliability diagram: each bin's mean prediction and share that came true, its area by cases.

    `said` stands below the name; a bin holds low, high, n, mean, share and ci95, as in mechanisms.json.
    """
    lines = textwrap.wrap(name, 34)
    if len(lines) > 2:  # names differ at their ends
        lines = [lines[0], "… " + name[-32:].partition(" ")[2]]
    top, side = TOP + 32, width - LEFT - 12
    x, y = Scale(0, 1, LEFT, LEFT + side), Scale(0, 1, top + side, top)
    parts = [
        Markup('<text class="{}" x="4" y="{}">{}</text>').format(kind, 16 + 15 * place, text)
        for place, (kind, text) in enumerate([*(("title", each) for each in lines), ("", said)])
    ]
    parts.append(_axes(x, y, [(v, _tick(v)) for v in x.ticks()], False, "mean prediction", ""))
    parts.append(_upright("share that came true", y(0.5)))
    parts.append(
        Markup('<path class="rule" d="M{} {}L{} {}"/>').format(
            _n(x(0)), _n(y(0)), _n(x(1)), _n(y(1))
        )
    )
    most = max(each["n"] for each in bins)
    for each in bins:
        low, high = each["ci95"] or (each["share"], each["share"])
        parts.append(
            Markup(
                '<path d="M{0} {1}V{2}" style="stroke:{3};stroke-width:1.5"/>'
                '<circle cx="{0}" cy="{4}" r="{5}" style="fill:{3};fill-opacity:.75"><title>{6}</title></circle>'
            ).format(
                _n(x(each["mean"])),
                _n(y(low)),
                _n(y(high)),
                style.colour,
                _n(y(each["share"])),
                _n(max(1.5, 8 * math.sqrt(each["n"] / most))),
                f"{each['low']:g} to {each['high']:g}: {each['n']} cases, mean {each['mean']:.3f}, "
                f"share {each['share']:.3f} ({low:.3f} to {high:.3f})",
            )
        )
    return _svg(f"{name}: reliability", width, top + side + BOTTOM, parts)


def swatch(style: Style) -> Markup:
    """A method's marker, for legends and tables."""
    return Markup('<svg class="swatch" viewBox="-6 -6 12 12" aria-hidden="true">{}</svg>').format(
        style.marker()
    )


# --- parts -------------------------------------------------------------------------------------


def _titled(title: str, height: float, parts: Sequence[Markup]) -> Markup:
    head = Markup('<text class="title" x="4" y="16">{}</text>').format(shorten(title, 52))
    return _svg(title, WIDTH, height, [head, *parts])


def _svg(title: str, width: float, height: float, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(_n(width), _n(height), title, Markup("").join(parts))


def _axes(
    x: Scale,
    y: Scale,
    x_ticks: Sequence[tuple[float, str]],
    shares: bool,
    x_label: str,
    y_label: str,
) -> Markup:
    parts = []
    for tick in y.ticks():
        parts.append(
            Markup(
                '<path class="grid" d="M{} {}H{}"/><text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
            ).format(
                _n(x.start),
                _n(y(tick)),
                _n(x.end),
                _n(x.start - 6),
                _n(y(tick) + 4),
                _percent(tick) if shares else _tick(tick),
            )
        )
    for value, text in x_ticks:
        parts.append(
            Markup(
                '<path class="axis" d="M{0} {1}v4"/><text class="tick" x="{0}" y="{2}" text-anchor="middle">{3}</text>'
            ).format(_n(x(value)), _n(y.start), _n(y.start + 17), text)
        )
    parts.append(
        Markup('<path class="axis" d="M{} {}H{}"/>').format(_n(x.start), _n(y.start), _n(x.end))
    )
    if x_label:
        middle = _n((x.start + x.end) / 2)
        parts.append(
            Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                middle, _n(y.start + 35), x_label
            )
        )
    if y_label:
        parts.append(
            Markup('<text class="label" x="{}" y="{}" text-anchor="end">{}</text>').format(
                WIDTH - RIGHT, 16, y_label
            )
        )
    return Markup("").join(parts)


def _upright(label: str, y: float) -> Markup:
    """The name of the vertical axis, along it."""
    return Markup(
        '<text class="label" transform="translate(13 {}) rotate(-90)" text-anchor="middle">{}</text>'
    ).format(_n(y), label)


def _series(series: Series, x: Scale, y: Scale, shares: bool) -> Markup:
    style, parts = series.style, []
    places = [(x(a) + series.shift, y(b)) for a, b in series.points]
    if series.line and len(places) > 1:
        path = "M" + "L".join(f"{_n(a)} {_n(b)}" for a, b in places)
        width = "2" if series.markers else "1.2"
        parts.append(
            Markup(
                '<path d="{}" style="fill:none;stroke:{};stroke-width:{};stroke-dasharray:{}"/>'
            ).format(path, style.colour, width, style.dash or "none")
        )
    for (at, _), (low, high) in zip(places, series.intervals, strict=False):
        parts.append(
            Markup('<path d="M{} {}V{}" style="stroke:{};stroke-width:1.5"/>').format(
                _n(at), _n(y(low)), _n(y(high)), style.colour
            )
        )
    if series.markers:
        for (a, b), (value_x, value) in zip(places, series.points, strict=True):
            said = f"{100 * value:.1f} %" if shares else f"{value:.4g}"
            parts.append(style.marker(a, b, f"{series.name}: {said} at {value_x:.4g}"))
    return Markup("").join(parts)


def _rule(x: float, name: str) -> Markup:
    late = x > WIDTH - RIGHT - 6 * len(name)  # no room to the right
    return Markup(
        '<path class="rule" d="M{0} {1}V{2}"/><text class="tick" x="{3}" y="{4}" text-anchor="{5}">{6}</text>'
    ).format(
        _n(x),
        TOP,
        HEIGHT - BOTTOM,
        _n(x - 3 if late else x + 3),
        TOP + 9,
        "end" if late else "start",
        shorten(name, 18),
    )


def _level(y: float, name: str) -> Markup:
    return Markup(
        '<path class="rule" d="M{} {}H{}"/><text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
    ).format(LEFT, _n(y), WIDTH - RIGHT, WIDTH - RIGHT, _n(y - 4), shorten(name, 40))


def _searched(values: Sequence[float], start: float, end: float, log: bool) -> Scale:
    """A scale of a searched range."""
    if log:
        return Scale(min(values) / 1.15, max(values) * 1.15, start, end, log=True)
    return linear(values, start, end)


def _bands(flat: Sequence[tuple[Vertex, Vertex, Vertex]], low: float, high: float) -> list[Markup]:
    """Each band painted over the lower ones, so that no seam shows between them."""
    parts = []
    for band in range(NUM_BANDS):
        level = low + (high - low) * band / NUM_BANDS
        polygons = [polygon for corners in flat if (polygon := above(corners, level))]
        path = "".join("M" + "L".join(f"{_n(a)} {_n(b)}" for a, b in p) + "z" for p in polygons)
        if path:
            parts.append(Markup('<path d="{}" style="fill:var(--r{})"/>').format(path, band))
    return parts


def _colour(value: float | None, low: float, high: float) -> str:
    if value is None:
        return ""
    share = (value - low) / (high - low) if high > low else 0.5
    return f"var(--r{min(NUM_BANDS - 1, int(share * NUM_BANDS))})"


def _colour_scale(top: float, low: float, high: float) -> Markup:
    """The bands with their bounds, in percent."""
    left, right = LEFT, WIDTH - RIGHT - 8
    width = (right - left) / NUM_BANDS
    parts = [
        Markup('<rect x="{}" y="{}" width="{}" height="9" style="fill:var(--r{})"/>').format(
            _n(left + width * band), _n(top), _n(width + 0.3), band
        )
        for band in range(NUM_BANDS)
    ]
    for bound in range(NUM_BANDS + 1):
        value = 100 * (low + (high - low) * bound / NUM_BANDS)
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                _n(left + width * bound),
                _n(top + 22),
                f"{value:.1f}" + (" %" * (bound == NUM_BANDS)),
            )
        )
    return Markup("").join(parts)


def _spot(spot: Spot, x: float, y: float, colour: str) -> Markup:
    size, fill = ("4.6", colour) if colour else ("3.6", "var(--paper)")
    title = Markup("<title>{}</title>").format(spot.said)
    parts = [_haloed(f'circle cx="{_n(x)}" cy="{_n(y)}" r="{size}"', 1, fill, title)]
    if spot.best:
        parts.append(_ring(x, y))
    if spot.default:
        parts.append(_frame(x, y))
    return Markup("").join(parts)


def _ring(x: float, y: float) -> Markup:
    return _haloed(f'circle cx="{_n(x)}" cy="{_n(y)}" r="8"', 2)


def _frame(x: float, y: float) -> Markup:
    return _haloed(f'path d="M{_n(x - 7.5)} {_n(y - 7.5)}h15v15h-15z"', 1.5)


def _haloed(shape: str, width: float, fill: str = "none", title: Markup | str = "") -> Markup:
    """An outline that shows on the palest and on the darkest band."""
    return Markup(
        '<{0} style="fill:none;stroke:var(--paper);stroke-width:{1}"/>'
        '<{0} style="fill:{2};stroke:var(--ink);stroke-width:{3}">{4}</{5}>'
    ).format(Markup(shape), _n(width + 2), fill, _n(width), title, shape.split()[0])


def _spot_legend(spots: Sequence[Spot], y: float) -> Markup:
    """What ring, frame and hollow mean, where there is one."""
    hollow = _spot(Spot(0, 0, None, "pruned"), 0, 0, "")
    known = [
        (any(s.best for s in spots), _ring(0, 0), "best"),
        (any(s.default for s in spots), _frame(0, 0), "the suite's own"),
        (any(s.value is None for s in spots), hollow, "pruned"),
    ]
    parts, x = [], LEFT + 4.0
    for shown, mark, name in known:
        if shown:
            parts.append(
                Markup(
                    '<g transform="translate({0} {1})">{2}<text class="tick" x="14" y="4">{3}</text></g>'
                ).format(_n(x), _n(y), mark, name)
            )
            x += 32 + 6 * len(name)
    return Markup("").join(parts)


def shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _round_step(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _n(value: float) -> str:
    """A coordinate: one decimal is a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _tick(value: float) -> str:
    """1500 as 1.5k, 2e12 as 2e12."""
    size = abs(value)
    if size >= 1e10:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}" if size >= 1e-9 else "0"


def legend(styles: Mapping[str, Style]) -> Markup:
    """Names beside their markers."""
    items = [
        Markup("<li>{}{}</li>").format(swatch(style), escape(name))
        for name, style in styles.items()
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def line_legend(styles: Mapping[str, Style]) -> Markup:
    """Names beside their lines, where no marker tells them apart."""
    items = [
        Markup(
            '<li><svg class="swatch wide" viewBox="0 -6 24 12" aria-hidden="true"><path d="M0 0H24" '
            'style="fill:none;stroke:{};stroke-width:2;stroke-dasharray:{}"/></svg>{}</li>'
        ).format(style.colour, style.dash or "none", name)
        for name, style in styles.items()
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))
