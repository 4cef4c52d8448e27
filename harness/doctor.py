"""What would go wrong with a suite, found without training anything that is kept.

Every finding is one line: what is, why it matters, what to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx2
import psutil
import torch

from harness import cell, evaluation, models, problems, registry, sizes
from harness.compare import check, check_tasks, experiment, use_data
from harness.config import Budget, Checkpoint, Experiment, Server, model_spec, nearest
from harness.ledger import Ledger
from harness.models.endpoint import Endpoint
from harness.models.hf import HFModel
from harness.models.openai import ServerModel
from harness.objectives import nll, reverse_kl
from harness.probe import SMALL, away, readable, spread
from harness.trainer import Trainer
from harness.types import (  # fmt: skip
    Example,
    LanguageModel,
    Objective,
    OffPolicy,
    Problem,
    Request,
    Sampling,
    Stage,
    Trace,
)
from harness.verifiers import completion, opens_think, sandbox, verify_many

GIB = 2**30
SAMPLE = 200  # problems whose lengths are looked at
WRITTEN = 24  # problems that both models answer
CUT = 0.1  # share of responses cut at max_new_tokens from which that is said; half of them is a problem
KL = 1e-4  # nats a token: the most that a model may differ from itself, in fp32
DRIFT = 1e-4  # relative difference of a loss over two cuts of a batch
PATIENCE = 5.0  # seconds for a server to say which models it has
PROBE = "What is 2+3?"
TEXT = f"{completion.OPEN}\n1+1\n\n  2\n{completion.CLOSE}\n2"


class Finding(NamedTuple):
    level: Literal["ok", "note", "problem"]
    subject: str
    text: str


def examine(
    suite: str | Experiment, overrides: Sequence[str] = (), results: Path = Path("results")
) -> list[Finding]:
    """All findings, in the order in which a run that writes to `results` would meet them."""
    setting = experiment(suite, overrides)
    use_data(setting)
    absent = away(setting)
    try:
        for label in setting.methods:
            cell.recipe(setting, label)
        seen, unread = readable(setting)
        if absent:
            check_tasks(seen)
        else:
            check(seen, list(setting.methods))
        for spec in (setting.student, setting.teacher, *setting.models.values()):
            models.check_extras(model_spec(spec))
        sizes.check_adapter(setting.student, problems.checkpoints())
    except ValueError as error:
        return [Finding("problem", "suite", str(error))]
    findings = [Finding("ok", "suite", f"{len(setting.methods)} arms, {setting.seeds} seeds")]
    findings += [
        Finding("note", subject, f"could not be looked at: {why}")
        for subject, why in (
            *((f"training on {name}", why) for name, why in unread["problems"].items()),
            *((f"benchmark {name}", why) for name, why in unread["benchmarks"].items()),
        )
    ]
    findings += _servers(setting)
    if absent:
        findings += [
            Finding(
                "note",
                "models",
                f"{text}: its tokenizer, template, weights and responses could not be looked at; fetch it (`hf download ID`) and ask again",
            )
            for text in absent
        ]
        findings += _described(setting)
    else:
        findings += _loaded(seen)
    findings += _memory(setting, here=not absent)
    findings += _disk(setting, results, here=not absent)
    findings += _extras(seen)
    return findings


def _described(setting: Experiment) -> Iterator[Finding]:
    """What configurations and tokenizers show of a pair whose weights are not here."""
    known = problems.checkpoints()
    pair = {
        name: models.find(spec, known)
        for name, spec in (("student", setting.student), ("teacher", setting.teacher))
        if isinstance(model_spec(spec), Checkpoint)
    }
    configs = {name: sizes.configuration(*found) for name, found in pair.items()}
    for name, config in configs.items():
        if config is not None:
            yield from _positions(name, config.get_text_config(decoder=True), setting)
    if len(pair) < 2 or not (token_level := _token_level(setting)):
        return
    if all(_holds(*found, "tokenizer.json") for found in pair.values()):
        try:
            models.check_vocabularies(setting.student, setting.teacher, known)
        except ValueError as error:
            yield Finding("problem", "vocabulary", f"{', '.join(token_level)}: {error}")
        else:
            yield Finding("ok", "vocabulary", "the same for both")
    elif all(config is not None for config in configs.values()):
        ours, theirs = (c.get_text_config(decoder=True).vocab_size for c in configs.values())
        yield Finding(
            "note",
            "vocabulary",
            f"heads of {ours} (student) and {theirs} rows (teacher); whether a token has the same id in both, which "
            f"{', '.join(token_level)} need, only their tokenizers tell: fetch them (`hf download ID tokenizer.json`)",
        )


def _positions(name: str, config: Any, setting: Experiment) -> Iterator[Finding]:
    asked = {"sampling": setting.sampling.max_new_tokens}
    if name == "student":
        asked |= {f"benchmarks.{b}": g.max_new_tokens or 0 for b, g in setting.benchmarks.items()}
    most = getattr(config, "max_position_embeddings", None)
    beyond = [f"{key}.max_new_tokens" for key, tokens in asked.items() if most and tokens >= most]
    text = f"{most} for prompt and response"
    if beyond:
        text += f", and the response alone may have more: lower {', '.join(beyond)}"
    yield Finding("problem" if beyond else "ok", f"{name}'s positions", text)


def _holds(name: str, path: Path, file: str) -> bool:
    """Whether a file of a model is in its folder or the local cache."""
    if path.is_dir():
        return (path / file).is_file()
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, file), str)


def _loaded(setting: Experiment) -> list[Finding]:
    """What only the models themselves can show."""
    known = problems.checkpoints()
    found: list[Finding] = []
    try:
        student = cell.student_model(setting.student)
        teacher = models.load(setting.teacher, checkpoints=known, tokenizer_of=student, writes=True)
    except ValueError as error:
        return [Finding("problem", "models", str(error))]
    pair: dict[str, LanguageModel] = {"student": student, "teacher": teacher}
    whole = {name: model for name, model in pair.items() if isinstance(model, HFModel)}
    for name, model in whole.items():
        spec = setting.student if name == "student" else setting.teacher
        found += _weights(name, model, models.find(spec, known)[1])
        found += _text(name, model, setting)
        found += _ends(name, model)
    if not (isinstance(teacher, ServerModel) and teacher.codec is student):
        found += _vocabularies(student, teacher)
    try:
        found += _templates(whole, _token_level(setting))
    except ValueError as error:
        return [*found, Finding("problem", "chat template", str(error))]
    found += _lengths(setting, whole)
    untried = "truncation, self-KL and the loss's invariance were not looked at"
    if any(each.level == "problem" for each in found):
        return [
            *found,
            Finding("note", "models", f"{untried}: mend the problems above and ask again"),
        ]
    if sum(model.num_parameters for model in whole.values()) > SMALL[student.device.type]:
        text = f"{untried}: the models are too large to be tried here; ask again on a GPU"
        return [*found, Finding("note", "models", text)]
    try:
        found += _behaviour(setting, whole)
    except ValueError as error:
        found.append(Finding("problem", "sampling", str(error)))
    return found


def _servers(setting: Experiment) -> Iterator[Finding]:
    """Whether each server answers, has its model and got a key; one that does not answer in time is said, and no trouble."""
    for who, line in {"teacher": setting.teacher, **setting.models}.items():
        spec = model_spec(line, who)
        if not isinstance(spec, Server):
            continue
        endpoint = Endpoint(spec)
        subject = f"{who}'s server"
        try:
            with httpx2.Client(timeout=PATIENCE) as client:
                listed = endpoint.models(client)
        except httpx2.TransportError as error:
            yield Finding(
                "note",
                subject,
                f"{endpoint.url} did not answer ({type(error).__name__}), so its model could not be checked; {endpoint.key_state()}",
            )
        except ConnectionError as error:
            yield Finding("problem", subject, str(error))
        else:
            has = f"{endpoint.url} answers; {endpoint.key_state()}"
            if spec.model in listed:
                yield Finding("ok", subject, f"{has}; it has {spec.model}")
            else:
                yield Finding(
                    "problem",
                    subject,
                    f"{has}; it does not list {spec.model!r}: {nearest(spec.model, listed)}",
                )
        if who == "teacher" and not spec.price:
            yield Finding("note", subject, "no `price`: the ledger counts its tokens and no money")


def _token_level(setting: Experiment) -> list[str]:
    """Arms that compare with the teacher's distribution."""
    return [
        label
        for label in setting.methods
        if "teacher.logits" in cell.recipe(setting, label)[0].required()
    ]


