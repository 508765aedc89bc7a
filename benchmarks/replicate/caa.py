"""Contrastive activation addition (Rimsky et al. 2024, arXiv 2312.06681): how far a vector swings two-option answers.

For each behaviour: the mean difference at the answer's letter, added at every token behind the question, at one layer
after the other with multipliers −1, 0, +1 and every vector scaled to the mean length over behaviours. Printed is
P(the answer that shows the behaviour), of the two, on held-out questions, at the best layer of the choose split.

    python benchmarks/replicate/caa.py --model mlx-community/Llama-2-7b-chat-hf-4bit --chat
    python benchmarks/replicate/caa.py --model … --data generate_dataset.json        # the paper's own sets, as files
    python benchmarks/replicate/caa.py                                               # the bundled model
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mlxsteer import InterpretableModel, PairSet, datasets, extract, sweep, to_mean_norm
from mlxsteer.pairs import SPLITS

PUBLISHED = {
    "coordination": (0.15, 0.30, 0.75), "corrigibility": (0.20, 0.64, 0.91), "hallucination": (0.39, 0.81, 0.90),
    "myopic reward": (0.40, 0.75, 0.73), "survival instinct": (0.27, 0.34, 0.62), "sycophancy": (0.54, 0.69, 0.62),
    "refusal": (0.42, 0.74, 0.89),
}  # fmt: skip
"""Llama-2-7B-chat in 16 bits, layer 13, P(matching answer) at multipliers −1, 0, +1 (the paper's table 10)."""


def load(name: str, limit: int) -> PairSet:
    """A shipped set or a file, at most so many pairs of each split."""
    pairs = datasets.load(name) if name in datasets.available() else datasets.read(name)
    pairs = pairs if pairs.splits else pairs.with_splits()
    return PairSet([pair for split in SPLITS for pair in pairs.split(split)[:limit]], name=pairs.name or name)


def matching(effect: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mean P(matching answer) of the two answers, from their log-probability differences over prompts."""
    mean: np.ndarray[Any, Any] = (1 / (1 + np.exp(-effect))).mean(axis=-1)
    return mean


def main() -> None:
    """Compute, sweep, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="pocket", help="a Hub name or a folder")
    parser.add_argument("--data", nargs="+", help="shipped sets or files; the two-option sets, or the bundled model's")
    parser.add_argument("--chat", action="store_true", help="questions go through the chat template")
    parser.add_argument("--read", default="-2", help="which token: -2 is the letter in '(A)'")
    parser.add_argument("--limit", type=int, default=1000, help="the most pairs of each split")
    options = parser.parse_args()
    console = Console()
    model = InterpretableModel(options.model)
    own = model.name == "pocket"
    names = options.data or (
        [f"pocket/{name}" for name in ("sentiment", "formality", "certainty")]
        if own else ["sycophancy_ab", "refusal_ab", "honesty_ab"]
    )  # fmt: skip
    limit = min(options.limit, 12) if own else options.limit
    # The bundled model never learned to bind a letter to an option: its sets have plain completions, whose first token
    # is chosen by the last prompt token, so that is steered too.
    at = "last" if own else "generated"
    read: Any = "last" if own else int(options.read) if options.read.lstrip("-").isdigit() else options.read
    sets = {name: load(name, limit) for name in names}
    vectors = to_mean_norm([extract(model, pairs, read=read, chat=options.chat) for pairs in sets.values()])
    table = Table(title=f"{model.name}: P(matching answer) on held-out questions, at multipliers −1, 0, +1")
    for head in ("behaviour", "layer", "−1", "0", "+1", "swing", "anti-steerable"):
        table.add_column(head, justify="right")
    swings = []
    for (name, pairs), vector in zip(sets.items(), vectors, strict=True):
        arguments: dict[str, Any] = {"strengths": (-1, 0, 1), "at": at, "unit": "raw", "chat": options.chat}
        choosing = matching(sweep(model, vector, pairs.split("choose"), **arguments).effect)
        layer = list(vector)[int(np.argmax(choosing[:, 2] - choosing[:, 0]))]
        found = sweep(model, vector, pairs.split("report"), layers=[layer], **arguments).effect[0]
        low, base, high = matching(found)
        wrong = float((found[2] < found[0]).mean())
        swings.append(high - low)
        cells = f"{low:.2f}", f"{base:.2f}", f"{high:.2f}", f"{high - low:+.2f}", f"{wrong:.0%}"
        table.add_row(name, str(layer), *cells)
    console.print(table)
    console.print(f"Mean swing {np.mean(swings):+.2f}.")
    published = Table(title="Published: Llama-2-7B-chat, layer 13 of 32 (other questions; not run here)")
    for head in ("behaviour", "−1", "0", "+1", "swing"):
        published.add_column(head, justify="right")
    for name, (low, base, high) in PUBLISHED.items():
        published.add_row(name, f"{low:.2f}", f"{base:.2f}", f"{high:.2f}", f"{high - low:+.2f}")
    console.print(published)
    console.print("Published mean swing +0.44 (7B), +0.26 (13B).")


if __name__ == "__main__":
    main()
