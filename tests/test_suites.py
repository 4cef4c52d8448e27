"""The suites that are shipped: each is valid, and the one on real text runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import SUITES
from harness import compare, config
from harness.compare import check
from harness.space import space

NAMES = sorted(path.stem for path in SUITES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_suite_is_valid(name: str) -> None:
    setting = config.load(SUITES / f"{name}.yaml")
    assert setting.name == name
    check(setting, list(setting.methods))
    for label in setting.methods:
        space(setting, label)


def test_the_suites_were_found() -> None:
    assert {"quickstart", "gsm8k-smoke", "heal-ceiling", "heal-ablations"} <= set(NAMES)


if os.environ.get("RETORT_DATA"):

    @pytest.mark.slow
    def test_gsm8k_smoke_runs_on_real_data(tmp_path: Path) -> None:
        """Real problems through models that know no English: nothing is right, nothing breaks, all is counted."""
        summary = compare("gsm8k-smoke", limit=10, results=tmp_path, quiet=True, track=False)
        assert [cell["method"] for cell in summary["cells"]] == ["base", "sft", "limo", "paced"]
        for cell in summary["cells"]:
            assert cell["n_problems"] == 10
            assert cell["accuracy"] == 0 and cell["unparsed"] == 10
        assert {pair["verdict"] for pair in summary["pairs"]} == {"cannot tell"}
