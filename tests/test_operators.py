"""Rotation, spherical steering, capping and affine maps against NumPy in float64; what keeps a norm keeps it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlxsteer import interventions as iv
from mlxsteer.interventions.base import Where
from mlxsteer.positions import Prompt, Tokens

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
ROUNDING = {mx.float32: 1e-5, mx.bfloat16: 8e-3, mx.float16: 1e-3}  # of a result given back in the dtype
hypothesis_settings = settings(max_examples=25, deadline=None, derandomize=True)


def where(x: mx.array) -> Where:
    rows, width = x.shape[:2]
    return Where(Tokens([0] * rows, [width] * rows, width, [Prompt(width)] * rows), "layers.3", 3)


def numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def bits(x: mx.array) -> np.ndarray:
    return np.array(x.view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


def unit(v: np.ndarray) -> np.ndarray:
    return v.astype(np.float64) / np.linalg.norm(v.astype(np.float64))


def norms(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1, keepdims=True)


# -- the formulas, in float64 ----------------------------------------------------------------------------------------


def plane_of(direction: np.ndarray, second: np.ndarray) -> np.ndarray:
    one = unit(direction)
    return np.stack([one, unit(second.astype(np.float64) - (second @ one) * one)])


def rotated_to(x: np.ndarray, s: Any, direction: np.ndarray, second: np.ndarray, degrees: float) -> np.ndarray:
    """In complex numbers; where s is 1, the paper's formula with its projection matrix."""
    b1, b2 = plane_of(direction, second)
    theta = np.deg2rad(degrees)
    if np.all(s == 1):
        inside = x @ (np.outer(b1, b1) + np.outer(b2, b2))
        return x - inside + norms(inside) * (np.cos(theta) * b1 + np.sin(theta) * b2)
    z = (x @ b1 + 1j * (x @ b2))[..., None]
    way = np.angle(np.exp(1j * theta) * z.conj())
    assume((np.abs(way) < np.pi - 1e-2).all())  # both ways round are as short: rounding decides
    assume((np.abs(z) > 1e-2).all())
    turned = z * np.exp(1j * s * way)
    return x + (turned - z).real * b1 + (turned - z).imag * b2


def rotated_by(x: np.ndarray, s: Any, direction: np.ndarray, second: np.ndarray, degrees: float) -> np.ndarray:
    b1, b2 = plane_of(direction, second)
    z = (x @ b1 + 1j * (x @ b2))[..., None]
    turned = z * np.exp(1j * np.asarray(s) * np.deg2rad(degrees))
    return x + (turned - z).real * b1 + (turned - z).imag * b2


def adaptive(x: np.ndarray, s: Any, direction: np.ndarray, **constants: Any) -> np.ndarray:
    c = (x @ unit(direction))[..., None]
    assume((np.abs(c) > 1e-3).all())
    return np.where(c > 0, rotated_to(x, s, direction, **constants), x)


def spherical(x: np.ndarray, s: Any, direction: np.ndarray) -> np.ndarray:
    v, length = unit(direction), norms(x)
    omega = np.arccos(np.clip((x @ v)[..., None] / length, -1, 1))
    assume((np.sin(omega) > 1e-2).all())
    return length * (np.sin((1 - s) * omega) * x / length + np.sin(s * omega) * v) / np.sin(omega)


def capped(x: np.ndarray, s: Any, direction: np.ndarray, threshold: float, side: str) -> np.ndarray:
    c = (x @ unit(direction))[..., None] - threshold
    return x - s * (np.minimum(c, 0) if side == "below" else np.maximum(c, 0)) * unit(direction)


def norm_kept(x: np.ndarray, s: Any, vector: np.ndarray) -> np.ndarray:
    moved = x + s * vector.astype(np.float64)
    assume((norms(moved) > 1e-2).all())
    return moved * norms(x) / norms(moved)


