"""Gates: interventions that act where a condition holds, for each row of a batch by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import mlx.core as mx

from mlxsteer.interventions.base import Intervention, Where, as_intervention
from mlxsteer.interventions.conditions import Condition, Inside, Reading
from mlxsteer.interventions.registry import register
from mlxsteer.positions import Position, PositionError

_LAST = Position.of("last")


@register("when")
@dataclass(frozen=True, eq=False, repr=False)
class When(Intervention):
    """Act where a condition holds: ``x' = f(x)`` where it does, x elsewhere, bit for bit.

    ``when(cosine(v) > 0.3, add_vector(w))`` asks each prompt once: the reading at its last token (or of its mean
    activation, ``cosine(v, read="mean")``) decides for the row, and what it opened acts from the prompt's last token
    on, on that one and all generated ones. With ``per="token"`` every token decides for itself. Both are computed on
    the device, row by row. Lee et al. 2024, Conditional activation steering, arXiv 2409.05907; `fit_gate` finds the
    threshold.

    Args:
        condition: made of ``cosine(v)``, ``projection(v)`` compared with numbers, ``inside(opening, closing)`` (with
            ``per="token"``), and ``&``, ``|``, ``~``.
        then: what is done: an intervention, or a list of them, with their own strengths, positions and schedules.
        strength: a multiplier on theirs.
        per: who is asked: ``"prompt"`` or ``"token"``.
    """

    condition: Condition
    then: Any
    strength: Any = 1.0
    per: Literal["prompt", "token"] = field(default="prompt", kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.condition, Condition):
            hint = f": compare it, such as {self.condition} > 0.3" if isinstance(self.condition, Reading) else ""
            if isinstance(getattr(self.condition, "condition", None), Condition):  # a GateFit
                hint = "; a fit's is fit.condition"
            raise TypeError(f"when: a condition is made of comparisons such as cosine(v) > 0.3{hint}.")
        if self.per not in ("prompt", "token"):
            raise ValueError(f"when: per is 'prompt' or 'token', not {self.per!r}.")
        if self.per == "prompt" and any(isinstance(leaf, Inside) for leaf in self.condition.leaves()):
            raise ValueError("when: inside(...) says something of each token: give per='token'.")
        if self.per == "token" and any(reading.read == "mean" for reading in self.readings()):
            raise ValueError("when: read='mean' says something of each prompt: give per='prompt'.")
        self._set(then=as_intervention(self.then))
        super().__post_init__()
        if self.at != Position.of("all") or self.schedule is not None or self.exclude is not None:
            raise ValueError("a gate acts where and when what it opens says: give at=, schedule= and exclude= to that.")
        if not isinstance(self.strength, float):
            raise ValueError("a gate's own strength is one number, which multiplies that of what it opens.")

    def readings(self) -> Iterator[Reading]:
        """What the condition reads."""
        for leaf in self.condition.leaves():
            if not isinstance(leaf, Inside):
                yield leaf.reading

    def __call__(self, x: mx.array, where: Where) -> mx.array:
        slots = where.tokens.slots(where.key, where.rows)
        opened = self._asked_once(x, where, slots) if self.per == "prompt" else self._asked_always(x, where)
        y = self.then(x, replace(where, strength=where.strength * self.strength))
        if opened is None or y is x:
            return x
        self._check_tokens(x, (len(where.tokens), where.tokens.width), where)
        return mx.where(opened.reshape(*opened.shape, *(1,) * (x.ndim - opened.ndim)), y, x)

    def _asked_always(self, x: mx.array, where: Where) -> mx.array:
        def value(reading: Reading) -> mx.array:
            return reading.of(self._source(reading, x, where))

        return self.condition.holds(value, where.tokens)

    def _asked_once(self, x: mx.array, where: Where, slots: list[dict[Any, Any]]) -> mx.array | None:
        """Where what is opened acts in this forward, (rows, 1 or tokens); None for nowhere."""
        tokens = where.tokens
        ends = [prompt.needed("when(...)", "") - 1 for prompt in tokens.prompts]
        means = {i: r for i, r in enumerate(self.readings()) if r.read == "mean"}
        for i, reading in means.items():
            self._sum(i, self._source(reading, x, where), ends, where, slots)
        spans = zip(ends, tokens.starts, tokens.lengths, strict=True)
        arriving = [row for row, (end, start, length) in enumerate(spans) if start <= end < start + length]
        if arriving:
            held = self._decide(x, ends, where, slots)
            tokens.remember("open", held, arriving, slots)
        touched = tokens.touched(_LAST, where.rows)
        if touched is False:
            return None
        for row, slot in enumerate(slots):
            acts = where.rows is None or where.rows[row]
            if acts and "open" not in slot and tokens.lengths[row] and tokens.starts[row] > ends[row]:
                raise PositionError(
                    f"{self.name} at {where.key} asks the prompt's last token, which ran before this gate was there: "
                    "steer from the prompt on."
                )
        opened = tokens.recalled("open", mx.array(False), slots)[:, None]
        return opened if touched is True else opened & touched

    def _sum(self, i: int, source: mx.array, ends: list[int], where: Where, slots: list[dict[Any, Any]]) -> None:
        """Go on with the sum of a prompt's activations, (rows, D), and with their number."""
        tokens = where.tokens
        # what lies before position 0 is left padding
        begins = [max(0, -start) for start in tokens.starts]
        stops = [
            min(length, end + 1 - start) for end, start, length in zip(ends, tokens.starts, tokens.lengths, strict=True)
        ]
        counts = [max(0, stop - begin) for begin, stop in zip(begins, stops, strict=True)]
        if not any(counts):
            return
        place = mx.arange(tokens.width)[None]
        inside = (place >= mx.array(begins)[:, None]) & (place < mx.array(stops)[:, None])
        part = mx.sum(mx.where(inside[..., None], source.astype(mx.float32), 0.0), axis=1)
        tokens.remember(i, part + tokens.recalled(i, mx.zeros((source.shape[-1],)), slots), None, slots)
        for slot, count in zip(slots, counts, strict=True):
            slot["count", i] = slot.get(("count", i), 0) + count

    def _decide(self, x: mx.array, ends: list[int], where: Where, slots: list[dict[Any, Any]]) -> mx.array:
        """Whether the condition holds of each row's prompt, (rows,); only of those whose last token is here."""
        tokens = where.tokens
        index = [min(max(end - start, 0), tokens.width - 1) for end, start in zip(ends, tokens.starts, strict=True)]
        numbers = {id(reading): i for i, reading in enumerate(self.readings())}

        def value(reading: Reading) -> mx.array:
            source = self._source(reading, x, where)
            if reading.read == "mean":
                i = numbers[id(reading)]
                total = tokens.recalled(i, mx.zeros((source.shape[-1],)), slots)
                counts = [max(1, slot.get(("count", i), 0)) for slot in slots]
                return reading.of(total / mx.array(counts)[:, None])
            return reading.of(mx.take_along_axis(source, mx.array(index)[:, None, None], axis=1)[:, 0])

        return self.condition.holds(value, tokens)

    def _source(self, reading: Reading, x: mx.array, where: Where) -> mx.array:
        source = x if reading.key is None else where.tokens.kept.get((where.steering, reading.key))
        if source is None:
            raise ValueError(
                f"the gate at {where.key} reads {reading.key}, which hasn't run yet in this forward: read a place that "
                "comes before, or leave key= out to read the place itself."
            )
        if source.ndim != 3 or source.shape[-1] != reading.vector.size:
            raise ValueError(
                f"the gate at {where.key} reads {reading.key or where.key}, of shape {source.shape}: its vector has "
                f"{reading.vector.size} features, and it takes (batch, tokens, {reading.vector.size})."
            )
        return source

    def check(self, width: int, key: str) -> None:
        for reading in self.readings():
            if reading.key is None and reading.vector.size != width:
                raise ValueError(
                    f"the gate at {key}: its condition's vector has width {reading.vector.size}, the activation "
                    f"{width}; cosine(v, key=...) reads another place."
                )
        self.then.check(width, key)

    def bound(self, encode: Callable[[str], list[int]] | None) -> Intervention:
        condition, then = self.condition.bound(encode), self.then.bound(encode)
        same = condition is self.condition and then is self.then
        return self if same else replace(self, condition=condition, then=then)

    def parts(self) -> tuple[Intervention, ...]:
        return tuple(self.then.parts())

    def row(self, index: int) -> Intervention:
        then = self.then.row(index)
        return self if then is self.then else replace(self, then=then)


