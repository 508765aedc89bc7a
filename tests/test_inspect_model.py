"""What inspecting a model shows is what the model has."""

from __future__ import annotations

import json

import architectures
import mlx.core as mx
import mlx.nn as nn
import tiny
from mlx.utils import tree_flatten
from rich.console import Console

from mlxsteer import InterpretableModel
from mlxsteer.cli.inspect_model import inspect_model
from mlxsteer.model_facts import model_facts


def test_keys_layers_shapes_and_roles() -> None:
    facts = model_facts(InterpretableModel(architectures.build("qwen3_next")))
    rows = {row.key: row for row in facts.keys}
    assert (rows["layers.*"].layers, rows["layers.*"].width) == ("0-3", 64)
    assert (rows["layers.*.self_attn"].layers, rows["layers.*.self_attn"].role) == ("1, 3", "layers.*.attn, heads")
    assert (rows["layers.*.linear_attn"].layers, rows["layers.*.linear_attn"].role) == ("0, 2", "layers.*.attn")
    assert rows["layers.*.self_attn.o_proj"].weight == "64 × 64 float32"
    assert (rows["embed"].layers, rows["embed"].weight) == ("", "96 × 64 float32")
    assert facts.keys[-1].key == "logits"
    assert facts.check is None
    assert (facts.architecture, facts.layers, facts.chat_template) == ("qwen3_next", 4, None)


def test_quantization_dtypes_and_parameters() -> None:
    plain = tiny.build("llama")
    count = sum(array.size for _, array in tree_flatten(plain.parameters()))
    assert model_facts(InterpretableModel(plain)).parameters == count
    model = tiny.build("llama", mx.bfloat16)
    model.layers[1].self_attn.o_proj = nn.QuantizedLinear.from_linear(model.layers[1].self_attn.o_proj, 32, 4)
    model.layers[2].mlp = model.layers[2].mlp
    facts = model_facts(InterpretableModel(model))
    assert facts.parameters == count
    assert facts.quantization == {"4-bit affine, group 32": 1}
    assert facts.dtypes.keys() == {"bfloat16", "uint32"}
    kinds = {(row.layers, row.weight) for row in facts.keys if row.key == "layers.*.self_attn.o_proj"}
    assert kinds == {("0, 2-3", "64 × 64 bfloat16"), ("1", "64 × 64 4-bit affine, group 32")}


def test_what_is_printed_is_what_is_returned(pocket: InterpretableModel) -> None:
    console = Console(width=160, record=True, quiet=False)
    with console.capture() as printed:
        facts = inspect_model(pocket, console, check=True)
    text = printed.get()
    assert "layers.*.mlp" in text
    assert "a change at" in text
    assert f"{facts.parameters:,} parameters" in text
    assert json.loads(json.dumps(facts.as_data()))["layers"] == len(pocket.layers)
