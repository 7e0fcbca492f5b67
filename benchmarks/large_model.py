"""Compress a model larger than memory should hold: ``python benchmarks/large_model.py FOLDER [--help]``.

Makes a checkpoint of random bf16 weights of true shapes (the cost depends on shapes alone) in FOLDER, compresses it out
of core with few calibration tokens, prints predicted against measured memory and the seconds of every stage, and
removes the weights. The record goes to ``results/large_model``. Shapes: 7b (13.5 GB on disk, and 9.5 GB for the result)
and 1.3b (2.7 GB and 2 GB).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modegpt.data.embedded import TINY_MODELS
from modegpt.records.store import load_record
from modegpt.streaming.shards import shard_name, write_index, write_shard

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1.3b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
}
GIB = 2**30
POOL = 2**26 + 1
"""Random numbers drawn; odd, so that repeats do not line up with rows."""


def write_random_checkpoint(
    directory: Path, shape: str, *, num_layers: int | None = None, seed: int = 0
) -> LlamaConfig:
    """A Llama checkpoint of random weights, one layer in memory at a time, with the tokenizer of tiny-llama."""
    sizes: dict[str, Any] = SHAPES[shape] | ({} if num_layers is None else {"num_hidden_layers": num_layers})
    config = LlamaConfig(
        **sizes, vocab_size=32000, max_position_embeddings=2048, architectures=["LlamaForCausalLM"], dtype="bfloat16"
    )
    directory.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(name.split(".")[2] if ".layers." in name else "outside", []).append(name)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(POOL).normal_(0, 0.02, generator=generator).to(torch.bfloat16)
    for index, names in enumerate(groups.values()):
        tensors = {name: _random(shapes[name], pool, generator) for name in names}
        write_shard(tensors, directory / shard_name(index, len(groups)))
    write_index(directory, sum(shape.numel() for shape in shapes.values()))
    config.save_pretrained(directory)
    AutoTokenizer.from_pretrained(TINY_MODELS["tiny-llama"]).save_pretrained(directory)
    return config


def _random(shape: torch.Size, pool: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A matrix cut from ``pool``, which starts over where it ends, at a random place: drawing billions of numbers takes
    long.
    """
    if len(shape) == 1:  # norms
        return torch.ones(shape, dtype=pool.dtype)
    start, size = int(torch.randint(len(pool), (), generator=generator)), shape.numel()
    rolled = pool.roll(-start)
    return rolled.repeat(-(-size // len(pool)))[:size].view(shape).clone()


def compress(dense: Path, target: Path, *, name: str, results: Path, arguments: argparse.Namespace) -> None:
    """The main job in a process of its own, so that its peak of memory is its own."""
    overrides = [
        *(
            "model=local",
            f"model.name={name}",
            f"model.path={dense}",
            "evaluation=none",
            "tracking=disabled",
        ),
        *(arguments.overrides or ["allocation=uniform"]),
        *(f"compression.sparsity={arguments.sparsity}", f"calibration.num_samples={arguments.num_samples}"),
        *(
            f"calibration.sequence_length={arguments.sequence_length}",
            f"calibration.batch_size={arguments.num_samples}",
        ),
        *(
            "out_of_core.enabled=true",
            f"output.save_model={target}",
            f"output.root={results.parent}",
            f"output.experiment={results.name}",
        ),
        *("output.overwrite=true", f"threads={arguments.threads}"),
    ]
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-m", "modegpt", *overrides], check=True, env=environment)


def main() -> int:
    """Make, compress, print, remove."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the weights are made, and removed at the end")
    parser.add_argument("overrides", nargs="*", help="of the run, such as method=modegpt_plus; else allocation=uniform")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--num-layers", type=int, default=None, help="fewer layers, to see what one costs")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("results/large_model"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = f"random-{arguments.shape}" + (f"-{arguments.num_layers}-layers" if arguments.num_layers else "")
    dense, target = arguments.folder.absolute() / "dense", arguments.folder.absolute() / "compressed"
    start = time.perf_counter()
    if not dense.is_dir():  # else a run that was killed is gone on with
        making = dense.with_name("dense.making")
        shutil.rmtree(making, ignore_errors=True)
        write_random_checkpoint(making, arguments.shape, num_layers=arguments.num_layers)
        making.rename(dense)
        print(f"checkpoint made in {time.perf_counter() - start:.0f} s", flush=True)
    compress(dense, target, name=name, results=arguments.results.absolute(), arguments=arguments)
    newest = max(arguments.results.glob(f"{name}-*/record.json"), key=lambda path: path.stat().st_mtime)
    record = load_record(newest)
    memory = record["compression"]["details"]["out_of_core"]
    predicted, measured = memory["predicted_peak_bytes"]["host"], memory["measured_peak_bytes"]["host"]
    share = measured / predicted["total"]
    print(f"host memory: {measured / GIB:.2f} GiB measured, {predicted['total'] / GIB:.2f} GiB predicted ({share:.2f})")
    print(json.dumps({part: f"{size / GIB:.2f} GiB" for part, size in predicted.items()}))
    for stage in record["cost"]["stages"]:
        print(f"{stage['name']:<16}{stage['seconds']:>9.1f} s")
    for weights in (dense, target):
        shutil.rmtree(weights)
    return 0


if __name__ == "__main__":
    sys.exit(main())
