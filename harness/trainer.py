"""Stages in, student out: one loop for every method, on Accelerate, resumable to the bit.

    L = (1/D) sum_i w_i sum_t m_it l_it        D: the loss tokens or sequences of the whole optimizer step

The denominator is that of the whole step, over micro-batches and ranks, so a loss does not depend on how a batch was cut,
padded or spread. Every rank sees the same examples and takes its share of the micro-batches.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from harness import ranks
from harness.config import Budget, Training
from harness.ledger import Ledger, forward_flops, training_flops
from harness.models.collate import collate
from harness.models.hf import HFModel
from harness.objectives.chunked import chunked_loss
from harness.store import digest, draft, writing
from harness.types import Batch, Example, Objective, OffPolicy, Stage, Tokens

if TYPE_CHECKING:
    from harness.types import LanguageModel

Report = Callable[[str, int, int], None]  # phase, done, total


@dataclass
class State:
    """Where a run stands; what a checkpoint holds besides weights, optimizer and generators."""

    stage: int = 0  # index of the stage in training
    step: int = 0  # optimizer steps done in it
    consumed: float = 0.0  # of the budget, in its unit, by training
    prepared: float = 0.0  # of a budget of FLOPs, by what was sampled and scored before the stages
    paid: float = 0.0  # FLOPs on the ledger that are accounted for in these two
    boundaries: list[str] = field(default_factory=list)  # the student's identity before each stage
    curve: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)


class Core(nn.Module):
    """The one module that is wrapped: the chunked loss is computed inside its forward, where the head is whole."""

    def __init__(self, student: HFModel, mixed: bool) -> None:
        super().__init__()
        self.student = [student]  # in a list: not a submodule
        self.model = student.model
        self.mixed = mixed  # bf16 products of fp32 weights

    def forward(
        self,
        batch: Batch,
        tokens: Tokens,
        coefficients: Tensor,
        objective: Objective,
        teacher: LanguageModel | None,
        teacher_hidden: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the batch's losses, and the losses themselves [N], detached."""
        student = self.student[0]
        # In here, because DeepSpeed switches off what is on around it.
        with torch.autocast(student.device.type, torch.bfloat16, enabled=self.mixed):
            return chunked_loss(
                student.hidden(batch),
                student.head_weight,
                student.head_bias,
                tokens,
                objective,
                coefficients,
                teacher_hidden,
                None if teacher is None else teacher.head,
                student.vocabulary,
            )


