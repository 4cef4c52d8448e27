"""One YAML is one experiment: what runs, on what budget, and how it is judged."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

Quantity = Literal["teacher_generated", "teacher_scored", "student_generated"]


class Frozen(BaseModel):
    """Plain data: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def search(
    default: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    choices: Sequence[Any] | None = None,
    log: bool = False,
    ge: float | None = None,
    le: float | None = None,
) -> Any:
    """A hyperparameter: its default and the range that a sweep explores, on one line.

    The range also validates; `ge` and `le` allow a wider hard range than the one that is searched.
    """
    space: dict[str, Any] = (
        {"choices": list(choices)}
        if choices is not None
        else {"low": low, "high": high, "log": log}
    )
    return Field(
        default,
        ge=low if ge is None else ge,
        le=high if le is None else le,
        json_schema_extra={"search": space},
    )


class SamplingSettings(Frozen):
    """Defaults of every sample that a method draws, teacher's and student's alike."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_new_tokens: int = Field(1024, gt=0)


class Training(Frozen):
    """The optimizer loop, the same for every method."""

    batch_size: int = Field(64, gt=0)  # sequences an optimizer step
    learning_rate: float = Field(1e-3, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the budget
    min_lr: float = Field(0.1, ge=0, le=1)  # final learning rate over the peak
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = Field(1.0, gt=0)  # gradient norm
    max_length: int = Field(
        16384, gt=0
    )  # prompt and response; longer examples are dropped and counted
    micro_tokens: int = Field(16384, gt=0)  # padded tokens of one forward pass
    checkpoint_every: int = Field(100, gt=0)  # optimizer steps
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    gradient_checkpointing: bool = (
        False  # compute activations again: less memory, a third more FLOPs
    )
    packing: bool = False  # several sequences in one row, apart by their positions, no padding

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """At its default a key that came later is left out: digests of what was run before there was one stay."""
        data: dict[str, Any] = handler(self)
        return {k: v for k, v in data.items() if k not in LATER or v != LATER[k]}


LATER: dict[str, Any] = {"gradient_checkpointing": False, "packing": False}  # keys of `training`


class Budget(Frozen):
    """What a comparison may cost; exactly one of steps, trained_tokens and flops."""

    steps: int | None = Field(None, gt=0)
    trained_tokens: int | None = Field(None, gt=0)
    flops: float | None = Field(None, gt=0)
    caps: dict[Quantity, Annotated[int, Field(ge=0)]] = {}

    @model_validator(mode="after")
    def _one_measure(self) -> Budget:
        given = [k for k in ("steps", "trained_tokens", "flops") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a budget states exactly one of steps, trained_tokens, flops; got {given or 'none'}"
            )
        return self


class Benchmark(Frozen):
    """How one benchmark is sampled; None: as its task says."""

    n: int | None = Field(None, gt=0)  # samples a problem
    limit: int | None = Field(None, gt=0)  # problems; None: all of them
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    max_new_tokens: int | None = Field(None, gt=0)
    levels: list[int] | None = None
    options: dict[str, Any] = {}  # further options of its problem set, such as families
    bands: dict[str, list[int]] = {}  # name -> levels that get a table and verdicts of their own

    @model_validator(mode="after")
    def _samples_differ(self) -> Benchmark:
        if self.n is not None and self.n > 1 and self.temperature == 0:
            raise ValueError(f"n = {self.n} greedy samples are equal: give a temperature above 0")
        for band, levels in self.bands.items():
            known = levels if self.levels is None else self.levels
            if not levels or not set(levels) <= set(known):
                raise ValueError(f"bands.{band}: some of the levels {known}, got {levels}")
        return self


class Range(Frozen):
    """What a sweep explores of one field; what is not given is as the field itself says."""

    low: float | None = None
    high: float | None = None
    log: bool | None = None
    choices: list[Any] | None = Field(None, min_length=1)
    num: int | None = Field(None, gt=1)  # values of it in a grid
    when: dict[str, list[Any]] = {}  # searched only where other fields have one of these values

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        if self.choices is not None and (self.low, self.high, self.log) != (None, None, None):
            raise ValueError("either choices, or low, high and log")
        return self


class Sweep(Frozen):
    """How a sweep tunes. Further keys are ranges: of a field, {alpha: {low: 0, high: 2}}, or of an arm's, {paced: {alpha: …}}."""

    model_config = ConfigDict(frozen=True, extra="allow", validate_default=True)
    __pydantic_extra__: dict[str, Any]

    objective: str = "dev"  # accuracy on dev problems of every training set; dev/NAME: of one
    dev_problems: int = Field(200, gt=1)  # in equal parts from the training sets
    share: float = Field(0.25, gt=0, le=1)  # of the budget, for a trial
    seeds: int = Field(1, gt=0)  # training seeds of a trial, 0, 1, …
    points: list[Annotated[float, Field(gt=0, lt=1)]] = [0.5]  # of a trial's budget, to prune at
    confirm_seeds: int = Field(3, ge=0)  # fresh training seeds for the best and the suite's own
    only: list[str] | None = None  # fields; None: all that methods say are searched
    training: dict[str, Any] = {}  # ranges of the training's own, such as learning_rate
    budget: dict[Literal["steps"], Any] = {}  # steps of the full budget; a trial makes its share
    heartbeat: int = Field(60, gt=0)  # seconds, with a database: silent for twice as long is dead


