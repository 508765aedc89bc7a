"""Token shards on disk, and batches of whole texts of similar length."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .corpus import TOKEN_SHARES, Sampler
from .tokenizer import EOS, PAD

TOKENS_PER_SHARD = 1_000_000
# Share of the texts that are joined with others (text </s><s> text ...) so that long positions are trained too.
JOINED_SHARE = 0.10
JOINED_LENGTH = 448
TEXTS_PER_DRAW = 2_000


@dataclass(frozen=True)
class Shard:
    """Texts as one row of token ids; text i is ``ids[starts[i]:starts[i + 1]]``, from <s> to </s>."""

    ids: np.ndarray  # (tokens,) uint16
    starts: np.ndarray  # (texts + 1,) int64

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.starts[index] : self.starts[index + 1]]


def write_shard(tokenizer_file: str, path: str, seed: int) -> None:
    """Generate about a million tokens with the behaviours in their shares."""
    tokenizer = Tokenizer.from_file(tokenizer_file)
    sampler = Sampler(seed)
    rng = random.Random(seed)
    kinds = list(TOKEN_SHARES)
    tokens = dict.fromkeys(kinds, 2_000.0)  # pseudo-counts: 50 texts of 40 tokens
    texts = dict.fromkeys(kinds, 50.0)
    pieces: list[np.ndarray] = []
    total = 0
    while total < TOKENS_PER_SHARD:
        # A text's chance is its share of tokens over its mean length so far.
        weights = [TOKEN_SHARES[kind] * texts[kind] / tokens[kind] for kind in kinds]
        drawn = rng.choices(kinds, weights, k=TEXTS_PER_DRAW)
        encodings = tokenizer.encode_batch([sampler.draw(kind) for kind in drawn])
        for kind, encoding in zip(drawn, encodings, strict=True):
            ids = np.array([*encoding.ids, EOS], dtype=np.uint16)
            tokens[kind] += len(ids) - 1
            texts[kind] += 1
            total += len(ids)
            pieces.append(ids)
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
    temporary = Path(path).with_suffix(".part.npz")
    np.savez(temporary, ids=np.concatenate(pieces), starts=starts)
    temporary.replace(path)


def build_shards(folder: Path, tokenizer_file: Path, count: int, seed: int, processes: int) -> list[Path]:
    """Write the shards that do not exist yet; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"shard-{seed}-{index:04d}.npz" for index in range(count)]
    missing = [
        (str(tokenizer_file), str(path), seed * 100_003 + index)
        for index, path in enumerate(paths)
        if not path.exists()
    ]
    if missing:
        with Pool(processes) as pool:
            pool.starmap(write_shard, missing, chunksize=1)
    return paths


def load_shard(path: Path) -> Shard:
    """Read one shard."""
    with np.load(path) as arrays:
        return Shard(arrays["ids"], arrays["starts"])


def joined_texts(shard: Shard, rng: np.random.Generator) -> list[np.ndarray]:
    """The shard's texts, a share of them joined to rows of about ``JOINED_LENGTH`` tokens."""
    order = rng.permutation(len(shard))
    cut = int(len(order) * JOINED_SHARE)
    rows = [shard[i] for i in order[cut:]]
    current: list[np.ndarray] = []
    length = 0
    for index in order[:cut]:
        current.append(shard[index])
        length += len(shard[index])
        if length >= JOINED_LENGTH - 64:
            rows.append(np.concatenate(current)[:JOINED_LENGTH])
            current, length = [], 0
    return rows


def batches(shard: Shard, tokens: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows padded to their batch's longest, (texts, length) int64, about ``tokens`` tokens each, in random order."""
    rows = joined_texts(shard, rng)
    # Sorting by length with a little noise keeps batches tight and not always the same.
    lengths = np.array([len(row) for row in rows])
    order = np.argsort(lengths + rng.random(len(rows)) * 4)
    groups: list[list[int]] = [[]]
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        if longest * (len(groups[-1]) + 1) > tokens and groups[-1]:
            groups.append([])
            longest = lengths[index]
        groups[-1].append(index)
    for group in rng.permutation(len(groups)):
        members = groups[group]
        batch = np.full((len(members), max(lengths[i] for i in members)), PAD, dtype=np.int64)
        for row, index in enumerate(members):
            batch[row, : lengths[index]] = rows[index]
        yield batch
