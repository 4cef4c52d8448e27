"""The Transformers backend: exact against plain forwards, and the same samples however they are batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
)

from harness import models
from harness.models import cache, decoding, hf
from harness.models.collate import collate
from harness.models.decoding import sample_ranges
from harness.models.hf import HFModel
from harness.models.noise import choose, gumbel, keep_top, sample_seed
from harness.types import Batch, Example, LanguageModel, Problem, Request, Sampling, Trace
from tests.tiny import tiny_model, tiny_network, tiny_path, tiny_tokenizer

ENDS = [258, *range(97, 117)]  # with so many end tokens a random model soon meets one


def requests(*prompts: str) -> list[Request]:
    return [Request(prompt, Problem(prompt, prompt)) for prompt in prompts]


MIXED = requests("1+2=?", "x", "a longer question of some forty characters", "(3*4)-1=?", "x*2=8")


def ending_model(seed: int = 0) -> HFModel:
    network = tiny_network(seed)
    network.generation_config.eos_token_id = ENDS
    return HFModel(network, tiny_tokenizer(), name="ending")


def flat(traces: list[list[Trace]]) -> list[Trace]:
    return [trace for group in traces for trace in group]


def plain_logp(lm: HFModel, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """[L, V] by one forward of one unpadded sequence."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = lm.model(input_ids=ids).logits[0, len(prompt) - 1 : -1, : lm.vocabulary]
    return logits.log_softmax(-1)


def close(found: Sequence[float] | None, expected: Any, atol: float = 2e-5) -> None:
    torch.testing.assert_close(
        torch.tensor(found), torch.as_tensor(expected, dtype=torch.float32), rtol=0, atol=atol
    )


def check_against_plain(lm: HFModel, trace: Trace, atol: float = 2e-5) -> None:
    written = trace.tokens[trace.prefix :]
    logp = plain_logp(lm, lm.encode(trace.problem.prompt), trace.tokens)[trace.prefix :]
    close(trace.logprobs, logp[range(len(written)), list(written)], atol)
    close(trace.entropies, -(logp.exp() * logp).sum(-1), 5 * atol)


# -- text ---------------------------------------------------------------------------------------


def test_is_a_language_model() -> None:
    lm = tiny_model()
    assert isinstance(lm, LanguageModel)
    assert lm.vocabulary == 300
    assert lm.eos == {258}
    assert lm.pad == 256
    assert lm.end == 258


def test_encode_renders_one_user_turn() -> None:
    lm = tiny_model()
    raw = lm.tokenizer.decode(lm.encode("2+2"))
    assert raw == "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"


def test_tokenize_ends_once_and_decodes_back() -> None:
    lm = tiny_model()
    text = "<think>\né 1\n</think>\n45"
    ids = lm.tokenize(text)
    assert ids[-1] == 258
    assert lm.tokenize(text, end=False) == ids[:-1]
    assert lm.tokenize(text + "<|im_end|>") == ids
    assert lm.decode(ids) == text
    assert ids[0] == lm.tokenizer.convert_tokens_to_ids("<think>")


def test_a_system_turn_stands_before_the_users() -> None:
    lm = tiny_model()
    raw = lm.tokenizer.decode(lm.encode("2+2", system="be brief"))
    assert raw.index("system") < raw.index("be brief") < raw.index("user") < raw.index("2+2")
    assert lm.encode("2+2") != lm.encode("2+2", system="be brief")
    assert lm.encode("2+2") == tiny_model().encode("2+2")  # what was kept of one is not the other's


def test_no_chat_template_says_what_to_do() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"bare: its tokenizer has no chat template.*jinja"):
        HFModel(tiny_network(), tokenizer, name="bare").encode("x")


def test_head_smaller_than_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head has 280 rows, fewer than the 300 tokens"):
        HFModel(tiny_network(rows=280), tiny_tokenizer())


# -- noise --------------------------------------------------------------------------------------


def test_mixing_is_splitmix64() -> None:
    """The first outputs of splitmix64 with seed 1234567, as published with the algorithm."""
    from harness.models.noise import GOLDEN, mix

    states = torch.tensor([1234567]) + torch.arange(1, 4) * GOLDEN
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [v % 2**64 for v in mix(states).tolist()] == expected


