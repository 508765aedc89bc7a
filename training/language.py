"""How well the model knows the grammar: loss against its entropy, and whether its texts are grammatical."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlxsteer.pocket import scorer

from .corpus import HELD_OUT, TOKEN_SHARES, TRAIN, Sampler
from .pairs import DOMAINS, review_prompt
from .runner import Runner
from .tokenizer import EOS

USER, BOT = "<|user|>", "<|end|><|assistant|>"


@dataclass(frozen=True)
class Loss:
    """Mean loss of whole texts of one behaviour, nats per token."""

    model: float
    grammar: float  # mean cost of a derivation, the choice of the behaviour included: an upper bound on the entropy
    tokens_per_text: float

    @property
    def excess(self) -> float:
        """Nats per token above the grammar."""
        return self.model - self.grammar


def behaviour_costs(runner: Runner, texts: int = 200) -> dict[str, float]:
    """Cost in nats of the choice of a behaviour: how rare its texts are in the training mix."""
    sampler = Sampler(991)
    rates = {}
    for kind, share in TOKEN_SHARES.items():
        tokens = sum(len(runner.encode(sampler.draw(kind))) for _ in range(texts)) / texts
        rates[kind] = share / tokens
    total = sum(rates.values())
    return {kind: -math.log(rate / total) for kind, rate in rates.items()}


def loss(runner: Runner, kind: str, mode: str, kind_cost: float, texts: int = 160, seed: int = 4242) -> Loss:
    """Loss of fresh texts, each alone from <s> to </s>."""
    sampler = Sampler(seed, mode)
    rows, nats = [], 0.0
    for _ in range(texts):
        text = sampler.draw(kind)
        nats += sampler.nats + kind_cost
        rows.append([*runner.encode(text)[1:], EOS])
    total, count = runner.log_likelihood([""] * texts, rows)
    return Loss(-total / count, nats / count, count / texts)


def prompts_for(kind: str, mode: str, count: int, seed: int) -> list[str]:
    """Prompts that a behaviour's texts begin with; chat prompts end where the answer begins."""
    sampler = Sampler(seed, mode)
    return [_prompt(sampler, kind, index) for index in range(count)]


def _prompt(sampler: Sampler, kind: str, index: int) -> str:
    if kind == "sentiment":
        return review_prompt(sampler, DOMAINS[index % len(DOMAINS)])
    if kind in ("formality", "certainty"):
        return sampler.text(f"s.head.{kind}")
    if kind == "topic":
        return sampler.text("s.open.topic")
    if kind == "chat":
        deed = sampler.text("deed.harm" if index % 2 else "deed.safe")
        return USER + sampler.text("s.request", {"deed": deed}) + BOT
    if kind == "sentiment chat":
        np = sampler.text(f"np.{DOMAINS[index % len(DOMAINS)]}")
        return USER + sampler.text("s.opinion.ask", {"np": np}) + BOT
    symbol = {"formality chat": "s.write.ask", "certainty chat": "s.future.ask", "topic chat": "s.smalltalk"}[kind]
    return USER + sampler.text(symbol) + BOT


def grammatical_share(texts: Sequence[str], prompts: Sequence[str]) -> float:
    """Share of completions that the grammar accepts."""
    return sum(scorer.grammatical(text, prompt) for text, prompt in zip(texts, prompts, strict=True)) / len(texts)


def grammaticality(runner: Runner, kind: str, texts: int = 500, tokens: int = 48) -> dict[str, float]:
    """Share of grammatical texts, greedy and sampled at two temperatures, after training prompts and held-out ones."""
    half = texts // 2
    prompts = prompts_for(kind, TRAIN, half, seed=31) + prompts_for(kind, HELD_OUT, half, seed=32)
    shares = {}
    for name, temperature in (("greedy", 0.0), ("sampled at 0.7", 0.7), ("sampled at 1", 1.0)):
        written = runner.decode(runner.generate(prompts, tokens, temperature, seed=5))
        shares[name] = grammatical_share(written[:half], prompts[:half])
        shares[f"{name}, held-out prompts"] = grammatical_share(written[half:], prompts[half:])
    return shares
