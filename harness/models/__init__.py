"""The model backends, and how a line of a suite becomes one of them. Importing this loads no tensor library."""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.config import Checkpoint, ModelSpec, Replay, Server, YesNo, model_spec
from harness.models.codec import Bytes, Codec
from harness.types import Capability, LanguageModel

__all__ = ["capabilities", "check_pair", "find", "load"]

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
EXTRAS = {"adapter": ("peft", "adapters"), "quantize": ("bitsandbytes", "quantized")}
CLASSIFIERS = ("ForTokenClassification", "ForSequenceClassification")  # process reward models


def load(
    spec: str | Path | Mapping[str, Any] | ModelSpec,
    *,
    checkpoints: Mapping[str, Path] | None = None,
    tokenizer_of: Codec | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    writes: bool = False,
) -> Any:
    """The model that a suite names: a checkpoint's name, a folder, a Hub id, {model: …}, {traces: …}, {ask: …} or {server: …, model: …}.

    Replayed traces and what a server writes are tokenized as by `tokenizer_of`, the student. Classifiers, models that are asked
    yes or no, and servers unless they are to write are `RewardModel`s, all else is a `LanguageModel`. An adapter is drawn from the seed.
    """
    known = dict(checkpoints or {})
    described = model_spec(spec)
    if isinstance(described, Replay):
        from harness.models.traces import TraceFile

        if tokenizer_of is None:
            raise ValueError(
                "traces have no tokenizer of their own: only a teacher can be replayed"
            )
        return TraceFile(described.traces, tokenizer_of)
    if isinstance(described, Server):
        from harness.models.openai import JudgeServer, ServerModel

        if not writes:
            return JudgeServer(described)
        return ServerModel(described, codec(described, known, tokenizer_of))
    if isinstance(described, YesNo):
        from harness.models.reward import YesNo as Judge

        return Judge(load(described.ask, checkpoints=checkpoints, device=device, dtype=dtype))
    check_extras(described)
    name, path = find(spec, known)
    check_options(described)
    given: dict[str, Any] = {
        "attn_implementation": described.attn_implementation,
        "quantize": described.quantize,
        "offload": described.offload,
    }
    try:
        backend: Any
        if described.engine == "vllm":
            from harness.models.vllm import VLLM

            where = path if path.is_dir() else name
            return VLLM.load(where, described.vllm, dtype=described.dtype or dtype, name=name)
        if classifies(name, path, known):
            from harness.models.reward import RewardHF as backend
        else:
            from harness.models.hf import HFModel as backend

            given |= {"adapter": described.adapter, "seed": seed}
        return backend.load(
            path if path.is_dir() else name,
            device=device,
            dtype=described.dtype or dtype,
            name=name,
            **given,
        )
    except OSError as error:
        raise ValueError(not_found(name, known, str(error).strip().split("\n")[0])) from error


def codec(spec: Server, known: Mapping[str, Path], student: Codec | None) -> Codec:
    """What makes tokens of a server's text: its tokenizer, the student's, or for want of both, bytes."""
    if spec.tokenizer is None:
        return student or Bytes()
    from harness.models.text import Text

    try:
        return Text.of(known.get(spec.tokenizer, spec.tokenizer), spec.tokenizer)
    except OSError as error:
        raise ValueError(
            not_found(spec.tokenizer, known, str(error).strip().split("\n")[0])
        ) from error


def find(
    spec: str | Path | Mapping[str, Any] | ModelSpec, known: Mapping[str, Path]
) -> tuple[str, Path]:
    """A model's name and its folder (or Hub id), without loading it; refuses what cannot be one."""
    described = model_spec(spec)
    if isinstance(described, YesNo):
        return find(described.ask, known)
    if isinstance(described, Replay):
        return described.traces, Path(described.traces)
    if isinstance(described, Server):
        return described.model, Path(described.model)
    name = described.model
    path = Path(known.get(name, name))
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise ValueError(
                f"model {name!r} is an adapter without the model under it: give a folder with the two merged, which for a "
                "student trained here is the one that `adapter` lies in"
            )
        return name, path
    mistyped = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if name in known or mistyped or not HUB_ID.fullmatch(name):
        raise ValueError(not_found(name, known))
    return name, path


def capabilities(
    spec: str | Path | Mapping[str, Any] | ModelSpec,
    known: Mapping[str, Path],
    *,
    trained: bool = False,
    writes: bool = False,
) -> frozenset[Capability]:
    """What the model of a suite's line will be able to do, without loading it; one that is trained has its weights here,
    and a server writes, or it judges."""
    described = model_spec(spec)
    if isinstance(described, Replay):
        if not Path(described.traces).is_file():
            raise ValueError(f"traces: there is no file {described.traces!r}")
        return frozenset(("generate",))
    if isinstance(described, Server) and writes:
        return frozenset(("generate",))
    name, path = find(spec, known)
    inner = model_spec(described.ask) if isinstance(described, YesNo) else described
    check_extras(inner)
    if not trained:
        check_options(inner)
    if isinstance(described, Server | YesNo):
        return frozenset(("reward",))
    if classifies(name, path, known):
        if described.engine == "vllm":
            raise ValueError(
                f"{name} is a classifier, which runs on Transformers: leave out `engine: vllm`"
            )
        return frozenset(("reward",))
    if described.engine == "vllm" and not trained:
        return frozenset(("generate", "score"))
    return frozenset(("generate", "score", "logits"))


