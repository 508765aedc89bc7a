"""The code that the design promises, as a user writes it."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

import mlxsteer as ms
from mlxsteer import InterpretableModel
from mlxsteer import interventions as iv


def test_reading(pocket: InterpretableModel) -> None:
    model = pocket
    with model.trace("The food was") as trace:
        pass
    h = trace.activations["layers.5"]
    keys = list(trace.activations)
    names = model.sites("layers.*.mlp")
    with model.record("layers.5") as seen:
        mlx_lm.generate(model.model, model.tokenizer, prompt="The food was", max_tokens=8)
    assert h.shape == (1, 4, 256)
    assert {"embed", "layers.0", "layers.7.mlp.down_proj", "norm", "logits"} <= set(keys)
    assert names == [f"layers.{i}.mlp" for i in range(8)]
    assert sum(x.shape[1] for x in seen["layers.5"]) >= 5


def test_writing(pocket: InterpretableModel) -> None:
    model = pocket
    mx.random.seed(0)
    v = mx.random.normal((256,))
    with model.trace("The food was", interventions={"layers.5": iv.add_vector(v, strength=2.0, at="last")}):
        logits = model.output.save()
    by_intervention = logits
    with model.trace("The food was") as trace:
        model.layers[5].output[:, -1, :] += 2.0 * v
        logits = model.output.save()
    assert mx.array_equal(logits, by_intervention)
    assert mx.array_equal(trace.activations["logits"], logits)


def test_generating(pocket: InterpretableModel) -> None:
    model = pocket
    mx.random.seed(0)
    steer = {"layers.5": iv.add_vector(5 * mx.random.normal((256,)))}
    text = model.generate("The food was", interventions=steer, max_tokens=6)
    streamed = "".join(piece.text for piece in model.stream("The food was", interventions=steer, max_tokens=6))
    with model.steer(mood=steer) as steering:
        foreign = mlx_lm.generate(model.model, model.tokenizer, prompt="The food was", max_tokens=6)
        steering["mood"].strength = 0.5
    steering = model.steer(mood=steer).enable()
    enabled = mlx_lm.generate(model.model, model.tokenizer, prompt="The food was", max_tokens=6)
    steering.disable()
    cheerful = model.edit(steer)
    edited = mlx_lm.generate(cheerful.model, cheerful.tokenizer, prompt="The food was", max_tokens=6)
    rows = model.generate(["The food was", "The room was"], interventions=[steer, None], max_tokens=6)
    assert text == streamed == foreign == enabled == edited == rows[0]
    assert rows[1] == model.generate("The room was", max_tokens=6)
    assert text != model.generate("The food was", max_tokens=6)


def test_computing_a_vector_and_finding_where_and_how_much(pocket: InterpretableModel, tmp_path: Path) -> None:
    model = pocket
    whole = ms.datasets.load("pocket/sentiment")
    pairs = ms.PairSet([pair for split in ("train", "choose", "report") for pair in whole.split(split)[:3]])
    vector = ms.extract(model, pairs)
    v = vector[5]
    grid = ms.sweep(model, vector, pairs.split("choose"), layers="all", strengths=[-2, -1, 0, 1, 2])
    choice = ms.select(model, pairs, layers=[4, 5], neutral=["Here is a short story."], tokens=4, nulls=2)
    choice.plot(tmp_path / "layers.png")
    assert v.shape == (256,)
    assert grid.effect.shape == (8, 5, 3)
    assert {"Chosen:", "Warning:"} <= set(choice.table().split())
    assert (tmp_path / "layers.png").stat().st_size > 10_000
    steer = choice.interventions
    down = vector.at(5, strength=-choice.strength, at=-1, unit="residual")
    texts = model.generate(["The soup was", "The room was"], interventions=[steer, down], max_tokens=6)
    assert texts[0] != model.generate("The soup was", max_tokens=6)
    vector.save(tmp_path / "sentiment.safetensors")
    with pytest.warns(UserWarning, match="layer 0"):
        vector.save(tmp_path / "sentiment.gguf")
    assert ms.SteeringVector.load(tmp_path / "sentiment.safetensors", model=model).layers == vector.layers


def test_taking_it_away(pocket: InterpretableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pocket
    monkeypatch.chdir(tmp_path)
    vector = ms.extract(model, ms.datasets.load("pocket/sentiment").split("train")[:8])
    steer = vector.at(4)
    vector.save("sentiment.safetensors")
    with pytest.warns(UserWarning, match="layer 0"):
        vector.save("sentiment.gguf")
    ms.bake(model, steer, "sentiment-llama/")
    plain, tokenizer = mlx_lm.load("sentiment-llama")[:2]
    baked = mlx_lm.generate(plain, tokenizer, prompt="The food was", max_tokens=8)
    assert baked == model.generate("The food was", interventions=steer, max_tokens=8)
    assert baked != model.generate("The food was", max_tokens=8)
    for name in ("sentiment.safetensors", "sentiment.gguf"):
        assert mx.array_equal(ms.SteeringVector.load(name, model=model)[4], vector[4])