@dataclass(frozen=True, eq=False, repr=False)
class Keep(Intervention):
    """Keep an activation for the gates of the same forward; the activation stays."""

    key: str
    strength: Any = 1.0
    name: ClassVar[str] = "keep"
    saveable: ClassVar[bool] = False

    def __call__(self, x: mx.array, where: Where) -> mx.array:
        where.tokens.kept[where.steering, self.key] = x.reshape(x.shape)
        return x

    def parts(self) -> tuple[Intervention, ...]:
        return ()

    def _hash(self) -> str:
        return f"keep {self.key}"


def looks_back(intervention: Intervention) -> bool:
    """Whether what it does at a token depends on what came before it: there is a span in it, or a prompt's mean."""
    if intervention.exclude is not None:
        return True
    if isinstance(intervention, When):
        leaves = list(intervention.condition.leaves())
        return any(isinstance(leaf, Inside) or leaf.reading.read == "mean" for leaf in leaves) or looks_back(
            intervention.then
        )
    return any(map(looks_back, getattr(intervention, "steps", ())))


def spans_of(intervention: Intervention) -> Iterator[Inside]:
    """The spans that an intervention, or a gate in it, asks for."""
    if intervention.exclude is not None:
        yield intervention.exclude
    if isinstance(intervention, When):
        yield from (leaf for leaf in intervention.condition.leaves() if isinstance(leaf, Inside))
        yield from spans_of(intervention.then)
    for step in getattr(intervention, "steps", ()):
        yield from spans_of(step)


def gates(intervention: Intervention) -> Iterator[When]:
    """The gates in an intervention, outer ones first."""
    if isinstance(intervention, When):
        yield intervention
        yield from gates(intervention.then)
    for step in getattr(intervention, "steps", ()):
        yield from gates(step)


when = When
