"""Shared by all tests: the bundled model once, and memory given back after every module."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# Before NumPy is there: each worker has a core, and threads of its own would spin for the other's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxsteer import InterpretableModel


@pytest.fixture(scope="session")
def pocket() -> InterpretableModel:
    return InterpretableModel("pocket")


@pytest.fixture(scope="session")
def tokenizer(pocket: InterpretableModel) -> TokenizerWrapper:
    """The bundled model's, but it never ends a text, so that every run has the length asked for."""
    assert pocket.tokenizer is not None
    endless = TokenizerWrapper(pocket.tokenizer._tokenizer)
    endless._eos_token_ids = {10**6}
    return endless


@pytest.fixture(autouse=True, scope="module")
def _give_memory_back() -> Iterator[None]:
    yield
    gc.collect()
    mx.clear_cache()


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Functions by name: their addresses differ from process to process, and so would the names of tests."""
    return getattr(val, "__name__", None) if callable(val) else None
