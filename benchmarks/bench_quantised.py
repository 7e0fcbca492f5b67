"""Does compression help once weights are quantised? ``python benchmarks/bench_quantised.py MODEL [--help]``.

The dense model and what MoDeGPT makes of it at ``--sparsity`` under ``engine=deci`` (rows that 4 bits can store), each
as GGUF files of 16, 8 and 4 bits: bytes, perplexity with the weights that the file's blocks stand for, and llama.cpp's
tokens a second on one thread. Writes ``results/bench/quantised.json``. ``--engine`` is the interpreter of an
environment with xllamacpp, as ``make engines`` builds one; without it there are no speeds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import PreTrainedModel

import modegpt
from modegpt.errors import exit_status
from modegpt.evaluation.perplexity import perplexity
from modegpt.models import build_compressed, layer_shapes
from modegpt.models.gguf_file import write_gguf
from modegpt.progress import Progress
from modegpt.records.benchmark import FOLDER, write_benchmark

KINDS = ("f16", "q8_0", "q4_0", "q4_k")
BATCH_TOKENS = 1024
SPEED = Path(__file__).with_name("llama_cpp_speed.py")


def stored(model: PreTrainedModel, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of ``model`` as the GGUF file at ``path`` has them."""
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, model.config.num_hidden_layers)
    for name, own in model.state_dict().items():
        tensor = found.get(names.get_name(name, (".weight", ".bias")) or "")
        if tensor is None:  # a head that is the embeddings
            continue
        data = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if ".q_proj." in name or ".k_proj." in name:  # neighbours there, halves of a head here
            data = data.unflatten(0, (-1, model.config.dense_head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        yield name, data[tuple(slice(size) for size in own.shape)]  # without the zeros that rows were filled with


def speed(engine: str | None, path: Path) -> dict[str, float]:
    """llama.cpp's tokens a second: of a prompt, and of what follows."""
    if engine is None:
        return {}
    done = subprocess.run([engine, SPEED, path], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(arguments: argparse.Namespace) -> None:
    """Compress, write, score and time."""
    model, tokenizer = modegpt.load(arguments.model), modegpt.load_tokenizer(arguments.model)
    texts = [Path(arguments.calibration).read_text(encoding="utf-8")]
    windows = arguments.windows * arguments.length
    ids = torch.tensor(tokenizer(Path(arguments.text).read_text(encoding="utf-8")).input_ids[:windows])
    smaller = modegpt.compress(
        model,
        tokenizer,
        texts,
        sparsity=arguments.sparsity,
        method=arguments.method,
        num_samples=arguments.samples,
        sequence_length=arguments.length,
        engine="deci",
    )
    shapes = layer_shapes(model.config)
    forms = {"dense": build_compressed(model, shapes, [{}] * len(shapes)), f"{arguments.sparsity:.0%} removed": smaller}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, form in forms.items():
            weights = {key: tensor.clone() for key, tensor in form.state_dict().items()}
            for kind in arguments.kinds:
                path = Path(folder) / f"{len(rows)}.gguf"
                report = write_gguf(form, tokenizer, path, kind=kind)
                row = {"model": name, "kind": kind, "weight_bytes": report.exported.weight_bytes}
                row |= {"num_parameters": report.exported.num_parameters, **speed(arguments.engine, path)}
                form.load_state_dict(dict(stored(form, path)), strict=False)
                scored = perplexity(
                    form, ids, window=arguments.length, batch_tokens=1024, progress=Progress(quiet=True)
                )
                form.load_state_dict(weights)
                rows.append(row | {"perplexity": scored["value"]})
                print(rows[-1], flush=True)
    path = FOLDER / "quantised.json"
    write_benchmark(path, {"settings": vars(arguments), "rows": rows})
    print(f"written: {path}")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a dense model of llama.cpp's architecture deci, such as a Llama")
    parser.add_argument("--calibration", required=True, help="a text file")
    parser.add_argument("--text", required=True, help="a text file to score")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--method", default="modegpt", choices=("modegpt", "modegpt_plus"))
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window, in calibration and in scoring")
    parser.add_argument("--windows", type=int, default=32, help="windows scored")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=("f16", "q8_0", "q4_0"))
    parser.add_argument("--engine", help="an interpreter that has xllamacpp")
    arguments = parser.parse_args()
    return exit_status(lambda: run(arguments), program=Path(sys.argv[0]).name)


if __name__ == "__main__":
    sys.exit(main())
