"""What computing a steering vector costs, against a plain loop and against bare mlx-lm cut off by hand.

The plain loop runs one full forward with logits per text. The hand-cut pass is what an expert would write without this
package: padded batches through the blocks up to the last layer asked for, one read, one sum. Rounds are interleaved;
medians are shown.

    python benchmarks/extraction.py                        # the bundled model
    python benchmarks/extraction.py --model mlx-community/Llama-3.2-1B-Instruct-4bit --pairs 50 200
    python benchmarks/extraction.py --memory               # peak memory for 50, 200 and 800 pairs, and time per pair
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_attention_mask
from rich.console import Console
from rich.table import Table

from mlxsteer import ContrastPair, InterpretableModel, datasets, estimate, extract


def shared_pairs(count: int) -> list[ContrastPair]:
    """Pairs that share most of their text: a long prompt from the bundled sets, and one word of praise or blame."""
    source = [pair for pair in datasets.load("pocket/sentiment") if pair.split == "train"]
    rng = random.Random(0)
    openings = [
        "We talked for a long time.",
        "Here is what I thought.",
        "Let me tell you about it.",
        "This is my review.",
    ]
    words = [(" good", " bad"), (" great", " awful"), (" lovely", " dreadful"), (" superb", " horrible")]
    made = []
    for index in range(count):
        pair, (positive, negative) = source[index % len(source)], rng.choice(words)
        made.append(ContrastPair(f"{' '.join(rng.sample(openings, 2))} {pair.prompt}", positive, negative))
    return made


def apart_pairs(count: int) -> list[ContrastPair]:
    """Pairs of the same lengths that share nothing but BOS."""
    first, second = shared_pairs(count), shared_pairs(2 * count)[count:]
    return [
        ContrastPair("", f"Good. {a.prompt}{a.positive}", f"Bad. {b.prompt}{b.negative}")
        for a, b in zip(first, second, strict=True)
    ]


def even_pairs(model: InterpretableModel, count: int) -> list[ContrastPair]:
    """Pairs of one length, so that however many they are, the same number fills a batch."""
    made = shared_pairs(8 * count)
    lengths = [tuple(len(model.encode(p.prompt + side)) for side in (p.positive, p.negative)) for p in made]
    commonest = max(set(lengths), key=lengths.count)
    chosen = [pair for pair, length in zip(made, lengths, strict=True) if length == commonest]
    return (chosen * (1 + count // len(chosen)))[:count]


def loop(model: InterpretableModel, pairs: list[ContrastPair], layers: range) -> mx.array:
    """One full forward with logits per text, and every block's output at the last token."""
    total = mx.array(0.0)
    for pair in pairs:
        for side, sign in ((pair.positive, 1.0), (pair.negative, -1.0)):
            ids = mx.array([model.encode(pair.prompt + side)])
            with model.trace(ids) as trace:
                taken = [trace.activations[f"layers.{layer}"][0, -1].astype(mx.float32) for layer in layers]
                logits = model.output
            total = total + sign * mx.stack(taken)
            mx.eval(total, logits)
    return total / len(pairs)


