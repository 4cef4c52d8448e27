"""What `snr.json` says, in words, tables and charts: the gradient's signal-to-noise against the student's pass rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from harness.report import pages, plots
from harness.report.plots import Series, Style

HEADER = (
    "pass rate",
    "mean",
    "problems",
    "SNR (95 %)",
    "of unit gradients (95 %)",
    "loss, nats a token",
    "gradient norm",
    "its log spread",
)
EXPONENTS = ("exponents", "alpha (95 %)", "beta (95 %)", "bins")
KERNELS = ("weight", "delta", "efficiency lost, at most")
MEANING = (
    "The SNR of a bin is |g|^2 / V: g its mean gradient, with the noise's share taken off the square, and V the variance of a problem's "
    "gradient around it. Of unit gradients it says only whether problems pull the same way: where a few gradients are far larger than "
    "the rest (spread above 1) the plain SNR hangs on them and its interval is too sure. A bin counts from 50 problems on. The bell is "
    "there if the SNR at p = 0 and at p = 1 is lower than the mean of the bins from 0.25 to 0.75. alpha and beta are those of "
    "p^alpha (1-p)^beta that follow it best; if the bins' gradients point one way, the best weight follows |g| / V instead. delta is half "
    "the range of the log residuals over the bins with signal, their noise included; tanh^2(delta) bounds what a weight loses against the "
    "best one, if the best one follows the SNR."
)
MINUS = "\N{MINUS SIGN}"
CURVE = [place / 40 for place in range(1, 40)]


def table(loss: Mapping[str, Any]) -> list[list[str]]:
    """One line a bin."""
    return [
        [
            f"{row['low']:.3g}"
            if row["low"] == row["high"]
            else f"{row['low']:.3g} to {row['high']:.3g}",
            f"{row['p']:.3f}",
            str(row["n"]) + ("" if row["counts"] else ", too few"),
            _with_interval(row["snr"], row["ci95"]),
            _with_interval(row["unit_snr"], row["unit_ci95"]),
            f"{row['loss']:.3f}",
            f"{row['norm']:.3g}",
            f"{row['norm_spread']:.2f}",
        ]
        for row in loss["bins"]
    ]


def exponents(loss: Mapping[str, Any]) -> list[list[str]]:
    """The fitted exponents, of the SNR and of the best weight; a dash where bins are too few."""
    rows = []
    for name, key in (
        ("of the SNR, |g|^2 / V", "fit"),
        ("of |g| / V", "best_weight"),
        ("of the SNR of unit gradients", "unit_fit"),
    ):
        fit = loss[key]
        rows.append([name, *(["–"] * 3 if fit is None else _exponents(fit))])
    return rows


def _exponents(fit: Mapping[str, Any]) -> list[str]:
    cells = [f"{plain(fit[e])} ({span(fit[f'{e}_ci95'], plain)})" for e in ("alpha", "beta")]
    without = len(fit["skipped"])
    return [*cells, f"{fit['bins']}" + (f", {without} without signal" if without else "")]


def kernels(loss: Mapping[str, Any]) -> list[list[str]]:
    """What each weight loses at most, if the SNR is what it should follow."""
    if loss["fit"] is None:
        return []
    return [
        [name, f"{kernel['delta']:.2f}", f"{100 * kernel['lost']:.0f} %"]
        for name, kernel in loss["fit"]["kernels"].items()
    ]


def sentences(found: Mapping[str, Any]) -> list[str]:
    """For each loss, whether the bell is there, and why; then the same of unit gradients."""
    return [
        _sentence(name + said, loss, prefix)
        for name, loss in found["losses"].items()
        for prefix, said in (("", ""), ("unit_", ", unit gradients"))
    ]


def _sentence(name: str, loss: Mapping[str, Any], prefix: str) -> str:
    said = {
        "yes": "the bell curve is there",
        "no": "there is no bell curve",
        "cannot tell": "cannot tell whether there is a bell curve",
    }
    line = f"{name}: {said[loss[f'{prefix}bell']]}"
    middle = loss[f"{prefix}middle"]
    if middle is None:
        return f"{line}, as no bin from 0.25 to 0.75 has 50 problems"
    parts = [f"SNR {number(middle['snr'])} ({span(middle['ci95'])}) in the middle"]
    for end, row in loss[f"{prefix}ends"].items():
        words = {"cannot tell": "not to be told from it"}.get(row["is"], row["is"])
        parts.append(f"at {end} {words} ({number(row['difference'])}, {span(row['ci95'])})")
    return f"{line}: {'; '.join(parts)}"


def fed_back(loss: Mapping[str, Any]) -> str:
    """The fitted exponents as fields of `paced`, which takes none below 0; empty without a fit."""
    if loss["fit"] is None:
        return ""
    alpha, beta = (min(20.0, max(0.0, loss["fit"][name])) for name in ("alpha", "beta"))
    return f"As fields of paced: alpha: {alpha:.2f}, beta: {beta:.2f}"


def chart(name: str, loss: Mapping[str, Any]) -> Markup:
    """The bins with their intervals, and the fitted kernel through them."""
    rows = [row for row in loss["bins"] if row["snr"] is not None]
    if not rows:
        return Markup("")

    def points(name: str, colour: int, prefix: str, shift: float) -> Series:
        mine = [row for row in rows if row[f"{prefix}snr"] is not None]
        values = [(row["p"], row[f"{prefix}snr"]) for row in mine]
        intervals = [tuple(row[f"{prefix}ci95"]) for row in mine]
        return Series(name, Style.of(colour), values, intervals, line=False, shift=shift)

    series = [points("measured", 0, "", -2), points("of unit gradients", 2, "unit_", 2)]
    if fit := loss["fit"]:
        top = max(value for row in rows for value in row["ci95"])
        curve = [(p, fit["scale"] * p ** fit["alpha"] * (1 - p) ** fit["beta"]) for p in CURVE]
        series.append(
            Series("fitted", Style.of(1), [(p, y) for p, y in curve if y <= top], markers=False)
        )
    return plots.xy(name, series, "pass rate of the student", "SNR") + plots.legend(
        {s.name: s.style for s in series}
    )


def page(found: Mapping[str, Any]) -> str:
    """snr.html: the measurement by itself."""
    return pages.render("snr.html.j2", view(found))


def view(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the templates show."""
    return {
        "snr": {
            "name": found["name"],
            "conditions": conditions(found),
            "meaning": MEANING,
            "sentences": sentences(found),
            "headers": {"bins": HEADER, "exponents": EXPONENTS, "kernels": KERNELS},
            "losses": [
                {
                    "name": name,
                    "bins": table(loss),
                    "exponents": exponents(loss),
                    "kernels": kernels(loss),
                    "fed_back": fed_back(loss),
                    "chart": chart(name, loss),
                }
                for name, loss in found["losses"].items()
            ],
        }
    }


def conditions(found: Mapping[str, Any]) -> str:
    exact = found["dimensions"] == found["parameters"]
    how = "exact gradients" if exact else f"gradients projected to {found['dimensions']} numbers"
    return (
        f"{found['problems']} training problems, {found['rollouts']} rollouts each, the untrained student, {how}; "
        f"{found['without_reference']} problems passed over for want of a correct response of the teacher."
    )


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    return "–" if value is None else f"{number(value)} ({span(interval)})"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}".replace("-", MINUS)


def plain(value: float) -> str:
    return f"{value:.2f}".replace("-", MINUS)


def span(interval: Sequence[float] | None, form: Any = number) -> str:
    return "–" if interval is None else f"{form(interval[0])} to {form(interval[1])}"
