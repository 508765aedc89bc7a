"""Baked folders and adapters in other processes: plain mlx-lm, its shell commands, its server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import mlxsteer as ms
from mlxsteer import InterpretableModel
from mlxsteer.interventions import ablate, add_vector
from mlxsteer.pocket import scorer
from tests import tiny

STEPS = 64
FRESH = """
import json, sys
import mlx.core as mx, mlx_lm
from mlx_lm.models.cache import make_prompt_cache
work, steps = json.loads(sys.argv[1]), mx.load(sys.argv[2])
for name, (folder, adapter) in work.items():
    model = mlx_lm.load(folder, **({"adapter_path": adapter} if adapter else {}))[0]
    cache = make_prompt_cache(model)
    forced = steps["forced"]
    found = [model(forced[:, i : i + 1], cache=cache) for i in range(forced.shape[1])]
    out = {"prompts": model(steps["prompts"]), "forced": mx.concatenate(found, axis=1)}
    mx.save_safetensors(f"{name}.safetensors", out)
assert "mlxsteer" not in sys.modules
"""


def vector(seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=256).astype(np.float32))


def tokens_of(pocket: InterpretableModel) -> dict[str, mx.array]:
    """The first tokens of prompts, and a text to go through token by token; `benchmarks/baking.py` takes more."""
    pairs = [pair for name in ("sentiment", "topic", "formality") for pair in ms.datasets.load(f"pocket/{name}")]
    prompts = list(dict.fromkeys(tuple(pocket.encode(pair.prompt + pair.positive)[:4]) for pair in pairs))[:12]
    text = pocket.encode(" ".join(pair.prompt + pair.positive for pair in pairs[:20]))[:STEPS]
    assert (len(prompts), len(text)) == (12, STEPS)
    return {"prompts": mx.array(prompts), "forced": mx.array([text])}


def test_a_fresh_process_without_this_package_gives_the_same(pocket: InterpretableModel, tmp_path: Path) -> None:
    out = ablate(vector(1))
    written = {"layers.*.attn": out, "layers.*.mlp": out}
    several = {f"layers.{layer}": add_vector(vector(layer), 0.3) for layer in (1, 4, 6)}
    steered: dict[str, Any] = {
        "several": several,
        "ablated": {"embed": out, **written},
        "adapted": written,
    }
    work: dict[str, Any] = {}
    for name, steer in steered.items():
        if name == "adapted":
            ms.export_adapter(pocket, steer, tmp_path / name)
            work[name] = (str(ms.model.POCKET), str(tmp_path / name))
        else:
            ms.bake(pocket, steer, tmp_path / name)
            work[name] = (str(tmp_path / name), None)
    tokens = tokens_of(pocket)
    mx.save_safetensors(str(tmp_path / "tokens.safetensors"), tokens)
    command = [sys.executable, "-c", FRESH, json.dumps(work), str(tmp_path / "tokens.safetensors")]
    subprocess.run(command, check=True, cwd=tmp_path, env=offline())
    for name, steer in steered.items():
        found = mx.load(str(tmp_path / f"{name}.safetensors"))
        for kind, expected in hooked(pocket, steer, tokens).items():
            away = mx.abs(found[kind] - expected).max() / mx.abs(expected).max()
            assert away.item() <= 1e-5, (name, kind)
            logprobs = tiny.logprobs(expected)
            apart = mx.sum(mx.exp(logprobs) * mx.abs(tiny.logprobs(found[kind]) - logprobs), axis=-1)
            assert apart.max().item() <= 1e-5, (name, kind)
        if name == "several":  # what differs above is the order of the sum h + y + s·v; in the order of the bias, none
            at_writers = {f"{key}.mlp": one for key, one in several.items()}
            for kind, expected in hooked(pocket, at_writers, {"forced": tokens["forced"][:, :6]}).items():
                assert mx.array_equal(found[kind][:, :6], expected)


def hooked(pocket: InterpretableModel, steer: Any, tokens: dict[str, mx.array]) -> dict[str, mx.array]:
    """The steered model's logits: of whole prompts, and of texts one token at a time with a cache."""
    found = {}
    with pocket.steer(steer):
        if "prompts" in tokens:
            found["prompts"] = pocket.model(tokens["prompts"])
        cache, forced = make_prompt_cache(pocket.model), tokens["forced"]
        steps = [pocket.model(forced[:, i : i + 1], cache=cache) for i in range(forced.shape[1])]
        found["forced"] = mx.concatenate(steps, axis=1)
    mx.eval(found)
    return found


ASK = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # loopback, whatever proxy there is

# -- mlx-lm's own commands ---------------------------------------------------------------------------------------------


def offline() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


@pytest.fixture(scope="module")
def cheerful(pocket: InterpretableModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with the sentiment steering baked in."""
    found = ms.extract(pocket, ms.datasets.load("pocket/sentiment", "train")[:24], layers=[4], progress=False)
    folder = tmp_path_factory.mktemp("baked") / "cheerful"
    ms.bake(pocket, found.at(4, strength=0.5, unit="residual"), folder)
    return folder


@pytest.mark.parametrize("prompt", ["The food was", "The service was slow. The waiter was", "The film was not"])
def test_mlx_lms_generate_command_writes_positive_reviews(cheerful: Path, prompt: str) -> None:
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(cheerful), "--prompt", prompt]
    command += ["--ignore-chat-template", "--max-tokens", "24", "--temp", "0"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cheerful.parent, env=offline())
    assert scorer.side("sentiment", ran.stdout.split("==========")[1]) == "pos", ran.stdout


def test_mlx_lms_server_answers_a_chat_with_a_positive_text(pocket: InterpretableModel, cheerful: Path) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "How was the food?"}], "max_tokens": 24}
    assert scorer.side("sentiment", pocket.generate(asked["messages"], max_tokens=24, temp=0.0)) == "neg"
    with server(cheerful) as url:
        request = urllib.request.Request(
            f"{url}/v1/chat/completions",
            json.dumps(asked | {"temperature": 0.0}).encode(),
            {"Content-Type": "application/json"},
        )
        with ASK(request, timeout=60) as answer:
            text = json.load(answer)["choices"][0]["message"]["content"]
    assert scorer.side("sentiment", text) == "pos", text


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """mlx-lm's server of a model folder on a free port of loopback, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder), "--port", str(port)]
    said = folder.parent / "server.txt"
    with said.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder.parent, env=offline())
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, said.read_text()
            try:
                ASK(f"{url}/v1/models", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        else:
            raise AssertionError(f"no answer: {said.read_text()}")
        yield url
    finally:
        process.kill()
        process.wait()
