"""Imports point one way."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Each module of harness may import modules of lower rank only (or, inside a package, its own).
RANK = {
    "types": 0,
    "ranks": 0,
    "coding": 1,
    "config": 1,
    "objectives": 1,
    "registry": 2,
    "store": 1,
    "ledger": 1,
    "capsule": 1,
    "problems": 3,
    "verifiers": 2,
    "fewshot": 4,
    "space": 3,
    "sweep": 9,
    "trial": 8,
    "models": 4,
    "study": 4,
    "points": 1,
    "folder": 2,
    "progress": 1,
    "standing": 2,
    "statistics": 3,
    "sizes": 5,
    "lab": 5,
    "trainer": 5,
    "standin": 6,
    "evaluation": 6,
    "cell": 7,
    "executors": 7.5,
    "report": 7,
    "verify": 7,
    "mirror": 6,
    "tracking": 7,
    "compare": 8,
    "probe": 8,
    "plan": 9,
    "reproduce": 9,
    "export": 9,
    "doctor": 9,
    "mechanisms": 9,
    "snr": 9,
    "cli": 10,
    "__main__": 11,
    "__init__": 0,
}
FOR_METHODS = {"types", "config", "registry", "objectives", "verifiers", "problems"}
FOR_TASKS = {"verifiers", "problems", "fewshot", "types"}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports at run time, function bodies included."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        todo += ast.iter_child_nodes(node)
    return found


def parts(name: str) -> tuple[str, str]:
    top, _, rest = name.partition(".")
    return top, rest.split(".")[0]


def test_harness_imports_point_down() -> None:
    files = sorted((ROOT / "harness").rglob("*.py"))
    assert len(files) > 25
    for path in files:
        unit = path.relative_to(ROOT / "harness").parts[0].removesuffix(".py")
        assert unit in RANK, f"give {unit} a rank"
        for name in imported(path):
            top, target = parts(name)
            assert top not in {"methods", "benchmarks", "tests"}, f"{path} imports {name}"
            if top == "harness" and target in RANK and target not in {unit, "__init__"}:
                assert RANK[target] < RANK[unit], f"{path} imports {name}"


def test_methods_see_the_author_surface_only() -> None:
    files = sorted((ROOT / "methods").rglob("*.py"))
    assert len(files) >= 5
    for path in files:
        package = ".".join(path.relative_to(ROOT).parts[:-1])
        for name in imported(path):
            top, target = parts(name)
            if top == "harness":
                assert target in FOR_METHODS, f"{path} imports {name}"
            if top == "methods":
                own = package not in {"methods", "methods.baselines"} and name.startswith(package)
                assert own, f"{path} imports another method: {name}"
            assert top not in {"benchmarks", "tests"}, f"{path} imports {name}"


def test_tasks_import_verifiers_and_problems_only() -> None:
    files = sorted((ROOT / "benchmarks" / "tasks").rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            top, target = parts(name)
            assert top not in {"methods", "tests"}, f"{path} imports {name}"
            assert top != "harness" or target in FOR_TASKS, f"{path} imports {name}"


def test_types_load_no_tensor_library() -> None:
    import subprocess
    import sys

    code = "import harness.types, harness.cli, sys; print([m for m in ('torch', 'transformers', 'mlflow', 'lm_eval', 'optuna') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