# -- one model --------------------------------------------------------------------------------------


def _weights(name: str, model: HFModel, path: Path) -> Iterator[Finding]:
    state = model.model.state_dict()  # what is offloaded is not looked at
    wrong = [k for k, value in state.items() if not value.is_meta and not value.isfinite().all()]
    subject = f"{name}'s weights"
    if wrong:
        yield Finding(
            "problem",
            subject,
            f"{_some(wrong)} hold values that are not finite, so every loss is NaN: fetch or convert the checkpoint again",
        )
    random = _absent(model, path)
    if random:
        yield Finding(
            "problem",
            subject,
            f"{_some(random)} are not in the checkpoint and start at random: set tie_word_embeddings in config.json if the head is the "
            "embedding, else fetch the whole checkpoint",
        )
    if not wrong and not random:
        rows = len(model.model.get_output_embeddings().weight)
        text = f"{model.num_parameters / 1e6:.3g}M, finite"
        if model.adapter is not None:
            text += f"; {model.num_trained / 1e6:.3g}M of them, an adapter, are trained"
        if rows > model.vocabulary:
            text += f"; the head is padded to {rows} rows, and its logits are cut to the {model.vocabulary} tokens"
        yield Finding("ok", subject, text)


def _absent(model: HFModel, path: Path) -> list[str]:
    """Parameters that no file of a local checkpoint holds; nothing is said of one whose names are others altogether."""
    from safetensors import safe_open

    held: set[str] = set()
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            held |= set(tensors.keys())
    needed = {key for key, _ in model.model.named_parameters()}  # a tied head is no parameter
    if model.adapter is not None:
        needed = {key.replace(".base_layer.", ".") for key in needed - model.weights().keys()}
    return sorted(needed - held) if held & needed else []


