"""Dense against compressed inference: ``python benchmarks/bench_inference.py [--help]``.

Of a Llama-shaped model of at least 300M parameters with random weights, or of any checkpoint, and what MoDeGPT makes of
it: real ranks from its own allocation, on an influence profile like that of trained models (low in the middle of the
upper half), with random weights, since time does not depend on them. Prints each speed-up and its share of the ideal,
writes ``results/bench/inference.json`` and draws it beside. For example with a released model beside the random one:

    python benchmarks/bench_inference.py --models random HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_compression import llama_config
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from modegpt.allocation.policies import entropic_cap
from modegpt.allocation.ranks import integer_ranks
from modegpt.errors import UserError, exit_status
from modegpt.evaluation.spec import Workload
from modegpt.evaluation.throughput import CLOCKS, DENSE, PROCESSOR, WALL, Roof, describe_model, measure, measure_roof
from modegpt.methods.modegpt import MODULES, module_budgets
from modegpt.models import LayerShape, dense_shape, family_of, random_compressed
from modegpt.models.checkpoints import load_model
from modegpt.records.benchmark import FOLDER, write_benchmark

CAP = 0.85
MULTIPLES = {"exact": dict.fromkeys(MODULES, 1), "aligned": {"mlp": 64, "query_key": 16, "value_output": 16}}
GOAL = 0.85
RANDOM = "random"
"""The model that is made here."""


def influence_profile(num_layers: int) -> list[float]:
    """Block influence as trained models have it: high at both ends, lowest at two thirds of the depth."""
    return [0.02 + (index / num_layers - 0.65) ** 2 for index in range(num_layers)]


def planned_shapes(
    config: PreTrainedConfig, sparsity: float, rank_multiple: dict[str, int], *, of_layers: int | None = None
) -> list[LayerShape]:
    """The layer sizes that MoDeGPT gives a model with that influence.

    ``of_layers``: the model is planned with so many layers, of which ``config`` has some, evenly spaced.
    """
    budgets = module_budgets(config, family_of(config), rank_multiple=rank_multiple, targets={}, frozen=())
    num_layers, num_kv_heads = of_layers or config.num_hidden_layers, dense_shape(config).num_kv_heads
    plan = integer_ranks(entropic_cap(influence_profile(num_layers), sparsity, cap=CAP), [budgets] * num_layers)
    some = [
        plan.ranks[(2 * at + 1) * num_layers // (2 * config.num_hidden_layers)]
        for at in range(config.num_hidden_layers)
    ]
    return [LayerShape(ranks["query_key"], ranks["value_output"], ranks["mlp"], num_kv_heads) for ranks in some]


def random_model(config: LlamaConfig, *, dtype: torch.dtype, device: str, seed: int = 0) -> PreTrainedModel:
    """The dense model of ``config``, with normal weights made in place."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator) if parameter.ndim > 1 else parameter.fill_(1)
    return model.eval()