def test_choose_draws_from_the_softmax() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).repeat(40_000, 1)
    for sampling, kept in [
        (Sampling(), [0, 1, 2, 3]),
        (Sampling(temperature=0.5), [0, 1, 2, 3]),
        (Sampling(top_k=2), [0, 3]),
        (Sampling(top_p=0.9), [0, 1, 3]),  # masses 0.644, 0.237, 0.087, 0.032
        (Sampling(top_p=0.85), [0, 3]),
    ]:
        drawn = choose(logits, sampling, torch.arange(40_000), step=3)
        share = torch.bincount(drawn, minlength=4) / 40_000
        scaled = logits[0] / sampling.temperature
        outside = torch.tensor([v not in kept for v in range(4)])
        expected = scaled.masked_fill(outside, -torch.inf).softmax(-1)
        torch.testing.assert_close(share, expected, atol=0.012, rtol=0)


def test_noise_depends_on_seed_step_and_token_only() -> None:
    seeds = torch.tensor([5, -7, 2**62])
    noise = gumbel(seeds, 4, 50)
    assert torch.equal(gumbel(seeds[[2, 0]], 4, 30), noise[[2, 0], :30])
    assert not torch.equal(gumbel(seeds, 5, 50), noise)
    assert noise.unique().numel() == noise.numel()


def test_filters_keep_at_least_the_best() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 4.0, 4.5]])
    kept = keep_top(logits, 0, 0.0) > -torch.inf
    assert kept.tolist() == [[False, True, False], [True, False, False]]
    assert torch.equal(keep_top(logits, 3, 1.0), logits)


def test_sample_seed_ignores_n_and_nothing_else() -> None:
    base = Sampling(n=1, temperature=0.7, stop=("a",))
    seed = sample_seed((1, 2), (3,), base, 0)
    assert seed == sample_seed((1, 2), (3,), replace(base, n=64), 0)
    others = [
        sample_seed((1, 2, 3), (), base, 0),
        sample_seed((1, 2), (), base, 0),
        sample_seed((1, 2), (3,), base, 1),
        *(
            sample_seed((1, 2), (3,), replace(base, **{field: value}), 0)
            for field, value in {
                "temperature": 0.8,
                "top_p": 0.9,
                "top_k": 5,
                "max_new_tokens": 7,
                "stop": ("b",),
                "seed": 1,
            }.items()
        ),
    ]
    assert len({seed, *others}) == 1 + len(others)


# -- writing ------------------------------------------------------------------------------------


def test_greedy_equals_transformers_generate() -> None:
    lm = ending_model()
    greedy = Sampling(temperature=0.0, max_new_tokens=40)
    for [trace] in lm.generate(MIXED, greedy):
        prompt = lm.encode(trace.problem.prompt)
        out = lm.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=40,
            pad_token_id=lm.pad,
            suppress_tokens=[*range(lm.vocabulary, 320)],
        )
        assert trace.tokens == tuple(out[0, len(prompt) :].tolist())
        check_against_plain(lm, trace)


def test_logprobs_and_entropies_are_raw_whatever_the_sampling() -> None:
    lm = ending_model()
    sampling = Sampling(n=2, temperature=0.6, top_k=20, top_p=0.8, max_new_tokens=30)
    for trace in flat(lm.generate(MIXED, sampling)):
        check_against_plain(lm, trace)


def test_top_k_1_is_greedy() -> None:
    lm = tiny_model()
    one = lm.generate(MIXED, Sampling(top_k=1, max_new_tokens=12))
    greedy = lm.generate(MIXED, Sampling(temperature=0.0, max_new_tokens=12))
    assert [t[0].tokens for t in one] == [t[0].tokens for t in greedy]


def test_fewer_samples_are_a_bitwise_prefix_of_more() -> None:
    lm = ending_model()
    sampling = Sampling(n=8, max_new_tokens=20, seed=3)
    eight = lm.generate(MIXED, sampling)
    for n in (1, 3, 4):
        fewer = lm.generate(MIXED, replace(sampling, n=n))
        assert fewer == [traces[:n] for traces in eight]  # tokens, log-probs and entropies
    assert [t.index for t in eight[0]] == list(range(8))
    assert len({t.tokens for traces in eight for t in traces}) > 35


