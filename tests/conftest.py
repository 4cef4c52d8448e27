"""One torch thread, no hub, fixed seeds, no warnings of our own, and programs in whatever sandbox there is."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from harness.verifiers import sandbox

torch.set_num_threads(1)
# A process of pytest-xdist ignores Ctrl-C, and what a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if sandbox.unusable() is not None:  # tests of bubblewrap itself are skipped there
    os.environ.setdefault(sandbox.FLAG, "fallback")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest last, so that a mistake shows early."""
    items.sort(key=lambda item: "slow" in item.keywords)


def pytest_report_collectionfinish(items: list[pytest.Item]) -> str:
    real = sum("real_data" in item.nodeid for item in items)
    where = os.environ.get("RETORT_DATA", "not set")
    inside = f"sandbox: {sandbox.kind()}"
    vllm = sum("test_vllm" in item.nodeid for item in items)
    engine = f"{vllm} tests of vLLM (RETORT_VLLM: {os.environ.get('RETORT_VLLM') or 'not set'})"
    return f"{real} tests on real benchmark data (RETORT_DATA: {where}); {engine}; {inside}"
