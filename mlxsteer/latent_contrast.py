"""Which latents of a sparse autoencoder tell two sides apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.display import written_table
from mlxsteer.extraction import auroc
from mlxsteer.interventions.files import as_json
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import ContrastPair, PairSet, check_switch, checked
from mlxsteer.progress import Step, reporting
from mlxsteer.questions import check_count
from mlxsteer.reading import Text, bos_of, check_budget, check_completions, check_progress, encode_pairs
from mlxsteer.sae import SparseAutoencoder
from mlxsteer.tokenwise import tokenwise

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class LatentContrast:
    """The latents in which two sides of contrast pairs differ most, the largest difference first.

    Attributes:
        latents: their numbers, (n,).
        difference: mean activation on positive sides minus that on negative ones, (n,).
        moved: ``|difference|·‖d‖``, the length by which that moves the reconstruction, (n,): what they are ordered by.
        auroc: of the mean activation of a text, positive against negative sides, (n,): 0.5 is chance.
        active: share of tokens at which it is active, of positive and of negative sides, (n, 2).
        largest: its largest activation at any token of either side, (n,): a scale for clamping.
        ever_active: how many of all latents are active at any token.
        record: autoencoder, data, settings.
    """

    latents: Array
    difference: Array
    moved: Array
    auroc: Array
    active: Array
    largest: Array
    ever_active: int
    record: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.latents)

    def __repr__(self) -> str:
        first = f"latent {self.latents[0]}, AUROC {self.auroc[0]:.2f}" if len(self) else "no latent is active"
        return f"LatentContrast({len(self)} latents; first: {first})"

    def positive(self) -> int:
        """The latent that is most more active on positive sides.

        Raises:
            ValueError: there is none among these.
        """
        return self._first(self.difference > 0, "more")

    def negative(self) -> int:
        """The latent that is most less active on positive sides.

        Raises:
            ValueError: there is none among these.
        """
        return self._first(self.difference < 0, "less")

    def _first(self, which: Array, word: str) -> int:
        if not which.any():
            raise ValueError(
                f"none of these {len(self)} latents is {word} active on positive sides: give a larger top=."
            )
        return int(self.latents[int(np.flatnonzero(which)[0])])

    def largest_of(self, latent: int) -> float:
        """A latent's largest activation at any token.

        Raises:
            KeyError: it isn't among these.
        """
        found = np.flatnonzero(self.latents == latent)
        if not len(found):
            raise KeyError(f"latent {latent} is not among the {len(self)} here: give a larger top=.")
        return float(self.largest[found[0]])

    def table(self, count: int = 10) -> str:
        """The first so many latents, in plain text."""
        check_count(count, "count", 1)
        columns = (
            self.latents,
            self.difference,
            self.moved,
            self.auroc,
            self.active[:, 0],
            self.active[:, 1],
            self.largest,
        )
        forms = ("{}", "{:+.3g}", "{:.3g}", "{:.3f}", "{:.1%}", "{:.1%}", "{:.3g}")
        rows = [
            [form.format(one) for form, one in zip(forms, row, strict=True)]
            for row in list(zip(*columns, strict=True))[:count]
        ]
        heads = ("latent", "difference", "moved", "AUROC", "active +", "active -", "largest")
        return written_table(f"latents that differ, of {self.ever_active} active", heads, rows)

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON; with a path, also written there, whole or not at all."""
        names = ("latents", "difference", "moved", "auroc", "active", "largest")
        data = {name: getattr(self, name).tolist() for name in names}
        return as_json({**data, "ever_active": self.ever_active, "record": self.record}, path)


def latents_that_differ(
    model: InterpretableModel,
    sae: SparseAutoencoder,
    pairs: Iterable[ContrastPair],
    *,
    top: int = 50,
    chat: bool = False,
    batch_tokens: int = 4096,
    progress: bool | Step | None = False,
) -> LatentContrast:
    """The latents in which the sides of contrast pairs differ most.

    Read are the tokens of each completion, or, where the sides are prompts themselves, all tokens but BOS. A text's
    activation is the mean over its tokens, as in AxBench (Wu et al. 2025, arXiv 2501.17148), where a latent that
    detects a concept often isn't one that steers towards it: measure what clamping does.

    Args:
        model: the model.
        sae: an autoencoder of one of its places.
        pairs: contrast pairs; all of them are used.
        top: how many latents to keep.
        chat: prompts are a user's messages.
        batch_tokens: the most tokens in one batch, padding included.
        progress: True for a bar on a terminal, or a function of what is done and what there is.

    Returns:
        A `LatentContrast`.

    Raises:
        TypeError: no model, no autoencoder, no contrast pairs.
        ValueError: the autoencoder is another model's; an empty completion; activations are NaN.
        UnknownKey: the model has no such place.
    """
    if not isinstance(sae, SparseAutoencoder):
        raise TypeError(f"latents_that_differ takes a SparseAutoencoder, not {type(sae).__name__}.")
    sae.check(model)
    check_count(top, "top", 1)
    check_switch("chat", chat)
    check_budget(batch_tokens)
    check_progress(progress)
    given = checked(pairs)
    if any(pair.prompt or pair.messages for pair in given):
        check_completions("mean", given, [pair for pair in given if pair.prompt or pair.messages])
    texts = [text for side in zip(*encode_pairs(model, given, given, chat), strict=True) for text in side]
    bos = bos_of(model)
    starts = [_start(text, bos, number % len(given)) for number, text in enumerate(texts)]
    means, counts = np.zeros((len(texts), sae.latents), np.float32), np.zeros((2, sae.latents))
    largest, tokens = np.zeros(sae.latents, np.float32), np.zeros(2)
    done = 0
    with reporting(progress, "encoding") as step:
        for batch in tokenwise(model, texts, model._sites.resolve(str(sae.key)), batch_tokens):
            for number, values in batch:
                latents = sae.encode(values[starts[number] :])
                side = int(number >= len(given))
                read = mx.stack([latents.mean(axis=0), (latents > 0).sum(axis=0), latents.max(axis=0)])
                means[number], active, most = np.array(read)
                counts[side] += active
                tokens[side] += len(latents)
                largest = np.maximum(largest, most)
            done += len(batch)
            step(done, len(texts))
    halves = means[: len(given)].astype(np.float64), means[len(given) :].astype(np.float64)
    difference = halves[0].mean(axis=0) - halves[1].mean(axis=0)
    moved = np.abs(difference) * np.linalg.norm(np.array(sae.decoder, np.float64), axis=-1)
    order = np.argsort(-moved, kind="stable")[: min(top, int((largest > 0).sum()))]
    record = {
        "model": model.identity, "key": sae.key, "autoencoder": repr(sae), "pairs": len(given), "chat": chat,
        "data": PairSet(given).fingerprint,
    }  # fmt: skip
    return LatentContrast(
        order, difference[order], moved[order], np.array([auroc(halves[0][:, i], halves[1][:, i]) for i in order]),
        (counts / tokens[:, None]).T[order], largest[order], int((largest > 0).sum()), record,
    )  # fmt: skip


def _start(text: Text, bos: int | None, number: int) -> int:
    """The first token of a text that is read."""
    if text.prompt < len(text.tokens):
        return text.prompt
    start = int(text.tokens[0] == bos)
    if start == len(text.tokens):
        raise ValueError(f"pair {number}: one side has no token but BOS: there is nothing to read.")
    return start
