"""Measure every bar of the pocket model on the shipped 4-bit weights and print it: bar, measured, holds or not."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from .bars import bars, table
from .convert import total_megabytes, write_json
from .corpus import HELD_OUT, TOKEN_SHARES, TRAIN
from .environment import restart_with_environment
from .language import behaviour_costs, grammaticality, loss, prompts_for
from .pairs import MAKERS, check, load_pairs
from .refusal import measure_refusal
from .runner import Runner
from .steering import measure_sides
from .tasks import measure_tasks
from .topics import TOPIC_EFFECTS, measure_topic_effect

# Behaviours whose rules have held-out alternatives.
HELD_OUT_KINDS = ("sentiment", "formality", "certainty", "topic", "chat")
SIDE_BEHAVIOURS = ("sentiment", "formality", "certainty")


@dataclass(frozen=True)
class Job:
    """One independent piece of the evaluation, run in its own process."""

    part: str
    detail: str
    folder: Path
    float_folder: Path | None
    pairs: Path
    threads: int


def run_job(job: Job) -> dict:
    """Figures of one job."""
    torch.set_num_threads(job.threads)
    torch.set_flush_denormal(True)
    runner = Runner(job.folder)
    if job.part == "language":
        return measure_language(runner, Runner(job.float_folder) if job.float_folder else None)
    if job.part == "grammar":
        return grammaticality(runner, job.detail)
    if job.part == "sides":
        return measure_sides(runner, job.pairs, job.detail)
    if job.part == "refusal":
        return measure_refusal(runner, job.pairs)
    if job.part == "topics":
        return measure_topic_effect(runner, job.pairs, job.detail)
    return measure_tasks(runner)


# Longest first, so that the processes end together.
DETAILS = {
    "sides": SIDE_BEHAVIOURS,
    "topics": TOPIC_EFFECTS,
    "refusal": ("",),
    "language": ("",),
    "grammar": HELD_OUT_KINDS,
    "tasks": ("",),
}


def measure(
    folder: Path,
    float_folder: Path | None,
    pairs: Path,
    parts: Sequence[str] = (),
    processes: int | None = None,
) -> dict:
    """All figures as plain data; ``parts`` limits the work to some of ``DETAILS`` and "mlx"."""
    cores = os.cpu_count() or 1
    processes = processes or min(cores, 4)
    wanted = [part for part in DETAILS if not parts or part in parts]
    jobs = [
        Job(part, detail, folder, float_folder, pairs, max(1, cores // processes))
        for part in wanted
        for detail in DETAILS[part]
    ]
    start = time.time()
    figures: dict = {"size (MB)": total_megabytes(folder)}
    # Started afresh: a forked PyTorch process may hang in its thread pool.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for job, found in zip(jobs, pool.map(run_job, jobs), strict=True):
            print(f"{job.part} {job.detail} ({(time.time() - start) / 60:.1f} min): {found}", flush=True)
            if job.detail:
                figures.setdefault(job.part, {})[job.detail] = found
            else:
                figures[job.part] = found
    if not parts or "mlx" in parts:
        figures["mlx"] = confirm_with_mlx(folder, Runner(folder))
        print(f"mlx: {figures['mlx']}", flush=True)
    figures["pairs"] = {name: check(_all_rows(pairs, name)) for name in (*MAKERS, "tasks")}
    figures["evaluation minutes"] = round((time.time() - start) / 60, 1)
    return figures


def _all_rows(pairs: Path, name: str) -> list[dict[str, str]]:
    return [row for split in ("train", "choose", "report") for row in load_pairs(pairs, name, split)]


def measure_language(runner: Runner, float_runner: Runner | None) -> dict:
    """Losses per behaviour, in distribution and held out, 4-bit and float32."""
    costs = behaviour_costs(runner)
    result = {}
    for kind in TOKEN_SHARES:
        for mode in (TRAIN, HELD_OUT) if kind in HELD_OUT_KINDS else (TRAIN,):
            found = loss(runner, kind, mode, costs[kind])
            row = asdict(found) | {"excess": found.excess}
            if float_runner is not None:
                row["float32"] = loss(float_runner, kind, mode, costs[kind]).model
            result[f"{kind}, {mode}"] = row
    return result


def confirm_with_mlx(folder: Path, runner: Runner, tokens: int = 40) -> dict:
    """Greedy texts of plain mlx-lm and of the PyTorch runner, and mlx-lm's decoding speed on this machine."""
    import mlx.core as mx
    from mlx_lm import load, stream_generate

    mx.set_default_device(mx.cpu)
    model, tokenizer = load(str(folder))
    prompts = [prompts_for(kind, HELD_OUT, 2, 55)[i] for kind in HELD_OUT_KINDS for i in range(2)]
    same = 0
    for prompt in prompts:
        responses = [r.token for r in stream_generate(model, tokenizer, runner.encode(prompt), max_tokens=tokens)]
        ends = tokenizer.eos_token_ids
        same += [t for t in responses if t not in ends] == runner.generate([prompt], tokens, 0.0)[0]
    speeds = []
    for prompt in prompts[:7]:
        *_, last = stream_generate(model, tokenizer, runner.encode(prompt), max_tokens=128)
        speeds.append(last.generation_tps)
    return {"greedy texts": len(prompts), "equal": same, "tokens per second": statistics.median(speeds)}


def main() -> None:
    """``python -m training.evaluate``"""
    here = Path(__file__).resolve().parent.parent / "mlxsteer"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=here / "pocket" / "model", help="the 4-bit folder")
    parser.add_argument("--float32", type=Path, default=None, help="the float32 folder, for the cost of 4 bits")
    parser.add_argument("--pairs", type=Path, default=here / "datasets" / "pocket")
    parser.add_argument("--parts", nargs="*", default=(), help=f"some of {[*DETAILS, 'mlx']}")
    parser.add_argument("--figures", type=Path, default=None, help="write the figures here as JSON")
    parser.add_argument("--processes", type=int, default=None)
    arguments = parser.parse_args()
    figures = measure(arguments.model, arguments.float32, arguments.pairs, arguments.parts, arguments.processes)
    if arguments.figures:
        write_json(arguments.figures, figures)
    print(table(bars(figures)))


if __name__ == "__main__":
    restart_with_environment("training.evaluate")
    main()
