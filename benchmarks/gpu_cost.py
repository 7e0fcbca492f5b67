"""What compressing 7B, 13B and 70B should take on a GPU, predicted: ``python benchmarks/gpu_cost.py [--help]``.

One layer of each model, with every size divided by ``--scale``, is compressed on the CPU. That gives the share of the
measured rates that compression reaches, and from it a PREDICTION for the nominal rates of given GPUs. Reading a
checkpoint is not in it. Writes ``results/gpu_cost/prediction.json`` and ``prediction.md``; ``gpu.py`` measures.
"""

import argparse
import math
import sys
import textwrap
import time
from dataclasses import dataclass, replace
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
    vocabulary: int = 32000

    def divided(self, scale: int) -> "Shape":
        """Every size of a layer divided by ``scale``; heads stay as wide as they are where there are enough of them."""
        heads = max(self.heads // scale, 1)
        kv_heads = max(self.kv_heads * heads // self.heads, 1)
        sizes = {"hidden": self.hidden // scale, "width": self.width // scale, "heads": heads, "kv_heads": kv_heads}
        return replace(self, **sizes)


SHAPES = {
    "7B": Shape(4096, 11008, 32, 32, 32, target_seconds=60),
    "13B": Shape(5120, 13824, 40, 40, 40, target_seconds=120),
    "Llama-3 8B": Shape(4096, 14336, 32, 8, 32, target_seconds=60, vocabulary=128256),
    "70B": Shape(8192, 28672, 64, 8, 80, target_seconds=900),
}
NOMINAL = {  # FLOP/s (dense, matrix units where they exist) and bytes/s of the data sheets
    "A100": {"bfloat16": 312e12, "float32": 19.5e12, "float64": 19.5e12, "bytes": 2.0e12},
    "H100": {"bfloat16": 989e12, "float32": 67e12, "float64": 67e12, "bytes": 3.35e12},
    "H200": {"bfloat16": 989e12, "float32": 67e12, "float64": 67e12, "bytes": 4.8e12},
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


def nominal_work(
    gpu: str, shape: Shape, *, gram: str, sparsity: float, allocation: str, triangular: float
) -> tuple[dict[str, float], dict[str, float]]:
    """FLOPs of compressing a whole model with 128 x 2048 tokens, and their least seconds at nominal rates, by kind.

    Activations are bfloat16. ``gram``: that of the Gram products; products of bfloat16 are exact in float32, so
    the matrix units form and sum those. ``triangular``: Cholesky's share of the rate of a float64 product.
    """
    nominal = {dtype: rate for dtype, rate in NOMINAL[gpu].items() if dtype != "bytes"}
    ceiling = Ceiling(gpu, nominal, triangular * nominal["float64"], copy=NOMINAL[gpu]["bytes"], size=0)
    flops = work(
        shape, num_samples=128, length=2048, sparsity=sparsity, allocation=allocation, block=SYMMETRIC_BLOCK["cuda"]
    )
    dtypes = {
        "forward": "bfloat16",
        "gram": "float64" if gram == "float64" else "bfloat16",
        "factorisation": "float64",
    }
    return flops, ceiling.floor({f"{kind} {dtype}": flops[kind] for kind, dtype in dtypes.items()})


def measure_layers(
    shape: Shape,
    *,
    num_layers: int,
    samples: int,
    length: int,
    batch_size: int,
    sparsity: float,
    dtype: torch.dtype,
    precision: torch.dtype,
    allocation: str,
    device: str,
    ceiling: Ceiling,
    clock: str = "wall",
    overlap: bool = False,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Compress models of one layer, one after the other: ``num_layers``, or as many as end within ``seconds``.

    Random weights, made on the device; random tokens, ``samples`` windows of ``length``. ``precision`` is that of the
    Gram products, ``overlap`` as in ``Calibration``. Returns ``num_layers`` done, one at least, and ``against_floor``.
    """
    config = llama_config(shape, layers=1, length=length, vocab_size=256)
    meter, began, done = CostMeter(ceiling=ceiling, clock=CLOCKS[clock]), time.monotonic(), 0
    ids = torch.randint(0, config.vocab_size, (samples, length), generator=torch.Generator().manual_seed(0))
    method, before = paper_method(allocation), torch.get_default_dtype()
    while done < num_layers and (done == 0 or (time.monotonic() - began) * (done + 1) / done <= seconds):
        try:
            torch.set_default_dtype(dtype)
            with torch.device(device):
                model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
        calibration = Calibration(
            model,
            CalibrationTokens(ids, "", ids.numel()),
            batch_size=batch_size,
            precision=precision,
            progress=Progress(True),
            meter=meter,
            overlap=overlap,
        )
        with meter.stage("compression"):
            method.compress(CompressionTask(calibration, sparsity))
        done += 1
    cost = meter.summary()
    return {"num_layers": done, **against_floor(cost)}


def against_floor(cost: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a metered compression, those of its floor by kind of work, their ratio, and the cost itself."""
    seconds, least = sum(stage["seconds"] for stage in compression_stages(cost)), floor_seconds(cost)
    return {"seconds": seconds, "floor_seconds": least, "ratio": seconds / sum(least.values()), "cost": cost}


def predicted(arguments: argparse.Namespace) -> None:
    """Scaled shapes on the CPU, then nominal rates of GPUs at the efficiency seen."""
    clock, seen = CLOCKS[arguments.clock], []
    ceiling = measure_ceiling("cpu", torch.float32, size=2048, budget_seconds=8.0, clock=clock)
    for name in arguments.models:
        entry = measure_layers(
            SHAPES[name].divided(arguments.scale),
            num_layers=1,
            samples=arguments.samples,
            length=arguments.length,
            batch_size=arguments.batch_size,
            sparsity=arguments.sparsity,
            dtype=torch.float32,
            precision=getattr(torch, arguments.precision),
            allocation=arguments.allocation,
            device="cpu",
            ceiling=ceiling,
            clock=arguments.clock,
        )
        seen.append({"model": name} | entry)
        what = f"{name} with sizes / {arguments.scale}, one layer on the CPU"
        print(f"{what}: {entry['seconds']:.2f} s, {seen[-1]['ratio']:.2f} x its floor", flush=True)
    slowdown = max(entry["ratio"] for entry in seen)
    triangular = ceiling.factorisation / ceiling.gemm["float64"]
    predictions = []
    for gpu in NOMINAL:
        for gram in ("float64", "float32"):
            for name in arguments.models:
                flops, least = nominal_work(
                    gpu,
                    SHAPES[name],
                    gram=gram,
                    sparsity=arguments.sparsity,
                    allocation=arguments.allocation,
                    triangular=triangular,
                )
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
    """Predict; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--allocation", default="entropic", choices=PASSES)
    parser.add_argument("--precision", default="float64", choices=("float64", "float32"))
    parser.add_argument("--scale", type=int, default=8, help="what sizes are divided by")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="processor: for one thread on a busy CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return exit_status(lambda: predicted(arguments))


if __name__ == "__main__":
    sys.exit(main())
