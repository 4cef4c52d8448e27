"""What `snr.json` says, in words, tables and charts: the gradient's signal-to-noise against the student's pass rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.report import plots
from harness.report.plots import Series, Style

HEADER = (
    "pass rate",
    "mean",
    "problems",
    "SNR",
    "95 % interval",
    "loss, nats a token",
    "gradient norm",
)
EXPONENTS = ("", "alpha", "95 % interval", "beta", "95 % interval", "bins")
KERNELS = ("weight", "delta", "efficiency lost, at most")
MEANING = (
    "The SNR of a bin is |g|^2 / V: g its mean gradient, with the noise's share taken off the square, and V the variance of a problem's "
    "gradient around it. The bell is there if the SNR at p = 0 and at p = 1 is lower than the mean of the bins from 0.25 to 0.75. "
    "alpha and beta are those of p^alpha (1-p)^beta that follow the SNR best; if the bins' gradients point one way, the best weight "
    "follows |g| / V instead, which the second line fits. delta is half the range of the log residuals over the bins, their noise "
    "included; tanh^2(delta) bounds what a weight loses against the best one, if the best one follows the SNR."
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
            str(row["n"]),
            number(row["snr"]),
            span(row["ci95"]),
            f"{row['loss']:.3f}",
            f"{row['norm']:.3g}",
        ]
        for row in loss["bins"]
    ]


def exponents(loss: Mapping[str, Any]) -> list[list[str]]:
    """The fitted exponents, of the SNR and of the best weight; a dash where bins are too few."""
    rows = []
    for name, key in (("of the SNR, |g|^2 / V", "fit"), ("of |g| / V", "best_weight")):
        fit = loss[key]
        rows.append([name, *(["–"] * 5 if fit is None else _exponents(fit))])
    return rows


def _exponents(fit: Mapping[str, Any]) -> list[str]:
    cells = [
        cell for e in ("alpha", "beta") for cell in (plain(fit[e]), span(fit[f"{e}_ci95"], plain))
    ]
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
    """For each loss, whether the bell is there, and why."""
    said = {
        "yes": "the bell curve is there",
        "no": "there is no bell curve",
        "cannot tell": "cannot tell whether there is a bell curve",
    }
    lines = []
    for name, loss in found["losses"].items():
        line = f"{name}: {said[loss['bell']]}"
        if loss["middle"] is None:
            lines.append(f"{line}, as no bin from 0.25 to 0.75 has enough problems")
            continue
        parts = [
            f"SNR {number(loss['middle']['snr'])} ({span(loss['middle']['ci95'])}) in the middle"
        ]
        for end, row in loss["ends"].items():
            words = {"lower": "lower", "higher": "higher", "cannot tell": "not to be told from it"}[
                row["is"]
            ]
            parts.append(f"at {end} {words} ({number(row['difference'])}, {span(row['ci95'])})")
        lines.append(f"{line}: {'; '.join(parts)}")
    return lines


def fed_back(loss: Mapping[str, Any]) -> str:
    """The fitted exponents as fields of `paced`, which takes none below 0; empty without a fit."""
    if loss["fit"] is None:
        return ""
    alpha, beta = (min(20.0, max(0.0, loss["fit"][name])) for name in ("alpha", "beta"))
    return f"alpha: {alpha:.2f}, beta: {beta:.2f}"


def chart(name: str, loss: Mapping[str, Any]) -> Markup:
    """The bins with their intervals, and the fitted kernel through them."""
    rows = [row for row in loss["bins"] if row["snr"] is not None]
    if not rows:
        return Markup("")
    series = [
        Series(
            "measured",
            Style.of(0),
            [(row["p"], row["snr"]) for row in rows],
            [tuple(row["ci95"]) for row in rows],
            line=False,
        )
    ]
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
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((folder / "page.css").read_text(encoding="utf-8"))
    return environment.get_template("snr.html.j2").render(style=style, **view(found))


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
    return f"{found['problems']} training problems, {found['rollouts']} rollouts each, the untrained student, {how}."


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}".replace("-", MINUS)


def plain(value: float) -> str:
    return f"{value:.2f}".replace("-", MINUS)


def span(interval: Sequence[float] | None, form: Any = number) -> str:
    return "–" if interval is None else f"{form(interval[0])} to {form(interval[1])}"