def _text(name: str, model: HFModel, setting: Experiment) -> Iterator[Finding]:
    """Whether text survives the tokenizer, and what it puts around one."""
    back = model.decode(model.tokenize(TEXT, end=False))
    subject = f"{name}'s tokenizer"
    if back != TEXT:
        dropped = [tag for tag in (completion.OPEN, completion.CLOSE) if tag not in back]
        if dropped:
            text = (
                f'decoding drops {" and ".join(dropped)}, so no answer behind a think is found: set "special": false for them in '
                "tokenizer.json"
            )
        else:
            text = f"{TEXT!r} comes back as {back!r}, so texts are judged that nobody wrote: use the tokenizer's own files, clean-up off"
        yield Finding("problem", subject, text)
    tags = [
        t for t in (completion.OPEN, completion.CLOSE) if len(model.tokenize(t, end=False)) != 1
    ]
    if tags:
        yield Finding(
            "note",
            "thinking tags",
            f"{', '.join(tags)} are several tokens for the {name}, which it must spell out: add them to its tokenizer, or take a "
            "model that thinks",
        )
    else:
        yield Finding("ok", "thinking tags", f"one token each for the {name}")
    plain, bare = model.raw(PROBE), model.tokenize(PROBE, end=False)
    if plain[-1:] != bare[-1:]:
        raw = [each for each in setting.benchmarks if evaluation.is_raw(each)]
        yield Finding(
            "problem" if raw else "note",
            subject,
            f"it ends every text with {model.tokenizer.decode(list(plain[-1:]))!r}, so a prompt to continue is over already"
            f"{' (' + ', '.join(raw) + ')' if raw else ''}: switch add_eos_token off",
        )
    begins = model.tokenizer.bos_token_id
    if model.tokenizer.chat_template and begins is not None and plain[:1] == (begins,):
        count = model.encode(PROBE)[:2].count(begins)
        if count != 1:
            yield Finding(
                "problem" if count else "note",
                subject,
                f"a text begins with {model.tokenizer.bos_token!r} and a rendered prompt has it {count} times, which the model never saw: "
                "put bos_token once at the start of chat_template.jinja",
            )


def _ends(name: str, model: HFModel) -> Iterator[Finding]:
    special = set(model.tokenizer.all_special_ids)
    plain = sorted(i for i in model.eos if i not in special)
    if plain:
        yield Finding(
            "problem",
            f"{name}'s end tokens",
            f"{', '.join(f'{i} ({model.tokenizer.decode([i])!r})' for i in plain)} is ordinary text, so responses are cut at it: set "
            f"eos_token_id in generation_config.json to {model.tokenizer.eos_token_id}",
        )


# -- the pair ---------------------------------------------------------------------------------------


