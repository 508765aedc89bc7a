"""Learned edits beside a mean difference, at equal side effects on neutral text.

For each behaviour of the bundled model: the mean difference of the train pairs, LoReFT with and without the preference
term, and ReFT-r1, all at one layer and position, each at the strength that spends the same KL; then the shift on the
report pairs in nats with its interval, and the share of sampled texts that the grammar's scorer calls positive.

    python benchmarks/reft.py                                    # sentiment and formality, layer 4, KL 0.3
    python benchmarks/reft.py --sets sentiment --pairs 24 8 16 --epochs 3 --texts 8
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mlxsteer import InterpretableModel, PairSet, datasets, extract, strength_for, train_reft
from mlxsteer.measures import bootstrap, kl, preference_shift
from mlxsteer.pocket import scorer

LEARNED: dict[str, dict[str, Any]] = {
    "LoReFT": {"method": "loreft"},
    "LoReFT + preference": {"method": "loreft", "preference": 0.5},
    "ReFT-r1": {"method": "reft_r1"},
    "ReFT-r1 + preference": {"method": "reft_r1", "preference": 0.5},
}


def share(model: InterpretableModel, behaviour: str, steer: Mapping[str, Any] | None, prompts: list[str],
          seed: int) -> float:  # fmt: skip
    """How many of the sampled texts are on the first side, as the grammar's scorer has it."""
    texts = model.generate(prompts, steer, max_tokens=24, temp=1.0, seed=seed)
    return float(np.mean([scorer.judge(behaviour)(text) for text in texts]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sets", nargs="+", default=["sentiment", "formality"], choices=["sentiment", "formality", "certainty"]
    )
    parser.add_argument("--methods", nargs="+", default=list(LEARNED), choices=list(LEARNED))
    parser.add_argument("--layer", type=int, default=4)
    parser.add_argument("--at", default="last", help="last, generated, all, or an int such as -1")
    parser.add_argument("--kl", type=float, default=0.3, help="mean KL per token on neutral text, in nats")
    parser.add_argument("--pairs", type=int, nargs=3, default=[128, 48, 64], metavar=("TRAIN", "CHOOSE", "REPORT"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--neutral", type=int, default=16, help="neutral prompts")
    parser.add_argument("--tokens", type=int, default=24, help="of each neutral continuation")
    parser.add_argument("--texts", type=int, default=32, help="sampled texts, one of each report prompt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of where learning begins, and of sampling")
    options = parser.parse_args()
    at: Any = int(options.at) if options.at.lstrip("-").isdigit() else options.at
    console, model = Console(width=120), InterpretableModel("pocket")
    console.print(f"{model!r}; mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, {platform.machine()}; {options}")
    neutral = datasets.neutral(model)[: options.neutral]
    side_effects: dict[str, Any] = {"tokens": options.tokens}
    for name in options.sets:
        whole = datasets.load(f"pocket/{name}")
        splits = zip(("train", "choose", "report"), options.pairs, strict=True)
        pairs = PairSet([pair for split, count in splits for pair in whole.split(split)[:count]], name=name)
        report = pairs.split("report")
        prompts = [pair.prompt for pair in report[: options.texts]]
        title = f"{name}: layer {options.layer}, at={at!r}, KL {options.kl:g} (± 5 %), {len(report)} report pairs"
        table = Table(title=title)
        for head in ("method", "seed", "strength", "KL", "shift [95 %]", "positive texts", "seconds"):
            table.add_column(head, justify="right")
        for seed in options.seeds:
            table.add_row("none", str(seed), "", "", "", f"{share(model, name, None, prompts, seed):.2f}", "")
            begun = time.perf_counter()
            vector = extract(model, pairs, seed=seed)
            found = strength_for(model, vector, options.layer, kl=options.kl, neutral=neutral, at=at, **side_effects)
            steer: dict[str, Any] = dict(vector.at(options.layer, found.value, at, unit="residual"))
            took = time.perf_counter() - begun
            spent = kl(model, steer, neutral, **side_effects).mean
            shift = bootstrap(preference_shift(model, steer, report), seed=seed)
            row = f"{found.value:.2f}", f"{spent:.3f}", str(shift)
            positive = share(model, name, steer, prompts, seed)
            table.add_row("mean difference", str(seed), *row, f"{positive:.2f}", f"{took:.0f}")
            for label in options.methods:
                begun = time.perf_counter()
                learned = train_reft(
                    model, pairs, layers=options.layer, at=at, rank=options.rank, epochs=options.epochs, nulls=0,
                    budget={"kl_mean": options.kl}, neutral=neutral, seed=seed, **LEARNED[label], **side_effects,
                )  # fmt: skip
                took = time.perf_counter() - begun
                positive = share(model, name, learned.interventions, prompts, seed)
                row = f"{learned.strength:.2f}", f"{learned.divergence.mean:.3f}", str(learned.shift)
                table.add_row(label, str(seed), *row, f"{positive:.2f}", f"{took:.0f}")
        console.print(table)


if __name__ == "__main__":
    main()
