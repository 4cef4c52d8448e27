"""The model backends, and how a line of a suite becomes one of them. Importing this loads no tensor library."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.models.codec import Codec
from harness.types import Capability, LanguageModel

__all__ = ["capabilities", "check_pair", "find", "load"]

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
CLASSIFIERS = ("ForTokenClassification", "ForSequenceClassification")  # process reward models
SERVER = {"server", "model", "key"}  # key: the environment variable that holds it


def load(
    spec: str | Path | Mapping[str, Any],
    *,
    checkpoints: Mapping[str, Path] | None = None,
    tokenizer_of: Codec | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Any:
    """The model that a suite names: a checkpoint's name, a folder, a Hub id, {model: …}, {traces: …}, {ask: …} or {server: …, model: …}.

    Replayed traces are tokenized as by `tokenizer_of`, the student. Classifiers, servers and models that are asked yes or no
    are `RewardModel`s, all else is a `LanguageModel`.
    """
    known = dict(checkpoints or {})
    if isinstance(spec, Mapping):
        if set(spec) == {"traces"}:
            from harness.models.traces import TraceFile

            if tokenizer_of is None:
                raise ValueError(
                    "traces have no tokenizer of their own: only a teacher can be replayed"
                )
            return TraceFile(spec["traces"], tokenizer_of)
        if "server" in spec:
            from harness.models.openai import JudgeServer

            find(spec, known)
            names = {"url": "server", "model": "model", "key": "key"}
            return JudgeServer(**{to: spec[of] for to, of in names.items() if of in spec})
        if set(spec) == {"ask"}:
            from harness.models.reward import YesNo

            name = spec["ask"]
            return YesNo(load(name, checkpoints=checkpoints, device=device, dtype=dtype))
        if set(spec) == {"model", "adapter"}:
            raise ValueError(
                "adapters are not available in this version; leave `adapter` out to train all weights"
            )
        if set(spec) != {"model"}:
            raise ValueError(
                f"a model is a name, {{model: …}}, {{traces: file.jsonl}}, {{ask: …}} or {{server: …, model: …}}; found the keys {', '.join(map(str, spec))}"
            )
    name, path = find(spec, known)
    try:
        backend: Any
        if classifies(name, path, known):
            from harness.models.reward import RewardHF as backend
        else:
            from harness.models.hf import HFModel as backend

        return backend.load(path if path.is_dir() else name, device=device, dtype=dtype, name=name)
    except OSError as error:
        raise ValueError(not_found(name, known, str(error).strip().split("\n")[0])) from error


def find(spec: str | Path | Mapping[str, Any], known: Mapping[str, Path]) -> tuple[str, Path]:
    """A model's name and its folder (or Hub id), without loading it; refuses what cannot be one."""
    if isinstance(spec, Mapping) and "server" in spec:
        address = str(spec["server"])
        if not {"server", "model"} <= set(spec) <= SERVER or not address.startswith("http"):
            raise ValueError(
                f"a server is {{server: http://…/v1, model: NAME}}, with `key` for the environment variable that holds "
                f"its key (OPENAI_API_KEY otherwise); found the keys {', '.join(map(str, spec))}"
            )
        return str(spec["model"]), Path(str(spec["model"]))
    if isinstance(spec, Mapping) and set(spec) == {"ask"}:
        return find(spec["ask"], known)
    name = str(spec["model"] if isinstance(spec, Mapping) else spec)
    path = Path(known.get(name, name))
    if path.is_dir():
        return name, path
    mistyped = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if name in known or mistyped or not HUB_ID.fullmatch(name):
        raise ValueError(not_found(name, known))
    return name, path


def capabilities(
    spec: str | Path | Mapping[str, Any], known: Mapping[str, Path]
) -> frozenset[Capability]:
    """What the model of a suite's line will be able to do, without loading it."""
    if isinstance(spec, Mapping) and "traces" in spec:
        if not Path(spec["traces"]).is_file():
            raise ValueError(f"traces: there is no file {str(spec['traces'])!r}")
        return frozenset(("generate",))
    name, path = find(spec, known)
    asked = isinstance(spec, Mapping) and bool({"server", "ask"} & set(spec))
    if asked or classifies(name, path, known):
        return frozenset(("reward",))
    return frozenset(("generate", "score", "logits"))


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
            "use a model as the teacher, or a method that trains on text alone (sft, limo, heal)"
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
