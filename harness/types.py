"""The nouns of the bench, on one page.

Importing this module pulls in no tensor library, so that the command line answers at once.
Legend: B sequences in a batch, T positions, N loss tokens in a batch, H hidden width, V vocabulary, P problems.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Ids = tuple[int, ...]
Split = Literal["train", "dev", "test"]
# logits: hidden states and head, for divergences; reward: how likely the last step of a response is right
Capability = Literal["generate", "score", "logits", "reward"]
Status = Literal["ok", "wrong", "unparsed", "timeout", "error"]
Second = Literal["ok", "wrong"]  # what the second extractor says of a mathematical answer
# From the losses of tokens to that of a problem, as papers name it; and what a Stage calls it.
Reduction = Literal["seq_mean", "token_mean", "sum"]
MEAN: Mapping[str, Literal["token", "sequence", "sum"]] = {
    "seq_mean": "sequence",
    "token_mean": "token",
    "sum": "sum",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One task with a checkable answer."""

    id: str
    prompt: str  # the task's text; harness.problems.render makes the user turn from it
    answer: str | None = None  # ground truth, for verifiers that compare answers
    tests: str | None = None  # Python source that a program must pass, for verifiers that run code
    domain: str = "math"  # math or code
    level: int | None = None
    solution: str | None = None  # a reference response, where the data has one
    source: str = ""  # name of the problem set
    verifier: str = "math"  # how a completion is read and judged: math, exact (micro answers), code
    entry: str | None = None  # the function that the tests call, where there is one
    subject: str | None = None  # such as Algebra, where the data says


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier found in one completion."""

    status: Status
    extracted: str | None = None
    second: Second | None = (
        None  # reported, never counted; None: it did not look, or found no answer
    )

    @property
    def correct(self) -> bool:
        return self.status == "ok"

    @property
    def disputed(self) -> bool:
        """Whether the two extractors disagree."""
        return self.second is not None and self.correct != (self.second == "ok")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw responses. temperature 0 is greedy; top_k 0 and top_p 1 switch the filters off."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ()
    seed: int = 0  # the data seed, or a training seed for on-policy samples


@dataclass(frozen=True, slots=True)
class Request:
    """Ask a model to write: a user turn, and response tokens to continue from."""

    prompt: str  # the user turn, before the chat template
    problem: Problem  # the problem it serves
    prefix: Ids = ()  # response tokens that stand already
    raw: bool = False  # the prompt is text to continue, without a chat template

    def encoded(self, model: LanguageModel) -> Ids:
        """The prompt as a model reads it."""
        return model.raw(self.prompt) if self.raw else model.encode(self.prompt)


@dataclass(frozen=True, slots=True)
class Trace:
    """One attempt at a problem, whoever wrote it."""

    problem: Problem
    tokens: Ids  # the response, prefix included, EOS (or the stop string) included if it finished
    text: str  # the response decoded, without EOS or stop string
    finished: bool  # False: cut at max_new_tokens
    prefix: int = 0  # how many of the tokens were given in the request
    index: int = 0  # sample index under its request
    author: str = ""  # identity of the weights that wrote it
    logprobs: tuple[float, ...] | None = None  # of each written token at temperature 1, nats
    entropies: tuple[float, ...] | None = None  # of the full next-token distribution there, nats
    entropy_error: tuple[float, ...] | None = None  # how far these may be off; None: they are exact
    usage: tuple[int, int] | None = None  # (prompt, written) tokens, where a server counted them
    verdict: Verdict | None = None

    @property
    def correct(self) -> bool:
        if self.verdict is None:
            raise ValueError(
                "this trace was not judged: call lab.verify(trace.problem, trace.text)"
            )
        return self.verdict.correct


@dataclass(frozen=True, slots=True)
class Scores:
    """A model's view of a given response of length L."""

    logprobs: tuple[float, ...]  # [L], nats
    entropies: tuple[float, ...]  # [L], nats, full vocabulary
    entropy_error: tuple[float, ...] | None = None  # [L], how far these may be off; None: exact


