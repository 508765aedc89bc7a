"""Function vectors: what a few heads carry, what as many others do, and what finding them costs.

For each task: zero-shot accuracy, with the vector of the chosen heads, with vectors of as many other heads (mean and
most), on prompts with shuffled labels without and with the vector, with examples; on words that nothing was computed or
chosen from. Then the causal indirect effect of all heads against a loop of one forward for each head and prompt: time,
block-tokens, and the largest difference between the two.

    python benchmarks/heads.py                                        # the bundled model, five tasks, 25 prompts
    python benchmarks/heads.py --tasks antonym past --loop 5          # the loop on 5 of the prompts only
    python benchmarks/heads.py --model mlx-community/Llama-3.2-1B-Instruct-4bit --tasks antonym --top 20
"""

from __future__ import annotations

import argparse
import platform
import time
from importlib.metadata import version

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from mlxsteer import (
    FunctionVector,
    InContextPrompt,
    InterpretableModel,
    datasets,
    function_vector,
    in_context,
    indirect_effects,
    mean_head_values,
)
from mlxsteer import interventions as iv

TASKS = ["antonym", "past", "plural", "gerund", "upper_adjective"]


def vector_of(model: InterpretableModel, task: str, options: argparse.Namespace) -> FunctionVector:
    """A task's function vector, measured on its report words."""
    train, choose, report = (datasets.words(task, split) for split in ("train", "choose", "report"))
    return function_vector(
        model, train, choose=choose, report=report, shots=options.shots, clean=options.clean, trials=options.prompts,
        top=options.top, corrupted=options.corrupted, nulls=options.nulls, seed=options.seed,
    )  # fmt: skip


def loop(model: InterpretableModel, prompts: list[InContextPrompt], means: dict[int, mx.array]) -> np.ndarray:
    """One forward of the whole prompt for each head, and one without."""
    shape = (len(prompts), len(model.layers), max(mean.shape[0] for mean in means.values()))
    effects = np.full(shape, np.nan)
    for row, prompt in enumerate(prompts):
        ids = model.encode(prompt.text)
        target = model.encode(prompt.text + prompt.answer)[len(ids)]
        base = float(np.array(mx.softmax(model.model(mx.array([ids]))[0, -1].astype(mx.float32))[target]))
        for layer, mean in means.items():
            for head in range(mean.shape[0]):
                edit = iv.heads(head, iv.replace_with(mean[head : head + 1], at=-1))
                with model.trace(ids, interventions={f"layers.{layer}.attn.heads": edit}):
                    p = mx.softmax(model.output[0, -1].astype(mx.float32))[target]
                    effects[row, layer, head] = float(np.array(p)) - base
    return effects


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="names of datasets.word_sets()")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--clean", type=int, default=30, help="prompts for the mean values")
    parser.add_argument("--prompts", type=int, default=25, help="corrupted prompts for the effects")
    parser.add_argument("--top", type=int, default=4, help="heads in a vector")
    parser.add_argument("--nulls", type=int, default=5, help="draws of as many other heads")
    parser.add_argument("--corrupted", choices=("shuffled", "zero-shot"), default="zero-shot")
    parser.add_argument("--loop", type=int, default=25, help="prompts that the loop runs; 0 for no loop")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(width=120)
    model = InterpretableModel(options.model)
    own = "pocket/" if model.name == "pocket" else ""
    tasks = [task if "/" in task else own + task for task in options.tasks]
    console.print(f"{model!r}; mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, {platform.machine()}")
    table = Table(title=f"share of right answers, {options.top} heads, {options.shots} shots, {options.corrupted}")
    for head in ("task", "words", "heads", "layer", "zero-shot", "+ vector", "others", "most", "shuffled", "+ vector ",
                 "examples", "seconds"):  # fmt: skip
        table.add_column(head, justify="right")
    for task in tasks:
        begun = time.perf_counter()
        found = vector_of(model, task, options)
        names = ("zero-shot", "zero-shot + vector", "shuffled", "shuffled + vector", "in context")
        zero, steered, shuffled, both, shown = (f"{found.accuracy[name].value:.2f}" for name in names)
        others = (f"{np.mean(found.random):.2f}", f"{max(found.random):.2f}") if found.random else ("", "")
        heads = " ".join(f"{layer}.{head}" for layer, head, _ in found.heads)
        words, seconds = str(found.record["report"]), f"{time.perf_counter() - begun:.0f}"
        table.add_row(task, words, heads, str(found.layer), zero, steered, *others, shuffled, both, shown, seconds)
    console.print(table)
    if not options.loop:
        return
    pairs = datasets.words(tasks[0], "train")
    means = mean_head_values(model, in_context(pairs, options.clean, shots=options.shots))
    wrong = in_context(pairs, options.prompts, shots=options.shots, shuffled=True)
    begun = time.perf_counter()
    once = indirect_effects(model, wrong, means)
    shared = time.perf_counter() - begun
    some = min(options.loop, len(wrong))
    begun = time.perf_counter()
    plain = loop(model, wrong[:some], means)
    looped = (time.perf_counter() - begun) * len(wrong) / some
    scaled = "" if some == len(wrong) else f" (from {some} of them)"
    console.print(
        f"effects of {int(np.isfinite(once.mean).sum())} heads on {len(wrong)} shuffled prompts of {tasks[0]}: "
        f"{shared:.1f} s; a loop {looped:.1f} s{scaled}: {shared / looped:.3f} of its time, "
        f"{once.block_tokens / once.loop_block_tokens:.3f} of its block-tokens; largest difference "
        f"{np.nanmax(np.abs(once.effects[:some] - plain)):.1e}"
    )


if __name__ == "__main__":
    main()
