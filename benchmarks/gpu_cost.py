"""What compressing 7B, 13B and 70B takes: ``python benchmarks/gpu_cost.py [--help]``.

On a GPU: every layer at its true shape, with random bf16 weights made on the device, one layer in memory at a time:
time depends on shapes alone. Reading a checkpoint is not in it. Without one: the same layers with every size divided by
``--scale`` on the CPU, which gives the share of the measured rates that compression reaches, and from it a PREDICTION
for the nominal rates of given GPUs. Writes ``results/gpu_cost/measured.json``, or ``prediction.json`` and
``prediction.md``.
"""

import argparse
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_compression import CLOCKS, llama_config, paper_method
from transformers import LlamaForCausalLM

from modegpt.calibration.calibration import Calibration
from modegpt.cost.machine import measure_ceiling
from modegpt.cost.metering import CostMeter
from modegpt.cost.roofline import FLOOR_KINDS, Ceiling
from modegpt.data.tokens import CalibrationTokens
from modegpt.decompositions.linalg import SYMMETRIC_BLOCK
from modegpt.errors import exit_status
from modegpt.methods.base import CompressionTask
from modegpt.progress import Progress
from modegpt.records.benchmark import write_benchmark
from modegpt.records.cost import compression_stages, floor_seconds

FOLDER = Path("results") / "gpu_cost"


