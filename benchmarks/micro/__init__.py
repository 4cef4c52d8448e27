"""The micro world: problems whose every step can be judged, and four small models that live in it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.micro import code, math
from benchmarks.micro.problems import MICRO_VERSION, MicroSet

MATH = MicroSet(
    name="micro_math",
    families={"reduce": math.draw_reduce, "solve": math.draw_solve},
    levels={"reduce": (1, 2, 3, 4, 5, 6, 7), "solve": (1, 2, 3, 4, 5, 6)},
    oracle=math.MathOracle(),
)
CODE = MicroSet(
    name="micro_code",
    families={"code": code.draw_code},
    levels={"code": (2, 3, 4, 5, 6)},
    oracle=code.CodeOracle(),
)
CHECKPOINTS = {
    f"micro/{name}": Path(__file__).parent / "checkpoints" / name
    for name in ("teacher", "student", "either", "prm")
}

__all__ = ["CHECKPOINTS", "CODE", "MATH", "MICRO_VERSION"]
