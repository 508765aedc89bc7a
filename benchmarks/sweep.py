"""What a layer × strength sweep costs against the plain ways, with the largest difference between their effects.

* pairs, all positions steered: against a plain batched loop (one forward of the whole model for each layer and
  strength);
* prompts, only the last token steered, a score of the next token: against one prompt at a time (a forward for each
  layer, strength and prompt);
* pairs, only the last prompt token steered, the completions scored: the same. What is saved here is the prompts; the
  completions run for every layer and strength in both ways.

    python benchmarks/sweep.py                                 # the bundled model, 8 layers × 6 strengths × 32 pairs
    python benchmarks/sweep.py --depths 8 16 32 --pairs 4      # random models of growing depth, prompts only
    python benchmarks/sweep.py --model mlx-community/Llama-3.2-1B-Instruct-4bit
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import llama
from rich.console import Console
from rich.table import Table

from mlxsteer import ContrastPair, InterpretableModel, SteeringVector, datasets, sweep
from mlxsteer import interventions as iv

STRENGTHS = (-0.6, -0.4, -0.2, 0.2, 0.4, 0.6)


def deep(layers: int, tokenizer: Any) -> InterpretableModel:
    """A random llama of some depth with the bundled model's vocabulary."""
    mx.random.seed(0)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=256, num_hidden_layers=layers, intermediate_size=512,
            num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=4096,
        )
    )  # fmt: skip
    mx.eval(model.parameters())
    return InterpretableModel(model, tokenizer)


def random_vector(model: InterpretableModel) -> SteeringVector:
    """A random direction for every layer, in the unit of its own length."""
    mx.random.seed(1)
    width = model._sites.width(model._sites.resolve("layers.0")) or 1
    layers = range(len(model.layers))
    return SteeringVector({i: mx.random.normal((width,)) for i in layers}, residual_norms=dict.fromkeys(layers, 10.0))


def logprobs(logits: mx.array, tokens: Sequence[int], prompt: int) -> mx.array:
    """Log-probability of a text's completion from its logits, (tokens, vocabulary)."""
    logits = logits.astype(mx.float32)
    rows = logits[prompt - 1 : len(tokens) - 1]
    chosen = mx.take_along_axis(rows, mx.array(list(tokens[prompt:]))[:, None], axis=-1)[:, 0]
    return mx.sum(chosen - mx.logsumexp(rows, axis=-1))


def next_token(logits: mx.array) -> mx.array:
    """A score of prompts that fits every model: the log-probability of one token, (rows,)."""
    return logits[:, 100] - mx.logsumexp(logits, axis=-1)


def plain(
    model: InterpretableModel, vector: SteeringVector, asked: list[Any], at: Any, *, batched: bool
) -> np.ndarray[Any, Any]:
    """The effect by one forward of the whole model for each layer and strength, of all texts at once or one by one."""
    if isinstance(asked[0], ContrastPair):
        given = [(pair.prompt, side) for side in ("positive", "negative") for pair in asked]
        texts = [
            (model.encode(prompt + getattr(pair, side)), len(model.encode(prompt)))
            for (prompt, side), pair in zip(given, [*asked, *asked], strict=True)
        ]
    else:
        texts = [(model.encode(prompt), len(model.encode(prompt))) for prompt in asked]
    effect = np.zeros((len(vector), len(STRENGTHS), len(asked)))
    for i, layer in enumerate(vector):
        unit = vector[layer] * (vector.residual_norms[layer] / vector.norms[layer])
        for j, strength in enumerate(STRENGTHS):
            steering = {f"layers.{layer}": iv.add_vector(unit, strength, at=at)}
            found = []
            for group in [texts] if batched else [[text] for text in texts]:
                with model.trace([t for t, _ in group], steering, prompt_tokens=[n for _, n in group]):
                    logits = model.output
                if isinstance(asked[0], ContrastPair):
                    scores = [logprobs(row, *text) for row, text in zip(logits, group, strict=True)]
                else:
                    scores = [next_token(row[len(t) - 1][None])[0] for row, (t, _) in zip(logits, group, strict=True)]
                mx.eval(scores)
                found += [float(np.array(s)) for s in scores]
            pairs = isinstance(asked[0], ContrastPair)
            effect[i, j] = np.array(found[: len(asked)]) - (np.array(found[len(asked) :]) if pairs else 0)
    return effect


def compare(
    model: InterpretableModel, vector: SteeringVector, pairs: list[ContrastPair], repeats: int, *, last_only: bool
) -> list[Any]:
    """Seconds of both ways, for each kind of positions, and the largest difference of an effect."""
    rows = []
    kinds: list[tuple[list[Any], Any, bool, str]] = [
        (pairs, "all", True, "pairs, all positions, batched loop"),
        ([pair.prompt for pair in pairs], -1, False, "prompts, last token, one by one"),
        (pairs, -1, False, "pairs, last prompt token, one by one"),
    ]
    for asked, at, batched, name in kinds[1:2] if last_only else kinds:
        metric: Any = "logprob_difference" if asked is pairs else next_token
        ours, theirs, apart = [], [], 0.0
        for _ in range(repeats):
            start = time.perf_counter()
            grid = sweep(model, vector, asked, strengths=STRENGTHS, at=at, metric=metric, progress=False)  # type: ignore[arg-type]
            middle = time.perf_counter()
            expected = plain(model, vector, asked, at, batched=batched)
            theirs.append(time.perf_counter() - middle)
            ours.append(middle - start)
            apart = max(apart, float(np.abs(grid.effect - expected).max()))
        took = float(np.median(ours)), float(np.median(theirs))
        rows.append({"what": name, "ours": took[0], "plain": took[1], "ratio": took[1] / took[0], "apart": apart})
    return rows


def main() -> None:
    """Measure, print, and optionally save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="pocket", help="a Hub name or a folder")
    parser.add_argument("--depths", type=int, nargs="*", default=[], help="random models of so many layers instead")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    console = Console()
    pocket = InterpretableModel("pocket")
    models = {f"random, {n} layers": deep(n, pocket.tokenizer) for n in options.depths}
    models = models or {options.model: pocket if options.model == "pocket" else InterpretableModel(options.model)}
    pairs = random.Random(0).sample(
        [p for p in datasets.load("pocket/sentiment") if p.split == "choose"],
        options.pairs,
    )
    machine = f"{platform.system()} {platform.machine()}, {mx.default_device()}"
    console.print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, {machine}; {len(pairs)} pairs")
    table = Table()
    for head in ("model", "steered, against", "sweep", "plain", "× faster", "largest difference (nats)"):
        table.add_column(head, justify="right")
    figures: dict[str, Any] = {}
    for name, model in models.items():
        figures[name] = compare(model, random_vector(model), pairs, options.repeats, last_only=bool(options.depths))
        for row in figures[name]:
            table.add_row(name, row["what"], f"{row['ours']:.2f} s", f"{row['plain']:.2f} s", f"{row['ratio']:.2f}",
                          f"{row['apart']:.1e}")  # fmt: skip
    console.print(table)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "figures": figures}, file, indent=2)


if __name__ == "__main__":
    main()
