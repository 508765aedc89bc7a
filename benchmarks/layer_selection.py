"""Which layer should be steered? Every layer measured at equal side effects, and three ways to choose.

For each layer: the strength that spends the budget of KL on neutral text, the shift of the preference on the report
split with its interval, what random vectors of the same length do, and the share of pairs that move the wrong way. Then
what the layer chosen by `select` reaches, against the layer with the longest vector and the middle third of the
network, and what choosing cost.

    python benchmarks/layer_selection.py                                     # the bundled model, sentiment
    python benchmarks/layer_selection.py --data pocket/certainty --at all --kl 0.5
    python benchmarks/layer_selection.py --model mlx-community/Llama-3.2-1B-Instruct-4bit --data sycophancy_ab --out run
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlxsteer import Choice, InterpretableModel, PairSet, SteeringVector, datasets, extract, select
from mlxsteer.pairs import SPLITS


@dataclass(frozen=True)
class Row:
    """What is known of one layer."""

    layer: int
    norm: float
    choice: Choice

    def figures(self) -> dict[str, float]:
        """By name, for tables and files."""
        found, one = self.choice.evidence, self.choice.candidates[0]
        return {
            "layer": self.layer, "vector_length": self.norm, "strength": self.choice.strength, "spent": one.spent,
            "auroc": one.separation, "agreement": one.agreement, "effect_choose": one.effect,
            "effect_report": found.shift.value, "low": found.shift.low, "high": found.shift.high,
            "anti_steerable": found.curve.anti_steerable, "null_mean": float(np.mean(found.nulls)),
            "null_max": max(found.nulls), "p": found.p_value, "block_tokens": self.choice.block_tokens,
        }  # fmt: skip


def subset(pairs: PairSet, counts: list[int], seed: int) -> PairSet:
    """At most so many pairs of each split, drawn by chance."""
    pairs = pairs if pairs.splits else pairs.with_splits(seed=seed)
    parts = [pairs.split(name).shuffled(seed)[:count] for name, count in zip(SPLITS, counts, strict=True)]
    return PairSet([pair for part in parts for pair in part], name=pairs.name)


def ways(chosen: Choice, vector: SteeringVector, rows: list[Row]) -> dict[str, tuple[str, float]]:
    """Effect on the report split of three ways to choose: by `select`, by length, and the mean of the middle third."""
    effect = {row.layer: row.choice.evidence.shift.value for row in rows}
    longest = max(effect, key=lambda layer: vector.norms[layer])
    layers = sorted(effect)
    middle = layers[len(layers) // 3 : len(layers) - len(layers) // 3]
    name = " + ".join(map(str, chosen.strengths))
    return {
        "select": (name, chosen.evidence.shift.value),
        "longest vector": (str(longest), effect[longest]),
        "middle third, on average": (f"{middle[0]}–{middle[-1]}", float(np.mean([effect[layer] for layer in middle]))),
        "best of all, looked up": (str(max(effect, key=effect.__getitem__)), max(effect.values())),
    }


def picture(rows: list[Row], chosen: Choice, title: str) -> Figure:
    """Effects on the report split with intervals, over the range of what random vectors do."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    x = [row.layer for row in rows]
    found = [row.choice.evidence for row in rows]
    axes.fill_between(x, [min(f.nulls) for f in found], [max(f.nulls) for f in found], color="#bbbbbb", alpha=0.6,
                      label=f"{len(found[0].nulls)} random vectors")  # fmt: skip
    value = np.array([f.shift.value for f in found])
    spread = np.array([[f.shift.value - f.shift.low, f.shift.high - f.shift.value] for f in found]).T
    axes.errorbar(x, value, yerr=spread, fmt="o-", color="#dd6b20", capsize=3, label="steering, 95 % interval")
    for layer in chosen.strengths:
        axes.axvline(layer, color="#2b6cb0", linestyle=":", label=f"select: layer {layer}")
    axes.set(xlabel="layer", ylabel="shift of the preference (nats)", title=title)
    axes.set_xticks(x)
    axes.legend(fontsize="small")
    return figure


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="pocket", help="a Hub name or a folder")
    parser.add_argument("--data", default="pocket/sentiment", help="a shipped contrast set, or a file of pairs")
    parser.add_argument("--at", default="-1", help="which tokens are steered: -1, last, all, generated, …")
    parser.add_argument("--kl", type=float, default=0.3, help="mean KL per token on neutral text, in nats")
    parser.add_argument("--read", default="last")
    parser.add_argument("--pairs", type=int, nargs=3, default=[24, 24, 12], metavar=("TRAIN", "CHOOSE", "REPORT"))
    parser.add_argument("--neutral", type=int, default=8, help="neutral prompts")
    parser.add_argument("--tokens", type=int, default=12, help="of each neutral continuation")
    parser.add_argument("--nulls", type=int, default=20)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder for layers.csv, layers.json, layers.png and choice.json")
    return parser.parse_args()


