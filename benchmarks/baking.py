"""What baking leaves of a direction, and how far a baked model lies from the hooked one.

* The share of a direction left in what the writers write (the last projections of attention and feed-forward), given
  the same inputs: after `ms.bake`, after `ms.export_adapter`, and after the usual way, which orthogonalises each weight
  and quantizes it anew as it was (at 4 bits where it was not).
* Logits and log-probabilities of what was written, run by plain mlx-lm in a process of its own, against the hooked
  model's: prompts, and then steps with a cache, teacher-forced with the tokens that the hooked model likes best. Beside
  it, what the same formula differs by from itself in another order of operations: an addition at ``layers.N.mlp``, not
  ``layers.N``; an ablation as one product with I − R̂ᵀR̂.
* The same logits with every pass in float64 (on the CPU), which takes the passes' own rounding away: what stays is that
  the written weights are float32. In float32 alone two passes of one formula lie further apart than the bar.

All logits lie on disk meanwhile: 4 bytes × prompts × (steps + 1) × vocabulary × 2.

    python benchmarks/baking.py                                   # the bundled model, 50 prompts × 64 steps
    python benchmarks/baking.py --model mlx-community/Llama-3.2-1B-Instruct-4bit --prompts 10
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx.utils import tree_map, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mlxsteer as ms
from mlxsteer import InterpretableModel
from mlxsteer.baked import source_of
from mlxsteer.folding import dense, fold
from mlxsteer.interventions import ablate

BAR = 1e-5
BATCH = 10
KINDS = ("hooked", "plain")
TEXT = "The food was served at noon, and I think that"
Steer: TypeAlias = "Mapping[str, Any]"

FRESH = """
import json, sys
import mlx.core as mx, mlx_lm
from mlx_lm.models.cache import make_prompt_cache
place, folder, adapter = sys.argv[1:]
model = mlx_lm.load(folder, **({"adapter_path": adapter} if adapter else {}))[0]
assert "mlxsteer" not in sys.modules
for i, tokens in enumerate(json.load(open(f"{place}/tokens.json"))):
    cache = make_prompt_cache(model)
    steps = [model(mx.array(step), cache=cache)[:, -1] for step in tokens]
    mx.save_safetensors(f"{place}/plain-{i}.safetensors", {"logits": mx.stack(steps).astype(mx.float32)})
"""


# -- what is left of the direction -------------------------------------------------------------------------------------


def requantized(module: nn.Module, basis: mx.array) -> nn.Module:
    """The usual way: take the direction out of the weight, and quantize it as it was."""
    weight = dense(module)
    weight = weight - basis.T @ (basis @ weight)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in module)
    linear.weight = weight
    if "bias" in module:
        linear.bias = module["bias"] - basis.T @ (basis @ module["bias"])
    return nn.QuantizedLinear.from_linear(
        linear, getattr(module, "group_size", 64), getattr(module, "bits", 4), getattr(module, "mode", "affine")
    )


def left(model: InterpretableModel, steer: Steer, written: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """Per way, the share of a direction that is left in what the writers write.

    Args:
        model: the plain model, whose activations are the writers' inputs.
        steer: the ablation.
        written: way → the model that it gave.

    Returns:
        Rows with the median and the largest over the writers of the component's root mean square over tokens, as a
        share of what it was; and the largest share of it in an output's norm, over writers and tokens.
    """
    folds = [one for one in fold(model, steer) if one.key != "embed"]
    with model.trace(TEXT) as trace:
        pass
    modules = {way: dict(other.named_modules()) for way, other in written.items()}
    found: dict[str, list[tuple[float, float]]] = {}
    for one in folds:
        basis, x = one.ops[0][0].basis, trace.activations[f"{one.key}.input"]  # type: ignore[union-attr]
        before = mx.linalg.norm(one.module(x).astype(mx.float32) @ basis.T)
        ways = {way: paths[one.path] for way, paths in modules.items()}
        for way, module in {**ways, "orthogonalised, requantized": requantized(one.module, basis)}.items():
            y = module(x).astype(mx.float32)
            along = mx.linalg.norm(y @ basis.T, axis=-1)
            share = (mx.linalg.norm(along) / before, (along / mx.linalg.norm(y, axis=-1)).max())
            found.setdefault(way, []).append((number(share[0]), number(share[1])))
    return [
        {"way": way, "median": float(np.median(values, axis=0)[0]), "largest": max(v for v, _ in values),
         "of_norm": max(v for _, v in values), "writers": len(values)}
        for way, values in found.items()
    ]  # fmt: skip


# -- how far from the hooked model -------------------------------------------------------------------------------------


def hooked(model: InterpretableModel, steer: Steer, prompts: list[list[int]], steps: int, place: Path) -> None:
    """Write the hooked model's logits after each prompt and each step, and the tokens to go through."""
    told = []
    for i, start in enumerate(range(0, len(prompts), BATCH)):
        tokens, logits = [prompts[start : start + BATCH]], []
        cache = make_prompt_cache(model.model)
        with model.steer(steer):
            for step in range(steps + 1):
                logits.append(model.model(mx.array(tokens[-1]), cache=cache)[:, -1].astype(mx.float32))
                if step < steps:
                    best: Any = mx.argmax(logits[-1], axis=-1)[:, None].tolist()
                    tokens.append(best)
        mx.save_safetensors(str(place / f"hooked-{i}.safetensors"), {"logits": mx.stack(logits)})
        told.append(tokens)
    (place / "tokens.json").write_text(json.dumps(told))


