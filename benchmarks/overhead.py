"""What reading and steering cost, as ratios to bare mlx-lm measured in the same run.

Timings are interleaved (bare, ours, bare, ours, …); the median of the ratios is printed, with its quartiles.

    python benchmarks/overhead.py                       # the bundled model and a random deep narrow one
    python benchmarks/overhead.py --model mlx-community/Llama-3.2-1B-Instruct-4bit
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import llama
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlxsteer import InterpretableModel
from mlxsteer import interventions as iv

BARS = {
    "stage a forward, all blocks hooked": 1.15,
    "read layer ⌊0.4 L⌋": 0.48,
    "trace, logits evaluated": 1.03,
    "memory of a trace that read nothing": 1.10,
}


def deep_narrow() -> InterpretableModel:
    """A random llama of 48 layers and width 64: the hooks' own cost shows most where blocks are small."""
    mx.random.seed(0)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=64,
            num_hidden_layers=48,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=512,
        )
    )
    mx.eval(model.parameters())
    return InterpretableModel(model)


def seconds(run: Callable[[], Any]) -> float:
    """Wall seconds of one call; a call that returns a float has timed itself."""
    start = time.perf_counter()
    own = run()
    return own if isinstance(own, float) else time.perf_counter() - start


def paired(bare: Callable[[], Any], ours: Callable[[], Any], repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Interleaved timings of two calls, in seconds."""
    bare(), ours()
    times = np.array([(seconds(bare), seconds(ours)) for _ in track(range(repeats), transient=True)])
    return times[:, 0], times[:, 1]


def measure(model: InterpretableModel, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Every ratio for one model.

    Args:
        model: the model.
        tokens: length of the prompt.
        repeats: pairs of timings for each ratio; staging, short and cheap, takes at least 200.
    """
    mx.random.seed(1)
    vocabulary = model._sites.modules["embed"].weight.shape[0]
    prompt = [int(t) for t in np.array(mx.random.randint(10, vocabulary, (tokens,)))]
    array, bare = mx.array([prompt]), model.model
    layer = int(0.4 * len(model.layers))
    width = model._sites.width(model._sites.resolve("layers.0")) or 1
    steer = {"layers.*": iv.add_vector(mx.random.normal((width,)), 0.01)}

    def stage() -> None:
        bare(array)

    def forward() -> None:
        mx.eval(bare(array))

    def trace_and_read() -> None:
        with model.trace(prompt) as trace:
            mx.eval(trace.activations[f"layers.{layer}"])

    def trace_and_logits() -> None:
        with model.trace(prompt):
            mx.eval(model.output)

    def open_and_close() -> None:
        with model.trace(prompt):
            pass

    many = max(repeats, 200)
    rows = []
    with model.record("layers.*") as seen:
        recorded = list(seen.values())

        def stage_and_drop() -> None:  # what was captured is dropped, as the bare forward drops its result
            bare(array)
            for values in recorded:
                values.clear()

        rows.append(ratio("stage a forward, all blocks hooked", paired(_paused(model, stage), stage_and_drop, many)))
    with model.steer(steer):
        plain = _paused(model, stage)
        rows.append(ratio("stage a forward, a vector added at every block", paired(plain, stage, many)))
        plain = _paused(model, forward)
        rows.append(ratio("forward, a vector added at every block", paired(plain, forward, repeats)))
    rows.append(ratio("open and close a trace", paired(stage, open_and_close, many)))
    rows.append(ratio("read layer ⌊0.4 L⌋", paired(forward, trace_and_read, repeats)))
    rows.append(ratio("trace, logits evaluated", paired(forward, trace_and_logits, repeats)))
    rows.append(memory(model, prompt))
    return rows


def ratio(name: str, times: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Median and quartiles of ours / bare."""
    low, middle, high = np.percentile(times[1] / times[0], [25, 50, 75])
    bare, ours = (1e3 * float(np.median(t)) for t in times)
    return {"name": name, "ratio": middle, "low": low, "high": high, "bare_ms": bare, "ours_ms": ours}


def _paused(model: InterpretableModel, run: Callable[[], Any]) -> Callable[[], float]:
    """Time a call of the bare model in the middle of an open context: its classes are given back for that long."""

    def timed() -> float:
        swapped = [(module, type(module)) for module in model.model.modules() if hasattr(type(module), "_hooked")]
        for module, cls in swapped:
            object.__setattr__(module, "__class__", cls._hooked)
        try:
            return seconds(run)
        finally:
            for module, cls in swapped:
                object.__setattr__(module, "__class__", cls)

    return timed


def memory(model: InterpretableModel, prompt: list[int]) -> dict[str, Any]:
    """Memory held by a trace whose logits were evaluated and of which nothing else was read, over a forward's peak."""
    mx.clear_cache()
    mx.reset_peak_memory()
    mx.eval(model.model(mx.array([prompt])))
    peak = mx.get_peak_memory()
    mx.clear_cache()
    mx.reset_peak_memory()
    with model.trace(prompt) as trace:
        mx.eval(model.output)
    held, ours = mx.get_active_memory(), mx.get_peak_memory()
    assert trace.closed
    return {"name": "memory of a trace that read nothing", "ratio": held / peak, "low": None, "high": None,
            "bare_mb": peak / 1e6, "held_mb": held / 1e6, "peak_ratio": ours / peak}  # fmt: skip


def report(console: Console, name: str, rows: list[dict[str, Any]]) -> bool:
    """Print one model's ratios; whether every bar is met."""
    table = Table(title=name)
    for head in ("", "ours / bare", "quartiles", "bare", "ours", "bar"):
        table.add_column(head, justify="left" if not head else "right")
    fine = True
    for row in rows:
        bar = BARS.get(row["name"])
        fine &= bar is None or row["ratio"] <= bar
        spread = f"{row['low']:.3f} to {row['high']:.3f}" if row["low"] is not None else ""
        both = (f"{row['bare_ms']:.2f} ms", f"{row['ours_ms']:.2f} ms") if "bare_ms" in row else (
            f"{row['bare_mb']:.1f} MB peak", f"{row['held_mb']:.1f} MB held")  # fmt: skip
        mark = "" if bar is None else f"≤ {bar} {'met' if row['ratio'] <= bar else 'missed'}"
        table.add_row(row["name"], f"{row['ratio']:.3f}", spread, *both, mark)
    console.print(table)
    return fine


def main() -> None:
    """Measure, print, and optionally save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", action="append", help="a Hub name or a folder, in place of the two built-in models")
    parser.add_argument("--tokens", type=int, default=32, help="length of the prompt")
    parser.add_argument("--repeats", type=int, default=41, help="pairs of timings for each ratio")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    console = Console()
    models = (
        {name: InterpretableModel(name) for name in options.model}
        if options.model
        else {"pocket (8 layers, 4-bit)": InterpretableModel("pocket"), "random llama, 48 layers": deep_narrow()}
    )
    machine = f"{platform.system()} {platform.machine()}, {mx.default_device()}"
    console.print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, {machine}; {options.tokens} tokens")
    figures = {name: measure(model, options.tokens, options.repeats) for name, model in models.items()}
    met = [report(console, name, rows) for name, rows in figures.items()]
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "figures": figures}, file, indent=2)
    console.print("every bar is met" if all(met) else "a bar is missed")


if __name__ == "__main__":
    main()
