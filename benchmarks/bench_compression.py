"""Compression time against its floor, on random weights: ``python benchmarks/bench_compression.py [--help]``.

The floor is the FLOPs of the forward passes, the Gram matrices and the factorisations, each at the rate measured for a
product of that precision or a Cholesky factorisation, before and after, in the same process. Prints seconds by stage
and the ratio for every precision and allocation asked for, and writes ``results/bench/compression.json``.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modegpt.allocation.policies import POLICIES
from modegpt.calibration.calibration import Calibration
from modegpt.cost.machine import measure_ceiling
from modegpt.cost.metering import CostMeter
from modegpt.data.tokens import CalibrationTokens
from modegpt.decompositions.cr import QueryKeyCR
from modegpt.decompositions.nystrom import MLPNystrom
from modegpt.decompositions.svd import ValueOutputSVD
from modegpt.errors import exit_status
from modegpt.methods.base import CompressionTask, Method
from modegpt.methods.modegpt import MoDeGPT
from modegpt.progress import Progress
from modegpt.records.benchmark import FOLDER, write_benchmark
from modegpt.records.cost import COST_HEADERS, compression_stages, cost_rows, floor_line, floor_seconds, machine_line
from modegpt.records.summary import text_table

GOAL = 1.5
RATE_SIZE = 2048
"""Of the matrices that the ceiling is measured on: as large as those of the work."""
RATE_SECONDS = 4.0
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""Processor seconds of one thread are wall seconds without what other programs take; both sides of the ratio use the
same."""


def measure(
    model: PreTrainedModel,
    ids: torch.Tensor,
    method: Method,
    *,
    precision: torch.dtype,
    sparsity: float,
    batch_size: int,
    clock: str,
    overlap: bool = False,
) -> dict[str, Any]:
    """Compress ``model`` once; what the meter saw. ``overlap``: as in ``Calibration``."""
    meter = CostMeter(clock=CLOCKS[clock])
    tokens = CalibrationTokens(ids=ids, sha256="", stream_tokens=ids.numel())
    calibration = Calibration(
        model,
        tokens,
        batch_size=batch_size,
        precision=precision,
        progress=Progress(quiet=True),
        meter=meter,
        overlap=overlap,
    )
    with meter.stage("compression"):
        method.compress(CompressionTask(calibration, sparsity))
    return meter.summary()


def paper_method(allocation: str) -> MoDeGPT:
    """The paper's method with one of its allocations."""
    return MoDeGPT(
        mlp=MLPNystrom(), query_key=QueryKeyCR(), value_output=ValueOutputSVD(), allocation=POLICIES[allocation]()
    )


def add_shape(
    parser: argparse.ArgumentParser,
    *,
    layers: int,
    hidden: int,
    width: int,
    heads: int,
    kv_heads: int,
    length: int,
    batch_size: int,
) -> None:
    """The options that say what is compressed, apart from how many windows, with these defaults."""
    for option, default in (
        ("layers", layers),
        ("hidden", hidden),
        ("width", width),
        ("heads", heads),
        ("kv-heads", kv_heads),
        ("length", length),
        ("batch-size", batch_size),
    ):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--sparsity", type=float, default=0.3)


def llama_config(shape: Any, *, layers: int, length: int, **more: Any) -> LlamaConfig:
    """A Llama as wide as ``shape`` says (hidden, width, heads, kv_heads); ``more`` of its configuration."""
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=length,
        **more,
    )


def random_model(arguments: argparse.Namespace, **more: Any) -> PreTrainedModel:
    """A Llama of the shape that ``arguments`` describe, always the same weights; ``more`` of its configuration."""
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(arguments, layers=arguments.layers, length=arguments.length, **more)).eval()


def main() -> int:
    """Measure, print and record; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_shape(parser, layers=12, hidden=768, width=2048, heads=12, kv_heads=12, length=2048, batch_size=1)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--precision", nargs="+", default=["float64", "float32"], choices=("float64", "float32"))
    parser.add_argument("--allocation", nargs="+", default=["uniform", "entropic"], choices=("uniform", "entropic"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="processor: for one thread on a busy machine")
    parser.add_argument("--output", type=Path, default=FOLDER / "compression.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.clock == "processor" and (arguments.threads > 1 or arguments.device != "cpu"):
        parser.error("--clock processor is for one thread on the CPU")
    return exit_status(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """The measurement that ``arguments`` describe."""
    dtype = getattr(torch, arguments.dtype)
    model = random_model(arguments, vocab_size=1000).to(arguments.device, dtype)
    ids = torch.randint(0, model.config.vocab_size, (arguments.samples, arguments.length))
    cases = [(precision, allocation) for precision in arguments.precision for allocation in arguments.allocation]
    rates = partial(
        measure_ceiling.__wrapped__,
        arguments.device,
        dtype,
        size=RATE_SIZE,
        budget_seconds=RATE_SECONDS,
        clock=CLOCKS[arguments.clock],
    )
    ceiling, costs = rates(), []
    for precision, allocation in cases:
        costs.append(
            measure(
                model,
                ids,
                paper_method(allocation),
                precision=getattr(torch, precision),
                sparsity=arguments.sparsity,
                batch_size=arguments.batch_size,
                clock=arguments.clock,
            )
        )
        ceiling = ceiling.best(rates())
    results = []
    for (precision, allocation), cost in zip(cases, costs, strict=True):
        cost["machine"] = vars(ceiling)
        seconds, floor = sum(stage["seconds"] for stage in compression_stages(cost)), floor_seconds(cost)
        results.append(
            {
                "precision": precision,
                "allocation": allocation,
                "seconds": seconds,
                "floor_seconds": floor,
                "ratio": seconds / sum(floor.values()),
                "cost": cost,
            }
        )
        print(
            f"\nGram products in {precision}, {allocation} allocation",
            text_table(COST_HEADERS, cost_rows(cost)),
            f"compression: {floor_line(cost)}",
            sep="\n",
        )
    print(f"\n{machine_line(results[0]['cost'])}, {arguments.clock} clock")
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    path = write_benchmark(
        arguments.output, {"kind": "compression", "settings": settings, "goal": GOAL, "measurements": results}
    )
    print(
        f"{sum(result['ratio'] <= GOAL for result in results)} of {len(results)} at {GOAL} x the floor or less: {path}"
    )


if __name__ == "__main__":
    sys.exit(main())