def test_more_samples_only_add_blocks() -> None:
    lm = tiny_model()
    blocks = {n: [b.pairs for b in lm.plan(MIXED, Sampling(n=n))] for n in (1, 16, 64)}
    assert all(pairs in blocks[64] for n in (1, 16) for pairs in blocks[n])
    assert sorted(p for b in blocks[64] for p in b) == [(r, i) for r in range(5) for i in range(64)]
    assert {b.width for b in lm.plan(MIXED, Sampling())} == {32, 64}
    assert [*sample_ranges(6, 4)] == [range(1), range(1, 2), range(2, 4), range(4, 8)]
    assert [*sample_ranges(9, 2)][-3:] == [range(4, 6), range(6, 8), range(8, 10)]


def test_blocks_hold_to_rows_and_memory() -> None:
    lm = HFModel(tiny_network(), tiny_tokenizer(), rows=4)
    many = requests(*"abcdefghij")
    assert [len(b.pairs) for b in lm.plan(many, Sampling(n=2))] == [4, 4, 2] * 2
    lm = HFModel(tiny_network(), tiny_tokenizer(), cache_bytes=2 * 2 * 2 * 8 * 4 * 132 * 5)
    assert [len(b.pairs) for b in lm.plan(many[:8], Sampling(max_new_tokens=100))] == [4, 4]


def test_a_sample_does_not_depend_on_its_batch() -> None:
    lm = ending_model()
    sampling = Sampling(n=4, max_new_tokens=30, seed=9)
    together = lm.generate(MIXED, sampling)
    for request, traces in zip(MIXED, together, strict=True):
        [alone] = lm.generate([request], sampling)
        for one, other in zip(alone, traces, strict=True):
            assert (one.tokens, one.text, one.finished) == (
                other.tokens,
                other.text,
                other.finished,
            )
            close(one.logprobs, other.logprobs)


def test_compaction_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = ending_model()
    sampling = Sampling(n=8, max_new_tokens=60, seed=4)
    found = lm.generate(MIXED, sampling)
    lengths = {len(t.tokens) for traces in found for t in traces}
    assert len(lengths) > 10  # rows do leave at different steps
    monkeypatch.setattr(decoding, "COMPACT", 0.0)
    for traces, others in zip(found, lm.generate(MIXED, sampling), strict=True):
        for one, other in zip(traces, others, strict=True):
            assert one.tokens == other.tokens
            close(one.logprobs, other.logprobs)


def test_growing_the_cache_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = ending_model()
    sampling = Sampling(n=4, max_new_tokens=60, seed=4)
    found = lm.generate(MIXED, sampling)
    monkeypatch.setattr(cache, "ROOM", 1)
    assert lm.generate(MIXED, sampling) == found


def test_traces_end_at_the_first_end_token() -> None:
    lm = ending_model()
    traces = flat(lm.generate(MIXED, Sampling(n=8, max_new_tokens=25)))
    finished = [t for t in traces if t.finished]
    assert 0 < len(finished) < len(traces)
    assert {t.tokens[-1] for t in finished} - {258}  # also by the generation config's
    for t in finished:
        assert t.tokens[-1] in ENDS
        assert not set(t.tokens[:-1]) & set(ENDS)
        assert t.text == lm.decode(t.tokens[:-1])
        assert len(t.logprobs or ()) == len(t.entropies or ()) == len(t.tokens)
    for t in traces:
        if not t.finished:
            assert len(t.tokens) == 25
            assert not set(t.tokens) & set(ENDS)
        assert t.author == lm.identity


def test_an_end_token_at_the_limit_counts_as_finished() -> None:
    lm = tiny_model()
    [[trace]] = lm.generate(MIXED[:1], Sampling(temperature=0.0, max_new_tokens=50))
    last = max(trace.tokens.index(token) for token in trace.tokens)  # first seen there
    lm.eos = lm.eos | {trace.tokens[last]}
    [[cut]] = lm.generate(MIXED[:1], Sampling(temperature=0.0, max_new_tokens=last + 1))
    assert last > 0
    assert (cut.tokens, cut.finished) == (trace.tokens[: last + 1], True)


