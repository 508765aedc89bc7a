"""Activation addition (Turner et al. 2023, arXiv 2308.10248): one pair of prompts, added at the front of another.

"Love" − "Hate", read at layer 6 of GPT-2-XL and added with coefficient 5 at the front of "I hate you because".

    python benchmarks/replicate/actadd.py --model openai-community/gpt2-xl
    python benchmarks/replicate/actadd.py                                          # the bundled model, its own words
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from mlxsteer import ContrastPair, InterpretableModel, extract
from mlxsteer.measures import kl

PUBLISHED = "completions of “I hate you because” turn from abuse into declarations of love"


def main() -> None:
    """Make the vector, generate with and without."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="pocket", help="a Hub name or a folder")
    parser.add_argument("--pair", nargs=2, metavar=("TOWARDS", "AWAY"))
    parser.add_argument("--prompt")
    parser.add_argument("--layer", type=int, help="the block whose input is added to, as in the paper")
    parser.add_argument("--strength", type=float)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=40)
    options = parser.parse_args()
    console = Console()
    model = InterpretableModel(options.model)
    own = model.name == "pocket"
    towards, away = options.pair or (("Positive review.", "Negative review.") if own else ("Love", "Hate"))
    prompt = options.prompt or ("Here is what I thought. The soup at the cafe was" if own else "I hate you because")
    layer = options.layer if options.layer is not None else 3 if own else 6
    strength = options.strength if options.strength is not None else 2.0 if own else 5.0
    # What enters block l leaves block l − 1.
    vector = extract(model, [ContrastPair("", towards, away)], method="single", layers=[layer - 1])
    steering = vector.at(layer - 1, strength)
    arguments: dict[str, Any] = {"max_tokens": options.max_tokens, "temp": 1.0, "top_p": 0.3, "seed": 0}
    table = Table(
        title=f"{model.name}: “{prompt} …” with {strength:g} × (“{towards}” − “{away}”) entering block {layer}"
    )
    for head in ("unsteered", "steered"):
        table.add_column(head, ratio=1)
    prompts = [prompt] * options.samples
    for before, after in zip(model.generate(prompts, **arguments), model.generate(prompts, steering, **arguments),
                             strict=True):  # fmt: skip
        table.add_row(before.strip(), after.strip())
    console.print(table)
    console.print(f"{kl(model, steering, [prompt])} on the unsteered continuation.")
    console.print(f"Published for GPT-2-XL, layer 6, coefficient 5: {PUBLISHED} (not run here).")


if __name__ == "__main__":
    main()