def _vocabularies(student: HFModel, teacher: LanguageModel) -> Iterator[Finding]:
    sizes_ = f"student {student.vocabulary} tokens, teacher {teacher.vocabulary}"
    if student.vocabulary_digest == teacher.vocabulary_digest:
        yield Finding("ok", "vocabulary", f"the same for both ({sizes_})")
    else:
        text = f"differs ({sizes_}"
        if isinstance(teacher, HFModel):
            ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
            other = sorted(t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t))
            text += f"; {_some([repr(t) for t in other])} have other ids or none"
        yield Finding(
            "note",
            "vocabulary",
            text
            + "), so the teacher's text is encoded anew and token-level methods are refused: keep to methods that train on text, "
            "or take a pair of one family",
        )
    if isinstance(teacher, HFModel):
        ends = f"student {sorted(student.eos)}, teacher {sorted(teacher.eos)}"
        alike = student.vocabulary_digest == teacher.vocabulary_digest
        if alike and teacher.end not in student.eos:
            yield Finding(
                "problem",
                "end tokens",
                f"{ends}: a response that the teacher ends would not end for the student: add the teacher's to eos_token_id in the "
                "student's generation_config.json",
            )
        else:
            yield Finding("ok", "end tokens", ends)


def _templates(whole: Mapping[str, HFModel], token_level: Sequence[str]) -> Iterator[Finding]:
    prompts = {name: model.encode(PROBE) for name, model in whole.items()}
    for name, model in whole.items():
        told = model.tokenizer.decode(list(prompts[name]))
        turn = [{"role": "user", "content": PROBE}]
        closed = model.tokenizer.apply_chat_template(turn, add_generation_prompt=False, return_dict=False)  # fmt: skip
        if PROBE not in told:
            yield Finding(
                "problem",
                "chat template",
                f"the {name}'s does not show the question as it is ({told!r}): repair chat_template.jinja",
            )
        if tuple(closed) == prompts[name]:
            yield Finding(
                "problem",
                "chat template",
                f"the {name}'s ignores add_generation_prompt, so the model would go on with the question: let chat_template.jinja open "
                "the assistant's turn",
            )
    opens = {name: opens_think(model) for name, model in whole.items()}
    if len(set(opens.values())) > 1:
        (who,) = (name for name, does in opens.items() if does)
        yield Finding(
            "problem",
            "chat template",
            f"only the {who}'s opens {completion.OPEN}, so the teacher's responses do not fit behind the student's prompt: give both the "
            "same chat_template.jinja",
        )
    elif opens["student"]:
        yield Finding(
            "note",
            "chat template",
            f"it opens {completion.OPEN}: a response that never closes it is unparsed; leave room in max_new_tokens",
        )
    if len(whole) < 2 or whole["student"].vocabulary_digest != whole["teacher"].vocabulary_digest:
        return
    if prompts["student"] != prompts["teacher"]:
        ours, theirs = (whole[n].tokenizer.decode(list(prompts[n])) for n in ("student", "teacher"))
        why = f"student {ours!r}, teacher {theirs!r}"
        if token_level:
            text = f"{why}: {', '.join(token_level)} would ask the teacher under the student's prompt, which it was not trained on"
        else:
            text = f"{why}: each is asked under its own"
        yield Finding(
            "problem" if token_level else "note",
            "chat template",
            text + "; give both the teacher's chat_template.jinja if that is not meant",
        )
    else:
        yield Finding(
            "ok", "chat template", f"the same {len(prompts['student'])} tokens for a short question"
        )


# -- what they do -----------------------------------------------------------------------------------


def _lengths(setting: Experiment, whole: Mapping[str, HFModel]) -> Iterator[Finding]:
    student = whole["student"]
    sets: dict[str, list[Problem]] = {
        f"training on {name}": problems.load(name, "train", **{**options, "n": SAMPLE})
        for name, options in setting.problems.items()
    }
    sets |= {
        f"benchmark {name}": evaluation.problems_of(
            name, levels=given.levels, options=given.options
        )[:SAMPLE]
        for name, given in setting.benchmarks.items()
    }
    for subject, found in sets.items():
        if not found:
            continue
        prompt = max(len(student.encode(problems.render(problem))) for problem in found)
        total = prompt + setting.sampling.max_new_tokens
        text = f"prompts up to {prompt} tokens, with the response {total}"
        short = [
            f"the {name}'s {most} positions"
            for name, model in whole.items()
            if (most := getattr(model.model.config, "max_position_embeddings", None))
            and total > most
        ]
        if short:
            yield Finding(
                "problem",
                subject,
                f"{text}, beyond {' and '.join(short)}, where responses are cut: lower sampling.max_new_tokens, or extend the "
                "positions (rope_parameters)",
            )
        elif total > setting.training.max_length:
            yield Finding(
                "note",
                subject,
                f"{text}; examples beyond training.max_length = {setting.training.max_length} are dropped: raise it",
            )
        else:
            yield Finding("ok", subject, text)