def cut(model: InterpretableModel, pairs: list[ContrastPair], layers: range, budget: int) -> mx.array:
    """Bare mlx-lm, batches of both sides padded to their longest, through the blocks up to the last layer asked for."""
    inner: Any = model.model.model
    rows = [(model.encode(p.prompt + side), sign) for p in pairs for side, sign in ((p.positive, 1), (p.negative, -1))]
    rows.sort(key=lambda row: len(row[0]))
    total = mx.array(0.0)
    while rows:
        count = max(1, budget // len(rows[0][0]))
        while count > 1 and count * len(rows[min(count, len(rows)) - 1][0]) > budget:
            count -= 1
        batch, rows = rows[:count], rows[count:]
        width = max(len(ids) for ids, _ in batch)
        h = inner.embed_tokens(mx.array([ids + [0] * (width - len(ids)) for ids, _ in batch]))
        mask = create_attention_mask(h, None)
        last = mx.array([len(ids) - 1 for ids, _ in batch])
        signs = mx.array([float(sign) for _, sign in batch])
        taken = []
        for layer in range(layers.stop):
            h = inner.layers[layer](h, mask, None)
            taken.append(h[mx.arange(len(batch)), last].astype(mx.float32))
        total = total + mx.sum(signs[None, :, None] * mx.stack(taken), axis=1)
        mx.eval(total)
    return total / len(pairs)


def seconds(run: Callable[[], Any]) -> float:
    """Wall seconds of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ways_of(
    model: InterpretableModel, pairs: list[ContrastPair], layers: range, budget: int
) -> dict[str, Callable[[], Any]]:
    """The ways to compute one vector; by hand only where this program knows the model's parts."""

    def ours() -> Any:
        return extract(model, pairs, layers=list(layers), batch_tokens=budget, progress=False)

    ways: dict[str, Callable[[], Any]] = {"ours": ours, "loop": functools.partial(loop, model, pairs, layers)}
    if getattr(model.model, "model_type", "") == "llama":
        ways["cut"] = functools.partial(cut, model, pairs, layers, budget)
    return ways


def speed(model: InterpretableModel, counts: list[int], budget: int, repeats: int) -> list[dict[str, Any]]:
    """Pairs per second of the three ways, for pairs that share most of their text and for pairs that share nothing."""
    depth = len(model.layers)
    found = []
    for kind, make in (("shared", shared_pairs), ("apart", apart_pairs)):
        for label, layers in (("≤ 40 % depth", range(max(1, int(0.4 * depth)))), ("all", range(depth))):
            for count in counts:
                pairs = make(count)

                ways = ways_of(model, pairs, layers, budget)
                agree(ways["ours"](), {name: way() for name, way in ways.items() if name != "ours"})
                times: dict[str, list[float]] = {name: [] for name in ways}
                for _ in range(repeats):
                    for name, way in ways.items():
                        times[name].append(seconds(way))
                took = {name: float(np.median(values)) for name, values in times.items()}
                found.append({"pairs": count, "kind": kind, "layers": label, **took})
    return found


def agree(vector: Any, others: dict[str, mx.array]) -> None:
    """The ways compute the same vector, or the timing means nothing."""
    own = np.stack([np.array(vector[layer]) for layer in vector])
    for name, other in others.items():
        apart = float(np.abs(own - np.array(other)).max())
        assert apart <= 1e-3 * max(vector.residual_norms.values()), (name, apart)


def memory(model: InterpretableModel, counts: list[int]) -> list[dict[str, Any]]:
    """Peak memory above the weights with a budget that 25 pairs fill, and time per pair."""
    whole = even_pairs(model, max(counts))
    budget = 25 * 2 * len(model.encode(whole[0].prompt + whole[0].negative))
    found = []
    for count in counts:
        pairs = whole[:count]
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        start = time.perf_counter()
        extract(model, pairs, batch_tokens=budget, progress=False)
        took = time.perf_counter() - start
        guess = estimate(model, pairs, batch_tokens=budget)
        peak = (mx.get_peak_memory() - before) / 1e6
        expected = (guess.batch_bytes + guess.kept_bytes) / 1e6
        found.append({"pairs": count, "peak_mb": peak, "ms_per_pair": 1e3 * took / count, "estimate_mb": expected})
    return found


def main() -> None:
    """Measure, print, and optionally save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="pocket", help="a Hub name or a folder")
    parser.add_argument("--pairs", type=int, nargs="+", default=[50, 200, 800])
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure memory and time per pair in place of speed")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    console = Console()
    model = InterpretableModel(options.model)
    machine = f"{platform.system()} {platform.machine()}, {mx.default_device()}"
    console.print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, {machine}; {model!r}")
    table = Table()
    if options.memory:
        figures = memory(model, options.pairs)
        for head in ("pairs", "peak above the weights", "of the first", "ms per pair", "estimate"):
            table.add_column(head, justify="right")
        for row in figures:
            over = row["peak_mb"] / figures[0]["peak_mb"]
            cells = (
                f"{row['peak_mb']:.1f} MB",
                f"{over:.2f}",
                f"{row['ms_per_pair']:.1f}",
                f"{row['estimate_mb']:.1f} MB",
            )
            table.add_row(str(row["pairs"]), *cells)
    else:
        figures = speed(model, options.pairs, options.batch_tokens, options.repeats)
        for head in ("pairs", "layers", "n", "pairs/s", "× the plain loop", "× cut by hand"):
            table.add_column(head, justify="right")
        for row in figures:
            ratios = [f"{row[name] / row['ours']:.2f}" if name in row else "" for name in ("loop", "cut")]
            kind = "share most" if row["kind"] == "shared" else "share nothing"
            table.add_row(kind, row["layers"], str(row["pairs"]), f"{row['pairs'] / row['ours']:.1f}", *ratios)
    console.print(table)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "figures": figures}, file, indent=2)


if __name__ == "__main__":
    main()
