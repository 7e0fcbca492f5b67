"""What modegpt_plus takes beside the paper's method, on random weights: ``python benchmarks/bench_plus.py [--help]``.

The shapes are those of small released models, but for the number of layers: a large vocabulary over a narrow residual
stream. Each number of calibration windows is one ratio, measured in one process; the fewer there are, the more weighs
what does not depend on them. Writes ``results/bench/plus.json``.
"""

import argparse
import sys
from pathlib import Path

import torch
from bench_compression import CLOCKS, add_shape, measure, paper_method, random_model

from modegpt.errors import exit_status
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.progress import Progress
from modegpt.records.benchmark import FOLDER, write_benchmark
from modegpt.records.cost import compression_stages
from modegpt.records.summary import text_table

GOAL = 2.0


def main() -> int:
    """Measure, print and record; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_shape(parser, layers=10, hidden=576, width=1536, heads=9, kv_heads=3, length=512, batch_size=8)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--samples", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        default="processor",
        choices=CLOCKS,
        help="processor seconds are for one thread: what other programs take does not count",
    )
    parser.add_argument("--output", type=Path, default=FOLDER / "plus.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.clock == "processor" and arguments.threads > 1:
        parser.error("--clock processor is for one thread")
    return exit_status(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """The measurement that ``arguments`` describe."""
    model = random_model(arguments, vocab_size=arguments.vocabulary, tie_word_embeddings=True)
    results, progress = [], Progress()
    for samples in arguments.samples:
        ids, measured = torch.randint(0, arguments.vocabulary, (samples, arguments.length)), {}
        for name, method in (("modegpt", paper_method("entropic")), ("modegpt_plus", MoDeGPTPlus())):
            cost = measure(
                model,
                ids,
                method,
                precision=torch.float64,
                sparsity=arguments.sparsity,
                batch_size=arguments.batch_size,
                clock=arguments.clock,
            )
            measured[name] = {"seconds": sum(stage["seconds"] for stage in compression_stages(cost)), "cost": cost}
            progress.say(f"{samples} x {arguments.length} tokens, {name}: {measured[name]['seconds']:.1f} s")
        results.append(
            {
                "samples": samples,
                "length": arguments.length,
                "ratio": measured["modegpt_plus"]["seconds"] / measured["modegpt"]["seconds"],
                "methods": measured,
            }
        )
    rows = [
        [
            f"{each['samples']} x {each['length']}",
            *(f"{each['methods'][name]['seconds']:.1f}" for name in each["methods"]),
            f"{each['ratio']:.2f}",
        ]
        for each in results
    ]
    print(text_table(["tokens", "MoDeGPT (s)", "plus (s)", "ratio"], rows))
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    path = write_benchmark(
        arguments.output, {"kind": "plus", "settings": settings, "goal": GOAL, "measurements": results}
    )
    enough = f"{sum(result['ratio'] <= GOAL for result in results)} of {len(results)}"
    print(f"{enough} at {GOAL:g} x the paper's method or less, {arguments.clock} clock: {path}")


if __name__ == "__main__":
    sys.exit(main())