def _behaviour(setting: Experiment, whole: Mapping[str, HFModel]) -> Iterator[Finding]:
    """What both write on some training problems, and the student's loss on it."""
    every = [
        problem
        for name, options in setting.problems.items()
        for problem in problems.load(name, "train", **{**options, "n": options.get("n", SAMPLE)})
    ]
    some = spread(every, WRITTEN)
    written = {name: _written(setting, model, some) for name, model in whole.items()}
    for name, traces in written.items():
        yield from _responses(name, whole[name], traces, setting)
    student = whole["student"]
    traces = [trace for trace in written.get("teacher", written["student"]) if trace.tokens]
    examples = [
        Example(
            trace.problem.id,
            student.encode(problems.render(trace.problem)),
            student.tokenize(trace.text, end=trace.finished),
        )
        for trace in traces
    ]
    yield from _losses(setting, student, [e for e in examples if e.response])


def _written(setting: Experiment, model: HFModel, some: Sequence[Problem]) -> list[Trace]:
    requests = [Request(problems.render(problem), problem) for problem in some]
    return [t for group in model.generate(requests, Sampling(**setting.sampling.model_dump())) for t in group]  # fmt: skip


def _responses(
    name: str, model: HFModel, traces: Sequence[Trace], setting: Experiment
) -> Iterator[Finding]:
    limit = setting.sampling.max_new_tokens
    cut = sum(not trace.finished for trace in traces)
    opened = opens_think(model)
    ended = [trace for trace in traces if trace.finished]
    open_ = sum(completion.response(trace.text, opened=opened) is None for trace in ended)
    verdicts = verify_many([(t.problem, t.text, t.finished) for t in traces], opened=opened)
    right = sum(verdict.status == "ok" for verdict in verdicts)
    lengths = sorted(len(trace.tokens) for trace in traces)
    text = f"{len(traces)} responses of {lengths[len(lengths) // 2]} tokens (median), {right} right, {cut} cut at {limit}"
    subject = f"{name}'s responses"
    if cut >= CUT * len(traces):
        yield Finding(
            "problem" if cut >= len(traces) / 2 else "note",
            subject,
            f"{text}: a response that is cut teaches and scores nothing: raise sampling.max_new_tokens",
        )
    if open_ > CUT * len(traces):
        yield Finding(
            "problem",
            subject,
            f"{open_} of {len(ended)} that ended never closed their think, so they hold no answer: take a model that writes "
            f"{completion.CLOSE}, or a template that does not open it",
        )
    elif name == "teacher" and not right:
        yield Finding(
            "note",
            subject,
            f"{text}: methods that keep verified responses would have none: look at some, or take easier problems",
        )
    elif cut < CUT * len(traces):
        yield Finding("ok", subject, text)


