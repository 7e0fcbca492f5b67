"""Does compression help once weights are quantised? ``python benchmarks/quantised.py MODEL [--help]``.

The dense model and what ``--methods`` make of it at ``--sparsity`` under ``engine=deci`` (rows that 4 bits can store),
each as GGUF files of 16, 8 and 4 bits: bytes, perplexity with the weights that the file's blocks stand for, and
llama.cpp's tokens a second on one thread. Writes ``results/bench/quantised.json``. ``--engine`` is the interpreter of
an environment with xllamacpp, as ``make engines`` builds one; without it there are no speeds.

``--factors`` adds what the scales of value-output factors are worth, on a model whose heads are cut as well: balanced
between the two as MoDeGPT has them, or all on one side, with every matrix rounded in place (rows filled to whole
blocks).
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
from modegpt.models import build_compressed, decoder_layers, family_of, layer_shapes
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


def rounded(model: PreTrainedModel, kind: str) -> dict[str, torch.Tensor]:
    """The matrices inside the layers of ``model`` as blocks of ``kind`` stand for them, along their rows."""
    found, prefix, block = {}, f"{family_of(model.config).layers}.", gguf.GGMLQuantizationType[kind.upper()]
    for name, tensor in model.state_dict().items():
        if name.startswith(prefix) and name.endswith("_proj.weight"):
            rows = torch.nn.functional.pad(tensor.float(), (0, -tensor.shape[1] % 32)).numpy()
            data = gguf.quants.dequantize(gguf.quants.quantize(rows, block), block)
            found[name] = torch.from_numpy(data)[:, : tensor.shape[1]].contiguous()
    return found


def one_sided(model: PreTrainedModel, *, values: bool) -> dict[str, torch.Tensor]:
    """The value and output maps of ``model`` with the scale of each of their products in the ``values``, or outputs."""
    family, tensors = family_of(model.config), {}
    for index, layer in enumerate(decoder_layers(model)):
        W_V, W_O = (role(layer).weight.detach() for role in (family.value, family.output))
        heads = layer_shapes(model.config)[index].num_kv_heads
        V, W = W_V.unflatten(0, (heads, -1)), W_O.unflatten(1, (heads, -1, len(W_V) // heads))
        scale = W.norm(dim=(0, 2)) if values else 1 / V.norm(dim=2)
        scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
        for path, made in (
            (family.value_path, (V * scale.unsqueeze(2)).flatten(0, 1)),
            (family.output_path, (W / scale[:, None, :]).flatten(1)),
        ):
            tensors[f"{family.layers}.{index}.{path}.weight"] = made
    return tensors


def factor_rows(model: PreTrainedModel, ids: torch.Tensor, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Perplexity with the scale of value-output products in both factors or in one of them, unrounded and rounded."""
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    sides = {"balanced": {}, "in values": one_sided(model, values=True), "in outputs": one_sided(model, values=False)}
    for side, changed in sides.items():
        for kind in ("f32", *(each for each in arguments.kinds if each in ("q8_0", "q4_0"))):
            model.load_state_dict(changed, strict=False)
            model.load_state_dict({} if kind == "f32" else rounded(model, kind), strict=False)
            yield {"model": "heads cut too", "scale": side, "kind": kind, "perplexity": scored(model, ids, arguments)}
            model.load_state_dict(weights)


def scored(model: PreTrainedModel, ids: torch.Tensor, arguments: argparse.Namespace) -> float:
    """Perplexity of ``ids``."""
    quiet = Progress(quiet=True)
    return perplexity(model, ids, window=arguments.length, batch_tokens=BATCH_TOKENS, progress=quiet)["value"]


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

    def compressed(method: str, engine: str) -> PreTrainedModel:
        return modegpt.compress(
            model,
            tokenizer,
            texts,
            sparsity=arguments.sparsity,
            method=method,
            num_samples=arguments.samples,
            sequence_length=arguments.length,
            engine=engine,
        )

    shapes = layer_shapes(model.config)
    forms = {"dense": build_compressed(model, shapes, [{}] * len(shapes))}
    forms |= {f"{arguments.sparsity:.0%} removed by {name}": compressed(name, "deci") for name in arguments.methods}
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
                rows.append(row | {"perplexity": scored(form, ids, arguments)})
                form.load_state_dict(weights)
                print(rows[-1], flush=True)
    for row in factor_rows(compressed("modegpt", "any"), ids, arguments) if arguments.factors else ():
        rows.append(row)
        print(row, flush=True)
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
    methods = ("modegpt", "modegpt_plus")
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window, in calibration and in scoring")
    parser.add_argument("--windows", type=int, default=32, help="windows scored")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=("f16", "q8_0", "q4_0"))
    parser.add_argument("--factors", action="store_true", help="rows about the scales of value-output factors too")
    parser.add_argument("--engine", help="an interpreter that has xllamacpp")
    arguments = parser.parse_args()
    return exit_status(lambda: run(arguments), program=Path(sys.argv[0]).name)


if __name__ == "__main__":
    sys.exit(main())
