"""What scoring costs beyond the model's own forward passes: ``python benchmarks/bench_evaluation.py [--help]``.

The five embedded tasks through lm-evaluation-harness, on the embedded models. The time inside the model's forward is
measured in the very pass that is timed, so the ratio does not depend on how busy the machine is. The first pass
tokenises and imports; later ones (the compressed model after the dense one) reuse its tokens. Writes
``results/bench/evaluation.json``.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.errors import exit_status
from modegpt.evaluation.tasks import load_tasks
from modegpt.evaluation.throughput import synchronise
from modegpt.evaluation.zeroshot import zeroshot
from modegpt.models.checkpoints import load_model, load_tokenizer
from modegpt.progress import Progress
from modegpt.records.benchmark import FOLDER, write_benchmark

GOAL = 0.20


class ForwardClock:
    """Adds up the seconds inside ``model``'s forward, on a GPU to the end of its work.

    Wall time: to ask for processor time is a system call, which would be counted as overhead.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.seconds, self.device = 0.0, model.device
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        synchronise(self.device)
        self._began = time.perf_counter()

    def _stop(self, *_: object) -> None:
        synchronise(self.device)
        self.seconds += time.perf_counter() - self._began


def score(model: PreTrainedModel, clock: ForwardClock, **options: Any) -> dict[str, float]:
    """One pass over all tasks: seconds, those inside the forward, and what the rest adds to them (``overhead``)."""
    clock.seconds = 0.0
    began = time.perf_counter()
    zeroshot(model, **options)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "forward_seconds": clock.seconds, "overhead": seconds / clock.seconds - 1}


def bench(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    repeats: int,
    limit: int | None,
) -> dict[str, Any]:
    """Every pass over one model, which the record calls ``name``."""
    clock = ForwardClock(model)
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "tasks": load_tasks(["tiny"], data_path=None),
        "batch_size": batch_size,
        "max_length": model.config.max_position_embeddings,
    }
    options |= {"limit": limit, "progress": Progress(quiet=True), "encodings": {}}
    first = score(model, clock, **options)
    later = [score(model, clock, **options) for _ in range(repeats)]
    overhead = median(each["overhead"] for each in later)
    passes = f"first pass {first['overhead']:.1%} over its forward passes, later ones {overhead:.1%} (goal {GOAL:.0%})"
    seconds = median(each["seconds"] for each in later)
    print(f"{name}: {passes}; {first['seconds']:.1f} s and {seconds:.1f} s", flush=True)
    return {
        "model": name,
        "num_requests": len(options["encodings"]),
        "first": first,
        "later": later,
        "first_overhead": first["overhead"],
        "later_overhead": overhead,
    }


def main() -> int:
    """Measure and record; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny-llama", "tiny-opt"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=int, help="only the first items of each task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=FOLDER / "evaluation.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return exit_status(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """The measurement that ``arguments`` describe."""
    results = [
        bench(
            name,
            load_model(f"embedded:{name}", device="cpu"),
            load_tokenizer(f"embedded:{name}"),
            batch_size=arguments.batch_size,
            repeats=arguments.repeats,
            limit=arguments.limit,
        )
        for name in arguments.models
    ]
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    path = write_benchmark(
        arguments.output, {"kind": "evaluation", "settings": settings, "goal": GOAL, "measurements": results}
    )
    worst = max(each["first_overhead"] for each in results)
    print(f"largest overhead {worst:.1%}, goal {GOAL:.0%}: {path}")


if __name__ == "__main__":
    sys.exit(main())