class Adapter(Frozen):
    """LoRA (arXiv:2106.09685): W + (alpha / r) B A, of which A [r, in] and B [out, r] are trained."""

    r: int = Field(16, gt=0)
    alpha: float | None = Field(None, gt=0)  # None: 2 r
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"  # modules, as peft names them


class Engine(Frozen):
    """How vLLM runs a model; further keys go to its engine as they are."""

    model_config = ConfigDict(frozen=True, extra="allow", validate_default=True)

    tensor_parallel_size: int = Field(1, gt=0)  # GPUs that one copy is spread over
    data_parallel_size: int = Field(1, gt=0)  # copies
    gpu_memory_utilization: float = Field(0.5, gt=0, lt=1)
    max_model_len: int | None = Field(None, gt=0)  # tokens; None: the model's own
    max_logprobs: int = Field(20, gt=0)  # K: entropies are of the K likeliest tokens, and bounded
    enforce_eager: bool = False


class Checkpoint(Frozen):
    """A model with weights: a name, a folder or a Hub id, and how it is run."""

    model: str
    engine: Literal["hf", "vllm"] = "hf"  # what writes and scores; training is always hf
    vllm: Engine = Engine()
    adapter: Adapter | None = None  # of a student: train LoRA weights only
    dtype: Literal["fp32", "bf16", "fp16"] | None = None  # None: fp32 on a CPU, bf16 on a GPU
    attn_implementation: str | None = None  # None: as Transformers chooses
    quantize: Literal["8bit", "4bit"] | None = None  # of a frozen model, by bitsandbytes
    offload: bool = False  # of a frozen model: layers that do not fit are kept in main memory

    @model_validator(mode="after")
    def _engine_is_used(self) -> Checkpoint:
        if self.engine == "hf" and self.vllm != Engine():
            raise ValueError(
                "`vllm: {…}` is for `engine: vllm`, and this model runs on Transformers"
            )
        return self


class Server(Frozen):
    """A model behind an OpenAI-compatible server: it writes; as one of `models`, it judges."""

    server: str = Field(pattern=r"^https?://")  # http://host:port/v1
    model: str
    key: str = Field(
        "OPENAI_API_KEY", pattern=r"^\w+$"
    )  # the environment variable that holds the key
    api: Literal["chat", "completions"] = "chat"  # who applies the chat template: it, or the bench
    tokens: Literal["text", "ids"] = "text"  # ids: of vLLM, with their log-probabilities
    tokenizer: str | None = None  # a folder or Hub id; None: the student's, over its text
    prefix: Literal["continue", "refuse"] = "refuse"  # of chat: may it go on from a begun answer
    body: dict[str, Any] = {}  # further keys of each request's body; null leaves a key out
    concurrency: int = Field(8, gt=0)  # requests at a time
    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0)
    attempts: int = Field(5, gt=0)
    timeout: float = Field(600.0, gt=0)  # seconds of one attempt
    price: dict[Literal["input", "output"], Annotated[float, Field(ge=0)]] = {}  # of 1e6 tokens

    WRITING: ClassVar = ("api", "tokens", "tokenizer", "prefix", "body", "price")  # not of a judge


class Replay(Frozen):
    """A teacher that only replays a file of traces."""

    traces: str


class YesNo(Frozen):
    """A judge: a language model that is asked yes or no."""

    ask: str | Checkpoint


ModelSpec = Checkpoint | Server | Replay | YesNo


