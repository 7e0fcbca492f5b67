r"""Speed of saved checkpoints beside their dense model: ``python benchmarks/throughput.py DENSE COMPRESSED ...``.

The measurement of ``bench_inference.py`` on real models, on a CPU or a GPU; names as for ``model.path`` (a directory, a
hub name, ``embedded:NAME``). For example on a GPU:

    python benchmarks/throughput.py meta-llama/Llama-2-7b-hf results/runs/NAME/model --device cuda --dtype float16 \
        --prefill 1x512 8x512 1x2048 --decode 1x512 16x512 64x512 --repeats 20 --decode-tokens 32
"""

import argparse
import sys
from pathlib import Path

import torch

from modegpt.errors import UserError, exit_status
from modegpt.evaluation.spec import Workload
from modegpt.evaluation.throughput import DENSE, describe_model, measure, measure_roof
from modegpt.models.checkpoints import load_model
from modegpt.records.benchmark import FOLDER, write_benchmark


def main(argv: list[str] | None = None) -> int:
    """Measure and record; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", help="the dense model")
    parser.add_argument("compressed", nargs="+", help="what it was compressed to")
    parser.add_argument("--prefill", nargs="*", default=["1x128"], metavar="BATCHxLENGTH")
    parser.add_argument("--decode", nargs="*", default=["1x128", "8x128"], metavar="BATCHxLENGTH")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--decode-tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=FOLDER / "throughput.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    return exit_status(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """The measurement that ``arguments`` describe."""
    workloads = [Workload.parse(phase, text) for phase in ("prefill", "decode") for text in getattr(arguments, phase)]
    labels = dict(
        zip(
            [DENSE, *(Path(path).name for path in arguments.compressed)],
            [arguments.dense, *arguments.compressed],
            strict=True,
        )
    )
    if len(labels) != 1 + len(arguments.compressed):
        names = ", ".join(Path(path).name for path in arguments.compressed)
        raise UserError(f"the compressed models need different names, got {names}")
    models = {label: load_model(path, arguments.dtype, arguments.device) for label, path in labels.items()}
    about = {label: describe_model(model, models[DENSE]) for label, model in models.items()}
    roof = measure_roof(models[DENSE].device, models[DENSE].dtype)
    results = measure(
        models, workloads, repeats=arguments.repeats, decode_tokens=arguments.decode_tokens, roof=roof, say=print
    )
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    print(
        write_benchmark(
            arguments.output,
            {
                "kind": "throughput",
                "settings": settings,
                "ceiling": vars(roof),
                "models": about,
                "measurements": results,
            },
        )
    )


if __name__ == "__main__":
    sys.exit(main())
