"""Write docs/architectures.md: what the checks of steering find on a tiny random model of every mlx-lm model type.

    python -m benchmarks.architectures                  # all, into docs/architectures.md (some minutes on two cores)
    python -m benchmarks.architectures llama gpt2       # some, on the terminal
    python -m benchmarks.architectures --page page.md   # with another mlx-lm than the page's

The checks are those of the tests (tests/conformance.py), which run them on every model type as well.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.progress import track

import mlxsteer as ms
from mlxsteer import InterpretableModel, UnsupportedModel
from mlxsteer import interventions as iv

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architectures.md"


@dataclass
class Row:
    """What was measured of one model type."""

    name: str
    blocks: str = ""
    mixers: str = ""
    feed_forward: str = ""
    heads: str = ""
    bakes: str = ""
    passed: int = 0
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    refusal: str = ""

    @property
    def result(self) -> str:
        return f"{len(self.wrong)} fail" if self.wrong else "pass"

    def line(self) -> str:
        cells = [self.name, self.result, self.blocks, self.mixers, self.feed_forward, self.heads, self.bakes,
                 self.said()]  # fmt: skip
        return f"| {' | '.join(cells)} |"

    def said(self) -> str:
        return "; ".join([*self.wrong, *dict.fromkeys(self.notes)])


def measured(name: str, conformance: Any, tokenizer: TokenizerWrapper) -> Row:
    """Build one model type and run every check on it."""
    row = Row(name)
    try:
        case = conformance.Case(name, tokenizer)
    except UnsupportedModel as refusal:
        row.refusal = str(refusal).split(": ", 1)[1]
        return row
    sites = case.model._sites
    row.blocks = f"`{sites.container}`"
    parts: dict[str, list[str]] = {"attn": [], "mlp": [], "attn.heads": []}
    for layer in range(len(sites.blocks)):
        for role in sites.roles(layer):
            if role in parts:
                parts[role].append(sites.resolve(f"layers.{layer}.{role}").key.split(".", 2)[2])
    row.mixers, row.feed_forward = (
        ", ".join(f"`{part}`" for part in dict.fromkeys(parts[role])) for role in ("attn", "mlp")
    )
    row.heads = "yes" if parts["attn.heads"] else ""
    row.bakes = bakes(name, importlib.import_module("architectures"))
    for check in conformance.CHECKS.values():
        try:
            note = check(case)
        except Exception as error:  # noqa: BLE001
            row.wrong.append(f"**{check.__name__}**: {error}".replace("\n", " ").replace("|", "\\|"))
            continue
        row.passed += 1
        if note and note not in ("no attention heads", "no feed-forward part beside the mixer"):
            row.notes.append(note)
    return row


def bakes(name: str, architectures: Any) -> str:
    """What can be taken into the weights of a model type, in few words, by a dry run."""
    model = InterpretableModel(architectures.build(name))
    site = model._sites.resolve("layers.1")
    with model.trace([1, 2]) as trace:
        v = mx.random.normal((trace.activations[site.key].shape[-1],), key=mx.random.key(0))
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        settings = architectures.config(name) | {"model_type": name}
        Path(folder, "config.json").write_text(json.dumps(settings), encoding="utf-8")
        model.name, model._loaded_with = folder, {}  # as if it were loaded from there
        writers = {f"layers.{i}.{role}" for i in range(len(model.layers)) for role in model._sites.roles(i)}
        parts = {key: iv.ablate(v) for key in sorted(writers) if not key.endswith("heads")}
        for what, steer in (("addition", {"layers.1": iv.add_vector(v)}), ("ablation", parts)):
            if steer:
                with contextlib.suppress(ms.CannotBake, ValueError):
                    written = ms.bake(model, steer, Path(folder, "out"), dry_run=True).written_as
                    taken.append(f"{what} as {written}" if written != name else what)
    return ", ".join(taken)


def page(rows: list[Row], not_built: dict[str, str], checks: list[Any]) -> str:
    """The whole page."""
    steered = [row for row in rows if not row.refusal]
    passed = [row for row in steered if not row.wrong]
    refused = [row for row in rows if row.refusal]
    parts = sum(reason.startswith("part of") for reason in not_built.values())
    lines = [
        f"# Architectures in mlx-lm {version('mlx-lm')}",
        "",
        "Written by `make architectures`; the tests hold the same checks against every model type.",
        "",
        f"mlx-lm {version('mlx-lm')}, MLX {version('mlx')}, on {mx.default_device().type.name}. Of "
        f"{len(rows)} model types that were built, tiny and random, {len(passed)} pass every check, "
        f"{len(steered) - len(passed)} fail one, and {len(refused)} are refused when a model is wrapped. "
        f"{len(not_built)} files were not built, {parts} of them because they are no models.",
        "",
        "## What is checked",
        "",
        *(f"- **{check.__name__}**: {check.__doc__.strip()}" for check in checks),
        "",
        "All comparisons are with the plain model, edited by hand. Prompts are longer than the sliding windows. Where "
        "a row says *one row at a time*, `generate` does so by itself, since rows of mlx-lm's own batches differ from "
        "the rows alone or can't be batched there.",
        "",
        "## Steered",
        "",
        "The keys are the same everywhere: `layers.5`, `layers.5.attn`, `layers.5.mlp`. The columns say which modules",
        "they mean. *bakes*: what `ms.bake` takes into the weights, by a dry run: an addition behind a block (written",
        "as another family's file, where one is named), and an ablation at all mixers and feed-forward parts.",
        "",
        "| model type | result | blocks | `attn` | `mlp` | `attn.heads` | bakes | besides |",
        "|---|---|---|---|---|---|---|---|",
        *(row.line() for row in steered),
        "",
        "## Refused",
        "",
        "| model type | reason |",
        "|---|---|",
        *(f"| {row.name} | {row.refusal} |" for row in refused),
        "",
        "## Not built here",
        "",
        "| file | reason |",
        "|---|---|",
        *(f"| {name} | {reason} |" for name, reason in not_built.items()),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the page or print rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types; all of them, into the page, unless given")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write the page")
    options = parser.parse_args()
    names = options.names
    sys.path.insert(0, str(ROOT / "tests"))
    architectures: Any = importlib.import_module("architectures")
    conformance: Any = importlib.import_module("conformance")
    pocket = InterpretableModel("pocket").tokenizer
    assert pocket is not None
    tokenizer = TokenizerWrapper(pocket._tokenizer)
    tokenizer._eos_token_ids = {10**6}  # every run has the length asked for
    not_built = {n: r for n, r in architectures.NOT_BUILT.items() if n in architectures.files()}
    rows = []
    for name in track(names or [n for n in architectures.files() if n not in not_built], "checking"):
        rows.append(measured(name, conformance, tokenizer))
        gc.collect()
        mx.clear_cache()
    if names:
        for row in rows:
            print(f"{row.name}: {row.refusal or row.result} {row.said()}; bakes: {row.bakes or 'nothing'}")
    else:
        options.page.parent.mkdir(exist_ok=True)
        options.page.write_text(page(rows, not_built, list(conformance.CHECKS.values())), encoding="utf-8")


if __name__ == "__main__":
    main()
