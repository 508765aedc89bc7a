"""What steering must be on every architecture: each check compares with edits made by hand on the plain model.

A check takes a `Case` and returns nothing when all is as it should be, or a word where mlxsteer says that it falls back
to a plainer way; what is wrong is an AssertionError.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import architectures
import mlx.core as mx
import mlx.nn as nn
import tiny
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlxsteer as ms
from mlxsteer import InterpretableModel, SteeringVector, UnknownKey
from mlxsteer import interventions as iv

PROMPT = [3, 41, 15, 92, 65, 35, 89, 79, 32, 38, 46]  # longer than the sliding windows of the configs
OTHER = [27, 18, 28, 18]
MADE = 3
"""Tokens that generations make: always the same one, so that no two ways of running can part."""

STREAM = {"talkie": 1}
"""Model type → which argument of its blocks is the residual stream, where that isn't the first."""

LAST = {
    "nanochat": "its final norm is no module",
    "talkie": "its final norm is no module",
    "kimi_k3": "its head reads all that the blocks handed on",
}
"""Model types in which no module reads the last block's output alone."""


UNQUANTIZED = {"afm7": "unquantized: its layers refuse the arguments of MLX's nn.quantize"}
"""Model types that MLX can't quantize here → why; they are tried in bfloat16."""


def forced(logprobs: mx.array) -> mx.array:
    return mx.full(logprobs.shape[:-1], 7)


