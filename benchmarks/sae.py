"""A sparse autoencoder of the bundled model: how good it is, and what its latents steer.

Trains one on texts of the model's grammar (or loads one), prints explained variance, L0 and dead latents on held-out
texts; finds the latent that is most more active on praise; clamps it at several multiples of its largest activation,
and random latents at the same lengths, and says how often the grammar's scorer finds the text positive. Then the
latent's decoder row against the mean difference of pairs, each at the strengths that spend the same KL on neutral text.

    python -m benchmarks.sae                                  # 20,000 tokens, 512 latents; minutes on two cores
    python -m benchmarks.sae --kind jumprelu --out sae.safetensors
    python -m benchmarks.sae --load sae.safetensors
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mlxsteer import (
    InterpretableModel,
    SparseAutoencoder,
    datasets,
    extract,
    latents_that_differ,
    strength_for,
    train_sae,
)
from mlxsteer import interventions as iv
from mlxsteer.interventions import Intervention
from mlxsteer.pocket import scorer
from training.corpus import TOKEN_SHARES, Sampler


def grammar_texts(model: InterpretableModel, tokens: int, seed: int) -> list[str]:
    """Texts of all behaviours, in the shares that the model was trained on, up to so many tokens."""
    sampler, rng = Sampler(seed), np.random.default_rng(seed)
    kinds, shares = list(TOKEN_SHARES), np.array(list(TOKEN_SHARES.values()))
    texts, count = [], 0
    while count < tokens:
        texts.append(sampler.draw(str(rng.choice(kinds, p=shares / shares.sum()))))
        count += len(model.encode(texts[-1]))
    return texts


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=4)
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--kind", choices=("topk", "jumprelu"), default="topk")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--random", type=int, default=5, help="latents drawn by chance")
    parser.add_argument("--kl", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--load", help="an autoencoder's file, in place of training one")
    parser.add_argument("--out", help="where to save it")
    parser.add_argument("--checkpoint", help="where to keep the run, to go on from")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Print the figures and both tables."""
    options, console = arguments(), Console(width=120)
    model = InterpretableModel("pocket")
    console.print(f"{model!r}; mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, {platform.machine()}")
    sae = made(model, options, console)
    pairs = datasets.load("pocket/sentiment")
    prompts = [pair.prompt for pair in pairs.split("report")[: options.prompts]]
    judge = scorer.judge("sentiment")

    def positive(steer: Mapping[str, Intervention] | None) -> tuple[float, float]:
        """Share of positive texts, and of grammatical ones."""
        texts = model.generate(prompts, steer, max_tokens=options.new_tokens)
        sound = [scorer.grammatical(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
        return float(np.mean([judge(text) for text in texts])), float(np.mean(sound))

    found = latents_that_differ(model, sae, pairs.split("choose"))
    console.print(found.table(6))
    praise, largest = found.positive(), found.largest_of(found.positive())
    others = [int(one) for one in found.latents if one != praise]
    drawn = np.random.default_rng(options.seed).choice(others, options.random, replace=False)
    table = Table(title=f"positive (grammatical) texts of {len(prompts)}, latent {praise} clamped")
    for head in ("clamped to", "length", "latent", "random, mean", "random, most"):
        table.add_column(head, justify="right")
    table.add_row("nothing", "", written(positive(None)), "", "")
    for times in (0.5, 1.0, 2.0):
        length = times * largest * float(np.linalg.norm(np.array(sae.decoder[praise])))
        own = positive({str(sae.key): iv.sae_latent(sae, praise, times * largest)})
        chance = [positive({str(sae.key): iv.sae_latent(sae, int(i), length / norm(sae, i))}) for i in drawn]
        mean = (float(np.mean([one for one, _ in chance])), float(np.mean([one for _, one in chance])))
        table.add_row(f"{times:g} × largest", f"{length:.1f}", written(own), written(mean), written(max(chance)))
    console.print(table)
    compare(model, sae, praise, options, positive, console)


def made(model: InterpretableModel, options: argparse.Namespace, console: Console) -> SparseAutoencoder:
    """The autoencoder, trained or loaded, with its figures printed."""
    if options.load:
        sae = SparseAutoencoder.load(options.load, model=model)
        console.print(f"{sae!r}: {sae.info.get('figures')}")
        return sae
    begun = time.perf_counter()
    texts = grammar_texts(model, options.tokens, options.seed)
    sae = train_sae(
        model, texts, f"layers.{options.layer}", latents=options.latents, kind=options.kind, k=options.k,
        steps=options.steps, batch_size=512, rate=options.rate, seed=options.seed, checkpoint=options.checkpoint,
        progress=True,
    )  # fmt: skip
    figures = ", ".join(f"{name} {value:.3g}" for name, value in sae.info["figures"].items())
    console.print(f"{sae!r}: {figures}; {len(texts)} texts, {time.perf_counter() - begun:.0f} s")
    if options.out:
        console.print(f"saved: {sae.save(options.out)}")
    return sae


def compare(
    model: InterpretableModel, sae: SparseAutoencoder, praise: int, options: argparse.Namespace, positive: Any,
    console: Console,
) -> None:  # fmt: skip
    """The decoder row and the mean difference, at the strengths that spend the same KL."""
    layer = int(str(sae.key).split(".")[1])
    train = datasets.load("pocket/sentiment", split="train")
    vectors = {"decoder row": sae.vector(praise), "mean difference": extract(model, train, read="mean", layers=[layer])}
    cosine = vectors["decoder row"].cosine(vectors["mean difference"])[layer]
    table = Table(title=f"positive (grammatical) texts at equal KL, added at every token; cosine {cosine:.2f}")
    for head in ("KL", *vectors):
        table.add_column(head, justify="right")
    for kl in options.kl:
        cells = []
        for vector in vectors.values():
            strength = strength_for(
                model, vector, layer, kl=kl, at="all", tokens=8, neutral=datasets.neutral(model)[:16]
            )
            steer = vector.at(layer, strength.value, unit="residual")
            cells.append(f"{written(positive(steer))} at {strength.value:.3f} (KL {strength.reached:.2f})")
        table.add_row(f"{kl:g}", *cells)
    console.print(table)


def norm(sae: SparseAutoencoder, latent: Any) -> float:
    """The length of a latent's decoder row."""
    return float(np.linalg.norm(np.array(sae.decoder[int(latent)])))


def written(shares: tuple[float, float]) -> str:
    """Both shares, as a cell."""
    return f"{shares[0]:.2f} ({shares[1]:.2f})"


if __name__ == "__main__":
    main()
