"""The logit lens: vectors and activations through the model's own final norm and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.hooks import attached, detached
from mlxsteer.interventions.base import Function, tensor
from mlxsteer.model import InterpretableModel
from mlxsteer.plans import Plan
from mlxsteer.positions import Prompt, Tokens
from mlxsteer.sites import UnsupportedModel


def through_head(model: InterpretableModel, states: mx.array) -> mx.array:
    """The final norm and the head, alone, on states of the residual stream: (n, D) → (n, vocabulary), staged."""
    sites, count = model._sites, states.shape[0]
    if not sites.family.head:
        raise UnsupportedModel(
            f"the head of {sites.model_type} models reads more than the last block's output: no state can be looked at "
            "through it."
        )
    last = sites.resolve(f"layers.{len(sites.blocks) - 1}")
    # The last block's output is exchanged, so that nothing before it is ever computed.
    tokens = Tokens([0], [count], count, [Prompt(count, whole=True)])
    plan = Plan(sites, edits=[(last, Function(lambda _: states[None]))], tokens=tokens)
    with detached(), attached(plan):
        logits: mx.array = model.model(mx.zeros((1, count), dtype=mx.int32))
    plan.check_fired()
    return logits[0]


@dataclass(frozen=True)
class LensTokens:
    """The tokens that a direction speaks for and against.

    Attributes:
        boosted: (token, logit), the highest first.
        suppressed: (token, logit), the lowest first.
    """

    boosted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        sides = (("boosted", self.boosted), ("suppressed", self.suppressed))
        return "\n".join(f"{name}: {', '.join(f'{t!r} {v:+.2f}' for t, v in side)}" for name, side in sides)


class Lens:
    """A model's final norm and head, to look through at any point of the residual stream.

    nostalgebraist 2020, Interpreting GPT: the logit lens. ``model.lens`` is the model's own.

    Args:
        model: the model.
    """

    def __init__(self, model: InterpretableModel) -> None:
        self.model = model

    def __repr__(self) -> str:
        return f"<the logit lens of {self.model!r}>"

    def logits(self, states: Any) -> mx.array:
        """What the model would say if the residual stream ended in these states: ``head(norm(x))``.

        Only the norm and the head run. Works on tied and quantized heads, and after any softcap.

        Args:
            states: (D,) or (..., D).

        Returns:
            (..., vocabulary), staged.

        Raises:
            ValueError: they are not of the model's width, or not finite.
        """
        x = tensor(states, "lens: the states")
        sites = self.model._sites
        width = sites.width(sites.resolve("layers.0"))
        if width is not None and x.shape[-1] != width:
            raise ValueError(f"lens: the states have shape {x.shape}; the residual stream is of width {width}.")
        return through_head(self.model, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    def tokens(self, direction: Any, k: int = 10) -> LensTokens:
        """The tokens whose logits a direction raises and lowers most: ``head(norm(v)) − head(norm(0))``.

        Only the direction counts: v is scaled to a root mean square of 1 first, far above a norm's ε.

        Args:
            direction: a vector's direction or an activation, (D,).
            k: how many of each.

        Raises:
            ValueError: it is not of the model's width, or is zero; k is not from 1 to the size of the vocabulary; a
                logit is NaN or infinite.
        """
        v = tensor(direction, "lens: the direction")
        if v.ndim != 1:
            raise ValueError(f"lens: one direction has shape (D,), not {v.shape}.")
        if not v.any().item():
            raise ValueError("lens: the direction is zero.")
        x = np.array(v, np.float64)
        v = mx.array((x / np.sqrt(np.mean(x**2))).astype(np.float32))
        logits = self.logits(mx.stack([v, mx.zeros_like(v)])).astype(mx.float32)
        count = logits.shape[-1]
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= count:
            raise ValueError(f"k is a number of tokens from 1 to {count}, not {k!r}.")
        told = np.array(logits)
        if bad := int((~np.isfinite(told)).sum()):
            raise ValueError(f"lens: {bad} of the logits are NaN or infinite: the model's norm or head gives none.")
        shift = told[0] - told[1]
        order = np.argsort(-shift, kind="stable")
        name = self.model.token_to_str if self.model.tokenizer is not None else str
        ends = [tuple((name(int(i)), float(shift[i])) for i in part) for part in (order[:k], order[::-1][:k])]
        return LensTokens(*ends)