def model_spec(spec: str | Path | Mapping[str, Any] | ModelSpec, who: str = "model") -> ModelSpec:
    """The line of a suite that names a model; a mistake is one readable ValueError."""
    if isinstance(spec, Frozen):
        return spec
    if not isinstance(spec, Mapping):
        return Checkpoint(model=str(spec))
    kinds: dict[str, type[ModelSpec]] = {
        "traces": Replay, "server": Server, "ask": YesNo, "model": Checkpoint
    }  # fmt: skip
    kind = next((kinds[key] for key in kinds if key in spec), None)
    if kind is None:
        raise ValueError(
            f"{who}: a name, {{model: …}}, {{traces: file.jsonl}}, {{server: …, model: …}} or {{ask: …}}; "
            f"found the keys {', '.join(map(str, spec))}"
        )
    try:
        return kind.model_validate(spec)
    except ValidationError as error:
        raise ValueError(explain(error, who, kind)) from None


class Contamination(Frozen):
    """When a training problem counts as overlapping a benchmark."""

    rule: Literal["half", "any", "none"] = "half"


# Folders of results/ that no suite may write to
TAKEN = ("store", "eval", "mlartifacts", "reference")


class Experiment(Frozen):
    """A comparison, whole."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    student: str | dict[str, Any]
    teacher: str | dict[str, Any]
    models: dict[
        str, str | dict[str, Any]
    ] = {}  # further models by the name that a method asks for
    problems: dict[str, dict[str, Any]]  # problem set -> options (n, levels, …)
    benchmarks: dict[str, Benchmark]
    seeds: int = Field(3, gt=0)  # training seeds 0, 1, …
    data_seeds: list[int] = Field([0], min_length=1)
    budget: Budget | Literal["paper"]
    reference: str = "sft"  # the arm that verdicts are about, besides base
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1
    )  # label -> fields; `method` defaults to it
    training: Training = Training()
    sampling: SamplingSettings = SamplingSettings()
    contamination: Contamination = Contamination()
    sweep: Sweep = Sweep()
    workers: int = Field(1, gt=0)  # cells at a time
    threads: int | None = Field(None, gt=0)  # of one cell; None: all cores over workers
    data_dir: Path | None = None  # local benchmark files, like RETORT_DATA

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        for key in ("problems", "benchmarks"):
            if isinstance(data.get(key), str):
                data[key] = [data[key]]
        for key in ("problems", "benchmarks", "methods"):
            if isinstance(data.get(key), list):
                for item in data[key]:
                    if not isinstance(item, str):
                        raise ValueError(
                            f"{key}: a list holds names only, got {item!r}; with options write a mapping, "
                            f"{key}: {{NAME: {{…}}}}"
                        )
                data[key] = {name: {} for name in data[key]}
            if isinstance(data.get(key), Mapping):
                data[key] = {k: {} if v is None else v for k, v in data[key].items()}
        return data

    @model_validator(mode="after")
    def _labels(self) -> Experiment:
        if self.name in TAKEN:
            raise ValueError(
                f"name: results/{self.name} is not for a suite ({', '.join(TAKEN)} are the bench's own): take another name"
            )
        for label, fields in self.methods.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", label):
                raise ValueError(
                    f"methods: the label {label!r} must be letters, digits and . _ + -"
                )
            if not isinstance(fields.get("method", ""), str):
                raise ValueError(
                    f"methods.{label}.method: a method's name, got {fields['method']!r}"
                )
            for part in ("training", "budget"):
                if not isinstance(fields.get(part, {}), Mapping):
                    raise ValueError(
                        f"methods.{label}.{part}: a mapping of keys to values, got {fields[part]!r}"
                    )
        for name, options in self.problems.items():
            if not isinstance(options.get("n", 1), int) or options.get("n", 1) < 1:
                raise ValueError(
                    f"problems.{name}.n: a number of problems above 0, got {options['n']!r}"
                )
            if not isinstance(options.get("levels", []), list):
                raise ValueError(f"problems.{name}.levels: a list, got {options['levels']!r}")
        if not isinstance(student := model_spec(self.student, "student"), Checkpoint):
            raise ValueError(f"student: a name or {{model: …}}, got {self.student!r}")
        if student.quantize or student.offload:
            raise ValueError("student: quantised and offloaded weights cannot be trained")
        teacher = model_spec(self.teacher, "teacher")
        if isinstance(teacher, YesNo):
            raise ValueError(f"teacher: a model that writes, got {self.teacher!r}")
        others = {who: model_spec(spec, f"models.{who}") for who, spec in self.models.items()}
        for who, spec in others.items():
            if isinstance(spec, Server):
                writing = [key for key in Server.WRITING if key in spec.model_fields_set]
                if writing:
                    raise ValueError(
                        f"models.{who}: {', '.join(writing)} say how a server writes, and as one of `models` it judges"
                    )
        for who, spec in {"teacher": teacher, **others}.items():
            if isinstance(spec, Checkpoint) and spec.adapter is not None:
                raise ValueError(f"{who}: only a student has an adapter")
        if len(set(self.data_seeds)) < len(self.data_seeds):
            raise ValueError(f"data_seeds: each once, got {self.data_seeds}")
        if "base" in self.methods:
            raise ValueError("the label 'base' is taken by the untrained student: choose another")
        if self.reference not in self.methods and self.reference != "base":
            raise ValueError(
                f"reference: {self.reference!r} is not one of the methods "
                f"({', '.join(self.methods)}) and not 'base'"
            )
        return self

    @property
    def hash(self) -> str:
        """Digest of everything that decides the results, threads among them; name and workers do not."""
        data = self.model_dump(mode="json", exclude={"name", "workers", "data_dir", "sweep"})
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The tail of an error message: the closest valid name and the list of all."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(allowed) or 'none'}"


def find_suite(suite: str | Path, folders: Sequence[Path]) -> Path:
    """A path, or the name of a YAML file in one of the folders."""
    path = Path(suite)
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        if path.is_file():
            return path
        raise ValueError(f"suite {str(suite)!r}: there is no such file")
    known = {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    if str(suite) in known:
        return known[str(suite)]
    raise ValueError(f"unknown suite {str(suite)!r}: {nearest(str(suite), known)}; or give a path")


def load(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a suite and apply `key.key=value` overrides; errors name the file and the key."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "not valid YAML"
        raise ValueError(f"{path}{where}: {what}") from None
    if not isinstance(data, dict):
        raise ValueError(
            f"{path}: a suite is a mapping of keys to values, got {type(data).__name__}"
        )
    data.setdefault("name", path.stem)
    for override in overrides:
        _override(data, override)
    return parse(data, str(path))


def parse(data: Mapping[str, Any], source: str = "experiment") -> Experiment:
    """Validate plain data; every mistake becomes part of one readable ValueError."""
    try:
        return Experiment.model_validate(data)
    except ValidationError as error:
        raise ValueError(explain(error, source, Experiment)) from None


_BRANCHES = ("function-", "literal[", "Budget", "dict[")  # pydantic's names for a union's branches


def explain(error: ValidationError, source: str, model: type[BaseModel]) -> str:
    """A pydantic error in words: file, key, what was given, what is allowed."""
    lines = []
    for item in error.errors():
        path = [part for part in map(str, item["loc"]) if not part.startswith(_BRANCHES)]
        key = ".".join(path) or "(top level)"
        if item["type"] == "literal_error" and path and isinstance(item["input"], Mapping):
            continue  # the other branch of a union says what is wrong
        if item["type"] == "extra_forbidden":
            text = f"unknown key {key!r}: {nearest(path[-1], _keys(model, path[:-1]))}"
        elif item["type"] == "missing":
            text = f"key {key!r} is missing"
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = "" if isinstance(item["input"], Mapping) else f" (got {item['input']!r})"
            if path[-1:] == ["key"]:  # somebody may have put the key itself there
                given = ": the name of an environment variable, not the key"
            text = f"key {key!r}: {message[0].lower()}{message[1:]}{given}"
        lines.append(f"{source}: {text}")
    return "\n".join(dict.fromkeys(lines))


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {override!r}: write key.key=value, for example budget.steps=50")
    *parents, last = key.split(".")
    node = data
    for index, parent in enumerate(parents):
        named = parents[: index + 1]
        if isinstance(node.get(parent), str) and (
            named in (["student"], ["teacher"]) or (len(named) == 2 and named[0] == "models")
        ):
            node[parent] = {"model": node[parent]}
        elif isinstance(node.get(parent), (str, list)):  # short forms: a name, or a list of names
            names = [node[parent]] if isinstance(node[parent], str) else node[parent]
            node[parent] = {name: {} for name in names}
        elif node.get(parent) is None:
            node[parent] = {}
        if not isinstance(node[parent], dict):
            raise ValueError(f"--set {override!r}: {'.'.join(parents[: index + 1])} holds a value")
        node = node[parent]
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--set {override!r}: {value!r} is not valid YAML") from None


def _keys(model: type[BaseModel], path: Sequence[str]) -> Iterable[str]:
    """The field names that are valid at a key's parent."""
    for part in path:
        field = model.model_fields.get(part)
        if field is None:
            continue  # a key of a mapping, such as a benchmark's name
        candidates = [field.annotation, *get_args(field.annotation)]
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not found:
            return ()
        model = found[0]
    return model.model_fields
