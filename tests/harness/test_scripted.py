"""The shipped double: exactly what the script says, and a clear refusal of all else."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from harness.models.codec import Bytes
from harness.models.scripted import Reply, Scripted
from harness.types import Batch, LanguageModel, Problem, Request, Sampling, Scores
from tests.tiny import tiny_model

ADD, TIMES = Problem("add", "1+2=?"), Problem("times", "3*4=?")


def ask(problem: Problem = ADD, prefix: tuple[int, ...] = ()) -> Request:
    return Request(problem.prompt, problem, prefix)


def test_answers_come_from_the_table_in_turn() -> None:
    model = Scripted(
        {"add": ["3", Reply("4", finished=False)], "times": lambda r, i: f"{i}:{r.prompt}"}
    )
    assert isinstance(model, LanguageModel)
    [adds, times] = model.generate([ask(), ask(TIMES)], Sampling(n=3))
    assert [t.text for t in adds] == ["3", "4", "3"]
    assert [t.finished for t in adds] == [True, False, True]
    assert [t.tokens for t in adds] == [(51, Bytes.END), (52,), (51, Bytes.END)]
    assert [t.text for t in times] == ["0:3*4=?", "1:3*4=?", "2:3*4=?"]
    assert [t.index for t in times] == [0, 1, 2]
    assert adds[0].logprobs is adds[0].entropies is None
    assert {t.author for t in adds} == {model.identity}


def test_one_function_may_answer_everything() -> None:
    model = Scripted(lambda request, index: f"{request.problem.id}{index}")
    assert model.generate([ask(TIMES)], Sampling(n=2))[0][1].text == "times1"


def test_log_probs_and_entropies_where_the_script_says() -> None:
    reply = Reply("ab", logprobs=(-0.1, -0.2, -0.3), entropies=(1.0, 5.0, 2.0))
    [[trace]] = Scripted({"add": [reply]}).generate([ask()], Sampling())
    assert trace.logprobs == (-0.1, -0.2, -0.3)
    assert trace.entropies == (1.0, 5.0, 2.0)
    short = Scripted({"add": [Reply("ab", entropies=(1.0, 2.0))]}, name="short")
    with pytest.raises(ValueError, match="short: 2 entropies are scripted for 3 written tokens"):
        short.generate([ask()], Sampling())


def test_prefix_limit_and_stop() -> None:
    reply = Reply("two\nthree", logprobs=tuple(range(10)))
    model = Scripted({"add": [reply]})
    given = Bytes().tokenize("one\n", end=False)
    [[trace]] = model.generate([ask(prefix=given)], Sampling())
    assert (trace.text, trace.prefix, trace.tokens[:4]) == ("one\ntwo\nthree", 4, given)
    [[cut]] = model.generate([ask(prefix=given)], Sampling(max_new_tokens=2))
    assert (cut.text, cut.finished, cut.logprobs) == ("one\ntw", False, (0, 1))
    [[stopped]] = model.generate([ask(prefix=given)], Sampling(stop=("\n", "e")))
    assert (stopped.text, stopped.finished, len(stopped.logprobs or ())) == ("one\ntwo", True, 4)
    assert model.decode(stopped.tokens) == "one\ntwo\n"  # the tokens keep the stop


def test_it_can_use_a_models_tokenizer() -> None:
    lm = tiny_model()
    model = Scripted({"add": ["<think>\n"]}, codec=lm)
    [[trace]] = model.generate([ask()], Sampling())
    assert trace.tokens == lm.tokenize("<think>\n")
    assert model.vocabulary_digest == lm.vocabulary_digest
    assert model.encode("x") == lm.encode("x")


def test_unknown_problems_are_named() -> None:
    with pytest.raises(ValueError, match=r"scripted has no answer to problem 'times'; .*'add'"):
        Scripted({"add": ["3"]}).generate([ask(TIMES)], Sampling())


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda m: m.generate([ask()], Sampling()), "generate"),
        (lambda m: m.score([((1,), (2,))]), "score"),
        (lambda m: m.hidden(None), "logits"),
        (lambda m: m.head(None), "logits"),
    ],
)
def test_what_it_was_not_scripted_to_do_is_refused(call: Any, what: str) -> None:
    can = {"generate", "score", "logits"} - {what}
    with pytest.raises(ValueError, match=f"poor cannot {what}: .* {', '.join(sorted(can))} only"):
        call(Scripted({"add": ["3"]}, name="poor", capabilities=can))
    if what in ("score", "logits") and call.__code__.co_names[-1:] != ("head",):
        with pytest.raises(ValueError, match=f"no {'scores' if what == 'score' else 'logits'} are"):
            call(Scripted({"add": ["3"]}, capabilities={what}))


def test_scripted_scores_and_logits() -> None:
    model = Scripted(
        {},
        capabilities={"score", "logits"},
        scores=lambda prompt, response: Scores((-1.0,) * len(response), (0.5,) * len(response)),
        logits=lambda batch: torch.arange(300.0).repeat(len(batch.index), 1),
    )
    assert model.score([((1,), (2, 3))]) == [Scores((-1.0, -1.0), (0.5, 0.5))]
    ids = torch.zeros(1, 4, dtype=torch.long)
    hidden = model.hidden(Batch(ids, torch.ones_like(ids), torch.tensor([0, 2])))
    assert model.head(hidden).shape == (2, 260)


def test_importing_the_backends_loads_no_tensor_library() -> None:
    code = (
        "import sys, harness.models, harness.models.scripted, harness.models.traces; "
        "print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