@dataclass(frozen=True, slots=True)
class Example:
    """What the student trains on."""

    problem: str  # id
    prompt: Ids
    response: Ids
    weight: float = 1.0  # 0: counted in the denominator, never run; negative: pushed away
    loss: tuple[bool, ...] | None = None  # which response tokens count; None: all
    token_weights: tuple[float, ...] | None = None  # one a response token
    scalars: Mapping[str, float | tuple[float, ...]] = field(
        default_factory=dict
    )  # for the objective
    term: str = "main"  # which objective, where a stage has several
    teacher_prompt: Ids | None = None  # what the teacher scores under; None: the prompt

    @classmethod
    def zero(cls, problem: Problem) -> Example:
        """A sequence that counts in the denominator and costs nothing."""
        return cls(problem.id, (), (), weight=0.0)

    @property
    def num_loss_tokens(self) -> int:
        return len(self.response) if self.loss is None else sum(self.loss)


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded sequences, and where in them the loss tokens are predicted."""

    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T], 1 for real tokens
    index: Tensor  # [N], flat positions in B*T whose next token is a loss token
    positions: Tensor | None = (
        None  # [B, T], where several sequences lie in a row: 0, 1, … in each of them
    )


@dataclass(frozen=True, slots=True)
class Tokens:
    """The loss tokens of a batch, flat: no prompt, no padding."""

    targets: Tensor  # [N]
    weights: Tensor  # [N], example weight times token weight; the harness applies it, objectives may look
    scalars: Mapping[str, Tensor]  # each [N]
    progress: float = 0.0  # share of the stage that is done, 0..1

    def rows(self, part: slice | Tensor) -> Tokens:
        return Tokens(
            self.targets[part],
            self.weights[part],
            {name: values[part] for name, values in self.scalars.items()},
            self.progress,
        )


@runtime_checkable
class Objective(Protocol):
    """A per-token loss: (student logits [N, V], teacher logits [N, V] or None, Tokens) -> [N].

    It never masks and never reduces. An objective may also offer
    `gradient(student, teacher, tokens) -> (loss [N], d loss / d student [N, V])`, which the chunked evaluation then uses.
    """

    @property
    def name(self) -> str: ...
    @property
    def needs_teacher(self) -> bool: ...
    def __call__(self, student: Tensor, teacher: Tensor | None, tokens: Tokens) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class OffPolicy:
    """Examples that are known before the stage."""

    examples: Sequence[Example]


@dataclass(frozen=True, slots=True)
class OnPolicy:
    """Examples made just before the student trains on them.

    `make` gets the problems of the next `every` optimizer steps and returns their examples, in any number; they are dealt out
    to the steps in their order, in equal parts.
    """

    problems: Sequence[Problem]
    make: Callable[[Sequence[Problem]], Sequence[Example]]
    every: int = 1


@dataclass(frozen=True, slots=True)
class Stage:
    """One leg of training; the trainer trains the student when a method yields it."""

    name: str
    source: OffPolicy | OnPolicy
    objective: Objective | Mapping[str, Objective]  # one, or one by Example.term
    share: float = 1.0  # of the budget
    mean: Literal["token", "sequence", "sum"] = "token"
    teacher: LanguageModel | None = None  # None: the lab's teacher
    normalise: Literal["none", "step"] = "none"  # step: divide by the step's mean weight
    optimizer: Literal["keep", "reset"] = "keep"
    epochs: float | None = None  # ends it earlier, after so many passes over its source


@runtime_checkable
class LanguageModel(Protocol):
    """What every backend offers. `capabilities` says which of generate, score and logits it can do."""

    @property
    def name(self) -> str: ...
    @property
    def identity(
        self,
    ) -> str: ...  # digest of what decides its outputs: weights, tokenizer, template, dtype, engine
    @property
    def capabilities(self) -> frozenset[Capability]: ...
    @property
    def vocabulary(self) -> int: ...  # tokenizer length; logits beyond it are padding
    @property
    def vocabulary_digest(
        self,
    ) -> str: ...  # equal for two models that may be compared token by token
    def encode(
        self, prompt: str, system: str | None = None
    ) -> Ids: ...  # a user turn through the chat template, ready for a response
    def raw(self, text: str) -> Ids: ...  # text to continue, no template around it
    def tokenize(self, text: str, *, end: bool = True) -> Ids: ...  # a response; with EOS if `end`
    def decode(self, ids: Sequence[int]) -> str: ...  # special tokens dropped
    def generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> list[list[Trace]]: ...  # [requests][n]
    def score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Scores]: ...  # of (prompt, response)
    def hidden(self, batch: Batch) -> Tensor: ...  # [N, H] at batch.index
    def head(self, hidden: Tensor) -> Tensor: ...  # [n, H] -> [n, V], cut to the vocabulary


class RewardModel(Protocol):
    """A judge of steps: a process reward model, or a server that is asked yes or no."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...  # digest of what decides its outputs
    @property
    def capabilities(self) -> frozenset[Capability]: ...  # reward
    @property
    def num_parameters(self) -> int: ...  # 0 where it is not known
    def lengths(self, pairs: Sequence[tuple[str, str]]) -> list[int]: ...  # tokens it reads of each
    def reward(
        self, pairs: Sequence[tuple[str, str]]
    ) -> list[float]: ...  # of (user turn, response so far): P(its last step is right), in [0, 1]