@dataclass
class Case:
    """One tiny model, and what the checks share."""

    name: str
    tokenizer: TokenizerWrapper
    bits: int | None = None
    dtype: mx.Dtype = mx.float32
    bare: nn.Module = field(init=False)
    model: InterpretableModel = field(init=False)

    def __post_init__(self) -> None:
        self.bare = architectures.build(self.name, self.dtype, bits=self.bits)
        self.model = InterpretableModel(self.bare, self.tokenizer)
        self.logits = self.bare(mx.array([PROMPT]))
        mx.eval(self.logits)

    @property
    def layers(self) -> list[int]:
        """The first, a middle and the last block."""
        count = len(self.bare.layers)
        return [0, count // 2, count - 1]

    @cached_property
    def width(self) -> int:
        return int(self.traced(["layers.0"])["layers.0"].shape[-1])

    @cached_property
    def own(self) -> float:
        """By how much mlx-lm's own steps with a cache differ from a recompute, without steering."""
        return far(streamed(self, PROMPT, None), recomputed(self, PROMPT, None))

    def vector(self, seed: int = 5) -> mx.array:
        mx.random.seed(seed)
        return mx.random.normal((self.width,))

    def traced(self, keys: list[str], interventions: Any = None) -> dict[str, mx.array]:
        with self.model.trace(PROMPT, interventions=interventions) as trace:
            return {key: mx.array(trace.activations[key]) for key in keys}

    def steered(self, interventions: Any, prompt: list[int] = PROMPT, **options: Any) -> mx.array:
        with self.model.trace(prompt, interventions=interventions, **options):
            return mx.array(self.model.output)

    @contextmanager
    def behind(self, layer: int, change: Callable[[mx.array], mx.array]) -> Iterator[list[mx.array]]:
        """Change by hand what is read behind a block: the next block's input, or the final norm's.

        Where no module reads it as it is (`LAST`), what the last block gives is changed.
        """
        blocks = self.bare.layers
        if layer + 1 < len(blocks):
            hand = entering(blocks[layer + 1], STREAM.get(self.name, 0), change)
        elif self.name in LAST:
            hand = leaving(blocks[layer], change)
        else:
            hand = entering(self.model._sites.modules["norm"], 0, change)
        with hand as seen:
            yield seen

    def spoken(self, key: str) -> bool:
        """Whether a fixed name means a module here; if not, there is a sentence that says so."""
        try:
            self.model._sites.resolve(key)
        except UnknownKey as refusal:
            if "is no module of its own" in str(refusal):
                return False
            raise
        return True


# -- by hand, without mlxsteer -----------------------------------------------------------------------------------------


@contextmanager
def entering(module: nn.Module, argument: int, change: Callable[[mx.array], mx.array]) -> Iterator[list[mx.array]]:
    """Change what enters a module, by a subclass written on the spot; what it is then is put into a list."""
    cls, seen = type(module), []
    name = list(inspect.signature(cls.__call__).parameters)[1 + argument]

    class Changed(cls):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if name in kwargs:
                kwargs[name] = change(kwargs[name])
                seen.append(kwargs[name])
            else:
                args = (*args[:argument], change(args[argument]), *args[argument + 1 :])
                seen.append(args[argument])
            return super().__call__(*args, **kwargs)

    module.__class__ = Changed
    try:
        yield seen
    finally:
        module.__class__ = cls


@contextmanager
def leaving(module: nn.Module, change: Callable[[mx.array], mx.array]) -> Iterator[list[mx.array]]:
    """Change what a module gives, or the first of what it gives."""
    seen: list[mx.array] = []

    def noted(x: mx.array) -> mx.array:
        seen.append(change(x))
        return seen[-1]

    with tiny.by_hand(module, noted):
        yield seen


def same(x: mx.array) -> mx.array:
    return x


# -- the checks --------------------------------------------------------------------------------------------------------


def names(case: Case) -> str | None:
    """Every block, its mixer and its feed-forward part, the embedding, the norm: found, and run once per forward."""
    sites = case.model._sites
    with case.model.trace(PROMPT) as trace:
        fired = trace.fired_keys()
    fixed = [key for key in ("embed", "norm") if case.spoken(key)]
    for key in (*fixed, "logits", *(f"layers.{i}" for i in range(len(sites.blocks)))):
        assert key in fired, f"{key} doesn't run, or more than once"
    said = [f"no {key}: no module of its own" for key in ("embed", "norm") if key not in fixed]
    found = [sites.roles(i) for i in range(len(sites.blocks))]
    for i, roles in enumerate(found):
        assert roles, f"block {i} has neither a mixer nor a feed-forward part"
        for role in roles:
            key = sites.resolve(f"layers.{i}.{role}").key
            assert role.endswith("heads") or key in fired, f"{key} doesn't run, or more than once"
    if not any("attn" in roles for roles in found):
        refusal = refused(case, "layers.0.attn")
        assert "this block has several: layers.0.self_attn.0 and" in refusal, refusal
        said.append("several mixers in a block, without a role name")
    if not any("mlp" in roles for roles in found):
        said.append("no feed-forward part beside the mixer")
    return "; ".join(said) or None


def refused(case: Case, key: str) -> str:
    """The sentence that refuses a key; empty where it isn't."""
    try:
        case.model._sites.resolve(key)
    except UnknownKey as refusal:
        return str(refusal)
    return ""


def exact(case: Case) -> None:
    """Read everywhere, the model is the bare one, bit for bit; at strength 0 as well."""
    blocks = [f"layers.{i}" for i in range(len(case.bare.layers))]
    v = case.vector()
    with case.model.trace(PROMPT) as trace:
        for key in trace.fired_keys():
            trace.activations[key].shape  # noqa: B018
        logits = mx.array(trace.activations["logits"])
    assert mx.array_equal(logits, case.logits), "reading changes the logits"
    zero = {key: [iv.add_vector(v, 0.0), iv.ablate(v, strength=0.0), iv.scale(3.0, strength=0.0)] for key in blocks}
    assert mx.array_equal(case.steered(zero), case.logits), "strength 0 changes the logits"
    assert mx.array_equal(case.bare(mx.array([PROMPT])), case.logits), "the model doesn't stay as it was"


def shapes(case: Case) -> str | None:
    """(batch, tokens, features) at the blocks and their parts; heads, where there are any."""
    sites = case.model._sites
    keys = [key for key in ("embed", "norm") if case.spoken(key)] + ["logits"]
    for i in range(len(sites.blocks)):
        keys += [sites.resolve(f"layers.{i}{role}").key for role in ("", ".input", *(f".{r}" for r in sites.roles(i)))]
    heads = [key for key in keys if key.endswith(".heads")]
    values = case.traced(keys)
    for key, value in values.items():
        assert value.shape[:2] == (1, len(PROMPT)), f"{key} has the shape {value.shape}"
        assert value.ndim == (4 if key in heads else 3), f"{key} has the shape {value.shape}"
        assert value.dtype == case.dtype or key in ("logits", *heads), f"{key} is {value.dtype}"
    for i in range(len(sites.blocks)):
        assert values[f"layers.{i}"].shape[-1] == case.width
    with case.behind(0, same) as seen:
        case.bare(mx.array([PROMPT]))
    assert mx.array_equal(values["layers.1.input"], seen[0]), "layers.1.input isn't the stream that enters block 1"
    return None if heads else "no attention heads"


def added(case: Case, layers: list[int] | None = None) -> None:
    """An addition at the first, a middle and the last block is one by hand at what reads behind it."""
    for layer in case.layers if layers is None else layers:
        v = (2.0 * case.vector(layer)).astype(case.dtype)
        logits = case.steered({f"layers.{layer}": iv.add_vector(v)})
        assert logits.dtype == case.logits.dtype, f"steered at layers.{layer} the logits are {logits.dtype}"
        with case.behind(layer, lambda h, v=v: h + v) as seen:
            expected = case.bare(mx.array([PROMPT]))
        assert len(seen) == 1, f"what reads behind layers.{layer} ran {len(seen)} times"
        assert not mx.array_equal(expected, case.logits), f"an edit by hand behind layers.{layer} does nothing"
        assert mx.array_equal(logits, expected), f"an addition at layers.{layer} is off by {far(logits, expected)}"


def ablated(case: Case) -> None:
    """What reads behind an ablation finds at most 1e-5 of the direction."""
    layer = case.layers[1]
    v = case.vector()
    unit = v / mx.linalg.norm(v)
    with case.behind(layer, same) as seen, case.model.steer({f"layers.{layer}": iv.ablate(v)}):
        mx.eval(case.bare(mx.array([PROMPT])))
    left = mx.abs(seen[-1] @ unit) / mx.linalg.norm(seen[-1], axis=-1)
    assert left.max().item() <= 1e-5, f"{left.max().item():.1e} of the direction is left"


def causes(case: Case) -> None:
    """A change at each named place changes the logits."""
    sites = case.model._sites
    keys = [key for key in ("embed", "norm") if case.spoken(key)] + ["layers.1.input"]
    kinds: set[str] = set()  # attention of one kind is tried in the first block that has it
    for i in range(len(sites.blocks)):
        keys.append(f"layers.{i}")
        for key in (sites.resolve(f"layers.{i}.{role}").key for role in sites.roles(i)):
            kind = key.split(".", 2)[2]
            keys += [] if kind in kinds else [key]
            kinds.add(kind)
    for key in keys:
        moved = case.steered({key: lambda x: x * 1.5 + 0.25})
        assert not mx.array_equal(moved, case.logits), f"a change at {key} doesn't reach the logits"


def steering(case: Case) -> dict[str, Any]:
    first, middle, _ = case.layers
    return {
        f"layers.{first}": iv.add_vector(case.vector(1), 1.0, at="generated"),
        f"layers.{middle}": [iv.add_vector(case.vector(2), 1.5, at="last"), iv.ablate(case.vector(3))],
    }


def recomputed(case: Case, prompt: list[int], steer: Any) -> mx.array:
    """Log-probabilities of each step, from one forward over the whole text without a cache."""
    text = [*prompt, *[7] * (MADE - 1)]
    logits = case.steered(steer, text, prompt_tokens=len(prompt)) if steer else case.bare(mx.array([text]))
    return tiny.logprobs(logits[0, len(prompt) - 1 :].astype(mx.float32))


def streamed(case: Case, prompt: list[int], steer: Any) -> mx.array:
    pieces = case.model.stream(prompt, steer, max_tokens=MADE, sampler=forced, prefill_step_size=4)
    return mx.stack([piece.logprobs for piece in pieces])


def far(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a - b).max().item())