def clamped(x: np.ndarray, s: Any, along: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    c = (x @ unit(along))[..., None]
    kept = np.minimum(np.maximum(c, -np.inf if low is None else low), np.inf if high is None else high)
    return x + s * (kept - c) * unit(along)


Draw = Callable[[np.random.Generator, int], dict[str, Any]]


def two(r: np.random.Generator, d: int) -> dict[str, Any]:
    return {"direction": 5 * r.normal(size=d), "second": r.normal(size=d), "degrees": float(r.uniform(-400, 400))}


def cap(side: str) -> Draw:
    return lambda r, d: {"direction": 3 * r.normal(size=d), "threshold": float(r.normal()), "side": side}


# label: operator, its constants for a width, further options, and its formula (x, s, **constants)
CASES: dict[str, tuple[str, Draw, dict[str, Any], Callable[..., np.ndarray]]] = {
    "rotate": ("rotate", two, {}, rotated_to),
    "rotate by": ("rotate", two, {"relative": True}, rotated_by),
    "rotate adaptively": ("rotate", two, {"adaptive": True}, adaptive),
    "slerp": ("slerp", lambda r, d: {"direction": 4 * r.normal(size=d)}, {}, spherical),
    "cap below": ("cap", cap("below"), {}, capped),
    "cap above": ("cap", cap("above"), {}, capped),
    "affine": (
        "affine", lambda r, d: {"scale": r.normal(size=d), "shift": r.normal(size=d)}, {},
        lambda x, s, scale, shift: x + s * (scale * x + shift - x)
    ),
    "add_vector with the norm kept": (
        "add_vector", lambda r, d: {"vector": r.normal(size=d)}, {"preserve_norm": True}, norm_kept
    ),
    "clamp along": ("clamp", lambda r, d: {"along": 2 * r.normal(size=d), "low": -0.3, "high": 0.4}, {}, clamped),
    "clamp along below": ("clamp", lambda r, d: {"along": r.normal(size=d), "low": 0.1, "high": None}, {}, clamped),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)
KEEP_THE_NORM = ["rotate", "rotate by", "rotate adaptively", "slerp", "add_vector with the norm kept"]


def constants_of(case: str, width: int, seed: int = 0) -> dict[str, Any]:
    drawn = CASES[case][1](np.random.default_rng(seed), width)
    return {k: v.astype(np.float32) if isinstance(v, np.ndarray) else v for k, v in drawn.items()}


def make(case: str, width: int, seed: int = 0, **more: Any) -> iv.Intervention:
    return iv.create(CASES[case][0], **constants_of(case, width, seed), **CASES[case][2], **more)


def activation(shape: tuple[int, ...], seed: int, dtype: mx.Dtype = mx.float32, size: float = 1.0) -> mx.array:
    return mx.array(size * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 3)).flatmap(
    lambda two: st.sampled_from([(), (2,)]).flatmap(
        lambda heads: st.integers(3, 9).map(lambda width: (*two, *heads, width))
    )
)
strengths = st.sampled_from([1.0, 0.5, -1.0, 2.0]) | st.floats(-2, 2, width=32)


@every_case
@given(data=st.data(), shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**16))
@hypothesis_settings
def test_an_operator_is_its_formula(
    case: str, data: st.DataObject, shape: tuple[int, ...], dtype: mx.Dtype, seed: int
) -> None:
    x = activation(shape, seed, dtype)
    strength = data.draw(strengths | st.lists(strengths, min_size=shape[0], max_size=shape[0]))
    s = np.array(strength, np.float64).reshape(-1, *(1,) * (x.ndim - 1))
    y = make(case, shape[-1], seed + 1, strength=strength)(x, where(x))
    expected = CASES[case][3](numpy(x), s, **constants_of(case, shape[-1], seed + 1))
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    untouched = np.broadcast_to(s == 0, x.shape)
    np.testing.assert_array_equal(bits(y)[untouched], bits(x)[untouched])
    scale = 1 + np.abs(numpy(x)).max() + np.abs(expected).max()
    np.testing.assert_allclose(numpy(y), expected, rtol=0, atol=ROUNDING[dtype] * scale)


@pytest.mark.parametrize("case", KEEP_THE_NORM)
@given(shape=shapes, seed=st.integers(0, 2**16), strength=strengths, size=st.sampled_from([1e-3, 1.0, 3e4]))
@hypothesis_settings
def test_the_norm_is_kept(case: str, shape: tuple[int, ...], seed: int, strength: float, size: float) -> None:
    x = activation(shape, seed, size=size)
    y = make(case, shape[-1], seed + 1, strength=strength)(x, where(x))
    np.testing.assert_allclose(norms(numpy(y)), norms(numpy(x)), rtol=3e-6)


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", [1.0, 0.3, (1.0, -0.5)], ids=repr)
def test_activations_of_zero_stay_finite_and_those_whose_norm_is_kept_stay_zero(
    case: str, dtype: mx.Dtype, strength: Any
) -> None:
    y = numpy(make(case, 4, strength=strength)(mx.zeros((2, 3, 4), dtype), where(mx.zeros((2, 3, 4)))))
    assert np.isfinite(y).all()
    assert case not in KEEP_THE_NORM or not y.any()


