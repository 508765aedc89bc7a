"""What an extraction contrasts: two sides as tokens, from pairs, from two lists of texts, or from labelled texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import ContrastPair, checked, in_split
from mlxsteer.reading import Text, as_chat, encode_side, encode_text
from mlxsteer.sites import Site, UnknownKey

SITES = {"residual": "layers.{layer}", "attn": "layers.{layer}.attn", "mlp": "layers.{layer}.mlp"}
"""Short names of the places that vectors are read at."""


@dataclass(frozen=True)
class Contrast:
    """Two sides as tokens: positives first. `partners` are the numbers of each pair's texts; None if unmatched."""

    texts: list[Text]
    positives: int
    partners: list[tuple[int, int]] | None

    @property
    def hash(self) -> str:
        """SHA-256 over both sides, whatever the order of the pairs."""
        sides = (self.texts[: self.positives], self.texts[self.positives :])
        told = [[text.tokens for text in side] for side in sides]
        return hashlib.sha256(repr((told, self.partners is not None)).encode()).hexdigest()[:16]


def of_pairs(model: InterpretableModel, pairs: Iterable[ContrastPair], chat: bool) -> Contrast:
    chosen = in_split(checked(pairs), "train")
    if chat:
        chosen = [as_chat(pair) for pair in chosen]
    encoded = [tuple(Text(*encode_side(model, pair, side)) for side in ("positive", "negative")) for pair in chosen]
    for pair, (positive, negative) in zip(chosen, encoded, strict=True):
        if positive.tokens == negative.tokens:
            raise ValueError(f"both sides of {pair!r} are the same tokens: there is no contrast.")
    # In an order of their own, the same whatever order they came in, and with the sides exchanged.
    encoded.sort(key=lambda sides: sorted(text.tokens for text in sides))
    texts = [*(positive for positive, _ in encoded), *(negative for _, negative in encoded)]
    return Contrast(texts, len(encoded), [(i, i + len(encoded)) for i in range(len(encoded))])


def _of_sides(model: InterpretableModel, positive: Iterable[Any], negative: Iterable[Any], chat: bool) -> Contrast:
    sides = []
    for name, given in (("positive", positive), ("negative", negative)):
        if isinstance(given, (str, Mapping)):
            raise TypeError(f"{name}= is a list of texts, not one {type(given).__name__}.")
        texts = [encode_text(model, text, chat=chat) for text in given]
        if not texts:
            raise ValueError(f"{name}= is empty: give at least one text.")
        sides.append(sorted(texts, key=lambda text: text.tokens))
    return Contrast([*sides[0], *sides[1]], len(sides[0]), None)


def contrast(
    model: InterpretableModel, pairs: Any, positive: Any, negative: Any, texts: Any, labels: Any, chat: bool
) -> Contrast:
    """The two sides, from whichever of the three ways they were given in.

    Raises:
        TypeError: none or several of the ways, or half of one.
    """
    ways = [pairs is not None, positive is not None or negative is not None, texts is not None or labels is not None]
    if sum(ways) != 1:
        raise TypeError("extract takes pairs, or positive= and negative=, or texts= and labels=: one of the three.")
    if ways[0]:
        return of_pairs(model, pairs, chat)
    if ways[1]:
        if positive is None or negative is None:
            raise TypeError("extract takes positive= and negative= together; a background set is background=.")
        return _of_sides(model, positive, negative, chat)
    if texts is None or labels is None:
        raise TypeError("extract takes texts= and labels= together.")
    given, marks = list(texts), list(labels)
    if len(given) != len(marks):
        raise ValueError(f"there are {len(given)} texts and {len(marks)} labels.")
    odd = [mark for mark in marks if not isinstance(mark, (bool, np.bool_)) and mark not in (0, 1)]
    if odd:
        raise ValueError(f"a label is True or 1 for the positive side, False or 0 for the negative, not {odd[0]!r}.")
    first, second = ([t for t, mark in zip(given, marks, strict=True) if bool(mark) is side] for side in (True, False))
    return _of_sides(model, first, second, chat)


def places(model: InterpretableModel, site: str, layers: Any) -> tuple[str, list[int], list[Site]]:
    """The key template, the layers and their places.

    Raises:
        ValueError: the template has no ``{layer}``, or a layer doesn't exist.
        UnknownKey: a place doesn't exist.
    """
    template = SITES.get(site, site)
    if "{layer}" not in template:
        raise ValueError(
            f"site is 'residual', 'attn', 'mlp' or a key with {{layer}} in it, such as "
            f"'layers.{{layer}}.mlp.down_proj', not {site!r}."
        )
    count = len(model.layers)
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers are 'all', a layer, or a list of layers, not {layers!r}.")
        chosen = list(range(count))
    else:
        given = [layers] if isinstance(layers, (int, np.integer)) else list(layers)
        if not given or any(not isinstance(n, (int, np.integer)) or isinstance(n, bool) for n in given):
            raise ValueError(f"layers are 'all', a layer, or a list of layers, not {layers!r}.")
        chosen = sorted({int(n) + count * (n < 0) for n in given})
        if chosen[0] < 0 or chosen[-1] >= count:
            raise ValueError(f"there is no layer {max(given, key=abs)}: the model has {count}, from 0 to {count - 1}.")
    found = []
    for layer in chosen:
        try:
            found.append(model._sites.resolve(template.format(layer=layer)))
        except UnknownKey:
            if not isinstance(layers, str):
                raise
        # Where all were asked for, a hybrid's layers that have no such place are left out.
    if not found:
        model._sites.resolve(template.format(layer=0))
    kept = [place.layer for place in found]
    return template, [layer for layer in kept if layer is not None], found