class Oracle(Protocol):
    """Exact truth about steps, where a problem set has it (the micro world)."""

    def valid_steps(self, problem: Problem, text: str) -> list[bool]: ...  # one a reasoning line
    def first_invalid(
        self, problem: Problem, text: str
    ) -> int | None: ...  # index of the first wrong line
    def sound(
        self, problem: Problem, text: str
    ) -> bool: ...  # every line is right and none is missing


@dataclass(frozen=True, slots=True)
class Measure:
    """One line of a method's scorecard: single cases, of which the bench makes one number and its interval.

    The number is the values' mean; with labels or truth, what is said there (calibration goes with labels).
    """

    values: Sequence[float]  # one a case; with labels: scores, higher for True
    problems: Sequence[str]  # the problem of each case: cases of one problem are not independent
    labels: Sequence[bool] | None = None  # what the values should tell: the AUC
    truth: Sequence[float] | None = None  # what the values should follow: Pearson's correlation
    calibration: bool = False  # the values are probabilities of the labels: the calibration error

    @property
    def kind(self) -> Literal["mean", "auc", "correlation", "calibration"]:
        if self.truth is not None:
            return "correlation"
        if self.calibration:
            return "calibration"
        return "mean" if self.labels is None else "auc"


class ProblemSet(Protocol):
    """A named source of problems with disjoint splits."""

    @property
    def name(self) -> str: ...
    @property
    def oracle(self) -> Oracle | None: ...
    @property
    def revision(self) -> str: ...  # what decides its rows: a version, or a digest of the file
    def load(self, split: Split, n: int | None = None, **options: Any) -> list[Problem]: ...


class Lab(Protocol):
    """All that a method may look at."""

    @property
    def student(self) -> LanguageModel: ...  # as trained so far
    @property
    def base(self) -> LanguageModel: ...  # the student before training, frozen
    @property
    def teacher(self) -> LanguageModel: ...
    @property
    def models(self) -> Mapping[str, Any]: ...  # further models, declared in `needs`
    @property
    def problems(self) -> Sequence[Problem]: ...
    @property
    def oracle(self) -> Oracle | None: ...
    @property
    def consumed(self) -> float: ...  # share of the budget, 0..1, that finished stages took

    def prompt(self, problem: Problem, hint: str | None = None) -> str:
        """The user turn of a problem; with a hint only inside a Request, never for training."""
        ...

    def samples(
        self,
        model: LanguageModel,
        n: int = 1,
        *,
        requests: Sequence[Request] | None = None,
        on_policy: bool = False,
        purpose: str = "samples",
        judge: bool | None = None,
        **sampling: Any,
    ) -> list[list[Trace]]:
        """Verified traces, n for each problem (or request), in their order.

        Sampling settings default to the suite's. They come from the store where it has them; `on_policy` samples are
        seeded by the training seed and step, and are not stored, nor judged unless asked. `judge=False` asks for no verdicts
        at all. The ledger tells costs by `purpose`.
        """
        ...

    def scores(
        self, model: LanguageModel, pairs: Sequence[tuple[Ids, Ids]], *, purpose: str = "scoring"
    ) -> list[Scores | None]:
        """A model's view of each (prompt, response), out of the store where it has it; None beyond a cap on scored tokens."""
        ...

    def rewards(
        self, model: RewardModel, pairs: Sequence[tuple[str, str]], *, purpose: str = "scoring"
    ) -> list[float]:
        """P(the last step is right) for each (user turn, response so far), out of the store where it has it."""
        ...

    def verify(self, problem: Problem, text: str) -> Verdict: ...

    def judged(self, traces: Sequence[Trace]) -> list[Trace]:
        """The traces with their verdicts, judged together: for on-policy samples, which come without."""
        ...

    def pass_rates(self, model: LanguageModel, n: int, **sampling: Any) -> np.ndarray:
        """Share of n samples that are correct, [P]."""
        ...

    def references(
        self, weights: Sequence[float] | None = None, *, n: int = 1, verified: bool = True
    ) -> list[Example]:
        """The teacher's first (verified) response to each problem out of n; problems without one are left out and noted."""
        ...

    def rollouts(
        self, weights: Sequence[float] | None = None, **sampling: Any
    ) -> Callable[[Sequence[Problem]], list[Example]]:
        """A `make` for OnPolicy: one fresh student response to each problem, weighted as given for lab.problems."""
        ...

    def example(self, trace: Trace, weight: float = 1.0, **fields: Any) -> Example:
        """A training example of a trace under the bare prompt."""
        ...

    def rng(self, purpose: str, *, on_policy: bool = False) -> np.random.Generator:
        """Randomness of a method: a function of the training seed and the purpose; inside OnPolicy.make also of the step, if asked."""
        ...

    def note(self, name: str, value: Any) -> None:
        """Record what the method did (counts, histograms) for the report."""
        ...