@dataclass(frozen=True)
class Shape:
    """One model's sizes."""

    hidden: int
    width: int
    heads: int
    kv_heads: int
    layers: int
    target_seconds: float

    def divided(self, scale: int) -> "Shape":
        """Every size of a layer divided by ``scale``; heads stay as wide as they are where there are enough of them."""
        heads = max(self.heads // scale, 1)
        kv_heads = max(self.kv_heads * heads // self.heads, 1)
        return Shape(self.hidden // scale, self.width // scale, heads, kv_heads, self.layers, self.target_seconds)


SHAPES = {
    "7B": Shape(4096, 11008, 32, 32, 32, target_seconds=60),
    "13B": Shape(5120, 13824, 40, 40, 40, target_seconds=120),
    "70B": Shape(8192, 28672, 64, 8, 80, target_seconds=900),
}
NOMINAL = {  # FLOP/s of the data sheets, dense, matrix units where they exist
    "A100": {"bfloat16": 312e12, "float32": 19.5e12, "float64": 19.5e12},
    "H200": {"bfloat16": 989e12, "float32": 67e12, "float64": 67e12},
}
PASSES = {"uniform": 1, "entropic": 2}


def work(
    shape: Shape, *, num_samples: int, length: int, sparsity: float, allocation: str, block: int
) -> dict[str, float]:
    """FLOPs of compressing a whole model, by kind: forward passes, Gram matrices, factorisations.

    For models that do not run here; what runs is counted, and a test holds this to that. ``block``: of
    ``linalg.upper_blocks``, which says how much of a symmetric product is formed.
    """
    tokens, d = num_samples * length, shape.hidden // shape.heads
    linears = shape.hidden * (2 * shape.hidden + 2 * shape.kv_heads * d + 3 * shape.width)
    forward = 2.0 * linears * tokens + 2.0 * shape.hidden * num_samples * length**2
    gram = 2.0 * tokens * (formed(shape.width, block) + (shape.heads + 2 * shape.kv_heads) * formed(d, block))
    kept = round((1 - sparsity) * shape.width)
    mlp = shape.width**3 * 2 / 3 + kept**3 / 3 + 2.0 * kept**2 * shape.hidden
    heads = shape.kv_heads * (1 / 3 + 9 + 1) * d**3
    return {
        "forward": shape.layers * PASSES[allocation] * forward,
        "gram": shape.layers * gram,
        "factorisation": shape.layers * (mlp + heads),
    }


def formed(size: int, block: int) -> int:
    """Entries of a Gram matrix (size, size) that are computed, the others being their mirror images."""
    return sum(min(block, size - start) * (size - start) for start in range(0, size, block))


def measure_layers(
    shape: Shape,
    *,
    num_layers: int,
    arguments: argparse.Namespace,
    dtype: torch.dtype,
    allocation: str,
    ceiling: Ceiling,
) -> dict[str, Any]:
    """Compress ``num_layers`` models of one layer, one after the other; seconds, the floor, and what the meter saw."""
    config = llama_config(shape, layers=1, length=arguments.length, vocab_size=256)
    meter = CostMeter(ceiling=ceiling, clock=CLOCKS[arguments.clock])
    ids = torch.randint(
        0, config.vocab_size, (arguments.samples, arguments.length), generator=torch.Generator().manual_seed(0)
    )
    method = paper_method(allocation)
    torch.set_default_dtype(dtype)
    for _ in range(num_layers):
        with torch.device(arguments.device):
            model = LlamaForCausalLM(config).eval()
        calibration = Calibration(
            model,
            CalibrationTokens(ids, "", ids.numel()),
            batch_size=arguments.batch_size,
            precision=getattr(torch, arguments.precision),
            progress=Progress(True),
            meter=meter,
        )
        with meter.stage("compression"):
            method.compress(CompressionTask(calibration, arguments.sparsity))
    torch.set_default_dtype(torch.float32)
    cost = meter.summary()
    least = floor_seconds(cost)
    return {
        "seconds": sum(stage["seconds"] for stage in compression_stages(cost)),
        "floor_seconds": least,
        "num_layers": num_layers,
        "cost": cost,
    }


def measured(arguments: argparse.Namespace) -> None:
    """True shapes on a GPU, every layer."""
    ceiling, results = measure_ceiling(arguments.device, torch.bfloat16), []
    for name in arguments.models:
        shape = SHAPES[name]
        measure_layers(
            shape,
            num_layers=1,
            arguments=arguments,
            dtype=torch.bfloat16,
            allocation=arguments.allocation,
            ceiling=ceiling,
        )  # warms up
        entry = measure_layers(
            shape,
            num_layers=shape.layers,
            arguments=arguments,
            dtype=torch.bfloat16,
            allocation=arguments.allocation,
            ceiling=ceiling,
        )
        results.append({"model": name, "target_seconds": shape.target_seconds} | entry)
        ratio = entry["seconds"] / sum(entry["floor_seconds"].values())
        print(f"{name}: {entry['seconds']:.1f} s, {ratio:.2f} x its floor; goal {shape.target_seconds:.0f} s")
    path = write_benchmark(
        FOLDER / "measured.json",
        {"kind": "gpu_cost measured", "settings": vars(arguments), "ceiling": vars(ceiling), "measurements": results},
    )
    print(path)


def predicted(arguments: argparse.Namespace) -> None:
    """Scaled shapes on the CPU, then nominal rates of GPUs at the efficiency seen."""
    ceiling, seen = (
        measure_ceiling(arguments.device, torch.float32, size=2048, budget_seconds=8.0, clock=CLOCKS[arguments.clock]),
        [],
    )
    for name in arguments.models:
        entry = measure_layers(
            SHAPES[name].divided(arguments.scale),
            num_layers=1,
            arguments=arguments,
            dtype=torch.float32,
            allocation=arguments.allocation,
            ceiling=ceiling,
        )
        seen.append({"model": name, "ratio": entry["seconds"] / sum(entry["floor_seconds"].values())} | entry)
        what = f"{name} with sizes / {arguments.scale}, one layer on the CPU"
        print(f"{what}: {entry['seconds']:.2f} s, {seen[-1]['ratio']:.2f} x its floor", flush=True)
    slowdown = max(entry["ratio"] for entry in seen)
    triangular = ceiling.factorisation / ceiling.gemm["float64"]
    predictions = []
    for gpu, nominal in NOMINAL.items():
        for gram in ("float64", "float32"):
            nominal_rates = Ceiling(gpu, nominal, triangular * nominal["float64"], copy=float("inf"), size=0)
            for name in arguments.models:
                flops = work(
                    SHAPES[name],
                    num_samples=128,
                    length=2048,
                    sparsity=arguments.sparsity,
                    allocation=arguments.allocation,
                    block=SYMMETRIC_BLOCK["cuda"],
                )
                # bf16 activations have exact products, which the matrix units sum in float32
                gram_dtype = "float64" if gram == "float64" else "bfloat16"
                dtypes = {"forward": "bfloat16", "gram": gram_dtype, "factorisation": "float64"}
                least = nominal_rates.floor({f"{kind} {dtype}": flops[kind] for kind, dtype in dtypes.items()})
                predictions.append(
                    {
                        "gpu": gpu,
                        "gram_precision": gram,
                        "model": name,
                        "flops": flops,
                        "floor_seconds": least,
                        "predicted_seconds": slowdown * sum(least.values()),
                        "target_seconds": SHAPES[name].target_seconds,
                    }
                )
    content = {
        "kind": "gpu_cost prediction",
        "settings": vars(arguments),
        "ceiling": vars(ceiling),
        "nominal": NOMINAL,
        "slowdown": slowdown,
        "factorisation_over_product": triangular,
        "scaled_runs": seen,
        "predictions": predictions,
    }
    path = write_benchmark(FOLDER / "prediction.json", content)
    table = markdown(predictions, slowdown, triangular, arguments)
    (FOLDER / "prediction.md").write_text(table, encoding="utf-8")
    print(table, path, sep="\n")


def markdown(
    predictions: list[dict[str, Any]], slowdown: float, triangular: float, arguments: argparse.Namespace
) -> str:
    """The predictions as a table that says what they are."""
    lines = [
        "# PREDICTED compression seconds (nothing here was measured on a GPU)",
        "",
        *textwrap.wrap(
            f"128 x 2048 tokens, {100 * arguments.sparsity:g} % removed, {arguments.allocation} allocation "
            f"({PASSES[arguments.allocation]} forward passes), without reading the checkpoint. Predicted = floor at "
            f"the GPU's nominal rates x {slowdown:.2f}, the worst ratio of measured seconds to floor over one layer "
            f"of each model with sizes / {arguments.scale} on a CPU. Cholesky is taken to run at {triangular:.2f} of "
            "the float64 product rate, as it does there. Of each Gram matrix the part that is computed counts; the "
            "rest is known by symmetry. Nominal rates are seldom reached, and memory traffic and launches weigh more "
            "on a GPU than on a CPU: treat these as lower bounds.",
            width=120,
        ),
        "",
        "| GPU | Gram products | model | forward s | Gram s | factorisation s | predicted s | goal s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in predictions:
        parts = " | ".join(f"{entry['floor_seconds'][kind]:.1f}" for kind in FLOOR_KINDS)
        cells = (entry["gpu"], entry["gram_precision"], entry["model"], parts)
        times = (f"{entry['predicted_seconds']:.0f}", f"{entry['target_seconds']:.0f}")
        lines.append(f"| {' | '.join((*cells, *times))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure where there is a GPU, predict elsewhere; 2 for a mistake of the user."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--samples", type=int, default=128 if gpu else 2)
    parser.add_argument("--length", type=int, default=2048 if gpu else 1024)
    parser.add_argument("--batch-size", type=int, default=8 if gpu else 2)
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--allocation", default="entropic", choices=PASSES)
    parser.add_argument("--precision", default="float64", choices=("float64", "float32"))
    parser.add_argument("--scale", type=int, default=8, help="what sizes are divided by on a CPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="processor: for one thread on a busy CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return exit_status(lambda: (measured if torch.device(arguments.device).type == "cuda" else predicted)(arguments))


if __name__ == "__main__":
    sys.exit(main())
