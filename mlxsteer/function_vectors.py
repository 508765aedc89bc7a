"""Function vectors: a task that examples show, carried out of them as one vector."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.display import written_table
from mlxsteer.head_effects import (
    IndirectEffects,
    TaskAnswers,
    indirect_effects,
    mean_head_values,
    share_of,
)
from mlxsteer.heads import bias, contributions, into_stream, layers_with_heads
from mlxsteer.interventions import AddVector
from mlxsteer.interventions.base import Intervention, number
from mlxsteer.interventions.files import as_json
from mlxsteer.measures.uncertainty import Interval
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import check_seed, counted, hint
from mlxsteer.progress import Step
from mlxsteer.questions import check_count
from mlxsteer.reading import activations, check_budget, check_model
from mlxsteer.vectors import SteeringVector
from mlxsteer.word_pairs import InContextPrompt, Template, in_context, in_context_prompts, template_of, word_pairs

CORRUPTED = ("shuffled", "zero-shot")


def task_states(
    model: InterpretableModel, prompts: Sequence[InContextPrompt], *, batch_tokens: int = 4096
) -> SteeringVector:
    """The mean residual stream at the last token of in-context prompts, at every layer.

    Added at the last token of a zero-shot prompt it carries the task less sparingly than a function vector. Hendel et
    al. 2023, In-Context Learning Creates Task Vectors, arXiv 2310.15916; the layer average of Todd et al. 2023, arXiv
    2310.15213.

    Args:
        model: the model.
        prompts: prompts with the right labels, of one task.
        batch_tokens: the most tokens in one batch, padding included.

    Returns:
        A vector of one direction for each layer, (D,) each.

    Raises:
        TypeError: no model, no prompts as `in_context` makes them.
    """
    check_model(model)
    texts = [one.text for one in in_context_prompts(prompts)]
    found = activations(model, texts, "layers.*", batch_tokens=batch_tokens)
    info = {**model.identity, "method": "task_states", "prompts": len(texts)}
    return SteeringVector({i: rows.mean(axis=0) for i, rows in enumerate(found.values())}, info=info)


def sum_of_heads(
    model: InterpretableModel, means: Mapping[int, mx.array], heads: Sequence[tuple[int, int]]
) -> mx.array:
    """The function vector of some heads: ``v = Σ W_O,lj ā_lj`` over (l, j), (D,) float32.

    In families that norm the attention's output before it joins the residual stream, that norm is frozen at the mean
    output. Todd et al. 2023, arXiv 2310.15213.

    Args:
        model: the model.
        means: layer → (heads, head_dim), as `mean_head_values` gives them.
        heads: (layer, head) of each.

    Raises:
        ValueError: there is no head, no such head, or one is there twice; the means lack one's layer.
    """
    chosen = _checked_heads(model, heads)
    if missing := [layer for layer, _ in chosen if layer not in means]:
        raise ValueError(f"the means have no layer {missing[0]}: mean_head_values of this model gives every layer.")
    total = None
    for layer in sorted({layer for layer, _ in chosen}):
        parts = contributions(model, layer, means[layer]).astype(mx.float32)
        parts = into_stream(model, layer, parts, parts.sum(axis=0) + bias(model, layer).astype(mx.float32))
        own = parts[mx.array([head for one, head in chosen if one == layer])].sum(axis=0)
        total = own if total is None else total + own
    assert total is not None
    mx.eval(total)
    return total


def _checked_heads(model: InterpretableModel, heads: Any) -> list[tuple[int, int]]:
    sites = layers_with_heads(model)
    if not isinstance(heads, (list, tuple)) or not heads:
        raise ValueError(f"heads are a list of (layer, head) such as [(9, 3), (12, 0)], not {heads!r:.60}.")
    chosen = []
    for one in heads:
        pair = tuple(one[:2]) if isinstance(one, (list, tuple)) and len(one) in (2, 3) else ()
        whole = len(pair) == 2 and all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in pair)
        if not whole or pair[0] not in sites or not 0 <= pair[1] < int(sites[pair[0]].heads or 0):
            raise ValueError(f"heads are (layer, head) of heads that this model has, not {one!r}.")
        chosen.append((int(pair[0]), int(pair[1])))
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"a head is there twice: {next(one for one in chosen if chosen.count(one) > 1)}.")
    return chosen


@dataclass(frozen=True, eq=False)
class FunctionVector:
    """A task as one vector, and what it does.

    Attributes:
        vector: (D,) float32; added to the residual stream behind block `layer`, at a prompt's last token.
        layer: where it is added.
        strength: how often.
        heads: (layer, head, mean effect) of the heads it is the sum of; the effect is NaN where they were given.
        effects: the causal indirect effects that they were chosen by; None where they were given.
        accuracy: share of right answers with its interval over prompts, by kind of prompt: ``"in context"``,
            ``"zero-shot"``, ``"zero-shot + vector"``, ``"shuffled"``, ``"shuffled + vector"``; of words that nothing
            was chosen or computed from.
        random: zero-shot accuracy with the vectors of as many other heads, drawn by chance.
        by_layer: layer → zero-shot accuracy on the choosing words, with the vector added there.
        warnings: what speaks against relying on it, in words.
        record: model, data, settings.
    """

    vector: mx.array
    layer: int
    strength: float
    heads: tuple[tuple[int, int, float], ...]
    effects: IndirectEffects | None
    accuracy: dict[str, Interval]
    random: tuple[float, ...]
    by_layer: dict[int, float]
    warnings: tuple[str, ...]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def interventions(self) -> dict[str, Intervention]:
        """The key dict that does the task: it acts at each prompt's last token."""
        return {f"layers.{self.layer}": AddVector(self.vector, self.strength, at=-1)}

    @property
    def steering_vector(self) -> SteeringVector:
        """The same as a `SteeringVector` of one layer, to be saved or calculated with."""
        info = {**self.record["model"], "method": "function_vector", "heads": str([h[:2] for h in self.heads])}
        return SteeringVector({self.layer: self.vector}, info=info)

    def __repr__(self) -> str:
        before, after = (self.accuracy[name].value for name in ("zero-shot", "zero-shot + vector"))
        warned = f", {len(self.warnings)} warnings" if self.warnings else ""
        return (
            f"FunctionVector({len(self.heads)} heads, layer {self.layer}, zero-shot {before:.2f} → {after:.2f}{warned})"
        )

    def table(self) -> str:
        """The heads, the accuracies and the warnings, in plain text."""
        heads = [(str(layer), str(head), "given" if np.isnan(e) else f"{e:+.4f}") for layer, head, e in self.heads]
        return "\n".join([written_table("heads", ("layer", "head", "effect"), heads), self.summary()])

    def summary(self) -> str:
        """What it does, in words."""
        lines = [f"Added {self.strength:g} times behind block {self.layer}, at the prompt's last token."]
        lines += [
            f"{name}: {one.value:.2f}" + ("" if np.isnan(one.low) else f" [{one.low:.2f}, {one.high:.2f}]") + " right"
            for name, one in self.accuracy.items()
        ]
        if self.random:
            lines.append(
                f"{len(self.random)} draws of as many other heads, zero-shot: {np.mean(self.random):.2f} on average, "
                f"{max(self.random):.2f} at most."
            )
        return "\n".join([*lines, *(f"Warning: {warning}" for warning in self.warnings)])

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything but the vector as JSON; with a path, also written there, whole or not at all."""
        data = {
            "layer": self.layer, "strength": self.strength, "heads": [list(one) for one in self.heads],
            "effects": self.effects.mean.tolist() if self.effects else None,
            "block_tokens": self.effects.block_tokens if self.effects else None,
            "accuracy": {name: asdict(one) for name, one in self.accuracy.items()}, "random": list(self.random),
            "by_layer": self.by_layer, "warnings": list(self.warnings), "record": self.record,
        }  # fmt: skip
        return as_json(data, path)

    def plot(self, path: str | Path | None = None) -> Any:
        """The effects of all heads as a heat map, those in the vector framed; a matplotlib figure.

        Args:
            path: also write it there, as PNG, PDF or SVG by suffix.

        Raises:
            ValueError: the heads were given, so that no effects are known.
        """
        from mlxsteer.plots import plot_heads

        if self.effects is None:
            raise ValueError("these heads were given, and no effects were measured: there is nothing to draw.")
        framed = [(layer, head) for layer, head, _ in self.heads]
        return plot_heads(self.effects.mean, "causal indirect effect", "change of P(answer)", framed, path)


def function_vector(
    model: InterpretableModel,
    pairs: Any,
    *,
    choose: Any = None,
    report: Any = None,
    heads: Sequence[tuple[int, int]] | None = None,
    top: int = 10,
    corrupted: str = "shuffled",
    shots: int = 10,
    clean: int = 100,
    trials: int = 25,
    layers: Sequence[int] | None = None,
    strength: float = 1.0,
    nulls: int = 5,
    template: str | Template = "arrow",
    seed: int = 0,
    batch_tokens: int = 4096,
    progress: bool | Step | None = False,
) -> FunctionVector:
    """A task's function vector: the summed mean outputs of the heads that carry it, and what adding it does.

    Heads are chosen by `indirect_effects` on corrupted prompts, the layer by zero-shot accuracy on words of their own,
    and accuracies are reported on others again. Todd et al. 2023, Function Vectors in Large Language Models, arXiv
    2310.15213: 100 prompts of 10 shots, 25 corrupted ones, 10 heads of 448 in GPT-J, shuffled labels.

    Args:
        model: the model.
        pairs: the task's (input, output) pairs: examples, and words for the means and effects.
        choose: pairs that the layer is chosen on; None takes every fifth of `pairs` away for it.
        report: pairs that accuracies are reported on; None takes every fifth of `pairs` away for it.
        heads: (layer, head) of the heads, such as those that several tasks share; None chooses them.
        top: how many heads are chosen.
        corrupted: what lacks the task: ``"shuffled"`` labels, or ``"zero-shot"`` prompts, for models that read a task
            off the outputs alone.
        shots: examples in a prompt.
        clean: prompts for the mean values.
        trials: corrupted prompts for the effects.
        layers: layers to add at; None tries all.
        strength: how often the vector is added.
        nulls: how many times as many other heads are drawn by chance.
        template: as for `in_context`.
        seed: of everything drawn.
        batch_tokens: the most tokens in one batch.
        progress: of the effects, as in `indirect_effects`.

    Raises:
        TypeError: no model, no pairs.
        ValueError: too few pairs, no such head or layer, or nothing to choose.
    """
    check_model(model)
    check_seed(seed)
    check_budget(batch_tokens)
    for name, value in (("top", top), ("shots", shots), ("clean", clean), ("trials", trials)):
        check_count(value, name, 1)
    check_count(nulls, "nulls", 0)
    if corrupted not in CORRUPTED:
        raise ValueError(f"corrupted is 'shuffled' or 'zero-shot', not {corrupted!r}.{hint(corrupted, CORRUPTED)}")
    strength, form = number(strength, "strength"), template_of(template)
    every = [(layer, head) for layer, site in layers_with_heads(model).items() for head in range(int(site.heads or 0))]
    given = None if heads is None else _checked_heads(model, heads)
    if given is None and top >= len(every):
        raise ValueError(f"top={top}: the model has {len(every)} heads, and some have to be left out.")
    tried = _checked_layers(model, layers)
    train, choosing, held = _split(pairs, choose, report, seed)
    options: dict[str, Any] = {"template": form, "seed": seed}
    means = mean_head_values(model, in_context(train, clean, shots=shots, **options), batch_tokens=batch_tokens)
    effects = None
    if given is None:
        wrong = in_context(
            train, trials, shots=shots if corrupted == "shuffled" else 0, shuffled=corrupted == "shuffled", **options
        )
        effects = indirect_effects(model, wrong, means, batch_tokens=batch_tokens, progress=progress)
        found = tuple(effects.top(top))
    else:
        found = tuple((layer, head, float("nan")) for layer, head in given)
    chosen = [(layer, head) for layer, head, _ in found]
    vector = sum_of_heads(model, means, chosen)
    zero = TaskAnswers(model, in_context(train, shots=0, queries=choosing, **options), batch_tokens=batch_tokens)
    by_layer = {layer: float(zero.added(site, strength * vector[None]).mean()) for layer, site in tried.items()}
    layer = max(by_layer, key=lambda one: (by_layer[one], -abs(one - len(model.layers) / 3)))
    others = [one for one in every if one not in chosen]
    draw = random.Random(f"{seed} heads")
    size = min(len(chosen), len(others))
    chance = [sum_of_heads(model, means, draw.sample(others, size)) for _ in range(nulls)] if size else []
    accuracy, by_chance = _reported(
        model, train, held, shots, options, tried[layer], strength * mx.stack([vector, *chance]), batch_tokens
    )
    record = {
        "model": model.identity, "train": len(train), "choose": len(choosing), "report": len(held), "shots": shots,
        "clean": clean, "trials": trials, "corrupted": corrupted, "template": asdict(form), "seed": seed,
    }  # fmt: skip
    mx.eval(vector)
    return FunctionVector(
        vector, layer, strength, found, effects, accuracy, by_chance, by_layer,
        tuple(_warnings(accuracy, by_chance, corrupted if effects else "", len(held))), record,
    )  # fmt: skip


def _checked_layers(model: InterpretableModel, layers: Any) -> dict[int, Any]:
    count = len(model.layers)
    given = list(range(count)) if layers is None else list(layers) if isinstance(layers, (list, tuple, range)) else None
    wrong = given is not None and [
        i for i in given if not isinstance(i, (int, np.integer)) or isinstance(i, bool) or not 0 <= i < count
    ]
    if not given or wrong:
        raise ValueError(f"layers are a list of layers from 0 to {count - 1}, not {layers!r}.")
    return {int(layer): model._sites.resolve(f"layers.{layer}") for layer in given}


def _split(pairs: Any, choose: Any, report: Any, seed: int) -> tuple[list[Any], list[Any], list[Any]]:
    """Train, choose and report pairs; what isn't given is taken from the pairs, and no input is in two of them.

    Raises:
        ValueError: an input is in both of those given, or there are too few pairs to take some away.
    """
    train = word_pairs(pairs)
    parts = {
        name: None if part is None else word_pairs(part, name)
        for name, part in (("choose", choose), ("report", report))
    }
    asked = [{word for word, _ in part or ()} for part in parts.values()]
    if both := asked[0] & asked[1]:
        raise ValueError(
            f"choose= and report= share {counted(len(both), 'input')}, such as {min(both)!r}: accuracies are reported "
            "on words that nothing was chosen on."
        )
    taken = asked[0] | asked[1]
    train = [pair for pair in train if pair[0] not in taken]
    random.Random(f"{seed} splits").shuffle(train)
    size = len(train) // 5
    for name, part in parts.items():
        if part is None:
            parts[name], train = train[:size], train[size:]
    for name, part in parts.items():
        if not part:
            raise ValueError(
                f"{len(word_pairs(pairs))} pairs are too few to take some away: give {name}=, or more pairs."
            )
    return train, parts["choose"] or [], parts["report"] or []


def _reported(
    model: InterpretableModel, train: Any, held: Any, shots: int, options: Mapping[str, Any], site: Any,
    vectors: mx.array, batch_tokens: int,
) -> tuple[dict[str, Interval], tuple[float, ...]]:  # fmt: skip
    """Accuracies on held-out words by kind of prompt, and those with the other vectors, zero-shot."""
    accuracy: dict[str, Interval] = {}
    by_chance: tuple[float, ...] = ()
    kinds: dict[str, dict[str, Any]] = {
        "in context": {"shots": shots}, "zero-shot": {"shots": 0}, "shuffled": {"shots": shots, "shuffled": True},
    }  # fmt: skip
    for name, kind in kinds.items():
        if kind.get("shuffled") and shots < 2:
            continue
        prompts = in_context(train, queries=held, **kind, **options)
        answers = TaskAnswers(model, prompts, batch_tokens=batch_tokens, copies=len(vectors))
        accuracy[name] = share_of(answers.base)
        if name != "in context":
            right = answers.added(site, vectors if name == "zero-shot" else vectors[:1])
            accuracy[f"{name} + vector"] = share_of(right[0])
            by_chance = by_chance or tuple(float(one.mean()) for one in right[1:])
    return accuracy, by_chance


def _warnings(accuracy: Mapping[str, Interval], chance: Sequence[float], corrupted: str, held: int) -> list[str]:
    said = []
    before, after, most = (accuracy[name].value for name in ("zero-shot", "zero-shot + vector", "in context"))
    if most < 0.5:
        said.append(f"the model hardly does the task with examples either ({most:.2f} right).")
    if after <= before:
        said.append(
            f"the vector raises nothing: {before:.2f} of zero-shot answers are right without, {after:.2f} with."
        )
    elif chance and after <= max(chance):
        said.append(f"no evidence that these heads matter: other heads reach {max(chance):.2f} too.")
    shuffled = accuracy.get("shuffled")
    if corrupted == "shuffled" and shuffled is not None and shuffled.value > 0.8 * most:
        said.append(
            f"shuffled labels hardly disturb this model ({shuffled.value:.2f} right), so that effects have little "
            "room: take corrupted='zero-shot'."
        )
    if held < 16:
        said.append(f"accuracies are of {held} words: their intervals are not to be relied on.")
    return said