def test_stop_strings_cut_the_text_and_end_the_trace() -> None:
    lm = tiny_model()
    greedy = Sampling(temperature=0.0, max_new_tokens=40)
    [[whole]] = lm.generate(MIXED[:1], greedy)
    words = [lm.decode([t]) for t in whole.tokens]
    place = next(i for i in range(5, 35) if "�" not in words[i] + words[i + 1])
    stop = words[place] + words[place + 1]  # spans two tokens
    [[cut]] = lm.generate(MIXED[:1], replace(greedy, stop=("never", stop)))
    assert cut.finished
    assert cut.tokens == whole.tokens[: place + 2]
    assert cut.text == whole.text[: whole.text.index(stop)]
    check_against_plain(lm, cut)


def test_a_stop_string_in_the_prefix_is_not_met() -> None:
    lm = tiny_model()
    greedy = Sampling(temperature=0.0, max_new_tokens=30)
    given = replace(MIXED[0], prefix=(*range(94), *range(259, 300)))  # nearly every word there is
    [[whole]] = lm.generate([given], greedy)
    written = whole.tokens[whole.prefix :]
    place = max(written.index(token) for token in written if token in given.prefix)
    [[cut]] = lm.generate([given], replace(greedy, stop=(lm.decode([written[place]]),)))
    assert place > 0
    assert cut.tokens == (*given.prefix, *written[: place + 1])
    assert cut.text == lm.decode((*given.prefix, *written[:place]))


def test_long_text_before_a_stop_is_kept_whole() -> None:
    lm = tiny_model()
    greedy = Sampling(temperature=0.0, max_new_tokens=120)
    [[whole]] = lm.generate(MIXED[1:2], greedy)
    place = max(whole.tokens.index(token) for token in whole.tokens if token > 260)
    assert place > 20  # beyond the window that is searched
    [[cut]] = lm.generate(MIXED[1:2], replace(greedy, stop=(lm.decode([whole.tokens[place]]),)))
    assert cut.text == lm.decode(whole.tokens[:place])


def test_prefixes_are_continued() -> None:
    lm = tiny_model()
    greedy = Sampling(temperature=0.0, max_new_tokens=20)
    whole = [traces[0] for traces in lm.generate(MIXED, greedy)]
    given = [
        replace(r, prefix=t.tokens[: 3 * i])
        for i, (r, t) in enumerate(zip(MIXED, whole, strict=True))
    ]
    for request, trace, full in zip(given, lm.generate(given, greedy), whole, strict=True):
        [found] = trace
        assert found.prefix == len(request.prefix)
        assert found.tokens[:20] == full.tokens
        assert len(found.logprobs or ()) == 20
        assert found.text == lm.decode(found.tokens)
        check_against_plain(lm, found)


def test_a_finished_prefix_has_nothing_to_add() -> None:
    lm = tiny_model()
    done = replace(MIXED[0], prefix=lm.tokenize("45"))
    [[trace], [other]] = lm.generate([done, MIXED[1]], Sampling(max_new_tokens=5))
    assert (trace.tokens, trace.text, trace.finished) == (done.prefix, "45", True)
    assert trace.logprobs == ()
    assert len(other.tokens) == 5
    [[trace]] = lm.generate([done], Sampling(max_new_tokens=5))
    assert trace.tokens == done.prefix


