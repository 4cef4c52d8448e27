"""One vLLM engine, and what it is taught: our sampling noise, a head cut to the tokenizer, weights that change in place."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

Row = dict[str, Any]


def sibling(name: str) -> ModuleType:
    """A module of the bench that needs nothing of it; found by path, since a folder beside it would hide vllm."""
    path = Path(__file__).resolve().parent.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"retort_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


noise, bounds = sibling("noise"), sibling("bounds")


class Noise(LogitsProcessor):
    """Our own sampling: filtered logits plus the sample's Gumbel noise, whose arg-max vLLM takes, as its greedy way.

    So a sample is a function of its seed and the logits, in whatever batch, and the same as that of the hf backend up to rounding.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.device = device
        self.rows: dict[int, tuple[Row, list[int]]] = {}  # row of the batch -> sampling, written

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        def entry(params: Any, prompt: Any, written: list[int]) -> tuple[Row, list[int]] | None:
            return (params.extra_args, written) if params.extra_args else None

        process_dict_updates(self.rows, batch_update, entry)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for row, (sampling, _) in sorted(self.rows.items()):
            kind = tuple(sampling[key] for key in ("temperature", "top_k", "top_p", "vocabulary"))
            kinds.setdefault(kind, []).append(row)
        for (temperature, top_k, top_p, vocabulary), rows in kinds.items():
            index, seeds, steps = (
                torch.tensor(values, device=self.device)
                for values in (
                    rows,
                    [self.rows[row][0]["seed"] for row in rows],
                    [len(self.rows[row][1]) for row in rows],
                )
            )
            scores = noise.keep_top(logits[index, :vocabulary] / temperature, top_k, top_p)
            logits[index, :vocabulary] = scores + noise.gumbel(seeds, steps, vocabulary)
        return logits


class Worker:
    """What vLLM's workers can do besides."""

    model_runner: Any
    reload_weights: Any

    def retort_cut_head(self, vocabulary: int) -> None:
        """Logits beyond the tokenizer are padding: they have no probability."""
        model = self.model_runner.get_model()
        whole = model.compute_logits

        def cut(*arguments: Any, **options: Any) -> torch.Tensor | None:
            logits: torch.Tensor | None = whole(*arguments, **options)
            if logits is not None:  # it is gathered on one rank
                logits[..., vocabulary:] = -torch.inf
            return logits

        model.compute_logits = cut

    def retort_load(self, folder: str) -> None:
        """Weights in place, those of a head that is tied to the embeddings too.

        vLLM reloads such a head by the memory that it shares; on a CPU it has a packed copy, which would stay what it was.
        """
        shared: dict[int, list[tuple[torch.nn.Module, str]]] = {}
        for module in self.model_runner.get_model().modules():
            for name, parameter in module.named_parameters(recurse=False):
                shared.setdefault(id(parameter), []).append((module, name))
        self.reload_weights(weights_path=folder)
        for (first, key), *others in shared.values():
            for module, name in others:
                setattr(module, name, getattr(first, key))
                if method := getattr(module, "quant_method", None):
                    method.process_weights_after_loading(module)


class Engine:
    """What the parent may ask for; every reply is stamped with the version of the weights, and empty if another was asked for."""

    def __init__(self, options: Row, vocabulary: int, eos: list[int], top: int) -> None:
        self.llm = LLM(
            **options,
            logits_processors=["vllm_engine:Noise"],
            worker_extension_cls="vllm_engine.Worker",
        )
        self.llm.collective_rpc("retort_cut_head", args=(vocabulary,))
        self.vocabulary, self.eos, self.top = vocabulary, eos, top
        self.version: str | None = "as stored"
        self.asleep = 0

    def write(
        self, requests: list[tuple[list[int], int, int]], sampling: Row, version: str
    ) -> list[Row]:
        """(prompt, most new tokens, seed) of each sample -> its tokens, whether it ended, and how likely they were."""
        if version != self.version:
            return []
        stop = list(sampling["stop"])
        shared = {key: sampling[key] for key in ("temperature", "top_k", "top_p")}
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=most,
                stop=stop or None,
                stop_token_ids=self.eos,
                ignore_eos=True,  # vLLM's own, which may be fewer
                logprobs=self.top,
                flat_logprobs=True,
                detokenize=bool(stop),
                extra_args={**shared, "vocabulary": self.vocabulary, "seed": seed}
                if sampling["temperature"]
                else None,
            )
            for _, most, seed in requests
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in requests]
        rows = []
        for output in self.llm.generate(prompts, params, use_tqdm=False):
            (one,) = output.outputs
            rows.append(
                {
                    "tokens": list(one.token_ids),
                    "finished": one.finish_reason == "stop",
                    **self._seen(one.logprobs.logprobs),
                }
            )
        return rows

    def score(self, pairs: list[tuple[list[int], int]], version: str) -> list[Row]:
        """(ids, where the response starts) -> how likely the response's tokens were.

        The last token is forced, not read: a sequence may fill all positions, and the step that vLLM must make is of use.
        """
        if version != self.version:
            return []
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=1,
                allowed_token_ids=[ids[-1]],
                ignore_eos=True,
                logprobs=self.top,
                prompt_logprobs=self.top if len(ids) - start > 1 else None,
                flat_logprobs=True,
                detokenize=False,
            )
            for ids, start in pairs
        ]
        prompts = [{"prompt_token_ids": ids[:-1]} for ids, _ in pairs]
        rows = []
        for (_, start), output in zip(
            pairs, self.llm.generate(prompts, params, use_tqdm=False), strict=True
        ):
            read = output.prompt_logprobs
            flat = [] if read is None else read.logprobs[read.start_indices[start] :]
            rows.append(self._seen([*flat, *output.outputs[0].logprobs.logprobs]))
        return rows

    def load(self, folder: str, version: str) -> None:
        """Take weights in place, and forget what was computed with the old ones."""
        if self.asleep:
            self.llm.wake_up(["weights"])
        self.llm.collective_rpc("retort_load", args=(folder,))
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
        self.asleep = 0
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: requests are still running")
        self.version = version

    def rest(self) -> None:
        """Let go of weights and cache; the weights must be loaded anew before it writes."""
        if not self.asleep:
            self.llm.sleep(level=2)
            self.asleep, self.version = 2, None

    def _seen(self, flat: list[float]) -> Row:
        """From K + 1 log-probabilities a token, its own first."""
        table = torch.tensor(flat, dtype=torch.float64).view(-1, self.top + 1)
        entropy, error = bounds.entropy_bounds(table[:, 1:], self.vocabulary)
        return {
            "logprobs": table[:, 0].tolist(),
            "entropies": entropy.tolist(),
            "entropy_error": error.tolist(),
        }
