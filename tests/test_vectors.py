"""`SteeringVector`: arithmetic as in NumPy, steering at layers, a file that comes back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxsteer import SteeringVector
from mlxsteer import interventions as iv
from mlxsteer import vectors as room

INFO = {"model": "pocket", "method": "mean_difference", "pairs": 12, "é": [1.5, None, True, {"a": "b"}]}


def random(seed: int = 0, layers: tuple[int, ...] = (0, 3, 11), width: int = 8, **more: Any) -> SteeringVector:
    drawn = np.random.default_rng(seed).normal(size=(len(layers), width))
    return SteeringVector({layer: mx.array(row) for layer, row in zip(layers, drawn, strict=True)}, **more)


def numpy(vector: SteeringVector) -> np.ndarray:
    """(layers, width) in float64."""
    return np.stack([np.array(vector[layer], np.float64) for layer in vector.layers])


# -- what it is ------------------------------------------------------------------------------------------------------


def test_a_vector_is_its_directions_by_layer_in_order() -> None:
    v = SteeringVector({11: [1.0, 2], 2: mx.array([3, 4], mx.bfloat16), 5: np.array([5.0, 6.0])})  # type: ignore[dict-item]
    assert v.layers == list(v) == [2, 5, 11]
    assert (len(v), v.width) == (3, 2)
    assert v[5].tolist() == [5.0, 6.0]
    assert all(v[layer].dtype == mx.float32 for layer in v)
    assert 5 in v
    assert 3 not in v
    assert repr(v) == "SteeringVector(3 layers, 2 to 11, of width 2)"
    assert repr(random(info={"model": "pocket"})).endswith("of width 8 from pocket)")


def test_a_vector_can_not_be_changed_and_keeps_its_values_when_the_array_it_was_given_changes() -> None:
    given_array = mx.ones(3)
    v = SteeringVector({0: given_array})
    with pytest.raises(FrozenInstanceError):
        v.site = "layers.{layer}.mlp"  # type: ignore[misc]
    given_array += 5
    assert v[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("layer", [1, -1, 99])
def test_a_layer_without_a_direction_is_refused_with_those_there_are(layer: int) -> None:
    for attempt in (lambda: random()[layer], lambda: random().at(layer), lambda: random().at([0, layer])):
        with pytest.raises(KeyError, match=rf"no direction for layer {layer}; it has \[0, 3, 11\]"):
            attempt()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no layer": (lambda: SteeringVector({}), "at least one layer"),
    "nan": (
        lambda: SteeringVector({0: mx.ones(3), 4: mx.array([1, float("nan")])}),
        "direction of layer 4 holds 1 NaN",
    ),
    "inf": (lambda: SteeringVector({4: mx.array([1, float("inf")])}), "direction of layer 4 holds 1 NaN or infinite"),
    "empty": (lambda: SteeringVector({0: mx.zeros(0)}), "direction of layer 0 is a tensor"),
    "two widths": (lambda: SteeringVector({0: mx.ones(3), 1: mx.ones(4)}), r"shapes \[\(3,\), \(4,\)\]"),
    "three axes": (lambda: SteeringVector({0: mx.ones((2, 3, 4))}), r"all are \(D,\)"),
    "a site without a layer": (lambda: SteeringVector({0: mx.ones(3)}, "layers.5"), "key with {layer} in it"),
    "divided by zero": (lambda: random() / 0, "NaN or infinite"),
    "times nan": (lambda: random() * float("nan"), "NaN or infinite"),
    "a zero normalized": ((random() * 0).normalized, "direction of layer 0"),
}


@pytest.mark.parametrize(("make", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_vector_is_refused(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


# -- arithmetic ------------------------------------------------------------------------------------------------------

factors = st.floats(-100, 100, width=32).filter(lambda f: f == 0 or abs(f) > 1e-3)


@given(
    seeds=st.tuples(st.integers(0, 99), st.integers(100, 199)),
    factor=factors,
    divisor=factors.filter(bool),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_arithmetic_is_that_of_the_directions(seeds: tuple[int, int], factor: float, divisor: float) -> None:
    a, b = random(seeds[0]), random(seeds[1])
    x, y = numpy(a), numpy(b)
    results = {
        "+": (a + b, x + y), "-": (a - b, x - y), "*": (a * factor, x * factor), "r*": (factor * a, x * factor),
        "/": (a / divisor, x / divisor), "neg": (-a, -x),
        "normalized": (a.normalized(), x / np.linalg.norm(x, axis=1, keepdims=True)),
        "all": (2 * (a - b) / divisor + -a, 2 * (x - y) / divisor - x),
    }  # fmt: skip
    for label, (result, expected) in results.items():
        np.testing.assert_allclose(
            numpy(result), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=label
        )
        assert result.layers == a.layers
    cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert a.cosine(b) == pytest.approx(dict(zip(a.layers, cosines, strict=True)), abs=1e-6)


def test_exact_identities() -> None:
    a, b = random(1), random(2)
    for left, right in [(a + b, b + a), (2 * a, a + a), (a * 2, 2 * a), (-1 * -a, a), (a - b, a + -b), (a * 4 / 4, a)]:
        np.testing.assert_array_equal(numpy(left), numpy(right))
    assert a.cosine(-a) == pytest.approx(dict.fromkeys(a.layers, -1.0), abs=1e-6)


def test_arithmetic_keeps_the_site_the_norms_and_the_origin_and_leaves_the_operands() -> None:
    a = random(1, site="layers.{layer}.mlp", residual_norms={3: 2.5}, info=INFO)
    b, before = random(2, site="layers.{layer}.mlp"), numpy(a)
    for result in (2 * a, a / 2, -a, a.normalized()):
        assert (result.site, result.residual_norms, result.info) == (a.site, a.residual_norms, a.info)
    for result in (a + b, a - b):  # the pairs of the one are not those of the sum
        kept = {name: value for name, value in a.info.items() if name != "pairs"}
        assert (result.site, result.residual_norms, result.info) == (a.site, a.residual_norms, kept)
    np.testing.assert_array_equal(numpy(a), before)


@pytest.mark.parametrize("factor", [np.float64(2), np.float32(2), np.int64(2)], ids=["float64", "float32", "int64"])
def test_a_numpy_number_is_a_factor_from_either_side(factor: Any) -> None:
    a = random(1)
    for result in (a * factor, factor * a, a / (1 / factor)):
        assert isinstance(result, SteeringVector)
        np.testing.assert_allclose(numpy(result), 2 * numpy(a), rtol=1e-6)


MISFITS = {
    "layers": random(layers=(0, 3)),
    "width": random(width=9),
    "site": random(site="layers.{layer}.mlp"),
}


@pytest.mark.parametrize("other", MISFITS.values(), ids=MISFITS)
def test_vectors_that_do_not_fit_together_are_refused(other: SteeringVector) -> None:
    for attempt in (lambda: random() + other, lambda: random() - other, lambda: random().cosine(other)):
        with pytest.raises(ValueError, match="don't fit together"):
            attempt()


def test_other_things_can_not_be_added_to_a_vector() -> None:
    for attempt in (lambda: random() + 1, lambda: random() - "a", lambda: 1 - random()):  # type: ignore[operator]
        with pytest.raises(TypeError, match="unsupported operand"):
            attempt()


# -- steering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "strengths"),
    [
        (3, {3: 2.0}), ([0, 11], {0: 2.0, 11: 2.0}), ((11, 0), {11: 2.0, 0: 2.0}),
        (range(0, 12, 11), {0: 2.0, 11: 2.0}),
        ({0: 0.5, 3: -1.0}, {0: 1.0, 3: -2.0}),
    ],
    ids=str,
)  # fmt: skip
def test_at_gives_a_key_dict_that_adds_the_directions(layers: Any, strengths: dict[int, float]) -> None:
    v = random()
    made = v.at(layers, strength=2.0, at="last")
    assert list(made) == [f"layers.{layer}" for layer in strengths]
    for layer, strength in strengths.items():
        expected = iv.add_vector(v[layer], strength, at="last")
        assert made[f"layers.{layer}"].fingerprint == expected.fingerprint


def test_at_adds_once_to_every_token_unless_told_otherwise() -> None:
    v = random(site="layers.{layer}.attn.heads")
    assert v.at(3)["layers.3.attn.heads"].fingerprint == iv.add_vector(v[3]).fingerprint


def test_at_takes_the_layer_that_numpy_found() -> None:
    best = np.argmax([0.1, 0.2, 0.1, 0.9])
    assert list(random().at(best)) == ["layers.3"]


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_vector_comes_back_bit_for_bit(tmp_path: Path) -> None:
    odd = [1e-45, -0.0, 1.1754944e-38, 3.4028235e38, np.pi]
    directions = {2: mx.array(odd), 10: mx.array(odd[::-1]), 1: mx.ones(5)}
    v = SteeringVector(directions, "layers.{layer}.mlp", {1: 0.1, 10: 1 / 3}, INFO)
    for path in (tmp_path / "v.safetensors", str(tmp_path / "w.safetensors")):
        assert v.save(path) == Path(path)
        loaded = SteeringVector.load(path)
        assert loaded.layers == [1, 2, 10]
        for layer in v:
            np.testing.assert_array_equal(np.array(loaded[layer]).view(np.uint32), np.array(v[layer]).view(np.uint32))
        assert (loaded.site, loaded.residual_norms, loaded.info) == (v.site, v.residual_norms, v.info)


def test_the_file_is_plain_safetensors_with_one_tensor_for_each_layer(tmp_path: Path) -> None:
    v = random()
    loaded: Any = mx.load(str(v.save(tmp_path / "v.safetensors")), return_metadata=True)
    tensors, metadata = loaded
    assert set(tensors) == {"layers.0", "layers.3", "layers.11"}
    assert mx.array_equal(tensors["layers.3"], v[3])
    assert json.loads(metadata["mlxsteer.vector"])["version"] == 1


def test_other_suffixes_missing_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"saved as a \.safetensors"):
        random().save(tmp_path / "v.txt")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        random().save(tmp_path / "none" / "v.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        SteeringVector.load(tmp_path / "none.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_origin_that_is_no_data_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        random(info={"model": object()}).save(tmp_path / "v.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_every_truncation_of_a_file_is_one_clear_error(tmp_path: Path) -> None:
    path = random().save(tmp_path / "v.safetensors")
    whole = path.read_bytes()
    for length in [*range(0, 16), *range(16, len(whole), 23), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is no complete safetensors file"):
            SteeringVector.load(path)


DAMAGE: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "no json": ({"layers.0": mx.ones(3)}, lambda d: "{"),
    "a list": ({"layers.0": mx.ones(3)}, lambda d: []),
    "no version": ({"layers.0": mx.ones(3)}, lambda d: {k: v for k, v in d.items() if k != "version"}),
    "no site": ({"layers.0": mx.ones(3)}, lambda d: {k: v for k, v in d.items() if k != "site"}),
    "no info": ({"layers.0": mx.ones(3)}, lambda d: {k: v for k, v in d.items() if k != "info"}),
    "a site without a layer": ({"layers.0": mx.ones(3)}, lambda d: d | {"site": "layers.0"}),
    "a site that is no text": ({"layers.0": mx.ones(3)}, lambda d: d | {"site": 3}),
    "norms as a list": ({"layers.0": mx.ones(3)}, lambda d: d | {"residual_norms": [1.0]}),
    "norms of no layer": ({"layers.0": mx.ones(3)}, lambda d: d | {"residual_norms": {"a": 1.0}}),
    "other tensors": ({"weight": mx.ones(3)}, lambda d: d),
    "two widths": ({"layers.0": mx.ones(3), "layers.1": mx.ones(4)}, lambda d: d),
    "a nan": ({"layers.0": mx.array([float("nan")])}, lambda d: d),
}


@pytest.mark.parametrize(("tensors", "change"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_one_clear_error_that_names_it(
    tensors: dict[str, Any], change: Callable[[Any], Any], tmp_path: Path
) -> None:
    path = tmp_path / "broken.safetensors"
    data = change({"version": 1, "site": "layers.{layer}", "residual_norms": {}, "info": {}})
    text = data if isinstance(data, str) else json.dumps(data)
    mx.save_safetensors(str(path), tensors, {room.FORMAT: text})
    with pytest.raises(ValueError, match=r"broken\.safetensors.*damaged"):
        SteeringVector.load(path)


def test_foreign_files_and_later_versions_say_what_they_are(tmp_path: Path) -> None:
    path = iv.save({"layers.0": iv.zero_out()}, tmp_path / "iv.safetensors")
    with pytest.raises(
        ValueError, match=r"holds no mlxsteer\.vector: its metadata names \['mlxsteer\.interventions'\]"
    ):
        SteeringVector.load(path)
    mx.save_safetensors(str(path), {"layers.0": mx.ones(3)})
    with pytest.raises(ValueError, match=r"holds no mlxsteer\.vector"):
        SteeringVector.load(path)
    mx.save_safetensors(str(path), {"layers.0": mx.ones(3)}, {room.FORMAT: json.dumps({"version": 7})})
    with pytest.raises(ValueError, match=r"version 7; this mlxsteer reads up to 1"):
        SteeringVector.load(path)


def test_what_is_orthogonal_to_another_vector_has_none_of_it_left() -> None:
    mx.random.seed(0)
    a, b = (SteeringVector({1: mx.random.normal((16,)), 3: mx.random.normal((16,))}) for _ in range(2))
    left = a.orthogonal_to(b)
    for layer in (1, 3):
        x, y = np.array(a[layer], np.float64), np.array(b[layer], np.float64)
        np.testing.assert_allclose(np.array(left[layer]), x - (x @ y) / (y @ y) * y, atol=1e-6)


# -- layers, and what is no layer ------------------------------------------------------------------------------------


def test_all_layers_and_some(tmp_path: Path) -> None:
    v = random(residual_norms={0: 1.0, 3: 2.0}, info={"agreement": {"0": 0.5, "11": 0.25}, "model": "m"})
    assert list(v.at("all")) == ["layers.0", "layers.3", "layers.11"]
    part = v.only([11, 0])
    assert type(part) is SteeringVector
    assert (part.layers, part.residual_norms, part.agreement) == ([0, 11], {0: 1.0}, {0: 0.5, 11: 0.25})
    assert (v.only(np.int64(3)).layers, v.only("all").layers) == ([3], [0, 3, 11])
    assert (v.only(3).agreement, v.only(3).info) == ({}, {"agreement": {}, "model": "m"})
    assert v.only(range(0, 12, 11)).layers == [0, 11]
    with pytest.raises(KeyError, match="no direction for layer 4"):
        v.only([0, 4])


NO_LAYER: dict[str, tuple[Any, str]] = {
    "45": ("45", r"layers are 'all', a layer, a list of layers such as \[0, 3, 11\], or .*, not '45'"),
    "a digit": ("3", "not '3'"),
    "a word": ("al", "not 'al'"),
    "truth": (True, "not True"),
    "truth in a list": ([0, True], r"not \[0, True\]"),
    "a half": (1.5, r"not 1\.5"),
    "a whole float": ([3.0], r"not \[3\.0\]"),
    "none": (None, "not None"),
    "a slice": (slice(1, 3), "not slice"),
    "text keys": ({"3": 1.0}, "not {'3': 1.0}"),
    "no layers": ([], "no layer, which would do nothing"),
    "no strengths": ({}, "no layer, which would do nothing"),
}


@pytest.mark.parametrize(("layers", "sentence"), NO_LAYER.values(), ids=NO_LAYER)
def test_what_is_no_layer_is_refused(layers: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        random().at(layers)
    if not isinstance(layers, dict):
        with pytest.raises(ValueError, match=sentence):
            random().only(layers)


def test_strengths_of_a_layer_are_numbers() -> None:
    with pytest.raises(
        TypeError, match=r"the strength of layer 3 is a number; one for each row is strength=\[1\.0, 2\.0\]"
    ):
        random().at({3: [1.0, 2.0]})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="the strength of layer 3 is a number, not 'a'"):
        random().at({3: "a"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="unit is 'raw' or 'residual', not 'residul'. Nearest: residual"):
        random().at(3, unit="residul")  # type: ignore[arg-type]


def test_layers_count_from_0() -> None:
    for attempt in (lambda: random()[-1], lambda: random().at(-1), lambda: random().only([-1])):
        with pytest.raises(KeyError, match=r"no direction for layer -1; it has \[0, 3, 11\].*count from 0"):
            attempt()
    for layer in (-1, 1.0, "1", True, None):
        with pytest.raises(ValueError, match="a layer is a whole number from 0 on, not "):
            SteeringVector({layer: mx.ones(4)})  # type: ignore[dict-item]
    for index in (slice(1, 3), [1, 2], True, 1.5, "3"):
        with pytest.raises(TypeError, match=r"vector\[layer\] is one layer's direction.*\.only\("):
            random()[index]  # type: ignore[index]


def test_a_direction_of_zero_is_not_added() -> None:
    v = SteeringVector({1: mx.zeros(3), 2: mx.ones(3)})
    for unit in ("raw", "residual"):
        with pytest.raises(ValueError, match="the direction of layer 1 is zero: it adds nothing"):
            replace(v, residual_norms={1: 2.0}).at([1], unit=unit)  # type: ignore[arg-type]
    assert list(v.at(2)) == ["layers.2"]
    tiny_one = SteeringVector({1: mx.full((3,), 1e-30)})  # its squares are zero, it isn't
    assert list(tiny_one.at(1)) == ["layers.1"]


# -- what is no vector, no number, no path ---------------------------------------------------------------------------

single = SteeringVector({0: mx.ones((3, 8)), 3: mx.ones((3, 8)), 11: mx.ones((3, 8))})
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "an array for directions": (
        lambda: SteeringVector(mx.ones(3)),  # type: ignore[arg-type]
        TypeError,
        r"directions are a dict from layers to directions, such as \{5: direction\}, not array",
    ),
    "times a text": (lambda: random() * "a", TypeError, "multiplied or divided by a number, not by 'a'"),  # type: ignore[operator]
    "times a vector": (lambda: random() * random(), TypeError, "by a number, not by SteeringVector"),  # type: ignore[operator]
    "divided by a text": (lambda: random() / "a", TypeError, "multiplied or divided by a number"),  # type: ignore[operator]
    "taken for an array": (lambda: mx.array(random()), TypeError, r"has several layers.*vector\[layer\]"),
    "added to an array": (lambda: mx.ones(8) + random(), TypeError, r"has several layers.*vector\[layer\]"),
    "an array's cosine": (
        lambda: random().cosine(mx.ones(8)), TypeError, "goes with a SteeringVector, not with array"),  # type: ignore[arg-type]
    "orthogonal to an array": (
        lambda: random().orthogonal_to(mx.ones(8)), TypeError, "goes with a SteeringVector"),  # type: ignore[arg-type]
    "one vector to mean norm": (
        lambda: room.to_mean_norm(random()), TypeError, "to_mean_norm takes a list of vectors, not SteeringVector"),  # type: ignore[arg-type]
    "arrays to mean norm": (
        lambda: room.to_mean_norm([mx.ones(3)]), TypeError, "list of vectors, and one of them is array"),  # type: ignore[list-item]
    "a dict to mean norm": (
        lambda: room.to_mean_norm({"a": random()}), TypeError, "list of vectors, not dict"),  # type: ignore[arg-type]
    "positions": (
        lambda: single + SteeringVector({n: mx.ones((6, 8)) for n in single}), ValueError,
        "don't fit together: one has a direction for each of 3 positions, the other for each of 6"),
    "positions and none": (lambda: single + random(), ValueError, "of 3 positions, the other for all positions"),
    "sites": (
        lambda: random() + random(site="layers.{layer}.mlp"), ValueError,
        r"don't fit together: one is at layers\.\{layer\}, the other at layers\.\{layer\}\.mlp"),
    "layers": (
        lambda: random() + random(layers=(0, 3)), ValueError, r"one has layers \[0, 3, 11\], the other \[0, 3\]"),
    "widths": (lambda: random() + random(width=9), ValueError, "one is of width 8, the other of 9"),
    "no path to load": (lambda: SteeringVector.load(None), TypeError, "a path is a text or a Path, not None"),  # type: ignore[arg-type]
    "no path to save": (lambda: random().save(3), TypeError, "a path is a text or a Path, not 3"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize(("attempt", "kind", "sentence"), WRONG.values(), ids=WRONG)
def test_what_does_not_go_with_a_vector_is_refused_in_a_sentence(
    attempt: Callable[[], Any], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        attempt()


def test_a_factor_may_be_an_array_of_no_dimensions() -> None:
    v = random()
    for factor in (mx.array(2.0), np.array(2.0)):
        np.testing.assert_array_equal(numpy(v * factor), 2 * numpy(v).astype(np.float32))
    with pytest.raises(TypeError, match=r"put the vector first"):
        mx.array(2.0) * v


def test_another_site_is_named() -> None:
    assert repr(random(site="layers.{layer}.mlp")) == (
        "SteeringVector(3 layers, 0 to 11, of width 8, at layers.{layer}.mlp)"
    )
    assert "layers.{layer}" not in repr(random())


@pytest.mark.parametrize("factor", [1.0, -2.3, 1e-3])
def test_nothing_is_left_of_a_parallel_vector(factor: float) -> None:
    v = random(width=256)
    assert v.orthogonal_to(factor * v).norms == {0: 0.0, 3: 0.0, 11: 0.0}


def test_a_sum_says_only_what_holds_of_it() -> None:
    both = {"model": "m", "method": "mean_difference", "read": "last", "pairs": 12, "positive": 3, "negative": 4,
            "background": 2, "data": "ab"}  # fmt: skip
    made = random(1, info={**both, "chat": True, "parameters": {"C": 1}}) + random(2, info=both)
    assert made.info == {"model": "m", "method": "mean_difference", "read": "last"}


@pytest.mark.parametrize("wrong", ["pocket", None, 3, random()], ids=["name", "none", "number", "vector"])
def test_only_a_model_is_a_model(wrong: Any, tmp_path: Path) -> None:
    sentence = r"model is an InterpretableModel, such as InterpretableModel\('pocket'\), not "
    with pytest.raises(TypeError, match=sentence):
        random().check(wrong)
    if wrong is not None:
        path = random().save(tmp_path / "v.safetensors")
        with pytest.raises(TypeError, match=sentence):
            SteeringVector.load(path, model=wrong)


# -- norms, origin, site: refused when made, so that what is saved is loaded -------------------------------------------

ONE = {0: mx.ones(3)}
UNSOUND: dict[str, tuple[Callable[[], Any], str]] = {
    "norms in a list": (lambda: SteeringVector(ONE, residual_norms=[1.0]), "residual norms are a dict from layers"),  # type: ignore[arg-type]
    "an infinite norm": (lambda: SteeringVector(ONE, residual_norms={0: float("inf")}), "norm of layer 0 is a finite"),
    "a norm that is a text": (lambda: SteeringVector(ONE, residual_norms={0: "x"}), "norm of layer 0 is a number"),  # type: ignore[dict-item]
    "a norm of zero": (lambda: SteeringVector(ONE, residual_norms={0: 0.0}), "norm of layer 0 is above 0, not 0.0"),
    "a negative norm": (lambda: SteeringVector(ONE, residual_norms={1: -5}), "norm of layer 1 is above 0, not -5"),
    "a norm of no layer": (lambda: SteeringVector(ONE, residual_norms={"a": 1.0}), "a layer is a whole number.*'a'"),  # type: ignore[dict-item]
    "no info": (lambda: SteeringVector(ONE, info=None), "info is a dict, not NoneType"),  # type: ignore[arg-type]
    "an agreement of texts": (
        lambda: SteeringVector(ONE, info={"agreement": {"a": "b"}}), "agreement .* from layers to numbers"),
    "an agreement of nothing": (
        lambda: SteeringVector(ONE, info={"reliability": None}), "reliability .* from layers to numbers, not None"),
    "a list of agreements": (
        lambda: SteeringVector(ONE, info={"reliability": [1]}), r"reliability .* from layers to numbers, not \[1\]"),
    "a site of attributes": (
        lambda: SteeringVector(ONE, "layers.{layer}{layer.__class__}"), "key with {layer} in it"),
    "a site that is filled up": (lambda: SteeringVector(ONE, "{layer}{layer:>60000000000}"), "key with {layer} in it"),
    "a brace": (lambda: SteeringVector(ONE, "layers.{layer}.{"), "key with {layer} in it"),
    "two braces": (lambda: SteeringVector(ONE, "layers.{layer}{{}}"), "key with {layer} in it"),
    "another name": (lambda: SteeringVector(ONE, "layers.{layer}.{foo}"), "key with {layer} in it"),
    "a minus": (lambda: SteeringVector(ONE, "layers.-{layer}"), "key with {layer} in it"),
    "no site": (lambda: SteeringVector(ONE, None), "key with {layer} in it.*not None"),  # type: ignore[arg-type]
    "a number for a site": (lambda: SteeringVector(ONE, 5), "key with {layer} in it.*not 5"),  # type: ignore[arg-type]
    "nothing for a direction": (lambda: SteeringVector({0: None}), "direction of layer 0 is .*not NoneType"),  # type: ignore[dict-item]
    "objects": (lambda: SteeringVector({0: np.array([1, None])}), "direction of layer 0 is an array or list"),  # type: ignore[dict-item]
    "texts": (lambda: SteeringVector({0: ["a"]}), "direction of layer 0 is an array or list of numbers"),  # type: ignore[dict-item]
    "rows of two lengths": (lambda: SteeringVector({0: [[1.0], [1.0, 2.0]]}), "direction of layer 0 is an array"),  # type: ignore[dict-item]
    "a vector": (lambda: SteeringVector({0: random()}), "direction of layer 0 is .*not SteeringVector"),  # type: ignore[dict-item]
    "dates": (lambda: SteeringVector({0: np.array(["2020"], "datetime64[D]")}), "direction of layer 0 is an array"),  # type: ignore[dict-item]
    "complex": (lambda: SteeringVector({0: np.ones(3) * 1j}), "direction of layer 0 is"),  # type: ignore[dict-item]
    "an empty path": (lambda: SteeringVector.load(""), "a path is a text or a Path, and this one is empty"),
    "an empty path to save": (lambda: random().save(""), "a path is a text or a Path, and this one is empty"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "sentence"), UNSOUND.values(), ids=UNSOUND)
def test_what_is_no_norm_no_origin_and_no_site_is_refused(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        make()


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f2", "i4", ">i2", "u1", "?", "longdouble"])
def test_a_direction_may_be_of_any_number_in_any_byte_order(dtype: str) -> None:
    assert SteeringVector({0: np.array([1, 0, 1], dtype)})[0].tolist() == [1, 0, 1]  # type: ignore[dict-item]


def test_numbers_of_numpy_are_norms_and_come_back(tmp_path: Path) -> None:
    v = SteeringVector({2: mx.ones(3)}, residual_norms={np.int64(2): np.float32(1.5)})  # type: ignore[dict-item]
    assert v.residual_norms == {2: 1.5}
    assert SteeringVector.load(v.save(tmp_path / "v.safetensors")).residual_norms == {2: 1.5}


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf", ".npz"])
def test_what_could_not_be_loaded_is_not_saved(suffix: str, tmp_path: Path) -> None:
    v = SteeringVector({1: mx.ones(3)})
    v[1][1] = float("nan")
    with pytest.raises(ValueError, match="the direction of layer 1 holds 1 NaN"):
        v.save(tmp_path / f"v{suffix}")
    if suffix != ".npz":
        for told, said in (({"a": {1}}, r"info\['a'\] is set"), ({"b": np.float32(1)}, r"info\['b'\] is float32")):
            with pytest.raises(TypeError, match=rf"{said}, and a file holds what JSON holds"):
                SteeringVector({1: mx.ones(3)}, info={"model": "m", **told}).save(tmp_path / f"v{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"residual_norms": {"1": -5}}, {"info": {"agreement": {"a": "b"}}},
                                    {"info": {"reliability": None}}, {"site": "{layer}{layer:>60000000000}"},
                                    {"residual_norms": {"0": float("nan")}}], ids=str)  # fmt: skip
def test_a_file_that_says_nonsense_is_damaged(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    data = {"version": 1, "site": "layers.{layer}", "residual_norms": {}, "info": {}} | change
    mx.save_safetensors(str(path), {"layers.0": mx.ones(3)}, {room.FORMAT: json.dumps(data)})
    with pytest.raises(ValueError, match=r"broken\.safetensors: the vector in it is damaged \("):
        SteeringVector.load(path)


def test_the_origin_of_a_result_is_its_own() -> None:
    v = random(info={"model": "m", "agreement": {"0": 0.5}}, residual_norms={0: 1.0})
    w = v * 2
    w.info["model"] = "n"  # type: ignore[index]
    w.residual_norms[3] = 1.0  # type: ignore[index]
    assert (v.info["model"], v.residual_norms) == ("m", {0: 1.0})


def test_the_key_of_a_layer() -> None:
    assert random().key(5) == "layers.5"
    assert random(site="model.layers.{layer}.mlp#0").key(11) == "model.layers.11.mlp#0"


def test_lengths_do_not_depend_on_the_scale_that_squares_have_room_for() -> None:
    v = random(width=64)
    for factor in (1e-30, 1e30):
        np.testing.assert_allclose(numpy((v * factor).normalized()), numpy(v.normalized()), rtol=1e-5)
        assert (v * factor).cosine(v)[3] == pytest.approx(1, abs=1e-6)
