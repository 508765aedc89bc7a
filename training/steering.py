"""Steering measured on the shipped model: sentiment, formality, certainty.

Vectors come from ``train`` pairs, layer and strength are chosen on ``choose`` prompts, figures on held-out prompts.
A strength of 1 adds the mean difference itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mlxsteer.pocket import scorer
from mlxsteer.pocket.grammar import SIDES

from .corpus import HELD_OUT, TRAIN
from .language import prompts_for
from .pairs import load_pairs
from .runner import Edit, Runner, add_at_last, add_everywhere

WHERE: dict[str, Callable[[Tensor], Edit]] = {"last": add_at_last, "all": add_everywhere}
STRENGTHS = {"last": (1.0, 2.0, 3.0, 6.0), "all": (0.3, 0.5)}
STANDARD_ERROR = 0.03  # of a share near 0.9, of 96 texts
TOKENS = {"sentiment": 40, "certainty": 40, "formality": 48, "topic": 40, "chat": 40}


@dataclass(frozen=True)
class Setting:
    """Where and how strongly a vector is added."""

    layer: int
    where: str
    strength: float


@dataclass(frozen=True)
class Outcome:
    """Texts written under one edit."""

    hits: float  # share of texts on the wanted side
    perplexity: float  # under the unsteered model


def penalty(ratio: float, limit: float) -> float:
    """Zero up to the allowed perplexity ratio, then growing."""
    return 2 * max(0.0, math.log(ratio / limit))


def side_vector(runner: Runner, pairs: Path, behaviour: str) -> tuple[Tensor, Tensor]:
    """Mean difference of the last tokens of positive and negative texts, (layers, hidden), and its length in units of
    the states' mean length, (layers,)."""
    rows = load_pairs(pairs, behaviour, "train")
    positive = runner.last_states([row["prompt"] + row["positive"] for row in rows])
    negative = runner.last_states([row["prompt"] + row["negative"] for row in rows])
    vector = (positive - negative).mean(0)
    return vector, vector.norm(dim=-1) / torch.cat([positive, negative]).norm(dim=-1).mean(0)


def write_both_ways(
    runner: Runner, behaviour: str, prompts: Sequence[str], vector: Tensor, setting: Setting, seed: int
) -> tuple[Outcome, Outcome]:
    """Add and subtract a vector in one batch: outcomes (first side, second side)."""
    count = len(prompts)
    signs = torch.cat([torch.ones(count), -torch.ones(count)])[:, None, None]
    edit = WHERE[setting.where](signs * setting.strength * vector[setting.layer])
    written = runner.generate([*prompts, *prompts], TOKENS[behaviour], 1.0, seed, {setting.layer: edit})
    texts = runner.decode(written)
    outcomes = []
    for index, side in enumerate(SIDES[behaviour]):
        part = slice(index * count, (index + 1) * count)
        hits = sum(scorer.side(behaviour, text) == side for text in texts[part]) / count
        outcomes.append(Outcome(hits, runner.perplexity(prompts, written[part])))
    return outcomes[0], outcomes[1]


def unsteered(runner: Runner, behaviour: str, prompts: Sequence[str], seed: int) -> tuple[float, float, float]:
    """Shares of both sides and perplexity without steering."""
    written = runner.generate(prompts, TOKENS[behaviour], 1.0, seed)
    sides = [scorer.side(behaviour, text) for text in runner.decode(written)]
    first, second = (sides.count(side) / len(sides) for side in SIDES[behaviour])
    return first, second, runner.perplexity(prompts, written)


def choose_per_layer(
    runner: Runner, behaviour: str, vector: Tensor, prompts: Sequence[str], limit: float, first: int = 0
) -> dict[tuple[int, str], tuple[float, Setting]]:
    """The best strength for every layer from `first` on and position, with its score (worse side's share, less the
    penalty)."""
    base = unsteered(runner, behaviour, prompts, 1)[2]
    best: dict[tuple[int, str], tuple[float, Setting]] = {}
    for layer in range(first, runner.layers):
        for where, strengths in STRENGTHS.items():
            for strength in strengths:
                setting = Setting(layer, where, strength)
                plus, minus = write_both_ways(runner, behaviour, prompts, vector, setting, 1)
                ratio = max(plus.perplexity, minus.perplexity) / base
                score = min(plus.hits, minus.hits) - penalty(ratio, limit)
                if (layer, where) not in best or score > best[layer, where][0]:
                    best[layer, where] = (score, setting)
    return best


