"""Train the pocket model; resumable, with a checkpoint every few minutes."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .dataset import batches, build_shards, load_shard
from .model import Config, PocketLlama
from .optimizer import MuonAdamW
from .tokenizer import PAD


@dataclass
class Settings:
    """Everything that decides a run. The run ends at ``steps`` or after ``minutes``, whichever comes first."""

    out: Path
    steps: int = 5_500
    minutes: float = math.inf
    seed: int = 0
    device: str = "auto"
    shards: int = 16  # of a million tokens; read again from the start when they are used up
    tokens_per_step: int = 4_096  # padding included
    muon_rate: float = 0.016
    adam_rate: float = 1.6e-3
    weight_decay: float = 0.15
    early_weight: float = 0.5  # of the early-exit loss
    early_share: float = 0.33  # of the positions that it is computed on
    warm_up: float = 0.02  # share of the run
    flat: float = 0.78  # share of the run at the full rate; a cosine follows
    final_factor: float = 0.03
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    processes: int = 2
    checkpoint_minutes: float = 3.0


def pick_device(name: str) -> torch.device:
    """``auto`` is a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def bfloat16_is_faster(device: torch.device) -> bool:
    """Time one matrix product of the model's size in both types: CPUs differ by whether they have bfloat16 units."""
    if device.type == "cuda":
        return True
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(4096, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype)
        for _ in range(3):
            left @ right
        start = time.perf_counter()
        for _ in range(20):
            left @ right
        times[dtype] = time.perf_counter() - start
    return times[torch.bfloat16] < times[torch.float32]


def rate_factor(progress: float, settings: Settings) -> float:
    """Learning-rate factor at a share of the run: warm-up, flat, cosine."""
    if progress < settings.warm_up:
        return progress / settings.warm_up + 0.02
    if progress < settings.flat:
        return 1.0
    fall = (progress - settings.flat) / (1 - settings.flat)
    return settings.final_factor + (1 - settings.final_factor) * 0.5 * (1 + math.cos(math.pi * min(fall, 1.0)))


def next_token_loss(model: PocketLlama, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over positions that are no padding; hidden (n, width), targets (n,)."""
    return F.cross_entropy(model.logits(hidden).float(), targets, ignore_index=PAD)


def loss_of_batch(model: PocketLlama, batch: Tensor, early_layer: int, settings: Settings) -> tuple[Tensor, Tensor]:
    """(total, plain next-token loss) of a padded batch (texts, length)."""
    final, early = model(batch[:, :-1], early_layer)
    targets = batch[:, 1:]
    real = targets != PAD
    plain = next_token_loss(model, final[real], targets[real])
    chosen = real & (torch.rand(real.shape, device=real.device) < settings.early_share)
    extra = next_token_loss(model, early[chosen], targets[chosen])
    return plain + settings.early_weight * extra, plain.detach()


def save_checkpoint(path: Path, state: dict) -> None:
    """Write through a temporary file, so that a killed run leaves the last checkpoint whole."""
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    temporary.replace(path)


def train(settings: Settings) -> dict[str, float]:
    """Run the training (or go on with it) and return what it used; the weights end in ``out/checkpoint.pt``."""
    out = settings.out
    out.mkdir(parents=True, exist_ok=True)
    device = pick_device(settings.device)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    # A confident model's softmax is full of denormal numbers, which CPUs multiply slowly.
    torch.set_flush_denormal(True)
    shards = build_shards(
        out / "shards", out / "tokenizer" / "tokenizer.json", settings.shards, settings.seed, settings.processes
    )
    model = PocketLlama(Config()).to(device)
    optimizer = MuonAdamW(model, settings.muon_rate, settings.adam_rate, settings.weight_decay)
    checkpoint = out / "checkpoint.pt"
    step, tokens, shard_index, minutes_before, cpu_before = 0, 0, 0, 0.0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, shard_index = state["step"], state["tokens"], state["shard"]
        minutes_before, cpu_before = state["minutes"], state["cpu_minutes"]
    half = bfloat16_is_faster(device)
    rng = np.random.default_rng(settings.seed + 7919 * step)
    start, cpu_start, last_save = time.time(), time.process_time(), time.time()
    losses: list[float] = []
    log = (out / "log.jsonl").open("a", encoding="utf-8")

    def used() -> dict[str, float]:
        minutes = minutes_before + (time.time() - start) / 60
        cpu_minutes = cpu_before + (time.process_time() - cpu_start) / 60
        return {"step": step, "tokens": tokens, "minutes": round(minutes, 2), "cpu_minutes": round(cpu_minutes, 2)}

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": model.config.as_dict()}
        save_checkpoint(checkpoint, state | used() | {"shard": shard_index})

    def finished() -> bool:
        return step >= settings.steps or used()["minutes"] >= settings.minutes

    while not finished():
        shard = load_shard(shards[shard_index % len(shards)])
        for rows in batches(shard, settings.tokens_per_step, rng):
            progress = max(step / settings.steps, used()["minutes"] / settings.minutes)
            if finished():
                break
            batch = torch.from_numpy(rows).to(device)
            # The output of the last block has its own loss; the early one takes any block before it.
            early_layer = int(rng.integers(1, model.config.layers - 1))
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                total, plain = loss_of_batch(model, batch, early_layer, settings)
            total.backward()
            optimizer.step(rate_factor(progress, settings))
            step += 1
            tokens += int((rows != PAD).sum())
            losses.append(float(plain))
            if step % 25 == 0:
                record = used() | {
                    "loss": round(float(np.mean(losses)), 4),
                    "factor": round(rate_factor(progress, settings), 3),
                }
                log.write(json.dumps(record) + "\n")
                log.flush()
                print(record, flush=True)
                losses.clear()
            if time.time() - last_save > 60 * settings.checkpoint_minutes:
                save()
                last_save = time.time()
        else:
            shard_index += 1
    save()
    log.close()
    return used() | {"device": device.type, "bfloat16": half}
