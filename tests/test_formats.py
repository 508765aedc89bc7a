"""Files of vectors: bit for bit there and back, as other programs write them, refused in a sentence when damaged."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import math
import pickle
import re
import shutil
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import errors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxsteer import SteeringVector
from mlxsteer.formats import arrays, hub, torch_tensor

INFO = {"model": "org/tiny", "architecture": "llama", "method": "mean_difference", "é": [1.5, None, True, {"a": "b"}]}
ODD = [1e-45, -0.0, 1.1754944e-38, 3.4028235e38, math.pi]
SUFFIXES = [".safetensors", ".gguf", ".npz", ".npy"]


def vector(layers: tuple[int, ...] = (1, 3, 11), width: int = 8, **more: Any) -> SteeringVector:
    drawn = np.random.default_rng(0).normal(size=(len(layers), width)).astype(np.float32)
    return SteeringVector({layer: mx.array(row) for layer, row in zip(layers, drawn, strict=True)}, **more)


def bits(v: SteeringVector) -> dict[int, list[int]]:
    """Layer → the direction as integers, so that -0.0 is not 0.0."""
    return {layer: np.array(v[layer]).view(np.uint32).tolist() for layer in v}


def gguf_file(path: Path, tensors: dict[str, np.ndarray], hint: str | None = "mistral", **more: Any) -> Path:
    """A file made by the rules of repeng's `export_gguf`, with the package that it uses."""
    writer = gguf.GGUFWriter(path, more.pop("architecture", "controlvector"))
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
        writer.add_uint32("controlvector.layer_count", len(tensors))
    for key, value in more.items():
        writer.add_custom_alignment(value) if key == "alignment" else writer.add_string(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


# -- there and back --------------------------------------------------------------------------------------------------

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
jsons = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_vector_comes_back_bit_for_bit(suffix: str, data: st.DataObject, tmp_path: Path) -> None:
    width = data.draw(st.integers(1, 40))
    if suffix == ".npy":
        layers = list(range(data.draw(st.integers(1, 5))))
    else:
        layers = data.draw(st.lists(st.integers(1, 500), min_size=1, max_size=5, unique=True))
    rows = {layer: mx.array(data.draw(st.lists(floats, min_size=width, max_size=width))) for layer in layers}
    norms = data.draw(st.dictionaries(st.sampled_from(layers), st.floats(0, 1e6, exclude_min=True), max_size=5))
    info = data.draw(st.dictionaries(st.text(), jsons, max_size=4))
    v = SteeringVector(rows, residual_norms=norms, info=info)
    path = v.save(tmp_path / f"vé.2{suffix}")
    loaded = SteeringVector.load(str(path))
    assert bits(loaded) == bits(v)
    assert loaded.site == v.site
    if suffix in (".safetensors", ".gguf"):
        assert (loaded.residual_norms, loaded.info) == (v.residual_norms, v.info)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file is left


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_other_sites_layer_0_and_a_direction_for_each_position_come_back(suffix: str, tmp_path: Path) -> None:
    mx.random.seed(0)
    for site in ("layers.{layer}.mlp", "layers.{layer}.attn.heads", "layers.{layer}.self_attn.o_proj.input"):
        v = SteeringVector({layer: mx.random.normal((3, 4)) for layer in (0, 10, 1)}, site)
        loaded = SteeringVector.load(v.save(tmp_path / f"v{suffix}"))
        assert (bits(loaded), loaded.site, loaded.layers) == (bits(v), site, [0, 1, 10])
        assert loaded[10].shape == (3, 4)


def test_an_npz_is_plain_numpy_with_an_array_for_each_key(tmp_path: Path) -> None:
    v = vector(site="layers.{layer}.mlp")
    with np.load(v.save(tmp_path / "v.npz"), allow_pickle=False) as loaded:
        assert set(loaded) == {"layers.1.mlp", "layers.3.mlp", "layers.11.mlp"}
        np.testing.assert_array_equal(loaded["layers.3.mlp"], np.array(v[3]))


def test_an_npy_is_a_plain_matrix(tmp_path: Path) -> None:
    v = vector((0, 1, 2))
    loaded = np.load(v.save(tmp_path / "v.npy"), allow_pickle=False)
    assert (loaded.shape, loaded.dtype) == ((3, 8), np.float32)
    np.testing.assert_array_equal(loaded[1], np.array(v[1]))


REFUSED: dict[str, tuple[Callable[[], SteeringVector], str, str]] = {
    "gguf, another site": (lambda: vector(site="layers.{layer}.mlp"), ".gguf", r"belongs to 'layers\.{layer}\.mlp'"),
    "gguf, positions": (lambda: SteeringVector({1: mx.ones((2, 3))}), ".gguf", "one for each position"),
    "gguf, layer 0 only": (lambda: vector((0,)), ".gguf", r"layers from 1 on, and this vector has \[0\]"),
    "npy, another site": (lambda: vector((0, 1), site="layers.{layer}.mlp"), ".npy", "can't say where"),
    "npy, a gap": (lambda: vector((0, 2)), ".npy", r"every layer from 0 on, and this vector has \[0, 2\]"),
    "npy, positions": (lambda: SteeringVector({0: mx.ones((2, 3))}), ".npy", "a direction for each position"),
    "npz, a raw path": (lambda: vector(site="transformer.h.{layer}"), ".npz", r"belongs to 'transformer\.h\.{layer}'"),
    "another suffix": (vector, ".safetensor", r"saved as a \.safetensors, \.gguf, \.npz or \.npy file; the nearest to "
                       r"'\.safetensor' is \.safetensors\."),
    "capitals": (vector, ".GGUF", r"the nearest to '\.GGUF' is \.gguf"),
    "what is only read": (vector, ".pt", r"saved as a \.safetensors"),
    "no suffix": (vector, "", r"or \.npy file\."),
}  # fmt: skip


@pytest.mark.parametrize(("make", "suffix", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_a_format_can_not_hold_is_refused_and_leaves_no_file(
    make: Callable[[], SteeringVector], suffix: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"w{re.escape(suffix)}: .*{sentence}"):
        make().save(tmp_path / f"w{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_replaced_whole_or_not_at_all(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = vector((0, 1) if suffix == ".npy" else (1, 2)).save(tmp_path / f"v{suffix}")
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            (vector((0, 1) if suffix == ".npy" else (1, 2)) * 2).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        vector((0, 1) if suffix == ".npy" else (1, 2)).save(tmp_path / "none" / f"v{suffix}")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_directions_of_half_precision_become_float32(dtype: mx.Dtype, tmp_path: Path) -> None:
    path = vector(info=INFO).save(tmp_path / "v.safetensors")
    read: Any = mx.load(str(path), return_metadata=True)
    tensors, metadata = read
    halves = {name: value.astype(dtype) for name, value in tensors.items()}
    mx.save_safetensors(str(path), halves, metadata)
    loaded = SteeringVector.load(path)
    assert all(loaded[layer].dtype == mx.float32 for layer in loaded)
    assert mx.array_equal(loaded[3], halves["layers.3"].astype(mx.float32))


# -- GGUF ------------------------------------------------------------------------------------------------------------


def test_the_gguf_package_reads_what_llama_cpp_and_repeng_want(tmp_path: Path) -> None:
    v = vector(info=INFO, residual_norms={1: 2.5})
    reader = gguf.GGUFReader(v.save(tmp_path / "v.gguf"))
    assert set(reader.fields) == {
        "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "controlvector.model_hint",
        "controlvector.layer_count", "mlxsteer.vector",
    }  # fmt: skip
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["GGUF.version"] == 3
    assert (values["general.architecture"], values["controlvector.model_hint"]) == ("controlvector", "llama")
    assert values["controlvector.layer_count"] == 3
    assert reader.fields["controlvector.layer_count"].types == [gguf.GGUFValueType.UINT32]
    assert json.loads(values["mlxsteer.vector"])["info"] == INFO
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.3", "direction.11"]
    for tensor, layer in zip(reader.tensors, v, strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.shape.tolist() == [8]
        np.testing.assert_array_equal(tensor.data, np.array(v[layer]))


@pytest.mark.parametrize("width", [1, 7, 8, 9])
def test_tensors_lie_one_behind_the_other_padded_to_32_as_llama_cpp_wants(width: int, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(vector(width=width).save(tmp_path / "v.gguf"))
    padded = -(-4 * width // 32) * 32
    starts = [int(tensor.data_offset) for tensor in reader.tensors]
    assert starts[0] % 32 == 0
    assert [start - starts[0] for start in starts] == [0, padded, 2 * padded]
    assert (tmp_path / "v.gguf").stat().st_size == starts[0] + 3 * padded  # llama.cpp reads the last padding, too


def test_the_direction_of_layer_0_is_left_out_with_a_warning(tmp_path: Path) -> None:
    v = vector((0, 1, 2))
    with pytest.warns(UserWarning, match=r"v\.gguf: the direction of layer 0 is left out") as caught:
        path = v.save(tmp_path / "v.gguf")
    assert caught[0].filename == __file__
    assert [tensor.name for tensor in gguf.GGUFReader(path).tensors] == ["direction.1", "direction.2"]
    assert SteeringVector.load(path).layers == [1, 2]


def test_a_vector_without_an_architecture_has_a_hint_all_the_same(tmp_path: Path) -> None:
    """repeng's import requires one."""
    reader = gguf.GGUFReader(vector().save(tmp_path / "v.gguf"))
    assert reader.fields["controlvector.model_hint"].contents() == "unknown"


def test_what_repeng_writes_is_read(tmp_path: Path) -> None:
    rows = {layer: np.arange(6, dtype=np.float32) + layer for layer in (31, 30, 2, 1)}
    path = gguf_file(tmp_path / "v.gguf", {f"direction.{layer}": row for layer, row in rows.items()})
    v = SteeringVector.load(path)
    assert (v.layers, v.site, v.info) == ([1, 2, 30, 31], "layers.{layer}", {"architecture": "mistral"})
    for layer, row in rows.items():
        np.testing.assert_array_equal(np.array(v[layer]), row)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_other_alignments_and_floats_are_read(alignment: int, dtype: type, tmp_path: Path) -> None:
    rows = {f"direction.{layer}": np.linspace(0, layer, 5).astype(dtype) for layer in (0, 1, 2)}
    v = SteeringVector.load(gguf_file(tmp_path / "v.gguf", rows, alignment=alignment, **{"general.name": "x"}))
    assert v.layers == [0, 1, 2]
    np.testing.assert_array_equal(np.array(v[2]), rows["direction.2"].astype(np.float32))
    assert not v[0].any().item()


def test_values_of_every_type_are_passed_over(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    for kind in ("uint8", "int8", "uint16", "int16", "int32", "float32", "uint64", "int64", "float64"):
        getattr(writer, f"add_{kind}")(f"x.{kind}", 7)
    writer.add_bool("x.bool", True)
    writer.add_array("x.numbers", [1, 2, 3])
    writer.add_array("x.texts", ["a", "", "é"])
    writer.add_tensor("direction.1", np.ones((1, 4), np.float32)[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert SteeringVector.load(tmp_path / "v.gguf")[1].tolist() == [1, 1, 1, 1]


ONES = np.ones(4, np.float32)
FOREIGN_GGUF: dict[str, tuple[dict[str, np.ndarray], dict[str, str], str]] = {
    "a model": ({"token_embd.weight": ONES}, {"architecture": "llama"}, "the architecture 'llama', not a control vec"),
    "another tensor": ({"direction.1": ONES, "norm": ONES}, {}, r"'norm' is no direction\.N"),
    "a layer twice": ({"direction.1": ONES, "direction.01": ONES}, {}, r"'direction\.01' is no direction\.N"),
    "a negative layer": ({"direction.-1": ONES}, {}, r"'direction\.-1' is no direction\.N"),
    "another digit": ({"direction.٣": ONES}, {}, "is no direction"),
    "a matrix": ({"direction.1": np.ones((2, 4), np.float32)}, {}, r"of shape \(4, 2\); a direction has one"),
    "integers": ({"direction.1": np.ones(4, np.int8)}, {}, "of ggml type 24; directions are floats"),
    "two widths": ({"direction.1": ONES, "direction.2": ONES[:3]}, {}, "shapes"),
    "nothing": ({}, {}, "at least one layer"),
    "nan": ({"direction.1": ONES * np.nan}, {}, "direction of layer 1 holds 4 NaN"),
    "too large": ({"direction.1": np.array([1e300])}, {}, "direction of layer 1 holds 1 NaN or infinite"),
    "a damaged key": ({"direction.1": ONES}, {"mlxsteer.vector": "{"}, r"key 'mlxsteer\.vector' is damaged"),
    "a later version": ({"direction.1": ONES}, {"mlxsteer.vector": '{"version": 9, "site": "layers.{layer}"}'},
                        "version 9; this mlxsteer reads up to 1"),
    "another site": ({"direction.1": ONES}, {"mlxsteer.vector": '{"version": 1, "site": "layers.{layer}.mlp"}'},
                     "names the site"),
    "no info": ({"direction.1": ONES}, {"mlxsteer.vector": '{"version": 1, "site": "layers.{layer}"}'}, "damaged"),
    "info that is a list": (
        {"direction.1": ONES},
        {"mlxsteer.vector": '{"version": 1, "site": "layers.{layer}", "residual_norms": {}, "info": []}'},
        "info is a dict, not list",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "more", "sentence"), FOREIGN_GGUF.values(), ids=FOREIGN_GGUF)
def test_other_gguf_files_are_refused(
    tensors: dict[str, np.ndarray], more: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"v\.gguf: .*{sentence}"):
        SteeringVector.load(gguf_file(tmp_path / "v.gguf", tensors, **more))


def raw_gguf(body: bytes, tensors: int = 1, keys: int = 0, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, keys) + body


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


HUGE = 2**62
INFO_1 = text("direction.1") + struct.pack("<IQIQ", 1, 3, 0, 0)
FORGED_GGUF: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no GGUF file"),
    "text": (b"not a vector at all", "is no GGUF file"),
    "version 1": (raw_gguf(b"", version=1), "of version 1"),
    "big-endian": (raw_gguf(b"", version=3 << 24), "is big-endian"),
    "tensors": (raw_gguf(INFO_1, HUGE), "ends early"),
    "keys": (raw_gguf(b"", 0, HUGE), "ends early"),
    "a key's length": (raw_gguf(struct.pack("<Q", HUGE), 0, 1), "ends early"),
    "a text's length": (raw_gguf(text("a") + struct.pack("<IQ", 8, HUGE), 0, 1), "ends early"),
    "an array's length": (raw_gguf(text("a") + struct.pack("<IIQ", 9, 0, HUGE), 0, 1), "ends early"),
    "an array of texts": (raw_gguf(text("a") + struct.pack("<IIQ", 9, 8, HUGE), 0, 1), "ends early"),
    "an array of arrays": (raw_gguf(text("a") + struct.pack("<IIQ", 9, 9, 1), 0, 1), "unknown type 9"),
    "a type": (raw_gguf(text("a") + struct.pack("<I", 99), 0, 1), "unknown type 99"),
    "a key twice": (raw_gguf(2 * (text("a") + struct.pack("<IB", 7, 1)), 0, 2), "'a' is in it twice"),
    "dimensions": (raw_gguf(text("direction.1") + struct.pack("<I", 2**31)), "2147483648 dimensions"),
    "a shape": (raw_gguf(text("direction.1") + struct.pack("<IQIQ", 1, HUGE, 0, 0) + bytes(64)), "ends early"),
    "a shape of 0": (raw_gguf(text("direction.1") + struct.pack("<IQIQ", 1, 0, 0, 0) + bytes(64)), r"shape \(0,\)"),
    "no shape": (raw_gguf(text("direction.1") + struct.pack("<IIQ", 0, 0, 0) + bytes(64)), r"of shape \(\);"),
    "an offset": (raw_gguf(text("direction.1") + struct.pack("<IQIQ", 1, 3, 0, HUGE) + bytes(64)), "lies at"),
    "an overlap": (raw_gguf(INFO_1 + INFO_1.replace(b"n.1", b"n.2") + bytes(96), 2), "lies at 0, not at 32"),
    "a layer twice": (raw_gguf(INFO_1 + INFO_1[:-8] + struct.pack("<Q", 32) + bytes(96), 2), "is in it twice"),
    "an alignment": (raw_gguf(text("general.alignment") + struct.pack("<II", 4, 33) + INFO_1, 1, 1), "not a power of"),
    "alignment 0": (raw_gguf(text("general.alignment") + struct.pack("<II", 4, 0) + INFO_1, 1, 1), "not a power of 2"),
    "an alignment of text": (raw_gguf(text("general.alignment") + struct.pack("<I", 8) + text("8"), 0, 1), "not a po"),
    "bytes that are no text": (raw_gguf(struct.pack("<Q", 1) + b"\xff" + bytes(8), 0, 1), "decode"),
}


@pytest.mark.parametrize(("content", "sentence"), FORGED_GGUF.values(), ids=FORGED_GGUF)
def test_forged_gguf_files_are_refused_before_memory_is_taken(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"v\.gguf: .*{sentence}"):
        SteeringVector.load(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


# -- NumPy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["5", "layer_5", "layers.5", "layer5", "layer-5", "layers_5", "direction.5"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_named_by_layer_are_read(name: str, save: Callable[..., Any], tmp_path: Path) -> None:
    save(tmp_path / "v.npz", **{name: np.arange(4, dtype=np.float64), name.replace("5", "12"): np.ones(4, np.float16)})
    v = SteeringVector.load(tmp_path / "v.npz")
    assert (v.layers, v.site) == ([5, 12], "layers.{layer}")
    assert v[5].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", "<i4", "|u1", ">i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_matrix_of_any_plain_number_is_read(dtype: str, order: Any, tmp_path: Path) -> None:
    rows = np.arange(12).reshape(3, 4).astype(dtype, order=order)
    np.save(tmp_path / "v.npy", rows)
    v = SteeringVector.load(tmp_path / "v.npy")
    assert v.layers == [0, 1, 2]
    np.testing.assert_array_equal(np.stack([np.array(v[layer]) for layer in v]), np.arange(12.0).reshape(3, 4))


class Spy:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_objects_in_numpy_files_are_refused_and_not_unpickled(tmp_path: Path) -> None:
    spied = np.array([Spy(tmp_path / "ran")], object)
    np.save(tmp_path / "v.npy", spied, allow_pickle=True)
    np.savez(tmp_path / "v.npz", **{"layers.1": spied})
    for name in ("v.npy", "v.npz"):
        with pytest.raises(ValueError, match=rf"{re.escape(name)}: its array is of no plain type"):
            SteeringVector.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


FOREIGN_NPZ: dict[str, tuple[dict[str, Any], str]] = {
    "another name": ({"weight": ONES}, r"'weight\.npy', which names no layer"),
    "another path": ({"layers.5": ONES, "norm.5": ONES}, r"'norm\.5\.npy', which names no layer"),
    "a layer twice": ({"layers.5": ONES, "5": ONES}, "are of one layer"),
    "a layer with a zero before it": ({"layers.05": ONES}, "names no layer"),
    "two sites": ({"layers.5": ONES, "layers.6.mlp": ONES}, "several sites"),
    "a site in a site": ({"layers.5.{layer}": ONES}, "names no layer"),
    "texts": ({"5": np.array(["a"])}, "no plain type"),
    "complex": ({"5": ONES * 1j}, "no plain type"),
    "a number": ({"5": np.float32(3)}, "of shape"),
    "nothing": ({}, "at least one layer"),
    "no numbers": ({"5": ONES[:0]}, "of shape"),
    "infinite": ({"5": ONES * np.inf}, "direction of layer 5 holds 4 NaN or infinite"),
    "too large": ({"5": np.array([1e300])}, "direction of layer 5 holds 1 NaN or infinite"),
    "a cube": ({"5": np.ones((1, 2, 3))}, "shapes"),
}


@pytest.mark.parametrize(("contents", "sentence"), FOREIGN_NPZ.values(), ids=FOREIGN_NPZ)
def test_other_npz_files_are_refused(contents: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", **contents)
    with pytest.raises(ValueError, match=rf"v\.npz: .*{sentence}"):
        SteeringVector.load(tmp_path / "v.npz")


def header(said: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(said)) + said.encode() + data


FORGED_NPY: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "holds no NumPy array"),
    "text": (b"x" * 100, "holds no NumPy array"),
    "a shape": (header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({HUGE}, 4), }}\n", b"abcd"), "don't fit"),
    "a shape modulo 2⁶⁴": (header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**62}, 4), }}\n"), "don't"),
    "a shape of nothing": (header("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4), }\n"), "at least one"),
    "a negative shape": (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4), }\n"), "header is damaged"),
    "code": (header("__import__('os').abort()"), "header is damaged"),
    "too many axes": (header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'0,' * 99}), }}\n"), ""),
    "a row": (npy(ONES), r"of shape \(4,\), and that of a vector \(layers, D\)"),
    "a cube": (npy(np.ones((2, 2, 2))), r"of shape \(2, 2, 2\)"),
    "a nan": (npy(np.full((2, 2), np.nan)), "direction of layer 0 holds 2 NaN"),
    "a header's length": (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{}", "header is damaged"),
}


@pytest.mark.parametrize(("content", "sentence"), FORGED_NPY.values(), ids=FORGED_NPY)
def test_forged_npy_files_are_refused_before_memory_is_taken(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"v\.npy: .*{sentence}"):
        SteeringVector.load(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "v.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("layers.1.npy", npy(np.zeros(40 << 20, np.float32)))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"v\.npz is no complete zip file \(it would unpack to more than 20 times"):
        SteeringVector.load(tmp_path / "v.npz")
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_zip_files_with_lengths_names_and_methods_that_are_forged_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    np.savez(path, **{"1": ONES})
    whole = path.read_bytes()
    at = whole.index(b"PK\x01\x02")  # the entry in the directory at the end: both its lengths
    path.write_bytes(whole[: at + 20] + struct.pack("<II", 2**31, 2**31) + whole[at + 28 :])
    with pytest.raises(ValueError, match="it says that it holds more than it does"):
        SteeringVector.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("1.npy", npy(ONES))
    with pytest.raises(ValueError, match="compressed in a way that is not read"):
        SteeringVector.load(path)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("1.npy", npy(ONES))
        archive.writestr("1.npy", npy(2 * ONES))
    with pytest.raises(ValueError, match="two files of one name"):
        SteeringVector.load(path)


# -- PyTorch and rotalabs-steer --------------------------------------------------------------------------------------


def said(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def program(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, kind: str = "FloatStorage", count: int = 8
) -> bytes:
    """The pickle that torch.save writes of a tensor, by hand: `pickletools.dis` of a real one shows the same."""

    def whole(n: int) -> bytes:
        return b"J" + struct.pack("<i", n) if abs(n) < 2**31 else b"\x8a\x0a" + n.to_bytes(10, "little")

    def row(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(whole, values)) + b"t"

    storage = b"(" + said("storage") + f"ctorch\n{kind}\n".encode() + said("0") + said("cpu") + whole(count) + b"tQ"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00(" + storage + whole(offset) + row(shape) + b"q\x01"
        + row(strides) + b"\x89ccollections\nOrderedDict\n)RtRq\x02."
    )  # fmt: skip


def torch_file(path: Path, pickled: bytes, numbers: bytes, byteorder: bytes = b"little") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {"data.pkl": pickled, "byteorder": byteorder, "data/0": numbers, "version": b"3"}.items():
            archive.writestr(f"{path.stem}/{name}", content)
    return path


EIGHT = np.arange(1, 9, dtype=np.float32)


def rotalabs(stem: Path, pickled: bytes, numbers: bytes = EIGHT.tobytes(), layer: Any = 5, **more: Any) -> Path:
    told = {"behavior": "refusal", "layer_index": layer, "model_name": "Qwen/Qwen3-8B", "extraction_method": "caa"}
    stem.with_suffix(".json").write_text(json.dumps(told | {"metadata": {}} | more), "utf-8")
    return torch_file(stem.with_suffix(".pt"), pickled, numbers)


PLAIN = program((8,), (1,))


def test_a_vector_of_rotalabs_steer_is_read_by_either_of_its_files(tmp_path: Path) -> None:
    rotalabs(tmp_path / "v", PLAIN, metadata={"pairs": 10}, vector_shape=[8])
    for name in ("v.json", "v.pt"):
        v = SteeringVector.load(tmp_path / name)
        assert (v.layers, v.site, v[5].tolist()) == ([5], "layers.{layer}", EIGHT.tolist())
        assert v.info == {
            "model": "Qwen/Qwen3-8B", "method": "caa", "behavior": "refusal", "metadata": {"pairs": 10},
        }  # fmt: skip


def test_a_set_of_rotalabs_steer_is_read_from_its_folder(tmp_path: Path) -> None:
    for layer in (3, 12):
        rotalabs(tmp_path / f"layer_{layer}", PLAIN, (EIGHT * layer).tobytes(), layer)
    listed = {"behavior": "refusal", "layers": [3, 12], "model_name": "Qwen/Qwen3-8B"}
    (tmp_path / "metadata.json").write_text(json.dumps(listed))
    v = SteeringVector.load(tmp_path)
    assert (v.layers, v[12].tolist()) == ([3, 12], (EIGHT * 12).tolist())
    assert v.info == {"model": "Qwen/Qwen3-8B", "method": "caa", "behavior": "refusal"}
    rotalabs(tmp_path / "layer_12", PLAIN, layer=11)
    with pytest.raises(ValueError, match=r"layer_12\.json: it is of layer 11"):
        SteeringVector.load(tmp_path)
    (tmp_path / "layer_12.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"layer_12\.pt: rotalabs-steer keeps a vector in two"):
        SteeringVector.load(tmp_path)
    for layers in (None, [], "3", [True], [-1], [99], {"3": 3}):
        (tmp_path / "metadata.json").write_text(json.dumps(listed | {"layers": layers}))
        with pytest.raises((ValueError, FileNotFoundError), match=r"lists no layers|layer_(-1|99)\.json"):
            SteeringVector.load(tmp_path)


HALVES = {
    "float32": ("FloatStorage", EIGHT.tobytes()),
    "float64": ("DoubleStorage", EIGHT.astype("<f8").tobytes()),
    "float16": ("HalfStorage", EIGHT.astype("<f2").tobytes()),
    "bfloat16": ("BFloat16Storage", (EIGHT.view(np.uint32) >> 16).astype("<u2").tobytes()),
}


@pytest.mark.parametrize(("kind", "numbers"), HALVES.values(), ids=HALVES)
def test_tensors_of_every_float_are_read(kind: str, numbers: bytes, tmp_path: Path) -> None:
    v = SteeringVector.load(rotalabs(tmp_path / "v", program((8,), (1,), kind=kind), numbers))
    assert v[5].tolist() == EIGHT.tolist()


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "expected"),
    [((3,), (1,), 5, [6, 7, 8]), ((4,), (2,), 0, [1, 3, 5, 7]), ((1, 3), (8, 2), 1, [[2, 4, 6]]),
     ((2, 3), (1, 2), 1, [[2, 4, 6], [3, 5, 7]])],
)  # fmt: skip
def test_views_are_read_as_they_lie_in_their_storage(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int, expected: list[Any], tmp_path: Path
) -> None:
    path = torch_file(tmp_path / "v.pt", program(shape, strides, offset), EIGHT.tobytes())
    assert torch_tensor.read_tensor(path).tolist() == expected


def test_pickles_are_not_run(tmp_path: Path) -> None:
    """Of every protocol, bare and in the zip file, and from behind a true tensor."""
    ran = tmp_path / "ran"
    attacks = [pickle.dumps(Spy(ran), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    attacks += [
        b"cos\nsystem\n(" + said(f"touch {ran}") + b"tR.",
        b"(" + said(f"touch {ran}") + b"ios\nsystem\n.",
        b"\x80\x02" + said("os") + said("system") + b"\x93" + said(f"touch {ran}") + b"\x85R.",
        PLAIN[:-1] + b"0" + b"cos\nsystem\n(" + said(f"touch {ran}") + b"tR.",
        PLAIN[:-1] + b"cos\nsystem\n" + said(f"touch {ran}") + b"\x85R.",
        b"\x80\x02cbuiltins\neval\n" + said(f"open({str(ran)!r}, 'w')") + b"\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}" + said("__code__") + b"Nsb.",
    ]
    for attack in attacks:
        for path in (tmp_path / "v.pt", tmp_path / "v.json"):
            rotalabs(tmp_path / "v", attack)
            with pytest.raises(ValueError, match=r"v\.pt: .*(which no tensor takes|something else than a tensor)"):
                SteeringVector.load(path)
            (tmp_path / "v.pt").write_bytes(attack)
            with pytest.raises(ValueError, match=r"v\.pt is (no PyTorch file|a bare pickle)"):
                SteeringVector.load(path)
        assert not ran.exists()
    pickle.loads(attacks[0])
    assert ran.exists()  # so it would have run


FORGED_TENSORS: dict[str, tuple[bytes, bytes, str]] = {
    "a shape": (program((2**31 - 1,), (1,)), b"", "there are 8 numbers"),
    "a shape without steps": (program((2**31 - 1,), (0,)), b"", "there are 8 numbers"),
    "a negative shape": (program((-1,), (1,)), b"", "something else than a tensor"),
    "a negative offset": (program((8,), (1,), -1), b"", "something else than a tensor"),
    "an offset": (program((8,), (1,), 1), b"", "there are 8 numbers"),
    "a step": (program((8,), (2,)), b"", "there are 8 numbers"),
    "a step backwards": (program((8,), (-1,), 7), b"", "something else than a tensor"),
    "nothing": (program((0,), (1,)), b"", "there are 8 numbers"),
    "a number": (program((), ()), b"", "neither a vector nor a matrix"),
    "a cube": (program((2, 2, 2), (4, 2, 1)), b"", "neither a vector nor a matrix"),
    "a matrix": (program((2, 4), (4, 1)), b"", r"of shape \(2, 4\), and a vector \(D,\)"),
    "two strides": (program((8,), (1, 1)), b"", "neither a vector nor a matrix"),
    "more numbers": (program((8,), (1,), count=9), b"", "are 8, and it says otherwise"),
    "a step past 2⁶⁴": (program((2,), (2**70,)), b"", "there are 8 numbers"),
    "a step past 2⁶⁴ that is never taken": (program((1,), (2**70,)), b"", "something else than a tensor"),
    "a shape past 2⁶⁴": (program((2**70,), (0,)), b"", "there are 8 numbers"),
    "a nan": (PLAIN, (EIGHT * np.nan).astype("<f4").tobytes(), "direction of layer 5 holds 8 NaN"),
    "integers": (program((8,), (1,), kind="IntStorage"), b"", r"'torch\.IntStorage', which no tensor takes"),
    "a storage called": (b"\x80\x02ctorch\nFloatStorage\n)R.", b"", "something else than a tensor"),
    "no stop": (PLAIN[:-1], b"", "exhausted"),
    "nothing made": (b"\x80\x02.", b"", "something else than a tensor"),
    "a text": (b"\x80\x02" + said("x") + b".", b"", "something else than a tensor"),
    "two things": (PLAIN[:-1] + b"N.", b"", "something else than a tensor"),
    "a tuple without a beginning": (b"\x80\x02t.", b"", "something else than a tensor"),
    "a pair of one": (b"\x80\x02N\x86.", b"", "something else than a tensor"),
    "a memory that isn't": (b"\x80\x02h\x07.", b"", "something else than a tensor"),
    "a large memory": (b"\x80\x02Nr\xff\xff\xff\x7f.", b"", "something else than a tensor"),
    "a long text": (b"\x80\x02X\xff\xff\xff\x7fabc.", b"", "expected 2147483647 bytes"),
    "a long program": (b"\x80\x02" + b"N" * 70000 + b".", b"", "its pickle has 70003 bytes"),
}


@pytest.mark.parametrize(("pickled", "numbers", "sentence"), FORGED_TENSORS.values(), ids=FORGED_TENSORS)
def test_forged_tensors_are_refused(pickled: bytes, numbers: bytes, sentence: str, tmp_path: Path) -> None:
    path = rotalabs(tmp_path / "v", pickled, numbers or EIGHT.tobytes())
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"v\.pt: .*{sentence}"):
        SteeringVector.load(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_other_files_beside_a_tensor_are_refused(tmp_path: Path) -> None:
    path = rotalabs(tmp_path / "v", PLAIN)
    torch_file(path, PLAIN, EIGHT.tobytes(), byteorder=b"big")
    with pytest.raises(ValueError, match=r"v\.pt: its numbers are big-endian"):
        SteeringVector.load(path)
    np.savez(tmp_path / "a.npz", **{"1": ONES})
    shutil.move(tmp_path / "a.npz", path)
    with pytest.raises(ValueError, match=r"v\.pt: it is a zip file, but none of PyTorch's"):
        SteeringVector.load(path)
    rotalabs(tmp_path / "v", PLAIN, vector_shape=[9])
    with pytest.raises(ValueError, match=r"v\.pt: it is of shape \(8,\), and v\.json says otherwise"):
        SteeringVector.load(path)
    for told in ("{", "[]", "3", '{"a": 1}', "[" * 5000, '"\ud800"', json.dumps({"layer_index": 1.5}), "\x00"):
        (tmp_path / "v.json").write_text(told, "utf-8", "surrogatepass")
        with pytest.raises(ValueError, match=r"v\.json"):
            SteeringVector.load(path)
    (tmp_path / "v.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"v\.json: rotalabs-steer keeps a vector in two, v\.json and v\.pt"):
        SteeringVector.load(path)


# -- damage ----------------------------------------------------------------------------------------------------------


def example(folder: Path, suffix: str) -> Path:
    if suffix == ".pt":
        return rotalabs(folder / "v", PLAIN)
    v = vector((0, 1) if suffix == ".npy" else (1, 2), width=4, residual_norms={1: 2.0}, info={"é": "ü"})
    return v.save(folder / f"v{suffix}")


def outcome(path: Path) -> dict[int, list[int]] | str:
    """What is read, or the sentence that refuses it."""
    try:
        return bits(SteeringVector.load(path))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".pt"])
def test_every_truncation_is_one_clear_error(suffix: str, tmp_path: Path) -> None:
    path = example(tmp_path, suffix)
    whole, before = path.read_bytes(), bits(SteeringVector.load(path))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        found = outcome(path)
        assert found == before or str(path) in str(found), length


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".pt"])
@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_changed_byte_is_one_clear_error_or_another_vector(suffix: str, flip: int, tmp_path: Path) -> None:
    path = example(tmp_path, suffix)
    whole = bytearray(path.read_bytes())
    for at in range(len(whole)):
        whole[at] ^= flip
        path.write_bytes(whole)
        found = outcome(path)
        assert isinstance(found, dict) or str(path) in found, at
        whole[at] ^= flip


def safetensors(path: Path, tensors: dict[str, Any], data: bytes = bytes(12)) -> Path:
    told = json.dumps({"version": 1, "site": "layers.{layer}", "residual_norms": {}, "info": {}})
    head = json.dumps({"__metadata__": {"mlxsteer.vector": told}, **tensors}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    return path


@pytest.mark.parametrize(
    ("name", "shape", "end", "sentence"),
    [
        ("layers.0", [2**31, 2**31], 0, "is of shape"),  # 4·2⁶² bytes are 0 modulo 2⁶⁴: MLX takes them
        ("layers.0", [2**30, 2**32], 0, "is of shape"),
        ("layers.0", [0], 0, "is of shape"),
        ("layers.0", [], 4, "is of shape"),
        ("layers.00", [3], 12, r"is no layers\.N"),
        ("0", [3], 12, r"is no layers\.N"),
        ("layers.1_0", [3], 12, r"is no layers\.N"),
        ("layers.٣", [3], 12, r"is no layers\.N"),
    ],
)
def test_forged_safetensors_are_refused(name: str, shape: list[int], end: int, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    safetensors(path, {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}, bytes(end))
    with pytest.raises(ValueError, match=rf"v\.safetensors: the vector in it is damaged .*{sentence}"):
        SteeringVector.load(path)


# -- which file ------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", never)
    monkeypatch.setattr(huggingface_hub, "HfApi", never)


@pytest.mark.usefixtures("offline")
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("user/v.safetensors", "user/v.pt", "v.gguf", "a/b/c", "/user/repo", "./repo", "../repo", "x", "",
                 Path("user/repo"), tmp_path / "none", "user/", "user/repo\n", "datasets/user/repo"):  # fmt: skip
        if Path(path).exists():
            continue
        with pytest.raises(FileNotFoundError, match="there is no file"):
            SteeringVector.load(path)


@pytest.mark.usefixtures("offline")
def test_what_exists_here_wins_over_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "repo").mkdir(parents=True)
    v = vector()
    v.save(tmp_path / "user" / "repo" / "any.gguf")
    assert bits(SteeringVector.load("user/repo")) == bits(v)
    (2 * v).save(tmp_path / "user" / "repo" / "vector.safetensors")
    assert bits(SteeringVector.load("user/repo")) == bits(2 * v)
    assert bits(SteeringVector.load("user/repo", filename="any.gguf")) == bits(v)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.npz"):
        SteeringVector.load("user/repo", filename="none.npz")
    with pytest.raises(ValueError, match="is for a repository"):
        SteeringVector.load("user/repo", revision="main")
    with pytest.raises(ValueError, match=r"any\.gguf is a file"):
        SteeringVector.load("user/repo/any.gguf", filename="x.gguf")


@pytest.mark.usefixtures("offline")
def test_a_slip_in_a_path_names_the_files_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    vector().save(tmp_path / "user" / "v.safetensors")
    for path in ("user/v.safetensor", "user/v", "user/v.gguf", tmp_path / "user" / "v"):
        with pytest.raises(FileNotFoundError, match=r"there is no file .*user/v.*\. Nearest: v\.safetensors"):
            SteeringVector.load(path)
    with pytest.raises(FileNotFoundError, match=r"there is no file user/other.*revision= .* Hub"):
        SteeringVector.load("user/other")


def test_a_repository_is_asked_for_where_its_revision_is_named(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    vector().push_to_hub("user/repo")
    assert bits(SteeringVector.load("user/repo", revision="main")) == bits(vector())


def test_what_is_no_vector_file_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    for path in (tmp_path / "v", str(tmp_path / "new") + "/"):
        with pytest.raises(ValueError, match="is a folder: name a file in it, such as .*vector.safetensors"):
            vector().save(path)
    for suffix in (".pt", ".txt"):
        with pytest.raises(ValueError, match="a vector is saved as a .* file") as caught:
            vector().save(tmp_path / f"v{suffix}")
        assert "nearest" not in str(caught.value)
    pairs = [{"positive": "a", "negative": "b"}]
    (tmp_path / "a.json").write_text(json.dumps(pairs), "utf-8")
    (tmp_path / "b.json").write_text(json.dumps({"behavior": "x", "pairs": pairs}), "utf-8")
    (tmp_path / "c.jsonl").write_text(json.dumps(pairs[0]), "utf-8")
    for name in ("a.json", "b.json", "c.jsonl"):
        with pytest.raises(ValueError, match=rf"{name}.* datasets\.read reads contrast pairs"):
            SteeringVector.load(tmp_path / name)


def test_folders_without_one_vector_say_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no vector: no \.safetensors, \.gguf, \.npz, \.npy, \.pt or \.json"):
        SteeringVector.load(tmp_path)
    for name in ("b.npz", "a.gguf"):
        vector().save(tmp_path / name)
    with pytest.raises(ValueError, match=r"say which by filename=, of a\.gguf, b\.npz"):
        SteeringVector.load(tmp_path)


def test_a_file_of_another_kind_is_refused_with_the_kinds_that_are_read(tmp_path: Path) -> None:
    for name in ("v.ggml", "v.NPZ", "v.txt", "v"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=rf"{name}: a vector is read from a \.safetensors, \.gguf, \.npz, \.npy"):
            SteeringVector.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"the nearest to '\.ggml' is \.gguf"):
        SteeringVector.load(tmp_path / "v.ggml")


# -- the Hub ---------------------------------------------------------------------------------------------------------


http: Any = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__)  # httpx, or httpx2


def failed(kind: Any, message: str = "x") -> Exception:
    return kind(message, response=http.Response(404, request=http.Request("GET", "https://example.invalid")))


class FakeHub:
    """Repositories as folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked, self.made = root, [], []  # type: ignore[var-annotated]
        self.error: Exception | None = None

    def model_info(self, repository: str, *, revision: str | None = None) -> None:
        if self.error is not None:
            raise self.error
        if not (self.root / repository).is_dir():
            raise failed(errors.RepositoryNotFoundError)

    def download(
        self, repository: str, filename: str, *, revision: str | None = None, token: str | None = None,
        local_files_only: bool = False,
    ) -> str:  # fmt: skip
        self.asked.append((repository, filename, revision))
        if self.error is not None:
            raise self.error
        folder = self.root / repository
        if not folder.is_dir():
            raise failed(errors.RepositoryNotFoundError)
        if revision not in (None, "main"):
            raise failed(errors.RevisionNotFoundError)
        if not (folder / filename).is_file():
            raise failed(errors.RemoteEntryNotFoundError)
        return str(folder / filename)

    def list_repo_files(self, repository: str, *, revision: str | None = None) -> list[str]:
        folder = self.root / repository
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        self.made.append((repository, private))
        (self.root / repository).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub/{repository}"  # type: ignore[return-value]

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str, **_: Any) -> None:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    made = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: made)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return made


def test_a_vector_goes_to_the_hub_and_comes_back(fake: FakeHub) -> None:
    v = vector(info=INFO, residual_norms={1: 0.1})
    assert v.push_to_hub("user/repo", private=True) == "https://hub/user/repo"
    assert fake.made == [("user/repo", True)]
    assert {path.name for path in (fake.root / "user/repo").iterdir()} == {"vector.safetensors", "README.md"}
    loaded = SteeringVector.load("user/repo", revision="main")
    assert (bits(loaded), loaded.info, loaded.residual_norms) == (bits(v), v.info, v.residual_norms)
    assert fake.asked == [("user/repo", "vector.safetensors", "main")]


def test_the_model_card_says_what_it_is_and_how_it_is_used(fake: FakeHub) -> None:
    odd = {"pairs|n": "a|b\n\n# not a heading", "long": "x" * 999, "html": "<script>"}
    vector(info={**INFO, **odd}).push_to_hub("user/repo")
    card = (fake.root / "user/repo" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: mlxsteer\ntags:\n- steering-vector\n")
    for line in ('base_model: "org/tiny"', "# repo", "| method | mean_difference |", "| width | 8 |",
                 "| layers with a direction | 3, from 1 to 11 |", 'vector = SteeringVector.load("user/repo")',
                 "| pairs\\|n | a\\|b # not a heading |", "| html | &lt;script> |"):  # fmt: skip
        assert line in card.splitlines(), line
    assert "x" * 201 not in card
    assert "\n# not" not in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")


def test_a_model_card_can_not_be_broken_by_a_name(fake: FakeHub) -> None:
    SteeringVector({3: mx.ones(2)}, info={"model": 'a/b"\n---\n: {'}).push_to_hub("user/repo")
    card = (fake.root / "user/repo" / "README.md").read_text("utf-8")
    assert card.splitlines().index("---", 1) == 7
    assert "| layers with a direction | 3 |" in card
    compile(card.split("```python\n")[1].split("```")[0], "README.md", "exec")


def test_the_only_vector_of_a_repository_is_found_and_of_several_one_is_named(fake: FakeHub) -> None:
    folder = fake.root / "user/repo"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("x")
    with pytest.raises(ValueError, match="user/repo holds no vector"):
        SteeringVector.load("user/repo")
    v = vector()
    v.save(folder / "sub" / "happy.gguf")
    assert bits(SteeringVector.load("user/repo")) == bits(v)
    (2 * v).save(folder / "sad.npz")
    with pytest.raises(ValueError, match=r"say which by filename=, of sad\.npz, sub/happy\.gguf"):
        SteeringVector.load("user/repo")
    assert bits(SteeringVector.load("user/repo", filename="sad.npz")) == bits(2 * v)
    with pytest.raises(FileNotFoundError, match="the repository has no such file"):
        SteeringVector.load("user/repo", filename="none.npz")
    for number in range(20):
        v.save(folder / f"v{number}.npz")
    with pytest.raises(ValueError, match=r", …\."):
        SteeringVector.load("user/repo")


def test_both_files_of_a_rotalabs_vector_are_fetched(fake: FakeHub) -> None:
    (fake.root / "user/repo").mkdir(parents=True)
    rotalabs(fake.root / "user/repo" / "refusal", PLAIN)
    assert SteeringVector.load("user/repo").layers == [5]
    assert fake.asked[-2:] == [("user/repo", "refusal.pt", None), ("user/repo", "refusal.json", None)]


HUB_ERRORS: dict[str, tuple[Callable[[], Exception], type[Exception], str]] = {
    "offline": (lambda: errors.LocalEntryNotFoundError("x"), ConnectionError, "can't be reached, and the file is not"),
    "offline mode": (lambda: errors.OfflineModeIsEnabled("HF_HUB_OFFLINE"), ConnectionError, "HF_HUB_OFFLINE"),
    "no network": (lambda: http.ConnectError("no\nroute"), ConnectionError, "or refuses: no route"),
    "refused": (lambda: failed(errors.HfHubHTTPError, "429\nslow down"), ConnectionError, "refuses: 429 slow down"),
    "gated": (lambda: failed(errors.GatedRepoError), FileNotFoundError, "unless it is private or gated"),
    "no name": (lambda: errors.HFValidationError("x"), ValueError, "of the form 'user/repo'"),
}


@pytest.mark.parametrize(("make", "kind", "sentence"), HUB_ERRORS.values(), ids=HUB_ERRORS)
def test_what_goes_wrong_with_the_hub_is_one_sentence(
    make: Callable[[], Exception], kind: type[Exception], sentence: str, fake: FakeHub
) -> None:
    fake.error = make()
    with pytest.raises(kind, match=rf"can't read 'user/repo', which is no path here: .*{sentence}") as caught:
        SteeringVector.load("user/repo")
    assert "\n" not in str(caught.value)
    if not isinstance(fake.error, errors.LocalEntryNotFoundError):
        with pytest.raises(kind, match=rf"can't write to 'user/repo': .*{sentence}"):
            vector().push_to_hub("user/repo")


def test_repositories_and_revisions_that_are_not_there_are_named(fake: FakeHub) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"can't read 'user/none', which is no path here: the Hugging Face Hub has no"
    ):
        SteeringVector.load("user/none")
    vector().push_to_hub("user/repo")
    with pytest.raises(FileNotFoundError, match=r"can't read 'user/repo', .*: it has no revision 'v9'"):
        SteeringVector.load("user/repo", revision="v9")


def test_the_hub_is_asked_with_its_own_signatures() -> None:
    """The fakes above take what the library's functions take."""
    assert {"revision", "token"} <= set(inspect.signature(huggingface_hub.hf_hub_download).parameters)
    api = huggingface_hub.HfApi
    assert "local_files_only" in inspect.signature(huggingface_hub.hf_hub_download).parameters
    for function, names in [(api.list_repo_files, {"revision"}), (api.model_info, {"revision"}),
                            (api.create_repo, {"private", "exist_ok"}),
                            (api.create_branch, {"branch", "exist_ok"}),
                            (api.upload_folder, {"repo_id", "folder_path", "commit_message", "revision",
                                                  "delete_patterns"})]:  # fmt: skip
        assert names <= set(inspect.signature(function).parameters)
    assert hub.NAME == "vector.safetensors"
    assert SteeringVector({0: mx.ones(1)}).site == arrays.RESIDUAL


def test_a_tensor_is_one_storage_rebuilt_once(tmp_path: Path) -> None:
    """A pickle that has its numbers read, or its tensor rebuilt, again and again takes no more room than a tensor."""
    plain, numbers = program((1 << 18,), (1,), count=1 << 18), bytes(1 << 20)
    stored = plain.replace(b"tQ", b"tq\x05Q" + b"h\x05Q" * 40)
    rebuilt = plain.replace(b"RtRq\x02.", b"Rtq\x06R" + b"h\x00h\x06R" * 40 + b".")
    for attack in (stored, rebuilt):
        assert attack != plain
        path = rotalabs(tmp_path / "v", attack, numbers)
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"v\.pt: it holds something else than a tensor"):
            SteeringVector.load(path)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
        tracemalloc.stop()
