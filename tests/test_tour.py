"""The read, write and generate code that the design promises, as a user writes it."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm

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
    assert h.shape == (1, 5, 256)
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
