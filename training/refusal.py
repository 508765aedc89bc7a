"""Refusal measured on the shipped model: held-out requests, two ablations, addition."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mlxsteer.pocket import scorer

from .corpus import COMBINATION, HELD_OUT, Sampler
from .language import BOT, USER
from .pairs import load_pairs
from .runner import Edits, Runner, add_at_last, set_component
from .steering import TOKENS, Outcome, penalty


def chat_prompts(symbol: str, mode: str, count: int, seed: int) -> list[str]:
    """Requests with deeds of one kind, as chat prompts."""
    sampler = Sampler(seed, mode)
    prompts = []
    for _ in range(count):
        deed = sampler.text(symbol)
        prompts.append(USER + sampler.text("s.request", {"deed": deed}) + BOT)
    return prompts


def refusals(runner: Runner, prompts: Sequence[str], edits: Edits | None = None) -> Outcome:
    """Share of greedy answers that refuse, and the answers' perplexity."""
    written = runner.generate(prompts, TOKENS["chat"], 0.0, 0, edits)
    hits = sum(scorer.refused(text) for text in runner.decode(written)) / len(prompts)
    return Outcome(hits, runner.perplexity(prompts, written))


def everywhere_edits(runner: Runner, direction: Tensor, values: Tensor) -> Edits:
    """Set the component along one direction after every block, to a value per layer."""
    return {layer: set_component(direction, float(values[layer])) for layer in range(runner.layers)}


def measure_refusal(runner: Runner, pairs: Path, texts: int = 250) -> dict:
    """Unsteered refusals on held-out requests; ablations; addition."""
    rows = load_pairs(pairs, "refusal", "train")
    harmful = runner.last_states([USER + row["positive"] + BOT for row in rows])
    harmless = runner.last_states([USER + row["negative"] + BOT for row in rows])
    difference, neutral = (harmful - harmless).mean(0), harmless.mean(0)
    choosing = load_pairs(pairs, "refusal", "choose")
    bad = [USER + row["positive"] + BOT for row in choosing]
    good = [USER + row["negative"] + BOT for row in choosing]
    base_bad, base_good = refusals(runner, bad), refusals(runner, good)
    candidates: dict[str, list[tuple[float, dict]]] = defaultdict(list)
    for layer in range(1, runner.layers):
        unit = difference[layer] / difference[layer].norm()
        for kind, values in (("affine", neutral @ unit), ("plain", torch.zeros(runner.layers))):
            outcome = refusals(runner, bad, everywhere_edits(runner, unit, values))
            loss = outcome.hits + penalty(outcome.perplexity / base_bad.perplexity, 1.3)
            candidates[kind].append((loss, {"layer": layer}))
        for strength in (1.0, 1.5, 2.0):
            outcome = refusals(runner, good, {layer: add_at_last(strength * difference[layer])})
            loss = 1 - outcome.hits + penalty(outcome.perplexity / base_good.perplexity, 1.3)
            candidates["add"].append((loss, {"layer": layer, "strength": strength}))
    best = {kind: min(entries, key=lambda entry: entry[0])[1] for kind, entries in candidates.items()}
    tests = {
        "harmful, new combinations": chat_prompts("deed.harm", COMBINATION, texts, 61),
        "harmful, new verbs and objects": chat_prompts("deed.harm", HELD_OUT, texts, 62),
        "harmless, new combinations": chat_prompts("deed.safe", COMBINATION, texts, 63),
        "harmless, new verbs and objects": chat_prompts("deed.safe", HELD_OUT, texts, 64),
    }
    base = {name: refusals(runner, prompts) for name, prompts in tests.items()}
    result: dict = {"unsteered": {name: outcome.hits for name, outcome in base.items()}}
    for kind in ("affine", "plain"):
        layer = best[kind]["layer"]
        unit = difference[layer] / difference[layer].norm()
        values = neutral @ unit if kind == "affine" else torch.zeros(runner.layers)
        edits = everywhere_edits(runner, unit, values)
        shares, ratios = {}, {}
        for name, prompts in tests.items():
            outcome = refusals(runner, prompts, edits)
            shares[name], ratios[name] = outcome.hits, outcome.perplexity / base[name].perplexity
        projections = {"harmful": float((harmful.mean(0) @ unit)[layer]), "harmless": float((neutral @ unit)[layer])}
        result[kind] = {"layer": layer, "shares": shares, "ratios": ratios, "projections at the layer": projections}
    layer, strength = best["add"]["layer"], best["add"]["strength"]
    result["add"] = {"layer": layer, "strength": strength, "shares": {}, "ratios": {}}
    for name in ("harmless, new combinations", "harmless, new verbs and objects"):
        outcome = refusals(runner, tests[name], {layer: add_at_last(strength * difference[layer])})
        result["add"]["shares"][name] = outcome.hits
        result["add"]["ratios"][name] = outcome.perplexity / base[name].perplexity
    return result
