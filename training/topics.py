"""Topics measured on the shipped model: stories on an asked topic, and a topic leaking into unrelated answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mlxsteer.pocket import scorer
from mlxsteer.pocket.grammar import TOPICS

from .corpus import HELD_OUT, TRAIN
from .pairs import load_pairs
from .refusal import chat_prompts
from .runner import Runner
from .steering import TOKENS, WHERE, Setting, penalty

TOPIC_EFFECTS = ("stories", "leak into answers")
STRENGTHS = {"last": (2.0, 4.0), "all": (0.3, 0.4, 0.5)}
Judge = Callable[[dict[str, list[str]]], dict[str, float]]


def topic_vectors(runner: Runner, pairs: Path) -> dict[str, Tensor]:
    """Mean state of a topic's texts less the mean over all topics, (layers, hidden) each."""
    texts: dict[str, list[str]] = defaultdict(list)
    for row in load_pairs(pairs, "topic", "train"):
        texts[row["group"]].append(row["prompt"] + row["positive"])
    means = {name: runner.last_states(texts[name]).mean(0) for name in TOPICS}
    centre = torch.stack(list(means.values())).mean(0)
    return {name: mean - centre for name, mean in means.items()}


def write_on_topics(
    runner: Runner, prompts: Sequence[str], vectors: dict[str, Tensor], setting: Setting, seed: int
) -> tuple[dict[str, list[str]], float]:
    """All ten topics in one batch: texts per topic, and the perplexity of all of them."""
    rows = torch.stack([vectors[name][setting.layer] for name in TOPICS]).repeat_interleave(len(prompts), 0)
    edit = WHERE[setting.where](setting.strength * rows[:, None])
    everything = list(prompts) * len(TOPICS)
    written = runner.generate(everything, TOKENS["topic"], 1.0, seed, {setting.layer: edit})
    texts = runner.decode(written)
    per_topic = {name: texts[i * len(prompts) : (i + 1) * len(prompts)] for i, name in enumerate(TOPICS)}
    return per_topic, runner.perplexity(everything, written)


def on_topic(texts: dict[str, list[str]]) -> dict[str, float]:
    """Share of texts whose main topic is the wanted one."""
    return {name: sum(scorer.topic(text) == name for text in part) / len(part) for name, part in texts.items()}


def leaked(texts: dict[str, list[str]]) -> dict[str, float]:
    """Share of texts that mention the wanted topic."""
    return {name: sum(scorer.mentions(text, name) for text in part) / len(part) for name, part in texts.items()}


def choose_setting(runner: Runner, prompts: Sequence[str], vectors: dict[str, Tensor], judge: Judge) -> Setting:
    """One layer, position and strength for all ten topics."""
    base = runner.perplexity(prompts * 4, runner.generate(prompts * 4, TOKENS["topic"], 1.0, 1))
    scored = []
    for layer in range(2, runner.layers):
        for where, strengths in STRENGTHS.items():
            for strength in strengths:
                setting = Setting(layer, where, strength)
                texts, perplexity = write_on_topics(runner, prompts, vectors, setting, 1)
                shares = judge(texts).values()
                value = sum(shares) / len(shares) + 0.5 * min(shares) - penalty(perplexity / base, 1.9)
                scored.append((value, setting))
    return max(scored, key=lambda entry: entry[0])[1]


def measure_topic_effect(runner: Runner, pairs: Path, effect: str) -> dict:
    """``stories``: on the asked topic. ``leak into answers``: mentions of a pushed topic in unrelated chat answers."""
    vectors = topic_vectors(runner, pairs)
    if effect == "stories":
        judge = on_topic
        choosing = list(dict.fromkeys(row["prompt"] for row in load_pairs(pairs, "topic", "choose")))[:12]
        reporting = list(dict.fromkeys(row["prompt"] for row in load_pairs(pairs, "topic", "report")))[:60]
    else:
        judge = leaked
        choosing = chat_prompts("deed.safe", TRAIN, 12, 71)
        reporting = chat_prompts("deed.safe", HELD_OUT, 60, 72)
    setting = choose_setting(runner, choosing, vectors, judge)
    plain = runner.generate(reporting * 4, TOKENS["topic"], 1.0, 2)
    before = runner.decode(plain)
    base = runner.perplexity(reporting * 4, plain)
    texts, perplexity = write_on_topics(runner, reporting, vectors, setting, 3)
    return {
        "layer": setting.layer,
        "where": setting.where,
        "strength": setting.strength,
        "texts each": len(reporting),
        "unsteered": judge(dict.fromkeys(TOPICS, before)),
        "shares": judge(texts),
        "ratio": perplexity / base,
        "examples": {topic: reporting[0] + texts[topic][0] for topic in TOPICS[:3]},
    }
