"""What a sweep explores: a method's `search` fields, as its suite narrows, widens and adds to them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from harness import registry
from harness.config import Experiment, Range, Training, explain, nearest

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

Kind = Literal["float", "int", "choice"]
SHARED = ("training.", "budget.")  # dimensions that are not of the method


@dataclass(frozen=True)
class Dimension:
    """One searched field."""

    kind: Kind
    low: Any = None
    high: Any = None
    log: bool = False
    choices: tuple[Any, ...] = ()
    num: int | None = None  # values in a grid; None: as many as the trials allow
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __contains__(self, value: Any) -> bool:
        if self.kind == "choice":
            return any(value == each and type(value) is type(each) for each in self.choices)
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        found: dict[str, Any] = {"kind": self.kind}
        if self.kind == "choice":
            found["choices"] = list(self.choices)
        else:
            found |= {"low": self.low, "high": self.high, "log": self.log}
        if self.when:
            found["when"] = {name: list(values) for name, values in self.when.items()}
        return found

    def suggest(self, name: str, trial: BaseTrial) -> Any:
        if self.kind == "choice":
            return trial.suggest_categorical(name, self.choices)
        if self.kind == "int":
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def values(self, most: int) -> list[Any]:
        """At most so many values, evenly spaced (in the logarithm, where that is searched)."""
        if self.kind == "choice":
            return list(self.choices)
        count = self.num or most
        low, high = float(self.low), float(self.high)
        at = [i / (count - 1) for i in range(count)]
        found = [low * (high / low) ** x if self.log else low + (high - low) * x for x in at]
        found[-1] = high  # exactly
        return sorted({round(v) for v in found}) if self.kind == "int" else found


@dataclass(frozen=True)
class Space:
    """The dimensions of one arm, those that stand under a condition last."""

    label: str
    dimensions: Mapping[str, Dimension]
    fixed: Mapping[str, Any]  # what the sweep's section sets
    known: Mapping[str, Any]  # every field at the suite's value, for conditions

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """One setting of the searched fields."""
        params: dict[str, Any] = {}
        for name, dimension in self.dimensions.items():
            if self.holds(dimension, params):
                params[name] = dimension.suggest(name, trial)
        return params

    def holds(self, dimension: Dimension, params: Mapping[str, Any]) -> bool:
        """Whether the conditions of a dimension are met."""
        return all(
            {**self.known, **params}[name] in values for name, values in dimension.when.items()
        )

    @property
    def default(self) -> dict[str, Any]:
        """The suite's own values of the searched fields."""
        return {
            name: self.known[name]
            for name, dimension in self.dimensions.items()
            if self.holds(dimension, {})
        }

    @property
    def default_inside(self) -> bool:
        """Whether the suite's own setting lies within the ranges."""
        return all(value in self.dimensions[name] for name, value in self.default.items())

    def describe(self) -> dict[str, Any]:
        return {name: dimension.describe() for name, dimension in self.dimensions.items()}

    def grid(self, trials: int) -> dict[str, list[Any]]:
        """Values of each dimension whose combinations are at most so many."""
        for name, dimension in self.dimensions.items():
            if dimension.when:
                raise ValueError(
                    f"a grid has no conditional fields, and {name} is searched only when "
                    f"{', '.join(dimension.when)} is right: take another --sampler, or fix it under sweep:"
                )
        best: dict[str, list[Any]] | None = None
        for most in itertools.count(2):
            axes = {name: each.values(most) for name, each in self.dimensions.items()}
            size = math.prod(map(len, axes.values()))
            if size > trials or axes == best:
                break
            best = axes
        if best is None:
            raise ValueError(
                f"a grid over {', '.join(self.dimensions)} has {size} points at least, and there are {trials} "
                "trials: name fewer fields with sweep.only, or ask for more trials"
            )
        return best

    def size(self, trials: int) -> int:
        """The points of a grid of at most so many."""
        return math.prod(map(len, self.grid(trials).values()))

    def arm(self, given: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
        """An arm of the suite with what the sweep fixes and a trial's values put in."""
        arm = {"method": self.label, **given}
        for name, value in {**self.fixed, **params}.items():
            part, dot, key = name.partition(".")
            if dot:
                arm[part] = {**arm.get(part, {}), key: value}
            else:
                arm[name] = value
        return arm


def space(setting: Experiment, label: str) -> Space:
    """The space of one arm; refuses what is not a field, not searchable, or out of a field's bounds."""
    given = setting.methods[label]
    cls = registry.get(given.get("method", label))
    fields = {each.name: each for each in registry.fields(cls)}
    searched = [name for name, each in fields.items() if each.search is not None]
    wanted, only = _wanted(setting, label, cls)
    if only is not None:
        for name in only:
            if name not in fields:
                raise ValueError(
                    f"sweep.only: {cls.name} has no field {name!r}: {nearest(name, fields)}"
                )
    paper = registry.paper_recipe(cls) if setting.budget == "paper" else {}
    budget = paper.get("budget", {}) if setting.budget == "paper" else setting.budget.model_dump()
    steps = budget.get("steps")
    values = {**paper.get("fields", {}), **given}
    training = setting.training.model_dump() | paper.get("training", {})
    known = {name: values.get(name, each.default) for name, each in fields.items()}
    known |= {f"training.{k}": v for k, v in (training | given.get("training", {})).items()}
    known["budget.steps"] = given.get("budget", {}).get("steps", steps)
    most = {"budget.steps": steps}
    if steps is not None:  # in which a larger batch is more training
        most["training.batch_size"] = known["training.batch_size"]
    dimensions: dict[str, Dimension] = {}
    fixed: dict[str, Any] = {}
    asked = [name for name in searched if only is None or name in only]
    for name in dict.fromkeys([*asked, *(only or ()), *wanted]):
        where, value = wanted.get(name, (f"sweep.{name}", {}))
        if value is None:  # not searched: as the suite has it
            continue
        if not isinstance(value, Mapping):
            fixed[name] = known[name] = _valid(where, _info(cls, name), value)
            _within(where, name, value, most)
            continue
        dimensions[name] = _dimension(where, cls, name, value, most, searched)
    for name, dimension in dimensions.items():
        for other in dimension.when:
            if other not in known or dimensions.get(other, Dimension("int")).when:
                raise ValueError(
                    f"sweep.{name}.when: another field that has no condition itself, got {other!r}: "
                    f"{nearest(other, known)}"
                )
    ordered = sorted(dimensions.items(), key=lambda item: bool(item[1].when))
    return Space(label, dict(ordered), fixed, known)


def changed(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two pieces of plain data differ, in words: `alpha.high was 3, is 2`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for key in dict.fromkeys([*old, *new])
            for line in changed(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        ]
    if old == new:
        return []
    was, now = ("not there" if each is None else _brief(each) for each in (old, new))
    return [f"{path} was {was}, is {now}"]


def tuned(
    setting: Experiment, labels: Sequence[str], path: Path
) -> tuple[Experiment, dict[str, Any]]:
    """The suite, named NAME-tuned, with each arm at the best setting of its study in a sweep.json; and what tuning each took.

    Refuses studies of another setting, and unequal effort. An arm with nothing to tune stays as it is.
    """
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    studies = {study["label"]: study for study in found.get("studies", ())}
    arms, effort = dict(setting.methods), {}
    equal: dict[str, Any] = {}
    for label in labels:
        if not space(setting, label).dimensions:
            continue
        again = f"retort sweep {setting.name} --method {label}"
        study = studies.get(label)
        if study is None or study["best"] is None:
            raise ValueError(
                f"--tuned: {path} has no finished sweep of {label}: run {again}, or leave it out with --methods"
            )
        if different := changed(study["of"], of(setting, label)):
            raise ValueError(
                f"--tuned: the sweep of {label} was of another setting ({'; '.join(different[:3])}): "
                f"say the same here with --set, or run {again} anew"
            )
        ended = sum(each["state"] in ("complete", "pruned") for each in study["trials"])
        if ended < study["trials_asked"]:
            raise ValueError(
                f"--tuned: the sweep of {label} has ended {ended} of {study['trials_asked']} trials: run {again} to its "
                "end, or leave it out with --methods"
            )
        equal[label] = {key: study[key] for key in ("trials_asked", "share", "seeds", "dev")}
        arms[label] = study["best"]["arm"]
        effort[label] = {
            "trials": study["trials_asked"],
            "params": study["best"]["params"],
            "dev": study["best"]["value"],
            "ledger": study["ledger"],
        }
    first = next(iter(equal), "")
    for label, mine in equal.items():
        if different := changed(equal[first], mine):
            raise ValueError(
                f"--tuned: {first} and {label} were not tuned with equal effort ({'; '.join(different)}): "
                "sweep them alike, or leave one out with --methods"
            )
    data = setting.model_dump(mode="json")
    return (
        Experiment.model_validate({**data, "methods": arms, "name": f"{setting.name}-tuned"}),
        effort,
    )


def of(setting: Experiment, label: str) -> dict[str, Any]:
    """What decides a trial's result besides its params; a study goes on only under the same."""
    data = setting.model_dump(mode="json")
    parts = (
        "student",
        "teacher",
        "models",
        "problems",
        "data_seeds",
        "budget",
        "training",
        "sampling",
    )
    sweep = ("objective", "dev_problems", "share", "seeds")
    arm = space(setting, label)
    values = {**arm.known, **arm.fixed}
    shared = {f"training.{name}": value for name, value in setting.training.model_dump().items()}
    shared["budget.steps"] = getattr(setting.budget, "steps", None)
    found = {
        **{name: data[name] for name in parts},
        "sweep": {name: data["sweep"][name] for name in sweep},
        "arm": {
            name: value
            for name, value in values.items()
            # of training and budget only what the arm, its paper or the sweep says otherwise
            if name not in arm.dimensions and not (name in shared and shared[name] == value)
        },
    }
    return dict(json.loads(json.dumps(found, default=str)))  # as it is read back


# -- reading the sweep's section ----------------------------------------------------------------


def _wanted(
    setting: Experiment, label: str, cls: type[registry.Method]
) -> tuple[dict[str, tuple[str, Any]], list[str] | None]:
    """What the section says of this arm's fields, {name: (where it stands, value)}, and the fields that it is only about."""
    sweep = setting.sweep
    names = {setting.methods[each].get("method", each): each for each in setting.methods}
    everyones = {f for name in names for f in registry.get(name).model_fields}
    found: dict[str, tuple[str, Any]] = {}
    only = sweep.only
    for key, value in sweep.__pydantic_extra__.items():
        if key in setting.methods or key not in everyones:
            continue
        if key in cls.model_fields:
            found[key] = (f"sweep.{key}", value)
    for key, value in sweep.__pydantic_extra__.items():
        if key not in setting.methods:
            if key not in everyones:
                settings = list(type(sweep).model_fields)
                raise ValueError(
                    f"{setting.name}: sweep.{key}: not a setting of sweeps, nor an arm, nor a field of a method of "
                    f"this suite: {nearest(key, [*settings, *setting.methods, *everyones])}"
                )
            continue
        if key != label:
            continue
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{setting.name}: sweep.{key}: a mapping of fields to ranges, got {value!r}"
            )
        for name, mine in value.items():
            if name == "only":
                if not isinstance(mine, list):
                    raise ValueError(
                        f"{setting.name}: sweep.{key}.only: a list of fields, got {mine!r}"
                    )
                only = mine
            elif name in ("training", "budget") and isinstance(mine, Mapping):
                found |= {f"{name}.{k}": (f"sweep.{key}.{name}.{k}", v) for k, v in mine.items()}
            else:
                found[name] = (f"sweep.{key}.{name}", mine)
    for part in ("training", "budget"):
        for name, mine in getattr(sweep, part).items():
            found.setdefault(f"{part}.{name}", (f"sweep.{part}.{name}", mine))
    return found, only


def _dimension(
    where: str,
    cls: type[registry.Method],
    name: str,
    value: Mapping[str, Any],
    most: Mapping[str, int | None],
    searched: Sequence[str],
) -> Dimension:
    try:
        given = Range.model_validate(value)
    except ValidationError as error:
        raise ValueError(explain(error, where, Range)) from None
    info = _info(cls, name, where)
    extra = info.json_schema_extra
    said: Any = extra.get("search") if isinstance(extra, dict) else None
    usual: dict[str, Any] = said or {}
    when = {other: tuple(values) for other, values in given.when.items()}
    listed = _choices(info)
    whole = int in _types(info) and float not in _types(info)
    number = listed is None and (whole or float in _types(info))
    if not (usual or listed or name.startswith(SHARED)):
        raise ValueError(
            f"{where}: {cls.name} does not search {name}: searchable are {', '.join(searched) or 'none'}, and by "
            "choices: […] whatever has listed values"
        )
    if given.choices is not None or "choices" in usual or not number:
        named = given.choices or usual.get("choices")
        if (given.low, given.high) != (None, None) or named is None:
            values = listed or usual.get("choices", ())
            raise ValueError(
                f"{where}: {name} is one of {', '.join(map(str, values))}: give choices: […]"
            )
        chosen = tuple(_valid(where, info, each) for each in named)
        if not all(each is None or isinstance(each, (str, int, float)) for each in chosen):
            raise ValueError(f"{where}: choices are numbers, text, true or false, got {named!r}")
        _within(where, name, max(chosen) if number else None, most)
        return Dimension("choice", choices=chosen, when=when)
    low = usual.get("low") if given.low is None else given.low
    high = usual.get("high") if given.high is None else given.high
    if low is None or high is None:
        raise ValueError(f"{where}: give low and high, got {dict(value)!r}")
    _within(where, name, high, most)
    low, high = (_valid(where, info, int(v) if whole and v == int(v) else v) for v in (low, high))
    log = bool(usual.get("log")) if given.log is None else given.log
    if not low < high:
        raise ValueError(f"{where}: low must be below high, got {low:g} and {high:g}")
    if log and low <= 0:
        raise ValueError(f"{where}: a logarithmic range is above 0, got low {low:g}")
    kind: Kind = "int" if whole else "float"
    return Dimension(kind, low, high, log, num=given.num, when=when)


def _within(where: str, name: str, high: Any, most: Mapping[str, int | None]) -> None:
    """Refuse a dimension along which a trial could train on more than its budget."""
    if name not in most or (most[name] is not None and high <= most[name]):
        return
    limit = f"the steps of the budget, which has {most[name]}"
    if name == "training.batch_size":
        limit = f"the suite's batch size of {most[name]}, as the budget is in steps"
    elif most[name] is None:
        limit = "the steps of the budget, which is not in steps"
    raise ValueError(f"{where}: at most {limit}; got up to {high:g}")


def _info(cls: type[registry.Method], name: str, where: str = "") -> FieldInfo:
    """The field behind a dimension: the method's, the training's, or the budget's."""
    part, dot, key = name.partition(".")
    model: type[BaseModel] = cls
    if dot and part == "training":
        model = Training
    elif dot:  # not the budget's own, which may be None
        return FieldInfo.from_annotated_attribute(int, Field(gt=0))
    if (key or name) not in model.model_fields:
        of = cls.name if model is cls else part
        raise ValueError(
            f"{where or name}: {of} has no field {key or name!r}: {nearest(key or name, model.model_fields)}"
        )
    return model.model_fields[key or name]


def _valid(where: str, info: FieldInfo, value: Any) -> Any:
    """The value as the field takes it, or the field's own reason against it."""
    annotated: Any = (
        Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
    )
    try:
        return TypeAdapter(annotated).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(
            f"{where}: {value!r} is out of the field's bounds: {reason[0].lower()}{reason[1:]}"
        ) from None


def _choices(info: FieldInfo) -> tuple[Any, ...] | None:
    """The values of a field that lists them."""
    if info.annotation is bool:
        return (False, True)
    listed = tuple(_literals(info.annotation))
    return listed or None


def _literals(annotation: Any) -> Iterator[Any]:
    for each in get_args(annotation):
        if isinstance(each, (str, int, float)):
            yield each
        elif each is type(None):
            yield None
        else:
            yield from _literals(each)


def _types(info: FieldInfo) -> tuple[Any, ...]:
    return get_args(info.annotation) or (info.annotation,)


def _brief(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
