"""What ``gpu.py`` measures: five steps, each a list of parts with the seconds that each should take on an H100."""

import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import bench_compression
import bench_evaluation
import bench_inference
import torch
from bench_compression import llama_config, paper_method
from gpu_cost import FOLDER, NOMINAL, PASSES, SHAPES, Shape, against_floor, measure_layers, nominal_work, work
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import modegpt
from modegpt.calibration.calibration import Calibration
from modegpt.cost.machine import measure_ceiling
from modegpt.cost.roofline import Ceiling
from modegpt.data.texts import load_documents
from modegpt.data.tokens import CalibrationTokens
from modegpt.evaluation.perplexity import perplexity
from modegpt.evaluation.spec import Workload
from modegpt.evaluation.throughput import DENSE, measure_roof
from modegpt.files import read_json
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.models import family_of
from modegpt.models.checkpoints import load_tokenizer
from modegpt.progress import Progress
from modegpt.records.cost import ceiling_share, compression_stages

CHECKOUT = Path(__file__).resolve().parent.parent
SHARED_MODELS = ("stories260K", "babyllama-105")
"""Small trained models of the folder ``MODEGPT_SHARED``; a step names those that are absent."""
SPARSITY = 0.3
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Largest relative difference of perplexity from that of the CPU in float32."""
GOALS = {"H100": 1.25, "H200": 1.0}
"""Times the target of a shape."""
PLUS_GOAL, PAPER_SPEEDUP = 3.0, 1.46
GIVEN_GPU = "H100"
ONE = dict.fromkeys(("mlp", "query_key", "value_output"), 1)


class Absent(Exception):
    """What a part needs is not here; it is skipped."""


@dataclass(frozen=True)
class Part:
    """One measurement.

    Args:
        seconds: what it should take.
        measure: what goes into the record, given the seconds that it may take.
        stretches: takes what it is given, so there is always time for it.
    """

    name: str
    seconds: float
    measure: Callable[[float], Mapping[str, Any]]
    stretches: bool = False


@dataclass(frozen=True)
class Setting:
    """Where the steps run, and on which sizes.

    Args:
        divisor: of the sizes of a layer. 1: true shapes.
        layers: of every model; None: its own number.
        samples, length, batch_size: of the calibration windows.
        races: how often the statistics on a second stream are compared.
        prefill, decode, repeats, decode_tokens, multiples: as for ``bench_inference.py``; of the multiples the last
            one is compiled and captured.
        compiled_layers: of the models that are compiled, as compiling all of them takes minutes.
        compiler: options of ``torch.compile``; dynamic, so that batches of two sizes share their code.
        texts, small_samples, methods: characters scored, calibration windows and methods of the first step.
        limit: items of each task; None: all.
    """

    device: str
    divisor: int = 1
    layers: int | None = None
    samples: int = 128
    length: int = 2048
    batch_size: int = 8
    races: int = 20
    prefill: tuple[str, ...] = ("1x2048", "8x512", "64x128")
    decode: tuple[str, ...] = ("1x512", "8x512", "64x128")
    repeats: int = 5
    decode_tokens: int = 8
    multiples: tuple[str, ...] = ("exact", "aligned")
    compiled_layers: int = 4
    compiler: Mapping[str, Any] = field(default_factory=lambda: {"mode": "reduce-overhead", "dynamic": True})
    texts: int = 60000
    small_samples: int = 32
    methods: tuple[str, ...] = ("modegpt", "modegpt_plus")
    limit: int | None = None

    def shape(self, name: str) -> Shape:
        """The sizes of a model, divided."""
        shape = SHAPES[name] if self.divisor == 1 else replace(SHAPES[name].divided(self.divisor), vocabulary=256)
        return shape if self.layers is None else replace(shape, layers=self.layers)

    @property
    def on_gpu(self) -> bool:
        """Whether this is more than a rehearsal."""
        return torch.device(self.device).type == "cuda"


SCALES: dict[str, dict[str, Any]] = {
    "full": {},
    "tiny": {
        "divisor": 64,
        "layers": 2,
        "samples": 4,
        "length": 64,
        "batch_size": 2,
        "races": 2,
        "prefill": ("1x16", "2x8"),
        "decode": ("1x16", "2x8"),
        "repeats": 1,
        "decode_tokens": 2,
        "multiples": ("exact",),  # of so few channels none are left in multiples of 64
        "compiled_layers": 1,
        "compiler": {"backend": "aot_eager", "dynamic": True},
        "texts": 3000,
        "small_samples": 2,
        "methods": ("modegpt",),
        "limit": 2,
    },
}


# 1. Correct


def correct(setting: Setting) -> list[Part]:
    """CPU and GPU agree: whole compressions of trained models, and the tests that are marked ``gpu``."""
    models = ["embedded:tiny-llama", "embedded:tiny-opt", *SHARED_MODELS]
    seconds = {"modegpt": 3.0, "modegpt_plus": 9.0}
    parts = [
        Part(f"{path.removeprefix('embedded:')}, {method}", seconds[method], partial(compared, path, method, setting))
        for method in setting.methods
        for path in models
    ]
    return [*parts, Part("tests -m gpu", 40.0, gpu_tests, stretches=True)]


def compared(path: str, method: str, setting: Setting, _: float) -> dict[str, Any]:
    """One model compressed in float32 on the CPU and on the device: ranks and perplexity of each, and the perplexity of
    the latter with its weights in bfloat16.
    """
    path = path if ":" in path else _shared_model(path)
    tokenizer = modegpt.load_tokenizer(path)
    text = [load_documents("tiny", path=None, split="test").joined()[: setting.texts]]
    ranks, scores = {}, {}
    for side, device in {"cpu": "cpu", "float32": setting.device}.items():
        smaller = modegpt.compress(
            modegpt.load(path, device=device, dtype=torch.float32),
            tokenizer,
            "tiny",
            sparsity=SPARSITY,
            method=method,
            num_samples=setting.small_samples,
            rank_multiple=ONE,  # which a GPU would choose otherwise
            quiet=True,
        )
        report: dict[str, Any] = vars(smaller)["modegpt_report"]
        ranks[side] = [layer["ranks"] for layer in report["compression"]["layers"]]
        scores[side] = _perplexity(smaller, tokenizer, text)
    scores["bfloat16"] = _perplexity(smaller.bfloat16(), tokenizer, text)
    differences = {side: abs(scores[side] / scores["cpu"] - 1) for side in TOLERANCE}
    within = {side: differences[side] <= tolerance for side, tolerance in TOLERANCE.items()}
    return {
        "ranks_agree": ranks["float32"] == ranks["cpu"],
        "ranks": ranks,
        "perplexity": scores,
        "relative_difference": differences,
        "tolerance": TOLERANCE,
        "met": ranks["float32"] == ranks["cpu"] and all(within.values()),
    }


def _perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: list[str]) -> float:
    [score] = modegpt.evaluate(model, tokenizer, text, windows=[128], quiet=True)["perplexity"].values()
    return score["value"]


def _shared_model(name: str) -> str:
    folder = Path(os.environ.get("MODEGPT_SHARED", CHECKOUT.parent / "shared")) / "models" / name
    if not folder.is_dir():
        raise Absent(f"no model {name}: MODEGPT_SHARED should name a folder with models/{name}")
    return str(folder)


def gpu_tests(seconds: float) -> dict[str, Any]:
    """The tests marked ``gpu``, in processes of their own; where the time is over before they are, those that ran."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider"]
    with tempfile.TemporaryFile("w+") as log:
        tests = subprocess.Popen(
            [*command, "-n", "8", "tests/gpu"], cwd=CHECKOUT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status = tests.wait(max(seconds - 1, 1))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if tests.poll() is None:
                os.killpg(tests.pid, signal.SIGKILL)  # with the workers, who would go on
                tests.wait()
        log.seek(0)
        output = log.read()
    outcomes = re.findall(r"\[ *\d+%\] (PASSED|FAILED|SKIPPED|ERROR) (\S+)", output)
    counts = dict(Counter(outcome.lower() for outcome, _ in outcomes))
    failed = [name for outcome, name in outcomes if outcome in ("FAILED", "ERROR")]
    return {"status": status, "counts": counts, "failed": failed, "output": output[-20000:], "met": status == 0}


# 2. Compression cost


def cost(setting: Setting) -> list[Part]:
    """Seconds of compressing models of true shape: whole where they fit in memory, 70B by layers."""
    seen: dict[tuple[str, str], float] = {}
    whole = [
        Part(f"{name}, {allocation}", expected(name, allocation), partial(compressed, name, allocation, setting, seen))
        for name in ("7B", "Llama-3 8B", "13B")
        for allocation in PASSES
    ]
    float64 = partial(by_layers, "7B", setting, torch.float64, 4)
    return [
        Part("7B, one layer to warm up", 10.0, partial(by_layers, "7B", setting, torch.float32, 1)),
        *whole,
        Part("7B, plus", plus_seconds("7B"), partial(compressed, "7B", "plus", setting, seen)),
        Part("7B, products in float64, 4 layers", 4 * layer_seconds("7B", gram="float64"), float64),
        Part("70B, by layers", 10.0, partial(by_layers, "70B", setting, torch.float32, None), stretches=True),
    ]


def expected(name: str, allocation: str, *, gram: str = "float32") -> float:
    """Seconds that compressing a whole model should take, by nominal rates and the share of them seen on a CPU."""
    seen = read_json(CHECKOUT / FOLDER / "prediction.json")
    _, least = nominal_work(
        GIVEN_GPU,
        SHAPES[name],
        gram=gram,
        sparsity=SPARSITY,
        allocation=allocation,
        triangular=seen["factorisation_over_product"],
    )
    return seen["slowdown"] * sum(least.values())


def plus_seconds(name: str) -> float:
    """What plus should take: its goal, and half a forward pass in float32, in which its allocation measures."""
    forward = work(SHAPES[name], num_samples=128, length=2048, sparsity=SPARSITY, allocation="uniform", block=2048)
    return PLUS_GOAL * expected(name, "entropic") + 0.5 * forward["forward"] / NOMINAL[GIVEN_GPU]["float32"]


def layer_seconds(name: str, *, gram: str = "float32") -> float:
    """Seconds that one layer should take, with entropic allocation."""
    return expected(name, "entropic", gram=gram) / SHAPES[name].layers


def compressed(
    name: str, method: str, setting: Setting, seen: dict[tuple[str, str], float], _: float
) -> dict[str, Any]:
    """A whole model with random bfloat16 weights, compressed once by ``method``: one of ``PASSES``, or plus.

    Its seconds join ``seen``; plus is held to those of the paper's method, which has a goal of its own.
    """
    shape = setting.shape(name)
    config = llama_config(shape, layers=shape.layers, length=setting.length, vocab_size=shape.vocabulary)
    model = bench_inference.random_model(config, dtype=torch.bfloat16, device=setting.device)
    ids = torch.randint(shape.vocabulary, (setting.samples, setting.length), generator=torch.Generator().manual_seed(0))
    metered = bench_compression.measure(
        model,
        ids,
        MoDeGPTPlus() if method == "plus" else paper_method(method),
        precision=torch.float32,
        sparsity=SPARSITY,
        batch_size=setting.batch_size,
        clock="wall",
    )
    found = of_floor(metered, rates(setting)) | {"model": name, "method": method}
    seen[name, method] = found["seconds"]
    if method != "plus":
        return found | within_goal(shape, found["seconds"], setting)
    if (name, "entropic") not in seen:
        return found
    ratio = found["seconds"] / seen[name, "entropic"]
    return found | {"over_paper": ratio, "goal": PLUS_GOAL, "met": ratio <= PLUS_GOAL}


def by_layers(
    name: str, setting: Setting, precision: torch.dtype, num_layers: int | None, seconds: float
) -> dict[str, Any]:
    """One-layer models of a shape, compressed one after the other: ``num_layers``, or as many as there is time for.

    ``extrapolated_seconds`` are those of all layers at the rate of the ones that were measured.
    """
    shape = setting.shape(name)
    entry = measure_layers(
        shape,
        num_layers=min(num_layers or shape.layers, shape.layers),
        seconds=0.8 * seconds,  # embedding and weights are made beside what is measured
        samples=setting.samples,
        length=setting.length,
        batch_size=setting.batch_size,
        sparsity=SPARSITY,
        dtype=torch.bfloat16,
        precision=precision,
        allocation="entropic",
        device=setting.device,
        ceiling=rates(setting),
    )
    whole = entry["seconds"] * shape.layers / entry["num_layers"]
    return of_floor(entry["cost"], rates(setting)) | {
        "model": name,
        "precision": str(precision).removeprefix("torch."),
        "num_layers": entry["num_layers"],
        "of_layers": shape.layers,
        "extrapolated_seconds": whole,
        **(within_goal(shape, whole, setting) if num_layers is None else {}),
    }


def rates(setting: Setting) -> Ceiling:
    """The measured rates of the device; once a process."""
    if setting.divisor == 1:
        return measure_ceiling(setting.device, torch.bfloat16, budget_seconds=2.0)
    return measure_ceiling(setting.device, torch.bfloat16, size=64, budget_seconds=0.01)


def of_floor(metered: dict[str, Any], ceiling: Ceiling) -> dict[str, Any]:
    """Seconds, the floor, and of each stage the share of the machine's rates that it reached."""
    metered["machine"] = vars(ceiling)
    shares = {stage["name"]: ceiling_share(stage, ceiling) for stage in compression_stages(metered)}
    return against_floor(metered) | {"share_of_ceiling": shares, "peak_memory_bytes": metered["peak_memory_bytes"]}


def within_goal(shape: Shape, seconds: float, setting: Setting) -> dict[str, Any]:
    """What a whole model should take at most on the GPU that is here, and whether it did; nothing on another."""
    name = torch.cuda.get_device_properties(setting.device).name if setting.on_gpu else ""
    factor = next((factor for gpu, factor in GOALS.items() if gpu in name), None)
    if factor is None:
        return {}
    goal = factor * shape.target_seconds
    return {"goal_seconds": goal, "met": seconds <= goal}


# 3. Overlap


def overlap(setting: Setting) -> list[Part]:
    """Gram products on a second stream: the same bits, and whether it gains anything."""
    return [
        Part("the same to the bit", 15.0, partial(same_bits, setting)),
        Part("gain on 7B", 12 * layer_seconds("7B") + 5, partial(gain, setting)),
    ]


def same_bits(setting: Setting, _: float) -> dict[str, Any]:
    """The statistics of one layer of 7B in line with the forward, and beside it several times."""
    shape = setting.shape("7B")
    config = llama_config(shape, layers=1, length=setting.length, vocab_size=256)
    model = bench_inference.random_model(config, dtype=torch.bfloat16, device=setting.device)
    ids = torch.randint(256, (min(setting.samples, 16), setting.length), generator=torch.Generator().manual_seed(0))
    names = paper_method("entropic").required_statistics(family_of(config)) | {"layer.influence"}

    def statistics(*, beside: bool) -> dict[str, torch.Tensor]:
        calibration = Calibration(
            model,
            CalibrationTokens(ids, "", ids.numel()),
            batch_size=2,
            precision=torch.float32,
            progress=Progress(True),
            overlap=beside,
        )
        [found] = calibration.statistics(names)
        return found

    plain = statistics(beside=False)
    equal: dict[str, list[bool]] = {"in line": [], "beside": []}
    for _ in range(setting.races):
        for side, same in equal.items():  # in line again: where kernels differ from run to run, there is no race in it
            found = statistics(beside=setting.on_gpu and side == "beside")
            same.append(all(torch.equal(found[name], plain[name]) for name in names))
    counts = {side: sum(same) for side, same in equal.items()}
    met = counts["beside"] == setting.races
    return {"num_runs": setting.races, "num_equal": counts, "overlapped": setting.on_gpu, "met": met}


def gain(setting: Setting, _: float) -> dict[str, Any]:
    """One layer of 7B compressed with and without the second stream, taking turns."""
    sizes: dict[str, Any] = {"num_layers": 1, "samples": setting.samples, "length": setting.length}
    sizes |= {"batch_size": setting.batch_size, "sparsity": SPARSITY, "dtype": torch.bfloat16}
    sizes |= {"precision": torch.float32, "allocation": "uniform", "device": setting.device, "ceiling": rates(setting)}
    seconds: dict[str, list[float]] = {"in line": [], "beside": []}
    for _ in range(5 if setting.divisor == 1 else 1):
        for name, found in seconds.items():
            entry = measure_layers(setting.shape("7B"), **sizes, overlap=setting.on_gpu and name == "beside")
            [statistics] = [stage for stage in entry["cost"]["stages"] if stage["name"] == "statistics"]
            found.append(statistics["seconds"])
    ratio = median(one / other for one, other in zip(seconds["in line"], seconds["beside"], strict=True))
    return {"statistics_seconds": seconds, "overlapped": setting.on_gpu, "speedup": ratio, "met": ratio > 1}


# 4. Inference

WAYS = ("eager", "captured", "compiled")
"""Of running a model: as it is; its steps as CUDA graphs, which leave Python and launches out; compiled, into such
graphs."""


def inference(setting: Setting) -> list[Part]:
    """Dense against compressed 7B, in each way."""
    return [
        Part(f"{way}, {phase}", inference_seconds(setting, way, phase), partial(side_by_side, way, phase, setting))
        for way in WAYS
        for phase in ("decode", "prefill")
    ]


STEP_SECONDS = {"eager": 6e-4, "captured": 5e-5, "compiled": 1e-4}
START_SECONDS, MAKE_SECONDS, COMPILE_SECONDS, COMPILE_LAYER_SECONDS = 1.5, 0.03, 2.0, 1.0
"""Assumed, not measured: a layer of a forward beside its kernels; the machine's rates and what else comes first; making
a layer; compiling, and what a layer adds."""


def inference_seconds(setting: Setting, way: str, phase: str) -> float:
    """What a way should take: FLOPs or bytes at twice their nominal time, or Python; making and compiling models."""
    shape, rates = SHAPES["7B"], NOMINAL[GIVEN_GPU]
    layers, multiples = sizes_of(setting, way)
    num_models = 1 + 2 * len(multiples)
    weights = layers * shape.hidden * (4 * shape.hidden + 3 * shape.width)
    total = START_SECONDS + MAKE_SECONDS * layers * num_models
    if way == "compiled":  # for one sequence, and for any number of them
        total += 2 * num_models * (COMPILE_SECONDS + layers * COMPILE_LAYER_SECONDS)
    for each in batches(setting, phase):
        steps = (setting.repeats + 1) * (setting.decode_tokens if phase == "decode" else 1)
        least = max(2 * weights * each.num_tokens / rates["bfloat16"], 2 * weights / rates["bytes"])
        total += num_models * steps * max(2 * least, STEP_SECONDS[way] * layers)
    return total


def sizes_of(setting: Setting, way: str) -> tuple[int, tuple[str, ...]]:
    """The number of layers, and the rank multiples."""
    layers = setting.shape("7B").layers
    if way == "eager":
        return layers, setting.multiples
    return min(setting.compiled_layers, layers) if way == "compiled" else layers, setting.multiples[-1:]


def batches(setting: Setting, phase: str) -> list[Workload]:
    """Those of one phase."""
    return (
        bench_inference.workloads(setting.prefill, ())
        if phase == "prefill"
        else bench_inference.workloads((), setting.decode)
    )


def side_by_side(way: str, phase: str, setting: Setting, _: float) -> dict[str, Any]:
    """One phase of the dense model and of its compressed forms."""
    if way == "captured" and not setting.on_gpu:
        raise Absent("only a GPU has graphs")
    shape, (layers, multiples) = setting.shape("7B"), sizes_of(setting, way)
    torch._dynamo.config.cache_size_limit = 64  # one forward, three models, three batches
    config = llama_config(shape, layers=layers, length=4096, vocab_size=shape.vocabulary)
    roof = measure_roof(torch.device(setting.device), torch.bfloat16)
    content = bench_inference.measured(
        bench_inference.random_model(config, dtype=torch.bfloat16, device=setting.device),
        sparsities=(0.3, 0.5),
        multiples=multiples,
        workloads=batches(setting, phase),
        repeats=setting.repeats,
        decode_tokens=setting.decode_tokens,
        roof=roof,
        compiler=setting.compiler if way == "compiled" else None,
        captured=way == "captured",
        of_layers=SHAPES["7B"].layers,  # of few layers none could keep as much as the first and last of many do
    )
    speedup = max(each["speedup"] for each in content["measurements"] if each["model"].startswith("50%"))
    shares = [each["share_of_ideal"] for each in content["measurements"] if each["model"] != DENSE]
    return content | {
        "ceiling": vars(roof),
        "layers": layers,
        "of_layers": SHAPES["7B"].layers,
        "goal": {"speedup": PAPER_SPEEDUP, "share_of_ideal": bench_inference.GOAL},
        "speedup": speedup,
        "least_share_of_ideal": min(shares),
        "met": speedup > PAPER_SPEEDUP and min(shares) >= bench_inference.GOAL,
    }


# 5. Evaluation

SHAPE_1B = Shape(2048, 8192, 32, 8, 16, target_seconds=math.nan, vocabulary=128256)


def evaluation(setting: Setting) -> list[Part]:
    """Perplexity and zero-shot requests of a random 1B model on the embedded tasks."""
    return [
        Part("1B, perplexity", 10.0, partial(score_text, setting)),
        Part("1B, zero-shot tasks", 25.0, partial(score_tasks, setting)),
    ]


def _model_1b(setting: Setting) -> PreTrainedModel:
    """Llama 3.2's 1B shape; the tokenizer of an embedded model gives ids far below its vocabulary."""
    shape = SHAPE_1B if setting.divisor == 1 else replace(SHAPE_1B.divided(16), layers=2, vocabulary=4096)
    config = llama_config(shape, layers=shape.layers, length=2048, vocab_size=shape.vocabulary)
    return bench_inference.random_model(config, dtype=torch.bfloat16, device=setting.device)


def score_text(setting: Setting, _: float) -> dict[str, Any]:
    """Tokens a second of perplexity on random tokens."""
    model, window = _model_1b(setting), setting.length
    ids = torch.randint(1000, (window * setting.samples,), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"window": window, "batch_tokens": 4 * window, "progress": Progress(True)}
    perplexity(model, ids[: 4 * window], **options)
    clock, began = bench_evaluation.ForwardClock(model), time.perf_counter()
    found = perplexity(model, ids, **options)
    seconds = time.perf_counter() - began
    return {
        "num_tokens": found["num_predicted_tokens"],
        "seconds": seconds,
        "tokens_per_second": found["num_predicted_tokens"] / seconds,
        "overhead": seconds / clock.seconds - 1,
    }


def score_tasks(setting: Setting, _: float) -> dict[str, Any]:
    """Requests a second through lm-evaluation-harness, and what it adds to the forward passes."""
    found = bench_evaluation.bench(
        "1B", _model_1b(setting), load_tokenizer("embedded:tiny-llama"), batch_size=32, repeats=2, limit=setting.limit
    )
    seconds = median(each["seconds"] for each in found["later"])
    return found | {"requests_per_second": found["num_requests"] / seconds, "goal": bench_evaluation.GOAL}


STEPS: dict[str, Callable[[Setting], list[Part]]] = {
    "correct": correct,
    "cost": cost,
    "overlap": overlap,
    "inference": inference,
    "evaluation": evaluation,
}
"""By the names of their records, in their order."""


def headline(found: Mapping[str, Any]) -> Iterable[str]:
    """The numbers of a part that fit on its line."""
    for key, unit in (("seconds", " s"), ("extrapolated_seconds", " s for all layers"), ("ratio", " x its floor")):
        if found.get(key) is not None:
            yield f"{found[key]:.3g}{unit}"
    for key in (
        "num_equal",
        "speedup",
        "least_share_of_ideal",
        "over_paper",
        "tokens_per_second",
        "requests_per_second",
        "later_overhead",
        "counts",
        "met",
    ):
        if found.get(key) is not None:
            yield f"{key} {found[key]:.4g}" if isinstance(found[key], float) else f"{key} {found[key]}"
