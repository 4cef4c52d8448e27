"""Methods register with a decorator and are found by entry points; adding one edits nothing else."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import pkgutil
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from harness.config import Frozen, explain, nearest
from harness.types import Lab, Measure, Stage

GROUPS = ("retort.methods", "retort.problems")
FALLBACK = {"retort.methods": "methods", "retort.problems": "benchmarks"}  # a checkout on the path


class Method(Frozen, ABC):
    """A distillation method; its fields are its hyperparameters."""

    name: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset({"teacher.generate"})  # model.capability

    @abstractmethod
    def stages(self, lab: Lab) -> Iterator[Stage]:
        """The paper's algorithm; the trainer trains the student at each yield."""

    def required(self) -> frozenset[str]:
        """`needs`, and what this setting of the fields needs besides."""
        return self.needs

    def mechanisms(self, lab: Lab) -> Mapping[str, Measure | float]:
        """What the method's scorecard shows; nothing by default."""
        return {}


@dataclass(frozen=True)
class Field:
    """One hyperparameter, as `retort methods NAME` prints it."""

    name: str
    default: Any
    search: Mapping[str, Any] | None  # what a sweep explores
    choices: tuple[Any, ...]  # the values that there are, where they are listed
    meaning: str


M = TypeVar("M", bound=type[Method])
_METHODS: dict[str, type[Method]] = {}


def method(name: str, paper: str) -> Callable[[M], M]:
    """Register a method under a name, with its paper's id."""

    def register(cls: M) -> M:
        known = _METHODS.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(
                f"method {name!r} is registered twice: {known.__module__} and {cls.__module__}"
            )
        cls.name, cls.paper = name, paper
        _METHODS[name] = cls
        return cls

    return register


@cache
def plugins(group: str) -> list[ModuleType]:
    """The modules that installed packages offer under an entry-point group."""
    values = [entry.value for entry in entry_points(group=group)] or [FALLBACK[group]]
    return [importlib.import_module(value) for value in dict.fromkeys(values)]


@cache
def methods() -> dict[str, type[Method]]:
    """Every registered method by name."""
    for package in plugins("retort.methods"):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
    return dict(sorted(_METHODS.items()))


def get(name: str) -> type[Method]:
    if name not in methods():
        raise ValueError(f"unknown method {name!r}: {nearest(name, methods())}")
    return methods()[name]


def build(label: str, fields: Mapping[str, Any], source: str = "experiment") -> Method:
    """The method of one arm: `method` in its fields, or its label, names the class."""
    fields = dict(fields)
    name = fields.pop("method", label)
    try:
        cls = get(name)
    except ValueError as error:
        raise ValueError(f"{source}: methods.{label}: {error}") from None
    try:
        return cls.model_validate(fields)
    except ValidationError as error:
        raise ValueError(explain(error, f"{source}: methods.{label}", cls)) from None


def fields(cls: type[Method]) -> list[Field]:
    """A method's hyperparameters with their search ranges and the comments beside them."""
    comments = _comments(cls)
    found = []
    for name, info in cls.model_fields.items():
        extra = info.json_schema_extra
        space = extra.get("search") if isinstance(extra, dict) else None
        listed = get_origin(info.annotation) is Literal
        found.append(
            Field(
                name,
                info.default,
                space if isinstance(space, dict) else None,
                get_args(info.annotation) if listed else (),
                comments.get(name, ""),
            )
        )
    return found


def card(cls: type[Method]) -> str:
    """The method's README, or its module's docstring where it is a single file."""
    module = inspect.getmodule(cls)
    file = Path(inspect.getfile(cls))
    readme = file.parent / ("README.md" if file.name == "__init__.py" else f"{file.stem}.md")
    return (
        readme.read_text(encoding="utf-8") if readme.is_file() else (module.__doc__ or "").strip()
    )


def summary(cls: type[Method]) -> str:
    """What the method does: its module's first line, `Title: what it does (source).`"""
    module = inspect.getmodule(cls)
    first = (module.__doc__ or "").strip().split("\n")[0]
    return first.partition(": ")[2].partition(" (")[0].rstrip(".")


def paper_recipe(cls: type[Method]) -> dict[str, Any]:
    """The paper's setting: `fields`, `training`, `budget`; empty where no paper.yaml is kept."""
    file = Path(inspect.getfile(cls))
    path = file.parent / ("paper.yaml" if file.name == "__init__.py" else f"{file.stem}.paper.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _comments(cls: type[Method]) -> dict[str, str]:
    """The trailing comment of each field: its meaning and the paper's symbol."""
    source = inspect.getsource(cls)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node in definition.body:  # not the annotated names inside its functions
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            rows = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = " ".join(comments[row] for row in rows if row in comments)
    return found