def rounding(model: InterpretableModel, steer: Steer, place: Path) -> dict[str, float]:
    """The first prompts again, by the same formula in another order of operations."""
    if all(isinstance(one, ms.interventions.AddVector) for one in steer.values()):
        steer = {f"{key}.mlp": one for key, one in steer.items()}
    else:
        steer = {key: projection(one.basis) for key, one in steer.items()}
    cache, tokens = make_prompt_cache(model.model), json.loads((place / "tokens.json").read_text())[0]
    with model.steer(steer):
        steps = [model.model(mx.array(step), cache=cache)[:, -1].astype(mx.float32) for step in tokens]
        mx.eval(steps)
    return apart(logits_of(place / "hooked-0.safetensors"), mx.stack(steps))


def exact(model: InterpretableModel, steer: Steer, written: tuple[Path, Path | None], place: Path) -> float:
    """The largest difference of logits where both passes run in float64, over the first prompts and all their steps."""
    tokens = json.loads((place / "tokens.json").read_text())[0]
    folder, adapter = written
    with mx.stream(mx.cpu):
        plain = doubled(mlx_lm.load(str(source_of(model)[0]))[0])
        other = doubled(mlx_lm.load(str(folder), **({"adapter_path": str(adapter)} if adapter else {}))[0])
        wrapped, found = InterpretableModel(plain, model.tokenizer), 0.0
        caches = make_prompt_cache(plain), make_prompt_cache(other)
        with wrapped.steer(steer):
            for step in tokens:
                ours, theirs = (
                    one(mx.array(step), cache=cache) for one, cache in zip((plain, other), caches, strict=True)
                )
                found = max(found, number(mx.abs(ours - theirs)[:, -1].max()))
    return found


def doubled(model: nn.Module) -> nn.Module:
    """A model with every weight as it acts, unquantized, in float64."""
    plain: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            weight = dense(module)
            inner: nn.Module = (
                nn.Embedding(*weight.shape)
                if isinstance(module, nn.QuantizedEmbedding)
                else nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in module)
            )
            inner.update({"weight": weight, **({"bias": module["bias"]} if "bias" in module else {})})
            plain.append((path, inner))
    model.update_modules(tree_unflatten(plain))
    model.update(tree_map(lambda array: array.astype(mx.float64), model.parameters()))
    return model


def projection(basis: mx.array) -> Any:
    """An ablation as one product with I − R̂ᵀR̂."""
    matrix = mx.eye(basis.shape[1]) - basis.T @ basis
    mx.eval(matrix)
    return lambda x: x.astype(mx.float32) @ matrix


def logits_of(file: Path) -> mx.array:
    loaded: Any = mx.load(str(file))
    found: mx.array = loaded["logits"]
    return found


def apart(a: mx.array, b: mx.array) -> dict[str, float]:
    """How far logits lie from each other: largest differences, and the largest that a step's own tokens would see."""
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (a, b))
    return {
        "logit": number(mx.abs(a - b).max()),
        "largest_logit": number(mx.abs(a).max()),
        "logprob": number(mx.abs(p - q).max()),
        "expected_logprob": number(mx.sum(mx.exp(p) * mx.abs(p - q), axis=-1).max()),
    }