def test_an_addition_that_cancels_the_activation_leaves_zero() -> None:
    x, v = mx.stack([mx.ones(4), -mx.ones(4), mx.zeros(4)])[None], mx.ones(4)
    y = iv.add_vector(v, preserve_norm=True)(x, where(x))
    np.testing.assert_array_equal(numpy(y)[0], [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("case", KEEP_THE_NORM)
def test_large_activations_of_float16_do_not_overflow_on_the_way(case: str) -> None:
    x = mx.full((1, 2, 4), 4e4, mx.float16)
    x[0, 1, 1:] = 0
    direction = {"direction": [1.0, 1, 1, 1], "second": [1.0, -1, 0, 0], "degrees": 10.0}
    constants = {"rotate": direction, "slerp": {"direction": [1.0, 1, 1, 0]}, "add_vector": {"vector": [4e4, 0, 0, 0]}}
    name = CASES[case][0]
    y = iv.create(name, **constants[name], **CASES[case][2])(x, where(x))
    finite = np.abs(numpy(y)) < 65504
    assert finite[0, 0].all()  # in token 1 the whole norm may come to lie in one feature, which still fits
    np.testing.assert_allclose(norms(numpy(y)), norms(numpy(x)), rtol=2e-3)


@every_case
def test_untouched_tokens_and_rows_keep_every_bit(case: str) -> None:
    x = activation((2, 4, 5), 1, mx.bfloat16)
    y = make(case, 5, strength=(0.7, 0.0), at=[1, 3])(x, where(x))
    changed = (bits(y) != bits(x)).any(axis=-1)
    assert not changed[1].any()
    assert not changed[0, [0, 2]].any()
    alone = make(case, 5, strength=0.7)(x[:1], where(x[:1]))
    np.testing.assert_allclose(numpy(y)[0, [1, 3]], numpy(alone)[0, [1, 3]], atol=2e-2)


# -- rotate ----------------------------------------------------------------------------------------------------------


def test_rotate_points_every_token_to_the_angle_and_leaves_what_lies_outside_the_plane() -> None:
    x, (b1, b2) = activation((2, 5, 16), 1), np.random.default_rng(2).normal(size=(2, 16)).astype(np.float32)
    plane = plane_of(b1, b2)
    for degrees in (0, 90, 180, 200, -30):
        y = numpy(iv.rotate(b1, b2, degrees)(x, where(x)))
        inside = y @ plane.T
        angle = np.rad2deg(np.arctan2(inside[..., 1], inside[..., 0]))
        np.testing.assert_allclose((angle - degrees + 180) % 360, 180, atol=1e-3)
        rest = np.eye(16) - plane.T @ plane
        np.testing.assert_allclose(y @ rest, numpy(x) @ rest, atol=1e-5)


def test_half_the_strength_goes_half_the_shorter_way() -> None:
    x = mx.array([[[1.0, 0, 7], [0, 1, 7], [np.sqrt(0.5), -np.sqrt(0.5), 7]]])
    y = numpy(iv.rotate([1, 0, 0], [0, 1, 0], 170, strength=0.5)(x, where(x)))[0]
    np.testing.assert_allclose(np.rad2deg(np.arctan2(y[:, 1], y[:, 0])), [85, 130, -117.5], atol=1e-3)  # −45° → −190°


def test_rotations_by_angles_add_up() -> None:
    x, (b1, b2) = activation((1, 3, 8), 1), np.random.default_rng(2).normal(size=(2, 8))
    step = iv.rotate(b1, b2, 30, relative=True)
    np.testing.assert_allclose(
        numpy((step | step | step)(x, where(x))), numpy(iv.rotate(b1, b2, 90, relative=True)(x, where(x))), atol=1e-5
    )
    np.testing.assert_allclose(numpy(iv.rotate(b1, b2, 30, 12.0, relative=True)(x, where(x))), numpy(x), atol=1e-5)


def test_adaptive_rotation_leaves_tokens_that_lie_against_the_direction() -> None:
    x = mx.array([[[2.0, 1, 3], [-2, 1, 3], [0, 1, 3]]])
    y = iv.rotate([1, 0, 0], [0, 1, 0], 180, adaptive=True)(x, where(x))
    np.testing.assert_array_equal(bits(y)[0, 1:], bits(x)[0, 1:])
    np.testing.assert_allclose(numpy(y)[0, 0], [-np.sqrt(5), 0, 3], atol=1e-6)


# -- slerp -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tilt", [0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-2])
@pytest.mark.parametrize("side", [1.0, -1.0], ids=["along", "opposite"])
@pytest.mark.parametrize("strength", [1.0, 0.25, 0.5, -0.5])
def test_slerp_keeps_the_norm_and_goes_its_share_near_the_direction_and_near_its_antipode(
    tilt: float, side: float, strength: float
) -> None:
    v, w = np.random.default_rng(3).normal(size=(2, 32))
    h = 20 * (side * unit(v) + tilt * w)
    x = mx.array(h.astype(np.float32))[None, None]
    y = numpy(iv.slerp(v, strength)(x, where(x)))[0, 0]
    np.testing.assert_allclose(np.linalg.norm(y), np.linalg.norm(h), rtol=3e-6)

    def angle(a: np.ndarray) -> float:
        return float(np.arctan2(np.linalg.norm(a - (a @ unit(v)) * unit(v)), a @ unit(v)))

    expected = (1 - strength) * angle(h)
    assert angle(y) == pytest.approx(abs((expected + np.pi) % (2 * np.pi) - np.pi), abs=1e-4)


def test_the_way_from_the_antipode_is_always_the_same() -> None:
    v = activation((8,), 4)
    x = mx.stack([-v, -3 * v])[None]
    half = numpy(iv.slerp(v, 0.5)(x, where(x)))[0]
    np.testing.assert_allclose(half @ unit(numpy(v)), 0, atol=1e-5)
    np.testing.assert_allclose(3 * half[0], half[1], rtol=1e-5, atol=1e-6)


def test_all_of_the_way_leaves_the_direction_with_the_norm() -> None:
    x, v = activation((2, 3, 8), 1), activation((8,), 2)
    y = numpy(iv.slerp(v)(x, where(x)))
    np.testing.assert_allclose(y, norms(numpy(x)) * unit(numpy(v)), atol=1e-5)


# -- cap and affine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cap_is_clamp_along_a_direction(dtype: mx.Dtype) -> None:
    x, v = activation((2, 9, 8), 1, dtype), activation((8,), 2)
    for side, bound in (("below", "low"), ("above", "high")):
        made = iv.cap(v, 0.3, side, 0.7)  # type: ignore[arg-type]
        np.testing.assert_array_equal(
            bits(made(x, where(x))), bits(iv.clamp(**{bound: 0.3}, along=v, strength=0.7)(x, where(x)))
        )


def test_cap_acts_only_on_tokens_past_the_threshold() -> None:
    x, v = activation((1, 64, 8), 1), activation((8,), 2)
    y, direction = iv.cap(v, 0.3)(x, where(x)), unit(numpy(v))
    before, after = numpy(x) @ direction, numpy(y) @ direction
    assert 10 < (before < 0.3).sum() < 54
    np.testing.assert_array_equal(numpy(y)[before >= 0.3], numpy(x)[before >= 0.3])
    np.testing.assert_allclose(after[before < 0.3], 0.3, atol=1e-6)


def test_affine_takes_one_map_for_every_head_or_one_per_head() -> None:
    x, scale, shift = activation((1, 3, 2, 4), 1), activation((2, 4), 2), activation((2, 4), 3)
    np.testing.assert_allclose(
        numpy(iv.affine(scale, shift)(x, where(x))), numpy(scale) * numpy(x) + numpy(shift), atol=1e-6
    )
    with pytest.raises(ValueError, match="one for every token"):
        iv.affine(activation((3, 4), 2), activation((4,), 3))(x[:, :, 0], where(x))


# -- refusals, data, threads -----------------------------------------------------------------------------------------

V, W = [1.0, 2.0, 3.0], [0.0, 1.0, -1.0]
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "parallel": (lambda: iv.rotate(V, [-2.0, -4, -6], 30), "second direction is parallel to the first"),
    "zero": (lambda: iv.rotate(V, [0.0, 0, 0], 30), "second direction is zero"),
    "zero first": (lambda: iv.rotate([0.0, 0, 0], V, 30), "the direction is zero"),
    "two widths": (lambda: iv.rotate(V, [1.0, 2.0], 30), "widths 3 and 2"),
    "a matrix": (lambda: iv.rotate([V, W], V, 30), r"one direction, \(D,\), not \(2, 3\)"),
    "no angle": (lambda: iv.rotate(V, W, float("nan")), "degrees is a finite number"),
    "slerp of zero": (lambda: iv.slerp([0.0, 0, 0]), "zero: a direction has a length"),
    "slerp of a matrix": (lambda: iv.slerp([V, W]), "one direction"),
    "slerp in one dimension": (lambda: iv.slerp([2.0]), "one dimension"),
    "cap without direction": (lambda: iv.cap([0.0, 0, 0], 1.0), "zero: a direction has a length"),
    "cap side": (lambda: iv.cap(V, 1.0, "under"), "side is 'below' or 'above', not 'under'"),  # type: ignore[arg-type]
    "cap threshold": (lambda: iv.cap(V, float("inf")), "threshold is a finite number"),
    "affine": (lambda: iv.affine([1.0, float("nan")], [0.0, 0.0]), "1 NaN or infinite value of 2"),
    "affine number": (lambda: iv.affine(2.0, [0.0, 0.0]), "not of shape"),
}


@pytest.mark.parametrize(("attempt", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_means_nothing_is_refused_when_it_is_given(attempt: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        attempt()


@pytest.mark.parametrize(
    "made",
    [iv.rotate(V, W, 30), iv.slerp(V), iv.cap(V, 1.0), iv.affine(V, W)],
    ids=lambda made: made.name,
)
def test_another_width_is_refused_with_both(made: iv.Intervention) -> None:
    with pytest.raises(ValueError, match=r"at layers\.3: its \w+ has width 3, the activation has 4"):
        made.check(4, "layers.3")


def test_they_come_back_from_a_file_and_do_the_same(tmp_path: Path) -> None:
    x = activation((2, 3, 5), 1)
    examples = {f"layers.{i}": make(case, 5, i, strength=(0.3, 1.0), at="last") for i, case in enumerate(CASES)}
    loaded = iv.load(iv.save(examples, tmp_path / "operators.safetensors"))
    for key, made in examples.items():
        np.testing.assert_array_equal(bits(loaded[key](x, where(x))), bits(made(x, where(x))))
        assert loaded[key].fingerprint == made.fingerprint
        spec, tensors = made.to_spec()
        assert iv.Intervention.from_spec(json.loads(json.dumps(spec)), tensors).fingerprint == made.fingerprint
    different = [
        iv.rotate(V, W, 30), iv.rotate(W, V, 30), iv.rotate(V, W, 31), iv.rotate(V, W, 30, relative=True),
        iv.rotate(V, W, 30, adaptive=True), iv.cap(V, 0.5), iv.cap(V, 0.5, "above"), iv.slerp(V), iv.ablate(V),
        iv.affine(V, W), iv.affine(W, V),
    ]  # fmt: skip
    assert len({made.fingerprint for made in different}) == len(different)


def test_they_are_registered_and_say_their_formula_and_paper() -> None:
    for name, paper in (
        ("rotate", "2510.26243"),
        ("slerp", "2602.08169"),
        ("cap", "2601.10387"),
        ("affine", "2503.10679"),
    ):
        assert name in iv.available()
        assert "x' = " in iv.describe(name)
        assert paper in iv.describe(name)


def test_an_intervention_made_in_one_thread_acts_in_another() -> None:
    x = activation((1, 2, 5), 1)
    every = [make(case, 5) for case in CASES] + [iv.ablate(np.ones(5)), iv.mean_replace(np.ones(5), np.ones(5))]
    mx.eval(x)
    failed: list[str] = []

    def act() -> None:
        for made in every:
            try:
                mx.eval(made(x, where(x)))
            except RuntimeError as error:
                failed.append(f"{made}: {error}")
        mx.clear_streams()

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert not failed