def check_extras(spec: Any) -> None:
    """Refuse a line whose options need a package that is not here."""
    for option, (package, extra) in EXTRAS.items():
        if getattr(spec, option, None) is not None and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{spec.model}: {option} needs {package}, which is not installed: pip install 'retort[{extra}]'"
            )


def check_options(spec: ModelSpec) -> None:
    """Refuse options of Transformers for a model that vLLM runs whole."""
    if not isinstance(spec, Checkpoint) or spec.engine == "hf":
        return
    given = {k: getattr(spec, k) for k in ("attn_implementation", "quantize", "offload", "adapter")}
    if ignored := [key for key, value in given.items() if value]:
        raise ValueError(
            f"{spec.model}: {', '.join(ignored)} {'is' if len(ignored) == 1 else 'are'} for Transformers; under `engine: vllm` give "
            "vLLM's own options in `vllm: {…}`"
        )


def check_here(spec: str | Path | Mapping[str, Any] | ModelSpec) -> None:
    """Refuse a line whose engine is not installed."""
    described = model_spec(spec)
    inner = model_spec(described.ask) if isinstance(described, YesNo) else described
    if isinstance(inner, Checkpoint) and inner.engine == "vllm":
        said(inner)


def said(spec: Mapping[str, Any] | ModelSpec) -> dict[str, str] | None:
    """What an evaluation's protocol says of the engine that a suite's line asks for; None: what it says of Transformers."""
    described = model_spec(spec)
    if not isinstance(described, Checkpoint) or described.engine == "hf":
        return None
    from harness.models.vllm import said

    return said(described.dtype)


def written(
    spec: str | Path | Mapping[str, Any] | ModelSpec, model: Any, known: Mapping[str, Path]
) -> Any:
    """A student with what writes in its place, if its line asks for an engine; the engine takes the model's weights."""
    described = model_spec(spec)
    if isinstance(described, Checkpoint) and described.engine == "vllm":
        from harness.models.vllm import write_for

        name, path = find(described, known)
        write_for(model, path if path.is_dir() else name, described.vllm, described.dtype)
    return model


def trainable(spec: str | Path | Mapping[str, Any] | ModelSpec) -> ModelSpec:
    """The line of a student without its engine: the weights that are trained are always of Transformers."""
    described = model_spec(spec)
    if isinstance(described, Checkpoint) and described.engine != "hf":
        given = described.model_dump(
            exclude_unset=True,
            exclude={"engine", "vllm", *(() if described.adapter else ("dtype",))},
        )
        return Checkpoint.model_validate(given)
    return described


def classifies(name: str, path: Path, known: Mapping[str, Path]) -> bool:
    """Whether a checkpoint is a classifier, as its configuration says."""
    file = path / "config.json"
    if not path.is_dir():  # a Hub id: its configuration is small, and asks whether it exists
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(name, "config.json"))
        except (OSError, ValueError) as error:
            raise ValueError(not_found(name, known, type(error).__name__)) from None
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return any(kind.endswith(CLASSIFIERS) for kind in config.get("architectures") or ())


def check_vocabularies(student: Any, teacher: Any, known: Mapping[str, Path]) -> None:
    """`check_pair`, from the tokenizers alone, before any weights are loaded."""
    from transformers import AutoTokenizer

    names = [find(spec, known) for spec in (student, teacher)]
    ours, theirs = (
        AutoTokenizer.from_pretrained(path if path.is_dir() else name).get_vocab()
        for name, path in names
    )
    if ours != theirs:
        raise ValueError(mismatch(names[0][0], len(ours), names[1][0], len(theirs)))


def not_found(name: str, known: Mapping[str, Path], reason: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else ""
    names = f" or one of {', '.join(sorted(known))}" if known else ""
    return (
        f"model {name!r} was not found{guess} Give a folder, a Hub id{names}. "
        "Without a network a Hub id must be in the local cache (`hf download ID` fills it)"
        + (f": {reason}" if reason else "")
    )


def check_pair(student: LanguageModel, teacher: LanguageModel) -> None:
    """Refuse to compare two models token by token unless their tokenizers map tokens to ids alike."""
    if "logits" not in teacher.capabilities:
        can = ", ".join(sorted(teacher.capabilities))
        raise ValueError(
            f"the objective needs the token distribution of its teacher, and {teacher.name} can only {can}; "
            "use a model with `engine: hf` as the teacher, or a method that trains on text alone (sft, limo, heal)"
        )
    if student.vocabulary_digest != teacher.vocabulary_digest:
        raise ValueError(
            mismatch(student.name, student.vocabulary, teacher.name, teacher.vocabulary)
        )


def mismatch(student: str, ours: int, teacher: str, theirs: int) -> str:
    return (
        f"{student} ({ours} tokens) and {teacher} ({theirs} tokens) have "
        "different tokenizers, so their distributions cannot be compared token by token. Heads padded to different "
        "sizes are fine, since logits are cut to the tokenizer; for other tokenizers use a method that trains on "
        "text alone (sft, limo, heal)"
    )
