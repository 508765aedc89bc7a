"""Make the pocket model from nothing: tokenizer, corpus, training, 4-bit conversion, contrast pairs, evaluation, card.

    python -m training                 # 5,500 steps; took 250 CPU-minutes, 5 hours on two shared cores
    python -m training --minutes 5     # a quick try
    python -m training --device cuda   # on a GPU

A run that was stopped goes on where its last checkpoint was; finished stages are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from .environment import restart_with_environment


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=5_500, help="training steps of about 2,700 tokens (4,096 with padding)"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many minutes, if earlier")
    parser.add_argument("--out", type=Path, default=root / "training" / "run", help="working folder, kept out of git")
    parser.add_argument(
        "--package", type=Path, default=root / "training" / "run" / "package",
        help="where model and data sets are written; mlxsteer replaces those that are shipped",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--shards", type=int, default=16, help="million tokens of corpus")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-evaluation", action="store_true", help="stop after the conversion")
    return parser.parse_args()


def main() -> None:
    """All stages in order."""
    arguments = parse_arguments()
    from .bars import bars, table
    from .card import write_card
    from .convert import quantize, write_checksums, write_float32, write_json
    from .evaluate import measure
    from .pairs import write_pairs
    from .tokenizer import train_tokenizer
    from .train import Settings, train

    out, package = arguments.out, arguments.package
    model_folder, pairs_folder = package / "pocket" / "model", package / "datasets" / "pocket"
    if not (out / "tokenizer" / "tokenizer.json").exists():
        print("training the tokenizer", flush=True)
        train_tokenizer(out / "tokenizer")
    settings = Settings(
        out=out, steps=arguments.steps, minutes=arguments.minutes, seed=arguments.seed, device=arguments.device,
        shards=arguments.shards, threads=arguments.threads,
    )  # fmt: skip
    used = train(settings)
    write_json(out / "training.json", used | {"seed": arguments.seed, "shards": arguments.shards})
    print("converting", flush=True)
    write_float32(out / "checkpoint.pt", out / "tokenizer", out / "float32")
    quantize(out / "float32", model_folder)
    write_checksums(model_folder)
    write_pairs(pairs_folder, arguments.seed)
    if arguments.no_evaluation:
        return
    print("evaluating", flush=True)
    figures = measure(model_folder, out / "float32", pairs_folder)
    write_json(out / "figures.json", figures)
    found = bars(figures)
    write_card(model_folder / "README.md", json.loads((out / "training.json").read_text()), figures, found)
    write_checksums(model_folder)
    print(table(found))


if __name__ == "__main__":
    restart_with_environment("training")
    main()