class Trainer:
    """Trains one student, stage after stage, on one budget."""

    def __init__(
        self,
        student: HFModel,
        training: Training,
        budget: Budget,
        seed: int,
        ledger: Ledger,
        checkpoint: Path | None = None,
        report: Report | None = None,
        key: str = "",
        watch: Callable[[Trainer], None] | None = None,
    ) -> None:
        self.student, self.training, self.budget = student, training, budget
        self.seed, self.ledger, self.checkpoint, self.key = seed, ledger, checkpoint, key
        self.watch = (
            watch  # called after every step and stage; it may look, and end the run by raising
        )
        self._saved: dict[str, Any] | None = None  # a checkpoint whose stage is not reached yet
        self.report: Report = report or (lambda phase, done, total: None)
        precision = training.precision
        if precision == "auto":
            precision = "bf16" if student.device.type == "cuda" else "fp32"
        ranks.join()
        self.accelerator = Accelerator(mixed_precision="no", cpu=student.device.type == "cpu")
        if training.gradient_checkpointing:
            student.recompute()
        student.model.train()
        self._shards: dict[str, Tensor] = {}  # of the weights in training, where they are sharded
        self._behind = False  # whether the student lacks what was trained since
        self.core, self.optimizer = self._wrapped(precision == "bf16")
        self.state = State()
        self.clock = (0, 0)  # stage and step of the samples that are being drawn
        self._reached = 0  # stages that the method has behind it in this process
        self._kept = 0  # step of the stage's last checkpoint

    @property
    def consumed(self) -> float:
        """Share of the budget that the stages took which the method has behind it."""
        return float(sum(done["share"] for done in self.state.stages[: self._reached]))

    @property
    def progress(self) -> float:
        """Share of the budget that training and preparing consumed so far."""
        return (self.state.consumed + self.state.prepared) / self._total()

    # -- the loop -------------------------------------------------------------------------------

    def run(
        self,
        index: int,
        stage: Stage,
        default: Callable[[], LanguageModel],
        notes: dict[str, Any],
    ) -> None:
        """Train on one stage; one that a checkpoint has behind it only gets the student's weights after it."""
        if index < self.state.stage:
            self._load(torch.load(self._boundary(index + 1), map_location="cpu"))
            self._reached = index + 1
            return
        if self._saved is not None:
            self._restore(self._saved)
        if len(self.state.boundaries) == index:
            self.state.boundaries.append(self.student.identity)
        teacher: Callable[[], Any] = default if stage.teacher is None else lambda: stage.teacher
        source, size, every = stage.source, self.training.batch_size, 1
        items: Sequence[Any]
        if isinstance(source, OffPolicy):
            items = self._fit(source.examples, stage, notes)
        else:
            items, every = source.problems, source.every
        if not items:
            raise ValueError(_empty(stage, "no problems", notes))
        if stage.optimizer == "reset" and self.state.step == 0 and index > 0:
            self.optimizer.state.clear()
        if self.state.step == 0:
            self._begin(stage)
        start = self.state.stages[-1]["from"]
        end = start + self.state.stages[-1]["length"]
        self._kept = self.state.step
        scored = any(objective.needs_teacher for objective in _objectives(stage))
        pending: list[Sequence[Example]] = []
        stop: str | None = None if end > start else "preparation"
        passes = math.inf if stage.epochs is None else stage.epochs * len(items)
        while self.state.consumed < end - 1e-9 and not stop:
            if self.state.step * size >= passes and not pending:
                # What is left of its share is for the stages after it.
                self.state.stages[-1]["share"] = self._share_of(start)
                break
            self.clock = (index, self.state.step)
            paid = self.ledger.charged["flops"]
            if isinstance(source, OffPolicy):
                examples: Sequence[Example] = self._draw(items, index, self.state.step, size)
            else:
                if not pending:
                    self._catch_up()
                    self.student.version = f"{self.state.boundaries[index]}+{self.state.step}"
                    block = self._draw(items, index, self.state.step // every, size * every)
                    made = self._fit(source.make(block), stage, notes, needed=False)
                    cuts = [len(made) * i // every for i in range(every + 1)]
                    pending = [made[a:b] for a, b in itertools.pairwise(cuts)]
                    self.student.model.train()
                examples = pending.pop(0)
                if not any(example.weight for example in examples):
                    stop = self.ledger.exhausted("student_generated", "teacher_generated")
            self.student.rest()  # it has written
            progress = (self.state.consumed - start) / (end - start)
            self._step(stage, examples, teacher, progress)
            self.state.step += 1
            self._consume(self.ledger.charged["flops"] - paid)
            if scored:
                stop = stop or self.ledger.exhausted("teacher_scored")
            total = self._steps_left() + len(self.state.curve)
            self.report("train", len(self.state.curve), total)
            if self.watch is not None:
                self.watch(self)
            # A checkpoint falls between two blocks: a block that was made is not kept in one.
            if self.state.step - self._kept >= self.training.checkpoint_every and not pending:
                self.save(notes)
                self._kept = self.state.step
        mine = self.state.curve[len(self.state.curve) - self.state.step :]
        if stage.epochs is None and not any(row["tokens"] for row in mine):  # a short leg may miss
            raise ValueError(_empty(stage, "every example has weight 0", notes))
        done = self.state.stages[-1]
        done |= {"steps": self.state.step, "examples": len(items), "stopped_by": stop}
        done["objective"] = ", ".join(objective.name for objective in _objectives(stage))
        self.state.stage, self.state.step = index + 1, 0
        self._reached = index + 1
        self.student.version = None
        self._catch_up()
        self.student.touch()
        self.save(notes, boundary=True)
        if self.watch is not None:
            self.watch(self)

    def _begin(self, stage: Stage) -> None:
        """Enter a stage: what it may consume is its share, less what it cost to prepare where FLOPs are the budget.

        One that is a later leg of passes (`epochs`) and has nothing left is passed over: what there was is trained on.
        """
        length, cost = self._length(stage), 0.0
        if self.budget.flops is not None:
            cost = self.ledger.charged["flops"] - self.state.paid
            self.state.prepared += cost
            self.state.paid += cost
        if length <= cost and (stage.epochs is None or not self.state.curve):
            why = f"its share {stage.share:g} of {self.budget.steps} steps rounds to none"
            if cost:
                why = f"what was sampled and scored before it cost {cost:.3g} of its {length:.3g} FLOPs"
            raise ValueError(f"stage {stage.name!r} gets no step: {why}; raise the budget")
        self.state.stages.append(
            {
                "name": stage.name,
                "share": stage.share,
                "from": self.state.consumed,
                "length": max(0.0, length - cost),
                "prepared": cost,
            }
        )

    def _share_of(self, start: float) -> float:
        """What the stage in training took of the budget; with the shares before it, a whole number of steps."""
        before = sum(done["share"] for done in self.state.stages[:-1])
        first = before * self._total()
        used = self.state.consumed - start + self.state.stages[-1]["prepared"]
        return ((round(first) if self.budget.steps else first) + used) / self._total() - before

    def _step(
        self, stage: Stage, examples: Sequence[Example], teacher: Callable[[], Any], progress: float
    ) -> None:
        """One optimizer step."""
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        live = [example for example in examples if example.weight != 0 and example.num_loss_tokens]
        tokens = sum(len(e.prompt) + len(e.response) for e in live)
        loss = 0.0
        if live:
            loss, norm = self._update(stage, live, denominator(stage, examples), teacher, progress)
        scored = sum(
            len(e.prompt if e.teacher_prompt is None else e.teacher_prompt) + len(e.response)
            for e in live
            if _objective(stage, e.term).needs_teacher
        )
        flops = training_flops(self.student.num_parameters, tokens, self.student.num_trained)
        if scored:
            flops += forward_flops(getattr(teacher(), "num_parameters", 0), scored)
        costs = {"trained": tokens, "steps": 1, "teacher_scored": scored, "flops": flops}
        for quantity, amount in costs.items():
            purpose = "training" if quantity == "teacher_scored" else None
            self.ledger.charge(quantity, amount, purpose=purpose)
            self.ledger.spend(quantity, amount)
        self.state.curve.append(
            {
                "step": len(self.state.curve) + 1,
                "stage": stage.name,
                "loss": loss,
                "lr": rate,
                "tokens": tokens,
                "grad_norm": norm if live else 0.0,
            }
        )

    def _update(
        self,
        stage: Stage,
        live: Sequence[Example],
        scale: float,
        default: Callable[[], Any],
        progress: float,
    ) -> tuple[float, float]:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        packed = self.training.packing
        batches = plan(live, self.training.micro_tokens, packed)
        total = torch.zeros((), device=self.student.device, dtype=torch.float64)
        for start in range(0, len(batches), world):
            last = start + world >= len(batches)
            # A rank without work repeats one at weight 0: a pass of sharded weights takes all ranks.
            idle = start + rank >= len(batches)
            members = batches[0 if idle else start + rank]
            objective = _objective(stage, members[0].term)
            batch, tokens, sequence = collate(
                members, self.student.pad, packed=packed, progress=progress
            ).to(self.student.device)
            coefficients = tokens.weights / scale
            if stage.mean == "sequence":
                lengths = torch.bincount(sequence, minlength=len(members))
                coefficients = coefficients / lengths[sequence]
            if idle:
                coefficients = coefficients * 0
            teacher = default() if objective.needs_teacher else None
            teacher_hidden = None
            if teacher is not None:
                teacher_hidden = self._teacher_hidden(teacher, members)
            # Gradients are added up over the ranks once a step; those of sharded weights at once, so that each keeps its own.
            apart = not last and not self._shards
            self.accelerator.sync_gradients = last  # DeepSpeed's step is in its last backward
            with self.accelerator.no_sync(self.core) if apart else nullcontext():
                part, _ = self.core(
                    batch,
                    tokens,
                    coefficients,
                    objective,
                    teacher,
                    teacher_hidden,
                )
                # All of them average gradients over ranks; the loss is already divided by the whole step.
                self.accelerator.backward(part * world)
            total += part.detach().double()
        total = self.accelerator.reduce(total, "sum") if world > 1 else total
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.training.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._behind = bool(self._shards)
        return float(total), float(_whole(norm))

    def _teacher_hidden(self, teacher: LanguageModel, members: Sequence[Example]) -> Tensor:
        packed = self.training.packing
        made = collate(members, self.student.pad, teacher=True, packed=packed)
        with torch.no_grad():
            return teacher.hidden(made.to(self.student.device).batch)

    # -- data order -----------------------------------------------------------------------------

    def _draw(self, items: Sequence[Any], stage: int, block: int, size: int) -> list[Any]:
        """Items of one block: shuffled epochs laid end to end, a function of seed, stage and block."""
        drawn = []
        orders: dict[int, np.ndarray] = {}
        for position in range(block * size, (block + 1) * size):
            epoch, offset = divmod(position, len(items))
            if epoch not in orders:
                key = digest(["order", self.seed, stage, epoch])
                orders[epoch] = np.random.default_rng(int(key[:16], 16)).permutation(len(items))
            drawn.append(items[orders[epoch][offset]])
        return drawn

    def _fit(
        self,
        examples: Sequence[Example],
        stage: Stage,
        notes: dict[str, Any],
        needed: bool = True,
    ) -> Sequence[Example]:
        """Examples that fit max_length; the others are dropped and counted."""
        longest = self.training.max_length
        fit = [e for e in examples if length(e) <= longest]
        if len(fit) < len(examples):
            name = f"{stage.name}: longer than {longest} tokens"
            notes[name] = notes.get(name, 0) + len(examples) - len(fit)
        if needed and not any(e.weight and e.num_loss_tokens for e in fit):
            what = f"{len(examples)} examples, {len(examples) - len(fit)} too long, "
            raise ValueError(_empty(stage, what + "none with weight", notes))
        return fit

    # -- budget ---------------------------------------------------------------------------------

    def _total(self) -> float:
        budget = self.budget
        return float(budget.steps or budget.trained_tokens or budget.flops or 0)

    def _length(self, stage: Stage) -> float:
        """A stage's part of the budget; what an earlier stage left unused is not handed on."""
        before = sum(done["share"] for done in self.state.stages[: self.state.stage])
        if not 0 < stage.share <= 1 or before + stage.share > 1 + 1e-6:
            raise ValueError(
                f"stage {stage.name!r}: its share {stage.share} and those before it ({before:g}) must "
                "be positive and sum to at most 1"
            )
        first, last = before * self._total(), (before + stage.share) * self._total()
        return round(last) - round(first) if self.budget.steps else last - first

    def _consume(self, flops: float) -> None:
        """Take a step off the budget. FLOPs: of training, scoring and the samples drawn for the step."""
        self.state.paid = self.ledger.charged["flops"]
        tokens = float(self.state.curve[-1]["tokens"])
        unit = {"steps": 1.0, "trained_tokens": tokens, "flops": flops}
        used = next(unit[name] for name in unit if getattr(self.budget, name) is not None)
        # A step without weight is free under a budget of tokens; a floor keeps the loop finite.
        self.state.consumed += used or self._total() * 1e-5

    def _steps_left(self) -> int:
        done = len(self.state.curve)
        rate = self.state.consumed / done if done else 1.0
        left = self._total() - self.state.prepared - self.state.consumed
        return max(0, math.ceil(left / max(rate, 1e-12)))

    def _learning_rate(self) -> float:
        """A function of the share of the budget consumed, never of a stage's own length; preparing moves it nowhere."""
        training = self.training
        done = self.state.consumed / (self._total() - self.state.prepared)
        if done < training.warmup:
            return training.learning_rate * max(done / training.warmup, 0.05)  # never quite zero
        rest = (done - training.warmup) / (1 - training.warmup)
        shape = {
            "constant": 1.0,
            "linear": 1 - rest,
            "cosine": (1 + math.cos(math.pi * min(rest, 1.0))) / 2,
        }[training.schedule]
        low = training.min_lr if training.schedule != "constant" else 0.0
        return training.learning_rate * (low + (1 - low) * shape)

    # -- weights over ranks ---------------------------------------------------------------------

    def _wrapped(self, mixed: bool) -> tuple[Any, Any]:
        """The core and its optimizer, as the launcher's configuration wants them: alone, DDP, FSDP2 or DeepSpeed.

        Under FSDP2 a twin of the student is sharded: each layer is a unit, and the root has what is left, so that
        embeddings and head are gathered from the beginning of the core's forward on. The student itself stays whole, because
        it writes, scores and is saved between the steps, and then each rank does another part of the work.
        """
        if _configured("FSDP"):
            if os.environ.get("FSDP_VERSION") != "2":
                raise ValueError(
                    "accelerate launch: FSDP of version 1 is not supported; fsdp_version: 2"
                )
            twin = copy.copy(self.student)
            twin.model = copy.deepcopy(self.student.model)
            core = Core(twin, mixed)
            layers = set(twin.model._no_split_modules or ())
            for module in core.modules():
                if type(module).__name__ in layers:
                    fully_shard(module)
            fully_shard(core)
            self._shards = dict(core.model.named_parameters())
            return core, self.accelerator.prepare_optimizer(self._optimizer(core))
        core = Core(self.student, mixed)
        if not _configured("DEEPSPEED"):
            wrapped = self.accelerator.prepare(core)
            return wrapped, self.accelerator.prepare_optimizer(self._optimizer(core))
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin.zero_stage > 2:
            raise ValueError(
                f"accelerate launch: ZeRO stage {plugin.zero_stage} is not supported: take zero_stage: 2, or FSDP2, "
                "which shards weights as well"
            )
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # it only divides by it
        plugin.deepspeed_config["gradient_clipping"] = self.training.clip
        self.checkpoint = None  # its optimizer is in parts that no other number of ranks can read
        return self.accelerator.prepare(core, self._optimizer(core))

    def _optimizer(self, core: nn.Module) -> torch.optim.Optimizer:
        training = self.training
        trained = [p for p in core.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": training.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas)

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained, in the optimizer's order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def _catch_up(self) -> None:
        """Give the student what was trained; where that is sharded, all ranks come here."""
        if self._behind:
            for name, parameter in self.student.model.named_parameters():
                if self._shards[name].requires_grad:
                    parameter.copy_(_whole(self._shards[name]))
            self._behind = False

    # -- checkpoints ----------------------------------------------------------------------------

    def save(self, notes: Mapping[str, Any], boundary: bool = False) -> None:
        """Write everything that the rest of the run depends on, atomically, from rank 0.

        At the end of a stage the weights are kept in a file of their own too: a run that is taken up again executes the
        method from its start, and must show it the student as it was between the stages.
        """
        if self.checkpoint is None:
            return
        self._catch_up()
        weights = self.student.weights()
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {
            place: {name: _gathered(value) for name, value in held.items()}
            for place, held in optimizer["state"].items()
        }
        if not self.accelerator.is_main_process:
            return
        if boundary:
            self._write(self._boundary(self.state.stage), weights)
        held = {
            "key": self.key,
            "state": vars(self.state),
            "model": weights,
            "optimizer": optimizer,
            "ledger": self.ledger.to_dict(),
            "notes": dict(notes),
            "rng": {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all(),
                "python": random.getstate(),
                "numpy": np.random.get_state(),
            },
        }
        self._write(self.checkpoint, held)

    def resume(self) -> Mapping[str, Any] | None:
        """Find the last checkpoint; returns the notes it held, or None if there is none.

        Its weights are loaded when the method reaches the stage that was cut off.
        """
        path = self.checkpoint
        if path is None or not ranks.agree(path.is_file):
            return None
        saved = torch.load(path, map_location="cpu", weights_only=False)
        if saved["key"] != self.key:
            raise ValueError(
                f"{path} was left by a run with another configuration: give this one a name of "
                "its own (--set name=…), or remove the file"
            )
        self._saved, self.state = saved, State(**saved["state"])
        self.ledger.load(saved["ledger"])
        return saved["notes"]

    def clear(self) -> None:
        """Remove the checkpoints of a run that has ended."""
        if self.checkpoint is not None and self.accelerator.is_main_process:
            for path in self.checkpoint.parent.glob(f"{self.checkpoint.stem}*.pt"):
                path.unlink(missing_ok=True)

    def _restore(self, saved: Mapping[str, Any]) -> None:
        self._saved = None
        self._load(saved["model"])
        held = dict(saved["optimizer"])
        held["state"] = {
            place: {name: _like(value, self.parameters[place]) for name, value in state.items()}
            for place, state in held["state"].items()
        }
        self.optimizer.load_state_dict(held)
        rng = saved["rng"]
        torch.set_rng_state(rng["torch"].cpu())
        if rng["cuda"]:
            torch.cuda.set_rng_state_all([state.cpu() for state in rng["cuda"]])
        random.setstate(rng["python"])
        np.random.set_state(rng["numpy"])

    @torch.no_grad()
    def _load(self, weights: Mapping[str, Tensor]) -> None:
        self.student.load_state(weights)
        for name, parameter in self.student.model.named_parameters():
            if name in self._shards:
                self._shards[name].copy_(_like(parameter, self._shards[name]))
        self._behind = False

    def _boundary(self, index: int) -> Path:
        assert self.checkpoint is not None
        return self.checkpoint.with_name(f"{self.checkpoint.stem}-{index}.pt")

    def _write(self, path: Path, data: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = draft(path)
        try:
            with writing(path):
                torch.save(data, partial)
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _configured(engine: str) -> bool:
    """Whether the launcher was told to use it; Accelerate itself leaves FSDP out on CPUs."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false") == "true"


def _whole(value: Any) -> Any:
    """A tensor that is sharded, gathered on every rank; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _gathered(value: Any) -> Any:
    """A sharded tensor whole in the main memory of rank 0, which saves it: a GPU need not hold all of them."""
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if ranks.first() else None


def _like(value: Any, parameter: Tensor) -> Any:
    """This rank's part of a whole tensor that is sharded as a parameter is; anything else as it is."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def denominator(stage: Stage, examples: Sequence[Example]) -> float:
    """What the weighted sum of a step's losses is divided by.

    token: the step's loss tokens; sequence and sum: its examples, those of weight 0 included.
    `normalise: step` divides by the mean weight too, so that a step's weights average to one.
    """
    if stage.mean == "token":
        count = float(sum(e.num_loss_tokens for e in examples))
        weight = sum(_token_weight(e) for e in examples)
    else:
        count = float(len(examples))
        weight = sum(e.weight for e in examples)
    if stage.normalise == "none":
        return count
    if weight <= 0:
        raise ValueError(
            f"stage {stage.name!r}: normalise 'step' needs a positive sum of weights in every step, "
            f"got {weight:g}; use normalise 'none' for signed weights"
        )
    return weight


def plan(
    examples: Sequence[Example], micro_tokens: int, packed: bool = False
) -> list[list[Example]]:
    """Cut a step into micro-batches of one term, like lengths, and bounded padded size; packed ones have no padding."""
    batches: list[list[Example]] = []
    width = 0
    for example in sorted(examples, key=lambda e: (e.term, length(e))):
        padded = -(-length(example) // 32) * 32
        current = batches[-1] if batches else None
        fits = current and current[0].term == example.term
        if packed:
            room = sum(map(length, current or ())) + length(example) <= micro_tokens
        else:  # a much longer sequence starts a batch of its own: padding costs more than a forward pass
            room = (len(current or ()) + 1) * padded <= micro_tokens and padded <= 2 * width
        if current and fits and room:
            current.append(example)
        else:
            batches.append([example])
            width = padded
    return batches


def length(example: Example) -> int:
    """Tokens of the longer of what the student and the teacher read."""
    prompt = max(len(example.prompt), len(example.teacher_prompt or ()))
    return prompt + len(example.response)


def _token_weight(example: Example) -> float:
    if example.token_weights is None:
        return example.weight * example.num_loss_tokens
    kept = example.loss or (True,) * len(example.response)
    return example.weight * sum(w for w, k in zip(example.token_weights, kept, strict=True) if k)


def _objective(stage: Stage, term: str) -> Objective:
    if not isinstance(stage.objective, Mapping):
        return stage.objective
    if term not in stage.objective:
        known = ", ".join(sorted(stage.objective))
        raise ValueError(f"stage {stage.name!r} has no objective for the term {term!r}: {known}")
    return stage.objective[term]


def _objectives(stage: Stage) -> list[Objective]:
    if isinstance(stage.objective, Mapping):
        return list(stage.objective.values())
    return [stage.objective]


def _empty(stage: Stage, why: str, notes: Mapping[str, Any]) -> str:
    counts = "; ".join(f"{name}: {value}" for name, value in notes.items()) or "nothing was noted"
    return f"stage {stage.name!r} is empty ({why}). What led here: {counts}"