def compare(
    model: InterpretableModel, steer: Steer, written: tuple[Path, Path | None], prompts: list[list[int]], steps: int
) -> dict[str, Any]:
    """Run both and compare them at every step."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        hooked(model, steer, prompts, steps, place)
        command = [sys.executable, "-c", FRESH, folder, str(written[0]), str(written[1] or "")]
        subprocess.run(command, check=True, cwd=folder)
        found: dict[str, Any] = {}
        for i in range(-(-len(prompts) // BATCH)):
            for name, value in apart(*(logits_of(place / f"{kind}-{i}.safetensors") for kind in KINDS)).items():
                found[name] = max(found.get(name, 0.0), value)
        found["share"] = found["logit"] / found["largest_logit"]
        return {**found, "rounding": rounding(model, steer, place), "exact": exact(model, steer, written, place)}


def prompts_of(model: InterpretableModel, pairs: Any, count: int) -> list[list[int]]:
    """The first tokens of different texts, all equally many, so that they make a batch without padding."""
    texts = dict.fromkeys(tuple(model.encode(pair.prompt + pair.positive)[:6]) for pair in pairs)
    found = [list(tokens) for tokens in texts if len(tokens) == 6][:count]
    if len(found) < count:
        raise ValueError(f"{count} prompts were asked for, and the contrast set has {len(found)} that differ.")
    return found


def number(x: mx.array) -> float:
    value: Any = x.item()
    return float(value)


# -- the whole ---------------------------------------------------------------------------------------------------------


def measure(name: str, prompts: int, steps: int) -> dict[str, Any]:
    """All figures for one model."""
    model = InterpretableModel(name)
    behaviour = "pocket/sentiment" if name == "pocket" else "sentiment"
    middle = int(0.5 * len(model.layers))
    several = sorted({middle - 2, middle, middle + 2} & set(range(len(model.layers))))
    vector = ms.extract(model, ms.datasets.load(behaviour, "train")[:40], layers=several)
    out = ablate(vector[middle])
    writers = {"layers.*.attn": out, "layers.*.mlp": out}
    steered: dict[str, Steer] = {
        f"addition at layer {middle}": vector.at(middle, strength=0.5, unit="residual"),
        f"additions at layers {several}": vector.at(dict.fromkeys(several, 0.25), unit="residual"),
        "ablation, baked": {"embed": out, **writers},
        "ablation, adapter": writers,
    }
    texts = prompts_of(model, ms.datasets.load(behaviour), prompts)
    rows, models = [], {}
    sizes: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way, steer in track(steered.items(), transient=True):
            target, source = Path(folder) / str(len(sizes)), source_of(model)[0]
            adapter = way.endswith("adapter")
            try:
                sizes[way] = size((ms.export_adapter if adapter else ms.bake)(model, steer, target))
            except ms.CannotBake as refused:
                sizes[way] = {"refused": str(refused)}
                continue
            written = (source, target) if adapter else (target, None)
            rows.append({"way": way, **compare(model, steer, written, texts, steps)})
            if way.startswith("ablation"):
                models[way] = mlx_lm.load(str(written[0]), **({"adapter_path": str(target)} if adapter else {}))[0]
        return {"left": left(model, writers, models), "apart": rows, "sizes": sizes}


def size(report: Any) -> dict[str, Any]:
    """Bytes before and after; of an adapter, its own."""
    if isinstance(report, ms.Baked):
        return {"before": report.bytes_before, "after": report.bytes_after}
    return {"adapter": report.bytes}


def report(console: Console, name: str, figures: Mapping[str, Any]) -> bool:
    """Print one model's figures; whether every bar is met."""
    table = Table(title=f"{name}: of the direction, left in what the writers write")
    for head in ("", "median", "largest", "of an output's norm", "writers", "bar"):
        table.add_column(head, justify="left" if not head else "right")
    fine = True
    for row in figures["left"]:
        ours = row["way"].startswith("ablation")
        met = not ours or row["of_norm"] <= BAR
        fine &= met
        mark = "" if not ours else f"≤ {BAR:.0e} of the norm {'met' if met else 'missed'}"
        shares = f"{row['median']:.2%}", f"{row['largest']:.2%}", f"{row['of_norm']:.1e}"
        table.add_row(row["way"], *shares, str(row["writers"]), mark)
    console.print(table)
    table = Table(title=f"{name}: written and run by plain mlx-lm, against hooked; in brackets, rounding alone")
    for head in ("", "logit", "of the largest", "in float64", "log-probability", "expected", "weights", "bar"):
        table.add_column(head, justify="left" if not head else "right")
    for row in figures["apart"]:
        met, own = row["share"] <= BAR and row["exact"] <= BAR, row["rounding"]
        fine &= met
        cells = [f"{row[k]:.1e} ({own[k]:.1e})" for k in ("logit", "logprob", "expected_logprob")]
        cells[1:1] = f"{row['share']:.1e}", f"{row['exact']:.1e}"
        kept = figures["sizes"][row["way"]]
        weight = f"+ {kept['adapter'] / 1e6:.2f} MB" if "adapter" in kept else (
            f"{kept['before'] / 1e6:.1f} → {kept['after'] / 1e6:.1f} MB")  # fmt: skip
        table.add_row(row["way"], *cells, weight, f"≤ {BAR:.0e} {'met' if met else 'missed'}")
    console.print(table)
    for way, kept in figures["sizes"].items():
        if "refused" in kept:
            console.print(f"{way}: refused. {kept['refused']}")
    return fine


def main() -> None:
    """Measure, print, and optionally save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", action="append", help="a Hub name or a folder, in place of the bundled model")
    parser.add_argument("--prompts", type=int, default=50, help="number of prompts")
    parser.add_argument("--steps", type=int, default=64, help="teacher-forced steps after each")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    console = Console()
    warnings.simplefilter("ignore", ms.EmbeddingStays)
    machine = f"{platform.system()} {platform.machine()}, {mx.default_device()}"
    console.print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, {machine}")
    console.print(f"{options.prompts} prompts × {options.steps} steps")
    figures = {name: measure(name, options.prompts, options.steps) for name in options.model or ["pocket"]}
    met = [report(console, name, rows) for name, rows in figures.items()]
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "figures": figures}, file, indent=2)
    console.print("every bar is met" if all(met) else "a bar is missed")


if __name__ == "__main__":
    main()
