"""The operators. In every formula x is an activation, s the strength, and a hat marks a unit vector."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import mlx.core as mx
import numpy as np

from mlxsteer.interventions.base import Intervention, Where, number, settled, tensor
from mlxsteer.interventions.registry import register
from mlxsteer.positions import PositionError


def _unit(direction: mx.array, what: str) -> mx.array:
    """Directions of length 1, (..., D), refusing zero."""
    largest = mx.max(mx.abs(direction), axis=-1, keepdims=True)
    if settled(largest) and (largest == 0).any().item():
        raise ValueError(f"{what} is zero: a direction has a length.")
    direction = direction / mx.stop_gradient(largest)  # squares of very long or short ones leave float32
    return direction / mx.linalg.norm(direction, axis=-1, keepdims=True)


def _orthonormal(directions: mx.array, what: str) -> mx.array:
    """An orthonormal basis, (k, D), of the span of `directions`, (D,) or (k, D)."""
    rows = directions.reshape(-1, directions.shape[-1])
    unit = _unit(rows, what)
    if rows.shape[0] == 1:
        return unit  # one direction stays differentiable
    q, r = np.linalg.qr(np.array(unit, dtype=np.float64).T)
    if rows.shape[0] > rows.shape[1] or np.abs(np.diag(r)).min() < 1e-6:
        raise ValueError(f"{what} has linearly dependent rows: give {rows.shape[0]} independent directions, or fewer.")
    return mx.array(q.T.astype(np.float32))


@register("add_vector")
@dataclass(frozen=True, eq=False, repr=False)
class AddVector(Intervention):
    """Add a steering vector: ``x' = x + s·v``.

    With ``preserve_norm=True`` the result is scaled back to the length of x: ``x' = (x + s·v)·‖x‖/‖x + s·v‖``.
    Turner et al. 2023, Activation addition, arXiv 2308.10248; Rimsky et al. 2024, Contrastive activation addition,
    arXiv 2312.06681.

    Args:
        vector: v, (D,); at ``attn.heads`` (head_dim,) for every head, or (heads, head_dim).
        strength: s.
        preserve_norm: keep each token's norm, computed in float32.
    """

    vector: Any
    strength: Any = 1.0
    preserve_norm: bool = field(default=False, kw_only=True)
    per_token: ClassVar[tuple[str, ...]] = ("vector",)

    def __post_init__(self) -> None:
        self._set(vector=tensor(self.vector, "add_vector: the vector"))
        super().__post_init__()

    def formula(self, x: mx.array, strength: float | mx.array, where: Where) -> mx.array:
        if isinstance(strength, float):
            delta = self.cast(strength, x.dtype, lambda: strength * self.vector)
        else:
            delta = (strength * self.vector).astype(x.dtype)
        moved = x + delta
        if not self.preserve_norm:
            return moved
        before, after = (mx.linalg.norm(h.astype(mx.float32), axis=-1, keepdims=True) for h in (x, moved))
        return moved.astype(mx.float32) * (before / mx.maximum(after, 1e-12))


@register("add_sequence")
@dataclass(frozen=True, eq=False, repr=False)
class AddSequence(Intervention):
    """Add a vector of its own to each position at the front of a prompt: ``x'_p = x_p + s·v_p`` for p < k.

    Tokens behind the k-th, and generated ones, stay. Turner et al. 2023, Activation addition, arXiv 2308.10248.

    Args:
        vectors: v, (k, D), one per position from 0 on.
        strength: s.
    """

    vectors: Any
    strength: Any = 1.0

    def __post_init__(self) -> None:
        self._set(vectors=tensor(self.vectors, "add_sequence: the vectors"))
        if self.vectors.ndim != 2:
            raise ValueError(f"add_sequence: the vectors have shape (positions, D), not {self.vectors.shape}.")
        super().__post_init__()

    def formula(self, x: mx.array, strength: float | mx.array, where: Where) -> mx.array:
        if x.shape[2:] != self.vectors.shape[1:]:
            raise ValueError(
                f"add_sequence at {where.key}: the vectors have shape {self.vectors.shape}, the activation {x.shape}; "
                f"it takes (positions, *{x.shape[2:]})."
            )
        tokens, count = where.tokens, self.vectors.shape[0]
        index = np.add.outer(tokens.starts, np.arange(tokens.width))
        ends = [min(prompt.needed("add_sequence"), count) for prompt in tokens.prompts]
        covered = (index >= 0) & (index < np.array(ends)[:, None])
        if not covered.any():
            return x
        moved = x + (strength * self.vectors[mx.array(np.clip(index, 0, count - 1))]).astype(x.dtype)
        return mx.where(mx.array(covered)[..., None], moved, x)


@register("ablate")
@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Intervention):
    """Take a direction or subspace out: ``x' = x − s·R̂ᵀR̂x``, with R̂ an orthonormal basis of the given directions.

    Zero lies on neither side by rights: where the projection of neutral text is not zero, `mean_replace` with a
    direction is the better operator. Arditi et al. 2024, Refusal is mediated by a single direction, arXiv 2406.11717.

    Args:
        directions: (D,) for one direction, (k, D) for a subspace; any length, any angles.
        strength: s; 2 mirrors x at the hyperplane.
    """

    directions: Any
    strength: Any = 1.0

    def __post_init__(self) -> None:
        self._set(directions=tensor(self.directions, "ablate: directions"))
        self._cache["basis"] = _orthonormal(self.directions, "ablate: directions")
        super().__post_init__()

    def formula(self, x: mx.array, strength: float | mx.array, where: Where) -> mx.array:
        wide, basis = x.astype(mx.float32), self._cache["basis"]
        return wide - strength * ((wide @ basis.T) @ basis)


@register("mean_replace")
@dataclass(frozen=True, eq=False, repr=False)
class MeanReplace(Intervention):
    """Put a mean activation in place of x, wholly or along a direction.

    Without a direction ``x' = x + s·(m − x)``; with one ``x' = x + s·R̂ᵀR̂(m − x)``: only the component along R̂ is set
    to the mean's (affine ablation, for when zero lies on one side). `mlxsteer.mean_activations` computes m.
    Marshall et al. 2024, Refusal in LLMs is an affine function, arXiv 2411.09003.

    Args:
        mean: m, (D,).
        direction: (D,) or (k, D), or None for the whole activation.
        strength: s.
    """

    mean: Any
    direction: Any = None
    strength: Any = 1.0
    per_token: ClassVar[tuple[str, ...]] = ("mean",)

    def __post_init__(self) -> None:
        self._set(mean=tensor(self.mean, "mean_replace: the mean"))
        if self.direction is not None:
            self._set(direction=tensor(self.direction, "mean_replace: the direction"))
            self._cache["basis"] = _orthonormal(self.direction, "mean_replace: the direction")
        super().__post_init__()

    def formula(self, x: mx.array, strength: float | mx.array, where: Where) -> mx.array:
        wide = x.astype(mx.float32)
        if self.direction is None:
            if isinstance(strength, float) and strength == 1.0:
                return mx.broadcast_to(self.mean, x.shape)
            return wide + strength * (self.mean - wide)
        basis = self._cache["basis"]
        return wide + strength * (((self.mean - wide) @ basis.T) @ basis)


@register("zero_out")
@dataclass(frozen=True, eq=False, repr=False)
class ZeroOut(Intervention):
    """Zero ablation: ``x' = x − s·x``.

    Args:
        strength: s; 1 gives zeros.
    """

    strength: Any = 1.0

    def formula(self, x: mx.array, strength: float | mx.array, where: Where) -> mx.array:
        if isinstance(strength, float) and strength == 1.0:
            return mx.zeros_like(x)
        return x.astype(mx.float32) * (1 - strength)


@register("replace_with")
@dataclass(frozen=True, eq=False, repr=False)
class ReplaceWith(Intervention):
    """Put another run's activation in place of x: ``x'_p = x_p + s·(a_q − x_p)`` (activation patching).

    The value is one for every touched token, or one per token. That is laid along the prompt: ``align="end"`` puts its
    last token on the last prompt token, ``"start"`` its first on position 0, ``"strict"`` demands equal lengths. Tokens
    that it doesn't cover stay.
    Vig et al. 2020, arXiv 2004.12265; Meng et al. 2022, arXiv 2202.05262.

    Args:
        value: a, (D,) for every touched token, (tokens, D), or (1, tokens, D) as a trace gives it; at ``attn.heads``
            with (heads, head_dim) in place of D.
        align: how the value's tokens are laid along the prompt's.
        strength: s.
    """

    value: Any
    align: Literal["end", "start", "strict"] = "end"
    strength: Any = 1.0

    def __post_init__(self) -> None:
        if self.align not in ("end", "start", "strict"):
            raise ValueError(f"replace_with: align is 'end', 'start' or 'strict', not {self.align!r}.")
        self._set(value=tensor(self.value, "replace_with: the value"))
        super().__post_init__()

    def formula(self, x: mx.array, strength: float | mx.array, where: Where) -> mx.array:
        value, axes = self.value, x.ndim - 2
        if value.ndim == axes + 2 and value.shape[0] == 1:
            value = value[0]
        elif value.ndim == axes + 1 and value.shape[0] == x.shape[0] > 1:
            raise ValueError(
                f"replace_with at {where.key}: a value of {len(value)} rows in a batch of {len(x)} could be one per "
                "row or one per token. For tokens say value[None]; for rows, patch one prompt at a time, or inline."
            )
        features = min(value.ndim, axes)
        if value.ndim > axes + 1 or value.shape[value.ndim - features :] != x.shape[x.ndim - features :]:
            raise ValueError(
                f"replace_with at {where.key}: the value has shape {self.value.shape}, the activation {x.shape}; it "
                f"takes {x.shape[2:]}, (tokens, *{x.shape[2:]}) or (1, tokens, *{x.shape[2:]})."
            )
        if value.ndim <= axes:
            source: mx.array = mx.broadcast_to(value, x.shape)
            return self._blend(x, source, strength)
        tokens, count = where.tokens, value.shape[0]
        offsets = np.array([self._offset(p.needed("replace_with's alignment"), count) for p in tokens.prompts])
        index = np.add.outer(tokens.starts, np.arange(tokens.width)) - offsets[:, None]
        covered = (index >= 0) & (index < count)
        if not covered.any():
            return x
        source = value[mx.array(np.clip(index, 0, count - 1))]
        inside = mx.array(covered).reshape(*covered.shape, *(1,) * axes)
        return mx.where(inside, self._blend(x, source, strength).astype(x.dtype), x)

    @staticmethod
    def _blend(x: mx.array, source: mx.array, strength: float | mx.array) -> mx.array:
        if isinstance(strength, float) and strength == 1.0:
            return source.astype(x.dtype)
        return x + (strength * (source - x.astype(mx.float32))).astype(x.dtype)

    def _offset(self, prompt: int, count: int) -> int:
        if self.align == "strict" and count != prompt:
            raise PositionError(
                f"replace_with(align='strict'): the value has {count} tokens, the prompt {prompt}; align='end' or "
                "'start' lays one along the other."
            )
        return prompt - count if self.align == "end" else 0


@register("scale")
@dataclass(frozen=True, eq=False, repr=False)
class Scale(Intervention):
    """Scale the activation: ``x' = x·(1 + s·(k − 1))``.

    Args:
        factor: k.
        strength: s.
    """

    factor: float
    strength: Any = 1.0

    def __post_init__(self) -> None:
        self._set(factor=number(self.factor, "scale: the factor"))
        super().__post_init__()

    def formula(self, x: mx.array, strength: float | mx.array, where: Where) -> mx.array:
        return x.astype(mx.float32) * (1 + strength * (self.factor - 1))


@register("clamp")
@dataclass(frozen=True, eq=False, repr=False)
class Clamp(Intervention):
    """Keep values in a range: ``x' = x + s·(clip(x) − x)``, or along a direction only.

    With ``along``, c = ⟨x, v̂⟩ and ``x' = x + s·(clip(c) − c)·v̂``: the rest of x stays.

    Args:
        low: lower bound, None for none.
        high: upper bound, None for none.
        along: v, (D,); its length doesn't matter, the bounds are on the projection on v̂.
        strength: s.
    """

    low: float | None = None
    high: float | None = None
    along: Any = None
    strength: Any = 1.0

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            if getattr(self, name) is not None:
                self._set(**{name: number(getattr(self, name), f"clamp: {name}")})
        if self.low is None and self.high is None:
            raise ValueError("clamp: give low, high or both.")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"clamp: low {self.low:g} lies above high {self.high:g}.")
        if self.along is not None:
            along = tensor(self.along, "clamp: along")
            if along.ndim != 1:
                raise ValueError(f"clamp: along is one direction, (D,), not {along.shape}.")
            self._set(along=along)
            self._cache["unit"] = _unit(along, "clamp: along")
        super().__post_init__()

    def formula(self, x: mx.array, strength: float | mx.array, where: Where) -> mx.array:
        wide = x.astype(mx.float32)
        if self.along is None:
            clipped = mx.clip(wide, self.low, self.high)
            return clipped if isinstance(strength, float) and strength == 1.0 else wide + strength * (clipped - wide)
        unit = self._cache["unit"]
        along = mx.sum(wide * unit, axis=-1, keepdims=True)
        return wide + strength * (mx.clip(along, self.low, self.high) - along) * unit


@register("noise")
@dataclass(frozen=True, eq=False, repr=False)
class Noise(Intervention):
    """Add Gaussian noise: ``x' = x + s·σ·ε``, ε ~ N(0, I).

    ε is a function of the seed, the layer and the absolute position alone: a recompute, another chunking, another row
    of a batch draw the same.

    Args:
        std: σ.
        seed: an integer below 2³².
        strength: s.
    """

    std: float
    seed: int = 0
    strength: Any = 1.0

    def __post_init__(self) -> None:
        seed = number(self.seed, "noise: the seed")
        if not seed.is_integer() or not 0 <= seed < 2**32:
            raise ValueError(f"noise: the seed is a whole number from 0 to 2³² − 1, not {self.seed}.")
        self._set(std=number(self.std, "noise: std"), seed=int(seed))
        super().__post_init__()

    def formula(self, x: mx.array, strength: float | mx.array, where: Where) -> mx.array:
        layer = 0xFFFF if where.layer is None else where.layer
        stream = int(np.random.SeedSequence([self.seed, layer]).generate_state(1)[0])
        positions = where.tokens.positions().reshape(-1).astype(mx.uint32)
        keys = mx.stack([mx.full(positions.shape, stream, dtype=mx.uint32), positions], axis=1)
        epsilon = mx.vmap(lambda key: mx.random.normal(x.shape[2:], key=key))(keys).reshape(x.shape)
        return x.astype(mx.float32) + strength * self.std * epsilon


add_vector = AddVector
add_sequence = AddSequence
ablate = Ablate
mean_replace = MeanReplace
zero_out = ZeroOut
replace_with = ReplaceWith
scale = Scale
clamp = Clamp
noise = Noise