def gentlest(chosen: dict[tuple[int, str], tuple[float, Setting]], lengths: Tensor) -> Setting:
    """Of the settings that can't be told from the best on so few texts, the one that changes the activations least."""
    best = max(score for score, _ in chosen.values())
    near = [setting for score, setting in chosen.values() if score >= best - STANDARD_ERROR]
    return min(near, key=lambda setting: (setting.where != "last", setting.strength * float(lengths[setting.layer])))


def measure_sides(runner: Runner, pairs: Path, behaviour: str) -> dict:
    """Best setting, every layer at its best setting, random vectors, the same vector in chat."""
    vector, lengths = side_vector(runner, pairs, behaviour)
    choosing = [row["prompt"] for row in load_pairs(pairs, behaviour, "choose")]
    chosen = choose_per_layer(runner, behaviour, vector, choosing, limit=1.3)
    report = [row["prompt"] for row in load_pairs(pairs, behaviour, "report")] * 2
    first, second, base = unsteered(runner, behaviour, report, 2)
    result: dict = {"unsteered": {"first": first, "second": second, "perplexity": base}, "layers": []}
    for layer in range(runner.layers):
        setting = max((chosen[layer, where] for where in WHERE), key=lambda entry: entry[0])[1]
        plus, minus = write_both_ways(runner, behaviour, report, vector, setting, 3)
        ratio = max(plus.perplexity, minus.perplexity) / base
        result["layers"].append({"layer": layer, "where": setting.where, "strength": setting.strength,
                                 "first": plus.hits, "second": minus.hits, "ratio": ratio})  # fmt: skip
    setting = gentlest(chosen, lengths)
    report = report * 4
    plus, minus = write_both_ways(runner, behaviour, report, vector, setting, 4)
    result["best"] = {
        "layer": setting.layer,
        "where": setting.where,
        "strength": setting.strength,
        "relative length": setting.strength * float(lengths[setting.layer]),
        "texts": len(report),
        "first": plus.hits,
        "second": minus.hits,
        "ratio": max(plus.perplexity, minus.perplexity) / base,
    }
    result["random"] = random_shifts(runner, behaviour, report, vector, setting)
    result["chat"] = in_chat(runner, behaviour, vector)
    return result


def random_shifts(
    runner: Runner, behaviour: str, prompts: Sequence[str], vector: Tensor, setting: Setting, count: int = 10
) -> dict[str, float]:
    """Largest change of the first side's share under random vectors of the same norm."""
    first, _, _ = unsteered(runner, behaviour, prompts, 5)
    norm = float(vector[setting.layer].norm()) * setting.strength
    generator = torch.Generator().manual_seed(0)
    shifts = []
    for index in range(count):
        direction = torch.randn(runner.hidden, generator=generator)
        edit = WHERE[setting.where](direction / direction.norm() * norm)
        written = runner.generate(prompts, TOKENS[behaviour], 1.0, 6 + index, {setting.layer: edit})
        sides = [scorer.side(behaviour, text) for text in runner.decode(written)]
        shifts.append(abs(sides.count(SIDES[behaviour][0]) / len(sides) - first))
    return {"vectors": count, "texts each": len(prompts), "largest": max(shifts), "mean": sum(shifts) / count}


def in_chat(runner: Runner, behaviour: str, vector: Tensor, texts: int = 256) -> dict:
    """The same vector on held-out chat prompts; where and how strongly is chosen on other chat prompts."""
    choosing = prompts_for(f"{behaviour} chat", TRAIN, 32, seed=76)
    chosen = choose_per_layer(runner, behaviour, vector, choosing, limit=1.3, first=2)
    setting = max(chosen.values(), key=lambda entry: entry[0])[1]
    prompts = prompts_for(f"{behaviour} chat", HELD_OUT, texts, seed=77)
    first, second, base = unsteered(runner, behaviour, prompts, 7)
    plus, minus = write_both_ways(runner, behaviour, prompts, vector, setting, 8)
    return {
        "layer": setting.layer,
        "where": setting.where,
        "strength": setting.strength,
        "unsteered first": first,
        "unsteered second": second,
        "first": plus.hits,
        "second": minus.hits,
        "ratio": max(plus.perplexity, minus.perplexity) / base,
    }