def cached(case: Case) -> str | None:
    """Generation with a cache, the prompt in chunks, is a recompute of the whole text."""
    steer = steering(case)
    found = streamed(case, PROMPT, steer)
    distance = far(found, recomputed(case, PROMPT, steer))
    if case.own > 1e-4:  # mlx-lm's own ways of running part: hold each against itself, edited by hand
        v = case.vector(1).astype(case.dtype)
        layer = case.layers[1]
        with case.behind(layer, lambda h: h + v):
            expected = streamed(case, PROMPT, None)
        distance = far(streamed(case, PROMPT, {f"layers.{layer}": iv.add_vector(v)}), expected)
        assert distance <= 1e-4, f"steered steps are off by {distance:.1e} from an edit by hand"
        return f"without steering, mlx-lm's steps with a cache differ by {case.own:.1g} from a recompute"
    assert distance <= 1e-4, f"steps with a cache are off by {distance:.1e}"
    return None


def batched(case: Case) -> str | None:
    """Rows of a batch, each with its own steering, are each the row alone."""
    first, _, last = case.layers
    steers = [steering(case), {f"layers.{last}": iv.add_vector(case.vector(4), 2.0), f"layers.{first}": iv.scale(1.2)}]
    prompts = [PROMPT, OTHER]
    options: dict[str, Any] = {"max_tokens": MADE, "sampler": forced, "logprobs": True}
    alone = [case.model.generate(p, s, **options).logprobs for p, s in zip(prompts, steers, strict=True)]
    rows = case.model.generate(prompts, steers, **options)
    distance = max(far(row.logprobs, one) for row, one in zip(rows, alone, strict=True))
    assert distance <= 1e-4, f"rows of a batch are off by {distance:.1e}"
    merged = all(hasattr(entry, "merge") for entry in make_prompt_cache(case.bare) if entry is not None)
    return None if case.model._sites.family.batch and merged else "one row at a time"