def draw(record: Mapping[str, Any]) -> Figure:
    """Speed-up over the removed share: a row for each model, a panel for each phase, ideals dashed."""
    compared = record["compared"]
    figure = Figure(figsize=(8.6, 3.6 * len(compared)), layout="constrained")
    panels = figure.subplots(len(compared), 2, squeeze=False)
    for (name, found), row in zip(compared.items(), panels, strict=True):
        for axis, phase in zip(row, ("prefill", "decode"), strict=True):
            mine = [entry for entry in found["measurements"] if entry["phase"] == phase]
            for colour, workload in zip(
                ("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
                dict.fromkeys((entry["batch_size"], entry["length"]) for entry in mine),
                strict=False,
            ):
                entries = [entry for entry in mine if (entry["batch_size"], entry["length"]) == workload]
                points = sorted(
                    (100 * found["models"][entry["model"]]["sparsity"], entry["speedup"], entry["ideal_speedup"])
                    for entry in entries
                )
                removed, speedups, ideals = zip(*points, strict=True)
                axis.plot(removed, speedups, "o-", color=colour, label=f"{workload[0]} x {workload[1]} tokens")
                axis.plot(removed, ideals, "--", color=colour, linewidth=0.9)
            axis.set_title(f"{name}, {phase}", fontsize=10)
            axis.set_xlabel("block-linear weights removed (%)", fontsize=9)
            axis.set_ylabel("speed-up over dense (dashed: ideal)", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, fontsize=8)
    return figure


def main() -> int:
    """Measure and record; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=[RANDOM], metavar="MODEL", help=f"{RANDOM}, or what model.path takes"
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2816)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument(
        "--multiples", nargs="+", default=["exact"], choices=MULTIPLES, help="rank multiples to compare"
    )
    parser.add_argument("--prefill", nargs="+", default=["1x128", "4x64"], metavar="BATCHxLENGTH")
    parser.add_argument("--decode", nargs="+", default=["1x128", "1x512", "8x64"], metavar="BATCHxLENGTH")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decode-tokens", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default=WALL, choices=CLOCKS, help="processor: where other programs run beside")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", type=Path, default=FOLDER / "inference.json")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw the record that is there")
    arguments = parser.parse_args()
    if arguments.clock == PROCESSOR and (arguments.threads > 1 or arguments.device != "cpu"):
        parser.error("--clock processor is for one thread on the CPU")
    torch.set_num_threads(arguments.threads)
    return exit_status(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Make and draw the record that ``arguments`` describe."""
    if not arguments.draw:
        record(arguments)
    draw(json.loads(arguments.output.read_text(encoding="utf-8"))).savefig(
        arguments.output.with_suffix(".png"), dpi=150, metadata={"Software": None}
    )


def record(arguments: argparse.Namespace) -> None:
    """The measurement that ``arguments`` describe."""
    names = dict(zip([Path(path).name for path in arguments.models], arguments.models, strict=True))
    if len(names) != len(arguments.models):
        raise UserError(f"--models need different names, got {', '.join(arguments.models)}")
    dtype = getattr(torch, arguments.dtype)
    config = llama_config(arguments, layers=arguments.layers, length=8192, vocab_size=arguments.vocabulary)
    roof = measure_roof(torch.device(arguments.device), dtype)
    print(f"ceiling: {roof.flops_per_second / 1e9:.0f} GFLOP/s, {roof.bytes_per_second / 1e9:.1f} GB/s")
    compared = {
        name: measured(
            random_model(config, dtype=dtype, device=arguments.device)
            if path == RANDOM
            else load_model(path, dtype, arguments.device),
            sparsities=arguments.sparsity,
            multiples=arguments.multiples,
            workloads=workloads(arguments.prefill, arguments.decode),
            repeats=arguments.repeats,
            decode_tokens=arguments.decode_tokens,
            roof=roof,
            clock=arguments.clock,
        )
        for name, path in names.items()
    }
    settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "draw")}
    content = {"kind": "inference", "settings": settings, "goal": GOAL, "ceiling": vars(roof), "compared": compared}
    path = write_benchmark(arguments.output, content)
    reached = [
        entry["share_of_ideal"]
        for found in compared.values()
        for entry in found["measurements"]
        if entry["model"] != DENSE
    ]
    print(
        f"{sum(share >= GOAL for share in reached)} of {len(reached)} measurements at {GOAL:.0%} of the ideal speed-up"
        f" or more, lowest {min(reached):.0%}: {path}"
    )


def workloads(prefill: Sequence[str], decode: Sequence[str]) -> list[Workload]:
    """Both phases' batches, each as BATCHxLENGTH."""
    return [Workload.parse("prefill", text) for text in prefill] + [Workload.parse("decode", text) for text in decode]


def measured(
    dense: PreTrainedModel,
    *,
    sparsities: Sequence[float],
    multiples: Sequence[str],
    workloads: Sequence[Workload],
    repeats: int,
    decode_tokens: int,
    roof: Roof,
    clock: str = WALL,
    compiler: Mapping[str, Any] | None = None,
    captured: bool = False,
    of_layers: int | None = None,
) -> dict[str, Any]:
    """``dense`` beside what MoDeGPT makes of it at each of ``sparsities``, with random weights.

    ``compiler``: options of ``torch.compile`` for all models, which then have caches of fixed size; None: not compiled.
    ``repeats, decode_tokens, roof, clock, captured``: as for ``throughput.measure``.
    ``of_layers``: as for ``planned_shapes``.
    Returns the sizes of the ``models`` and the ``measurements``.
    """
    models = {DENSE: dense}
    for sparsity in sparsities:
        for name in multiples:
            shapes = planned_shapes(dense.config, sparsity, MULTIPLES[name], of_layers=of_layers)
            models[f"{100 * sparsity:g}% {name}"] = random_compressed(dense, shapes)
    about = {label: describe_model(model, dense) for label, model in models.items()}
    for label, sizes in about.items():
        print(
            f"{label:14} {sizes['num_parameters'] / 1e6:.0f}M parameters, {sizes['sparsity']:.1%} removed, "
            f"{sizes['cache_bytes_per_token']} cache bytes a token ({sizes['cache_share']:.0%})"
        )
    if compiler is not None:
        for model in models.values():
            model.compile(**compiler)
    results = measure(
        models,
        workloads,
        repeats=repeats,
        decode_tokens=decode_tokens,
        roof=roof,
        say=lambda line: print(line, flush=True),
        clock=clock,
        fixed_cache=compiler is not None,
        captured=captured,
    )
    return {"models": about, "measurements": results}


if __name__ == "__main__":
    sys.exit(main())