def test_the_seed_and_only_the_seed_redraws() -> None:
    lm = tiny_model()
    first, again, other = (
        lm.generate(MIXED, Sampling(max_new_tokens=10, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again
    assert all(a[0].tokens != b[0].tokens for a, b in zip(first, other, strict=True))


def test_positions_limit_the_length() -> None:
    lm = HFModel(tiny_network(), tiny_tokenizer(), name="short")
    lm.model.config.max_position_embeddings = 40
    given = len(lm.encode("x"))
    [[trace]] = lm.generate(requests("x"), Sampling(max_new_tokens=100))
    assert len(trace.tokens) == 40 - given
    assert not trace.finished
    with pytest.raises(ValueError, match=r"problem 'x{40}'.*short has 40 positions"):
        lm.generate(requests("x" * 40), Sampling())


def test_what_a_row_would_write_after_its_limit_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "COMPACT", 0.0)  # rows stay in the batch to its end
    lm = ending_model()
    lm.model.config.max_position_embeddings = 36
    short, long = lm.generate(requests("x", "x" * 10), Sampling(n=32, max_new_tokens=50))
    assert {len(t.tokens) for t in short} > {len(t.tokens) for t in long}
    for trace in (*short, *long):
        assert trace.finished == (trace.tokens[-1] in ENDS)


def test_progress_counts_every_sample_once() -> None:
    lm = ending_model()
    counts: list[int] = []
    lm.generate(MIXED, Sampling(n=4, max_new_tokens=30), progress=counts.append)
    assert sum(counts) == 20


def test_generating_leaves_training_mode_alone() -> None:
    lm = tiny_model()
    lm.model.train()
    lm.generate(MIXED[:1], Sampling(max_new_tokens=2))
    assert lm.model.training
    loss = lm.head(lm.hidden(collate([Example("p", (1, 2), (3,))], lm.pad).batch)).sum()
    loss.backward()  # nothing that generating cached stands in the way


SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SMALL),
    "gpt2": GPT2Config(
        vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3,
        bos_token_id=None, eos_token_id=258,
    ),
    "sliding": MistralConfig(**SMALL, sliding_window=8),
    "hybrid": Lfm2Config(**SMALL, layer_types=["conv", "full_attention"], conv_L_cache=3),
    "capped": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0, sliding_window=16),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_write_as_they_do_alone(name: str) -> None:
    torch.manual_seed(1)
    network = AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()
    lm = HFModel(network, tiny_tokenizer(), name=name)
    for [trace] in lm.generate(MIXED, Sampling(temperature=0.0, max_new_tokens=24)):
        logp = plain_logp(lm, lm.encode(trace.problem.prompt), trace.tokens)
        assert tuple(logp.argmax(-1).tolist()) == trace.tokens
        check_against_plain(lm, trace, atol=1e-4)


def test_logits_changed_after_the_head_are_refused() -> None:
    lm = HFModel(AutoModelForCausalLM.from_config(ARCHITECTURES["capped"]), tiny_tokenizer())
    with pytest.raises(ValueError, match=r"changes its logits after the head.*only generates"):
        lm.score([((1, 2), (3, 4))])


# -- scoring ------------------------------------------------------------------------------------

PAIRS = [((1, 2, 3), (4, 5)), ((7,), tuple(range(90))), ((9, 8), ()), (tuple(range(33)), (5, 258))]


@pytest.mark.parametrize("logits", [1, 900, 1 << 24])
def test_scores_equal_plain_forwards(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "LOGITS", logits)
    lm = tiny_model()
    for (prompt, response), scores in zip(PAIRS, lm.score(PAIRS), strict=True):
        if not response:
            assert scores.logprobs == scores.entropies == ()
            continue
        logp = plain_logp(lm, prompt, response)
        close(scores.logprobs, logp[range(len(response)), list(response)])
        close(scores.entropies, -(logp.exp() * logp).sum(-1), 1e-4)


def test_scores_of_many_batches_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_model()
    once = lm.score(PAIRS * 3)
    monkeypatch.setattr(hf, "SCORED_TOKENS", 32)
    for one, other in zip(once, lm.score(PAIRS * 3), strict=True):
        close(one.logprobs, other.logprobs)


def test_scores_agree_with_what_was_recorded() -> None:
    lm = ending_model()
    traces = flat(lm.generate(MIXED, Sampling(n=2, max_new_tokens=30)))
    scores = lm.score([(lm.encode(t.problem.prompt), t.tokens) for t in traces])
    for trace, score in zip(traces, scores, strict=True):
        close(trace.logprobs, score.logprobs)
        close(trace.entropies, score.entropies, 1e-4)


def test_nothing_predicts_a_response_without_a_prompt() -> None:
    with pytest.raises(ValueError, match="under a prompt"):
        tiny_model().score([((), (1, 2))])


# -- hidden states and head ---------------------------------------------------------------------