def replayed(case: Case) -> str | None:
    """A sweep, which goes on from replayed blocks, is a plain loop over layers and strengths."""
    layers, strengths = case.layers, [-1.0, 2.0]
    vector = SteeringVector({layer: case.vector(layer) for layer in layers})

    def metric(logits: mx.array) -> mx.array:
        logprobs = tiny.logprobs(logits)
        return logprobs[:, 9] - logprobs[:, 60]

    prompts = [PROMPT, OTHER]
    # beginnings that aren't edited run once, into a cache: where mlx-lm's steps with a cache differ, edit them too
    at: Any = -1 if case.own <= 1e-4 else "all"
    swept = ms.sweep(case.model, vector, prompts, strengths=strengths, at=at, unit="raw", metric=metric, progress=None)
    for i, layer in enumerate(layers):
        for j, strength in enumerate(strengths):
            steer = {f"layers.{layer}": iv.add_vector(vector[layer], strength, at=at)}
            k = (i + j) % 2
            expected = metric(case.steered(steer, prompts[k])[:, -1].astype(mx.float32)).item()
            found = swept.effect[i, j, k]
            assert abs(found - expected) <= 1e-4, f"layer {layer}, strength {strength}: {found} for {expected}"
    return None if case.model._sites.family.replay else "no replay, every pass runs whole"


def quantized(case: Case) -> str | None:
    """With 4-bit weights in bfloat16: bare is bare, an addition is one by hand, and dtypes stay."""
    own = case.name in UNQUANTIZED
    small = Case(case.name, case.tokenizer, None if own else 4, mx.bfloat16)
    bits = {getattr(module, "bits", None) for module in small.bare.modules()}
    assert mx.array_equal(small.steered(None), small.logits), "reading changes the logits"
    added(small, small.layers[1:2])
    keys = [f"layers.{i}" for i in small.layers]
    steered = small.traced(keys, {f"layers.{small.layers[0]}": iv.add_vector(small.vector())})
    plain = small.traced(keys)
    for key in keys:
        assert steered[key].dtype == plain[key].dtype, f"{key} becomes {steered[key].dtype}"
    return None if 4 in bits else UNQUANTIZED[case.name]


CHECKS: dict[str, Callable[[Case], str | None]] = {
    "names": names, "exact": exact, "shapes": shapes, "added": added, "ablated": ablated, "causes": causes,
    "cached": cached, "batched": batched, "replayed": replayed, "quantized": quantized,
}  # fmt: skip