def layer_table(rows: list[Row], chosen: Choice, title: str) -> Table:
    """A row for each layer; the chosen one stands out."""
    table = Table(title=title)
    for head in ("layer", "strength", "KL", "shift [95 %]", "wrong way", "random: mean, max", "p", "AUROC", "length"):
        table.add_column(head, justify="right")
    for row in rows:
        f = row.figures()
        table.add_row(
            str(row.layer), f"{f['strength']:.2f}", f"{f['spent']:.3f}", str(row.choice.evidence.shift),
            f"{f['anti_steerable']:.0%}", f"{f['null_mean']:+.2f}, {f['null_max']:+.2f}", f"{f['p']:.3f}",
            f"{f['auroc']:.2f}", f"{row.norm:.1f}", style="bold" if row.layer in chosen.strengths else None,
        )  # fmt: skip
    return table


def save(folder: Path, rows: list[Row], chosen: Choice, report: dict[str, Any], title: str) -> None:
    """Write layers.csv, layers.json, layers.png, and choice.json: what `mlxsteer/recommendations/` keeps of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = [row.figures() for row in rows]
    with (folder / "layers.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(figures[0]))
        writer.writeheader()
        writer.writerows(figures)
    report = {**report, "layers": figures, "select": json.loads(chosen.to_json())}
    (folder / "layers.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    choice = {"behaviour": chosen.record["pairs_name"], **json.loads(chosen.to_json())}
    (folder / "choice.json").write_text(json.dumps(choice, indent=1) + "\n", encoding="utf-8")
    picture(rows, chosen, title).savefig(folder / "layers.png", dpi=160)


def main() -> None:
    """Measure, print, save."""
    options, console = arguments(), Console()
    console.width = max(console.width, 110)
    model = InterpretableModel(options.model)
    whole = datasets.load(options.data) if options.data in datasets.available() else datasets.read(options.data)
    pairs = subset(whole, options.pairs, options.seed)
    at: Any = int(options.at) if options.at.lstrip("-").isdigit() else options.at
    vector = extract(model, pairs, read=options.read, chat=options.chat, seed=options.seed)
    settings: dict[str, Any] = {
        "vector": vector, "budget": {"kl_mean": options.kl}, "neutral": datasets.neutral(model)[: options.neutral],
        "at": at, "nulls": options.nulls, "tokens": options.tokens, "chat": options.chat, "seed": options.seed,
        "read": options.read, "progress": False,
    }  # fmt: skip
    start = time.perf_counter()
    chosen = select(model, pairs, **settings)
    took = time.perf_counter() - start
    rows = [
        Row(layer, vector.norms[layer], select(model, pairs, layers=[layer], screen=False, combine=False, **settings))
        for layer in track(list(vector), "every layer", console=console)
    ]
    exhaustive = select(model, pairs, screen=False, combine=False, **{**settings, "nulls": 0}).block_tokens
    machine = f"{platform.system()} {platform.machine()}, {mx.default_device()}"
    console.print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, {machine}; {model!r}; {pairs!r}")
    title = f"{options.data}, at={at!r}, kl_mean = {options.kl:g}: shift on the report split, in nats"
    console.print(layer_table(rows, chosen, title))
    reached = ways(chosen, vector, rows)
    best = reached["best of all, looked up"][1]
    for name, (layer, effect) in reached.items():
        console.print(f"{name}: layer {layer}, {effect:+.2f} nats, {effect / best:.0%} of the best")
    console.print(
        f"select took {took:.0f} s; choosing cost {chosen.block_tokens:,} block-tokens, "
        f"{chosen.block_tokens / exhaustive:.0%} of measuring every layer ({exhaustive:,})"
    )
    for warning in chosen.warnings:
        console.print(f"warning: {warning}")
    if options.out:
        report = {"machine": machine, "record": chosen.record, "ways": reached,
                  "block_tokens": {"select": chosen.block_tokens, "every layer": exhaustive}}  # fmt: skip
        save(options.out, rows, chosen, report, f"{model.name}, {options.data}")
        console.print(f"wrote layers.csv, layers.json, layers.png and choice.json to {options.out}")


if __name__ == "__main__":
    main()