def test_head_of_hidden_is_the_models_logits() -> None:
    lm = tiny_model()
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 256, 256]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    logits = lm.head(lm.hidden(Batch(ids, mask, torch.tensor([0, 3, 5]))))
    assert logits.shape == (3, 300)
    whole = [plain_logp(lm, ids[0].tolist()[:1], [*ids[0].tolist()[1:], 0])]
    whole.append(plain_logp(lm, [5], [6, 0]))
    expected = torch.stack([whole[0][0], whole[0][3], whole[1][1]])
    torch.testing.assert_close(logits.log_softmax(-1), expected, atol=2e-5, rtol=0)
    assert lm.head_weight.shape == (300, 32)
    assert lm.head_bias is None


def test_padding_on_the_left_is_understood_too() -> None:
    lm = tiny_model()
    right = Batch(torch.tensor([[5, 6, 7, 256]]), torch.tensor([[1, 1, 1, 0]]), torch.tensor([2]))
    left = Batch(torch.tensor([[256, 5, 6, 7]]), torch.tensor([[0, 1, 1, 1]]), torch.tensor([3]))
    torch.testing.assert_close(lm.hidden(right), lm.hidden(left), atol=2e-5, rtol=0)


def test_gradients_flow_until_frozen() -> None:
    lm = tiny_model()
    batch = collate([Example("p", (1, 2, 3), (4, 5))], lm.pad).batch
    lm.head(lm.hidden(batch)).sum().backward()
    assert all(p.grad is not None for p in lm.model.parameters())
    with torch.no_grad():
        assert not lm.hidden(batch).requires_grad
    assert lm.freeze() is lm
    assert not lm.head(lm.hidden(batch)).requires_grad


# -- collate ------------------------------------------------------------------------------------


def test_collate_by_hand() -> None:
    first = Example(
        "a", (1, 2, 3), (4, 5, 6), weight=0.5, loss=(True, False, True),
        token_weights=(2.0, 3.0, 5.0), scalars={"u": (0.1, 0.2, 0.3), "k": 7.0},
    )  # fmt: skip
    second = Example(
        "b", (8,), (9, 10), weight=-3.0, scalars={"u": (0.4, 0.5), "k": 9.0},
        teacher_prompt=(11, 12, 13, 14),
    )  # fmt: skip
    batch, tokens, sequence = collate([first, second], 0, 4)
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5, 6, 0, 0], [8, 9, 10, 0, 0, 0, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.index.tolist() == [
        2,
        4,
        8,
        9,
    ]  # 3 predicts 4, 5 predicts 6; 8 predicts 9, 9 predicts 10
    assert tokens.targets.tolist() == [4, 6, 9, 10]
    assert tokens.weights.tolist() == [1.0, 2.5, -3.0, -3.0]
    close(tokens.scalars["u"].tolist(), [0.1, 0.3, 0.4, 0.5])
    assert tokens.scalars["k"].tolist() == [7.0, 7.0, 9.0, 9.0]
    assert sequence.tolist() == [0, 0, 1, 1]

    batch, same, _ = collate([first, second], 0, 4, teacher=True, progress=0.25)
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5, 6, 0, 0], [11, 12, 13, 14, 9, 10, 0, 0]]
    assert batch.index.tolist() == [2, 4, 11, 12]
    assert torch.equal(same.targets, tokens.targets)
    assert same.progress == 0.25


def test_collate_pads_to_a_multiple() -> None:
    batch = collate([Example("a", (1,), (2,) * 32)], 0).batch
    assert batch.ids.shape == (1, 64)


def test_a_pad_token_that_is_the_end_token_still_counts() -> None:
    lm = tiny_model()
    batch, tokens, _ = collate([Example("a", (1,), (2, 258)), Example("b", (1,), (2,) * 5)], 258)
    assert tokens.targets.tolist() == [2, 258, 2, 2, 2, 2, 2]
    logp = lm.head(lm.hidden(batch)).log_softmax(-1)
    torch.testing.assert_close(logp[:2], plain_logp(lm, (1,), (2, 258)), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"loss": (True,)}, "loss has 1 values for a response of 2 tokens"),
        ({"token_weights": (1.0, 2.0, 3.0)}, "token_weights has 3 values"),
        ({"scalars": {"p": (1.0,)}}, r"scalars\['p'\] has 1 values"),
    ],
)
def test_collate_refuses_wrong_lengths(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=f"problem 'q': {what}"):
        collate([Example("q", (1,), (2, 3), **fields)], 0)


