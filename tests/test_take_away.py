"""Steerings that leave the house: control vectors with llama.cpp's meaning, the Hub, and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.base import create_attention_mask

import mlxsteer as ms
from mlxsteer import InterpretableModel, SteeringVector
from mlxsteer import interventions as iv

PROMPT = "The food was"


def directions(*layers: int, width: int = 256) -> SteeringVector:
    drawn = np.random.default_rng(1).normal(size=(len(layers), width)).astype(np.float32)
    norms = {layer: 3.0 + layer for layer in layers}
    return SteeringVector({n: mx.array(row) for n, row in zip(layers, drawn, strict=True)}, residual_norms=norms)


def near(a: Any, b: Any) -> bool:
    return bool(np.allclose(np.array(a), np.array(b), rtol=1e-6, atol=1e-6))


# -- control vectors -------------------------------------------------------------------------------------------------


def llama_cpp(files: dict[Path, float], width: int, blocks: int) -> list[np.ndarray | None]:
    """What llama.cpp adds behind each block, by its rules: load (offset N − 1), sum, apply (offset il − 1, il ≥ 1)."""
    data = np.zeros(0, np.float32)
    for file, scale in files.items():
        for tensor in gguf.GGUFReader(file).tensors:
            number = int(tensor.name.removeprefix("direction."))
            assert number > 0, "llama.cpp refuses the file"
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            assert tensor.shape.tolist() == [width]
            start = width * (number - 1)
            data = np.concatenate([data, np.zeros(max(0, start + width - len(data)), np.float32)])
            data[start : start + width] += np.float32(scale) * tensor.data
    found: list[np.ndarray | None] = [None]
    for il in range(1, blocks):
        row = data[width * (il - 1) : width * il]
        found.append(row if len(row) else None)
    return found


def run_as_llama_cpp(model: InterpretableModel, files: dict[Path, float]) -> mx.array:
    """The bundled llama, block by block, with what llama.cpp adds behind each of them; no hooks."""
    inner: Any = model.model.model  # type: ignore[attr-defined]
    rows = llama_cpp(files, 256, len(inner.layers))
    h = inner.embed_tokens(mx.array([model.encode(PROMPT)]))
    mask = create_attention_mask(h, None)
    for il, block in enumerate(inner.layers):
        h = block(h, mask, None)
        if rows[il] is not None:
            h = h + mx.array(rows[il])
    h = inner.norm(h)
    logits: mx.array = (
        inner.embed_tokens.as_linear(h) if model.model.args.tie_word_embeddings else model.model.lm_head(h)
    )  # type: ignore[attr-defined]
    return logits


def hooked(model: InterpretableModel, interventions: Any) -> mx.array:
    with model.trace(PROMPT, interventions=interventions):
        logits: mx.array = model.output.save()
    return logits


def test_a_control_vector_means_to_llama_cpp_what_the_vector_means_here(
    pocket: InterpretableModel, tmp_path: Path
) -> None:
    v, w = directions(1, 4, 7), directions(4)
    files = {v.save(tmp_path / "v.gguf"): 0.75, w.save(tmp_path / "w.gguf"): -2.0}
    steer = v.at("all", strength=0.75)
    steer["layers.4"] = steer["layers.4"] | w.at(4, strength=-2.0)["layers.4"]
    here, there = hooked(pocket, steer), run_as_llama_cpp(pocket, files)
    assert mx.abs(here - there).max().item() < 1e-4
    assert mx.abs(here - hooked(pocket, None)).max().item() > 1


def test_exported_interventions_do_at_scale_1_what_the_hooks_do(pocket: InterpretableModel, tmp_path: Path) -> None:
    v = directions(2, 5)
    steer: dict[str, Any] = v.at({2: 0.05, 5: -0.1}, unit="residual")
    steer["layers.5"] = [steer["layers.5"], iv.add_vector(v[2], 0.5), iv.add_vector(v[2], 0.0)]
    steer["layers.-1"] = iv.add_vector(v[5], 0.25)
    made = ms.export_control_vector(pocket, steer, tmp_path / "steer.gguf")
    assert made.layers == [2, 5, 7]
    assert "layers 2, 5, 7" in str(made)
    assert f"--control-vector-scaled {tmp_path / 'steer.gguf'}:1" in str(made)
    there = run_as_llama_cpp(pocket, {tmp_path / "steer.gguf": 1.0})
    assert mx.abs(hooked(pocket, steer) - there).max().item() < 1e-4
    back = SteeringVector.load(tmp_path / "steer.gguf", model=pocket)
    assert near(hooked(pocket, back.at("all")), hooked(pocket, steer))
    fields = gguf.GGUFReader(tmp_path / "steer.gguf").fields
    assert bytes(fields["controlvector.model_hint"].parts[-1]) == b"llama"


def test_a_dry_run_writes_nothing(pocket: InterpretableModel, tmp_path: Path) -> None:
    made = ms.export_control_vector(pocket, directions(3).at(3), tmp_path / "x.gguf", dry_run=True)
    assert (made.path, made.layers, list(tmp_path.iterdir())) == (None, [3], [])
    assert "nothing written" in str(made)


V = mx.ones((256,))
NO_CONTROL_VECTOR: dict[str, tuple[dict[str, Any], str]] = {
    "ablate": ({"layers.3": iv.ablate(V)}, "ablate at layers.3 can't be exported: .*adds a constant.*ms.bake"),
    "a function": ({"layers.3": lambda x: x}, "adds a constant"),
    "block 0": ({"layers.0": iv.add_vector(V)}, r"nothing behind block 0.*nearest is layers\.1"),
    "an input": ({"layers.3.input": iv.add_vector(V)}, r"nearest is layers\.2, which is the same place"),
    "a part": ({"layers.3.mlp": iv.add_vector(V)}, r"layers\.3\.mlp can't .*layers\.1 to layers\.7.*is layers\.3\."),
    "the embedding": ({"embed": iv.add_vector(V)}, r"nearest is layers\.1"),
    "some tokens": ({"layers.3": iv.add_vector(V, at="last")}, "at='last', and llama.cpp adds it at every token"),
    "a schedule": ({"layers.3": iv.add_vector(V, schedule=iv.decay(half_life=2))}, "it has a schedule"),
    "a span": ({"layers.3": iv.add_vector(V, exclude=("a", "b"))}, "it has exclude="),
    "the norm": ({"layers.3": iv.add_vector(V, preserve_norm=True)}, "preserve_norm=True"),
    "rows": ({"layers.3": iv.add_vector(V, strength=[1.0, 2.0])}, "2 strengths, one per row"),
    "a gate": ({"layers.3": iv.when(iv.cosine(V) > 0.1, iv.add_vector(V))}, "adds a constant"),
    "one of two": ({"layers.3": [iv.add_vector(V), iv.scale(2.0)]}, "scale at layers.3"),
}


@pytest.mark.parametrize(("steer", "sentence"), NO_CONTROL_VECTOR.values(), ids=NO_CONTROL_VECTOR)
def test_what_a_control_vector_can_not_do_is_refused_with_the_reason(
    steer: dict[str, Any], sentence: str, pocket: InterpretableModel, tmp_path: Path
) -> None:
    with pytest.raises(ms.CannotExport, match=sentence) as caught:
        ms.export_control_vector(pocket, steer, tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_export_and_wrong_names_are_refused(pocket: InterpretableModel, tmp_path: Path) -> None:
    steer = {"layers.3": iv.add_vector(V)}
    with pytest.raises(ValueError, match="every strength is 0"):
        ms.export_control_vector(pocket, {"layers.3": iv.add_vector(V, 0.0)}, tmp_path / "x.gguf")
    with pytest.raises(ValueError, match=r"x\.bin: a control vector is a \.gguf file"):
        ms.export_control_vector(pocket, steer, tmp_path / "x.bin")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ms.export_control_vector(pocket, steer, tmp_path / "no" / "x.gguf")
    with pytest.raises(ms.UnknownKey):
        ms.export_control_vector(pocket, {"layers.99": iv.add_vector(V)}, tmp_path / "x.gguf")


@pytest.mark.parametrize("suffix", [".gguf", ".safetensors", ".npz"])
@pytest.mark.parametrize("unit", ["raw", "residual"])
def test_strengths_are_folded_into_a_file(suffix: str, unit: Any, tmp_path: Path) -> None:
    v = directions(2, 4, 6)
    folded = SteeringVector.load(v.save(tmp_path / f"v{suffix}", strengths={2: 2.0, 4: 0.0, 6: -0.5}, unit=unit))
    assert folded.layers == [2, 6]
    for layer, one in v.at({2: 2.0, 6: -0.5}, unit=unit).items():
        number = int(layer.split(".")[1])
        assert near(folded[number], np.array(one.vector) * one.strength)  # type: ignore[attr-defined]
    if suffix != ".npz":
        assert folded.info["folded"] == {"2": 2.0, "6": -0.5}
        assert folded.residual_norms == {2: 5.0, 6: 9.0}


def test_strengths_that_can_not_be_folded_are_refused(tmp_path: Path) -> None:
    v = directions(2, 4)
    with pytest.raises(ValueError, match="are all 0"):
        v.save(tmp_path / "v.gguf", strengths={2: 0.0})
    with pytest.raises(KeyError, match="no direction for layer 3"):
        v.save(tmp_path / "v.gguf", strengths={3: 1.0})
    with pytest.raises(ValueError, match="give strengths="):
        v.save(tmp_path / "v.gguf", unit="residual")
    assert list(tmp_path.iterdir()) == []
    each = SteeringVector({1: mx.ones((3, 4))})
    assert SteeringVector.load(each.save(tmp_path / "e.npz", strengths={1: 2.0}))[1].tolist() == [[2.0] * 4] * 3