def _losses(
    setting: Experiment, student: HFModel, examples: Sequence[Example]
) -> Iterator[Finding]:
    """The loss of one step, on the trainer's own path: of the student against itself, and over two cuts of the batch."""
    if not examples:
        return
    longest = sum(-(-(len(e.prompt) + len(e.response)) // 32) * 32 for e in examples) * 2
    twin = student.clone()
    divergence = _loss(setting, student, examples, reverse_kl, longest, twin)
    if not abs(divergence) < KL:
        yield Finding(
            "problem",
            "self-KL",
            f"the student differs from itself by {divergence:.3g} nats a token, so every divergence is off by as much: "
            "set the dropouts in its config.json to 0",
        )
    else:
        yield Finding(
            "ok", "self-KL", f"{abs(divergence):.1g} nats a token between the student and itself"
        )
    one, many = (_loss(setting, student, examples, nll, size, None) for size in (longest, 1))
    text = f"{one:.6g} in one batch, {many:.6g} in {len(examples)}"
    if not abs(one - many) <= DRIFT * abs(one):
        yield Finding(
            "problem",
            "loss",
            f"it depends on how a batch is cut ({text}), so training.micro_tokens would change results: set dropouts to 0; a model that "
            "routes over the batch cannot be trained here",
        )
    else:
        yield Finding("ok", "loss", f"does not depend on how a batch is cut ({text})")


def _loss(
    setting: Experiment,
    student: HFModel,
    examples: Sequence[Example],
    objective: Objective,
    micro_tokens: int,
    teacher: LanguageModel | None,
) -> float:
    """The loss of one optimizer step; the weights are put back."""
    before = student.state()
    training = setting.training.model_copy(
        update={"batch_size": len(examples), "micro_tokens": micro_tokens, "precision": "fp32"}
    )
    trainer = Trainer(student, training, Budget(steps=1), 0, Ledger())
    stage = Stage("doctor", OffPolicy(examples), objective, teacher=teacher)
    trainer.run(0, stage, lambda: student, {})
    student.load_state(before)
    return float(trainer.state.curve[0]["loss"])


# -- the machine ------------------------------------------------------------------------------------


def _shapes(setting: Experiment) -> dict[str, sizes.Shape]:
    known = problems.checkpoints()
    specs: dict[str, Any] = {"student": setting.student, "teacher": setting.teacher}
    return {
        name: sizes.shape(spec, known)
        for name, spec in specs.items()
        if not (isinstance(spec, Mapping) and {"traces", "server"} & set(spec))
    }


def _memory(setting: Experiment, here: bool) -> Iterator[Finding]:
    """The forecast of harness/sizes.py for the cells that run side by side; of models that are not here, for a GPU anywhere."""
    try:
        shapes = _shapes(setting)
    except ValueError as error:
        yield Finding("note", "memory", str(error))
        return
    cuda = torch.cuda.is_available() or not here
    student = shapes.pop("student")
    frozen = {**shapes, "base": student}
    length = min(setting.training.max_length, setting.sampling.max_new_tokens + 512)
    held = cell.memory(setting, student, frozen, length, cuda)
    need = held.peak * setting.workers
    if not here:
        text = f"about {held.peak / GIB:.0f} GiB of a GPU for one worker, with all models on it"
        yield Finding(
            "note", "memory", f"{text}; `retort plan --gpu NAME` says what of it is whose"
        )
        return
    if cuda:
        room, where = torch.cuda.mem_get_info()[0], "GPU memory"
    else:
        room, where = psutil.virtual_memory().available, "memory"
    text = f"about {need / GIB:.2f} GiB of {room / GIB:.1f} GiB {where} for {setting.workers} worker{'s' * (setting.workers != 1)}"
    if need > 0.8 * room:
        text += ": it may run out; lower workers, training.micro_tokens or max_new_tokens, or take smaller models"
    yield Finding(
        "problem" if need > room else "note" if need > 0.8 * room else "ok", "memory", text
    )


def _disk(setting: Experiment, results: Path, here: bool) -> Iterator[Finding]:
    """The students, and the checkpoints of cells at work: weights, moments, and weights between stages."""
    try:
        student = _shapes(setting)["student"]
    except ValueError:
        return
    cells = len(setting.methods) * setting.seeds * len(setting.data_seeds)
    need = 4 * (student.parameters + student.adapter) * cells
    need += 4 * student.trained * 6 * setting.workers
    place = results.absolute()
    there = next(folder for folder in (place, *place.parents) if folder.is_dir())
    free = psutil.disk_usage(str(there)).free
    text = f"about {need / GIB:.2f} GiB of {free / GIB:.0f} GiB free at {there} for {cells} students and checkpoints, samples apart"
    if need > 0.8 * free:
        text += ": it may run full; write elsewhere (--results), or take fewer seeds"
    if need > free and here:  # models that are not here will run elsewhere
        yield Finding("problem", "disk", text)
    else:
        yield Finding("note" if need > 0.8 * free else "ok", "disk", text)


def _extras(setting: Experiment) -> Iterator[Finding]:
    code = [
        name
        for name in setting.benchmarks
        if any(problem.verifier == "code" for problem in evaluation.problems_of(name)[:1])
    ]
    if code:
        try:
            kinds = {sandbox.kind(evaluation.source_of(name)) for name in code}
        except ValueError as error:
            yield Finding("problem", "sandbox", str(error))
        else:
            text = "programs run in bubblewrap"
            if "fallback" in kinds:
                text = "programs run with namespaces and resource limits only: install bubblewrap for isolation"
            yield Finding("note" if "fallback" in kinds else "ok", "sandbox", text)
    for spec in (setting.student, setting.teacher, *setting.models.values()):
        try:
            models.check_here(spec)
        except ValueError as error:  # a problem where the models are here, which `check` finds
            yield Finding("note", "vllm", str(error))
            break
    missing = [
        name
        for name in setting.methods
        if not registry.card(registry.get(setting.methods[name].get("method", name)))
    ]
    if missing:
        yield Finding("note", "cards", f"no card for {', '.join(missing)}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