def test_collate_refuses_what_cannot_be_batched() -> None:
    with pytest.raises(ValueError, match="'q': an example without a prompt"):
        collate([Example.zero(Problem("q", ""))], 0)
    with pytest.raises(ValueError, match="'b' lacks the scalars k"):
        collate([Example("a", (1,), (2,), scalars={"k": 1.0}), Example("b", (1,), (2,))], 0)


# -- identity and weights -----------------------------------------------------------------------


def test_identity_follows_what_decides_the_outputs(tmp_path: Path) -> None:
    lm = tiny_model()
    first = lm.identity
    assert first == tiny_model().identity
    assert first != tiny_model(seed=1).identity
    assert HFModel.load(lm.save(tmp_path / "copy"), device="cpu").identity == first
    assert HFModel.load(tmp_path / "copy", device="cpu", dtype="bf16").identity != first

    lm.generate(MIXED[:1], Sampling(max_new_tokens=2))
    lm.score(PAIRS[:1])
    assert lm.identity == first
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=1e-3)
    batch = collate([Example("p", (1, 2), (3,))], lm.pad).batch
    lm.head(lm.hidden(batch)).sum().backward()
    optimizer.step()
    assert lm.identity != first  # an update in place is seen by itself

    lm = tiny_model()
    assert lm.identity == first
    lm.model.model.norm.weight.data.mul_(2)
    lm.touch()
    assert lm.identity != first

    lm = tiny_model()
    lm.tokenizer.chat_template += " "
    assert lm.identity != first


def test_state_goes_out_and_in() -> None:
    lm, other = tiny_model(), tiny_model(seed=1)
    state = lm.state()
    before = other.identity
    other.load_state(state)
    assert other.identity == lm.identity != before
    lm.model.model.norm.weight.data.zero_()
    assert state["model.norm.weight"].abs().sum() > 0  # a copy


def test_a_clone_is_frozen_and_apart() -> None:
    lm = tiny_model()
    lm.head(lm.hidden(collate([Example("p", (1, 2), (3,))], lm.pad).batch)).sum().backward()
    twin = lm.clone()
    assert twin.identity == lm.identity
    assert not any(p.requires_grad or p.grad is not None for p in twin.model.parameters())
    with torch.no_grad():
        lm.model.model.norm.weight.add_(1.0)
    assert twin.identity != lm.identity


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "model"
    first = tiny_model()
    first.save(path)
    second = tiny_model(seed=1)
    with monkeypatch.context() as broken:
        broken.setattr(type(second.tokenizer), "save_pretrained", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            second.save(path)
    assert HFModel.load(path, device="cpu").identity == first.identity
    second.save(path)
    assert HFModel.load(path, device="cpu").identity == second.identity
    assert [p.name for p in path.parent.iterdir()] == ["model"]


# -- loading by name ----------------------------------------------------------------------------


def test_load_takes_names_and_folders() -> None:
    known = {"micro/teacher": tiny_path()}
    lm = models.load("micro/teacher", checkpoints=known, device="cpu")
    assert lm.name == "micro/teacher"
    assert models.load({"model": str(tiny_path())}, device="cpu").identity == lm.identity


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("micro/teachr", r"model 'micro/teachr' was not found; did you mean 'micro/teacher'\?.*hf download"),
        ("/no/such/folder", r"'/no/such/folder' was not found.*or one of micro/teacher"),
        ({"modle": "x"}, r"found the keys modle"),
        ({"traces": "x.jsonl"}, "only a teacher can be replayed"),
    ],
)  # fmt: skip
def test_load_says_what_it_wants(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.load(spec, checkpoints={"micro/teacher": tiny_path()})


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="dtype 'half' is unknown; choose one of fp32, bf16, fp16"):
        HFModel.load(tiny_path(), dtype="half")


def test_pairs_need_one_tokenizer() -> None:
    student = tiny_model()
    padded = HFModel(tiny_network(1, rows=384), tiny_tokenizer(), name="padded")
    models.check_pair(student, padded)
    other = HFModel(tiny_network(), tiny_tokenizer(["<other>"]), name="other")
    with pytest.raises(ValueError, match=r"300 tokens.*other \(260 tokens\).*Heads padded.*sft"):
        models.check_pair(student, other)
