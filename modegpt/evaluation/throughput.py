"""How fast causal language models run side by side, and how fast their sizes say they could."""

import ctypes
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from modegpt.cost.work import forward_cost
from modegpt.errors import UserError
from modegpt.evaluation.spec import ThroughputSpec, Workload
from modegpt.models import block_linear_parameters, cache_bytes_per_token, layer_shapes

DENSE = "dense"
"""The model that the others are compared with."""
COMPRESSED = "compressed"
CLOCKS = WALL, PROCESSOR = "wall", "processor"
"""What seconds are read from."""


@dataclass(frozen=True)
class Work:
    """What one step of a workload cannot do without: multiply-adds counted as two FLOPs, and bytes read from memory."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Roof:
    """What the machine attains: FLOP/s of a matrix product and bytes/s of reading a matrix once, measured here."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, work: Work) -> float:
        """The least time for ``work``: whichever of the two binds."""
        return max(work.flops / self.flops_per_second, work.bytes / self.bytes_per_second)


def work_of(model: PreTrainedModel, workload: Workload) -> Work:
    """The FLOPs and bytes of one step: linear maps, the head for one position a sequence, and causal attention.

    Embeddings, norms and activations are left out, so the ideal is a little better than any program can be.
    """
    cost, head = forward_cost(model), model.get_output_embeddings().weight.numel()
    block, attended = cost.num_weights, cost.attention_columns
    batch, length = workload.batch_size, workload.length
    if workload.phase == "prefill":
        flops = 2 * batch * (length * block + head + attended * length * (length + 1) / 2)
        return Work(flops=flops, bytes=model.dtype.itemsize * (block + head))
    cache = batch * length * cache_bytes_per_token(model.config, model.dtype)
    return Work(
        flops=2 * batch * (block + head + attended * length), bytes=model.dtype.itemsize * (block + head) + cache
    )


ROOF_SIZE = {"cpu": 2048, "cuda": 4096}
"""Of the matrices that ``measure_roof`` times: on a GPU large enough for a launch to weigh little."""


def measure_roof(device: torch.device, dtype: torch.dtype, *, size: int | None = None, repeats: int = 5) -> Roof:
    """Time a matrix product of ``size`` cubed and one with a single vector, whose matrix is far beyond the caches.

    The best of ``repeats`` counts. ``size``: by default that of the device.
    """
    size = size or ROOF_SIZE.get(device.type, 2048)
    rows = 16 * size
    square = torch.ones(size, size, device=device, dtype=dtype)
    tall, vector = torch.ones(rows, size, device=device, dtype=dtype), torch.ones(size, device=device, dtype=dtype)
    with torch.inference_mode():
        product = min(_seconds(lambda: square @ square, device)[0] for _ in range(repeats))
        reading = min(_seconds(lambda: tall @ vector, device)[0] for _ in range(repeats))
    return Roof(flops_per_second=2 * size**3 / product, bytes_per_second=tall.nbytes / reading)


def measure(
    models: Mapping[str, PreTrainedModel],
    workloads: Sequence[Workload],
    *,
    repeats: int,
    decode_tokens: int,
    roof: Roof,
    say: Callable[[str], None],
    clock: str = WALL,
    fixed_cache: bool = False,
    captured: bool = False,
) -> list[dict[str, Any]]:
    """Time every workload on every model, the models taking turns within each repeat, in an order that rotates.

    Args:
        models: by label, on one device; ``"dense"`` is the one that the others are compared with.
        repeats: measured rounds, after one to warm up.
        decode_tokens: tokens that are decoded, and then forgotten, in one measurement of a decoding step.
        clock: ``"wall"``, or ``"processor"`` where other programs run beside one thread.
        fixed_cache: keys and values in memory of a fixed size, as compiled models want it.
        captured: each step is a CUDA graph, which launches the same kernels without Python in between; to decode into
            memory of a fixed size.

    Returns one entry a workload and model:
        ``seconds`` by the clock and ``cpu_seconds`` a step: medians over the rounds, whose samples (wall and
            processor) are given too;
        ``tokens_per_second``;
        ``peak_memory_bytes``: weights and what the step needed beside them, None where the system does not say, and for
            a CUDA graph, which has its memory before it runs;
        ``speedup, cpu_speedup``: the median over rounds of dense / own seconds in the same round, by the clock and the
            processor's, None for the latter where it did not move;
        ``ideal_speedup``: what the work alone would give; ``share_of_ideal``: ``speedup`` over it.

    Raises UserError where the processor's time is the clock and did not move.
    """
    assert DENSE in models and clock in CLOCKS, (list(models), clock)
    results = []
    for workload in workloads:
        fixed = fixed_cache or (captured and workload.phase == "decode")
        steps = {label: _prepare(model, workload, decode_tokens, fixed) for label, model in models.items()}
        if captured:
            steps = {label: capture(step, models[label].device) for label, step in steps.items()}
        samples: dict[str, list[tuple[float, float]]] = {label: [] for label in models}
        peaks: dict[str, int | None] = {}
        labels = list(models)
        for turn in range(repeats + 1):
            for label in labels[turn % len(labels) :] + labels[: turn % len(labels)]:
                device = models[label].device
                if turn == 0:
                    with _peak_memory(device) as peak:
                        steps[label]()
                    known = peak[0] is not None and not captured
                    peaks[label] = (peak[0] or 0) + _weight_bytes(models[label]) if known else None
                else:
                    samples[label].append(_seconds(steps[label], device))
        del steps
        num_steps = decode_tokens if workload.phase == "decode" else 1
        for label, model in models.items():
            entry = _entry(workload, label, samples, num_steps, clock)
            ideal = roof.seconds(work_of(models[DENSE], workload)) / roof.seconds(work_of(model, workload))
            entry |= {
                "peak_memory_bytes": peaks[label],
                "ideal_speedup": ideal,
                "share_of_ideal": entry["speedup"] / ideal,
            }
            results.append(entry)
            say(describe(entry))
    return results


def measured_speedup(
    dense: PreTrainedModel,
    other: PreTrainedModel,
    workload: Workload,
    *,
    repeats: int,
    seconds: float,
    decode_tokens: int,
) -> float:
    """How many times as fast ``other`` is: the median of dense / own seconds over rounds in which the two take turns.

    There are ``repeats`` rounds, and more until they took so many ``seconds``. Processor seconds on a CPU, where other
    programs may run; those of the clock elsewhere.
    """
    steps = [_prepare(model.eval(), workload, decode_tokens, fixed_cache=False) for model in (dense, other)]
    for step in steps:
        step()
    of_processor = int(dense.device.type == "cpu")
    rounds: list[list[float]] = []
    while len(rounds) < repeats or sum(map(sum, rounds)) < seconds:
        rounds.append([_seconds(step, dense.device)[of_processor] for step in steps])
    speedup = _median_ratio(rounds)
    if speedup is None:
        raise _too_little(workload)
    return speedup


def beside_dense(
    dense: PreTrainedModel, compressed: PreTrainedModel | None, spec: ThroughputSpec, *, say: Callable[[str], None]
) -> dict[str, Any]:
    """``measure`` of a dense model and what it was compressed to, as it stands in a record.

    Returns ``ceiling`` (the machine's rates), ``measurements``, and by model ``cache_bytes_per_token``.
    """
    models = {DENSE: dense.eval()} | ({} if compressed is None else {COMPRESSED: compressed.eval()})
    roof = measure_roof(dense.device, dense.dtype)
    measurements = measure(
        models, spec.workloads, repeats=spec.repeats, decode_tokens=spec.decode_tokens, roof=roof, say=say
    )
    cache = {label: cache_bytes_per_token(model.config, model.dtype) for label, model in models.items()}
    return {"ceiling": vars(roof), "cache_bytes_per_token": cache, "measurements": measurements}


def describe(entry: Mapping[str, Any]) -> str:
    """One line of ``measure``'s result."""
    workload = f"{entry['phase']:7} {entry['batch_size']:3} x {entry['length']:<5} {entry['model']:14}"
    what = f"{workload} {1e3 * entry['seconds']:9.1f} ms {entry['tokens_per_second']:9.1f} tokens/s"
    if entry["model"] == DENSE:
        return what
    return f"{what}  {entry['speedup']:.2f}x of an ideal {entry['ideal_speedup']:.2f}x = {entry['share_of_ideal']:.0%}"


def describe_model(model: PreTrainedModel, dense: PreTrainedModel) -> dict[str, Any]:
    """Sizes of a model beside the dense one, JSON-able."""
    blocks = [block_linear_parameters(each) for each in (model, dense)]
    cache = cache_bytes_per_token(model.config, model.dtype)
    return {
        "num_parameters": model.num_parameters(),
        "block_linear_parameters": blocks[0],
        "sparsity": 1 - blocks[0] / blocks[1],
        "cache_bytes_per_token": cache,
        "cache_share": cache / cache_bytes_per_token(dense.config, dense.dtype),
        "layers": [
            {
                "mlp": shape.intermediate_size,
                "query_key": shape.qk_head_dim,
                "value_output": shape.v_head_dim,
                "num_kv_heads": shape.num_kv_heads,
            }
            for shape in layer_shapes(model.config)
        ],
    }


def _median_ratio(rounds: Sequence[Sequence[float]]) -> float | None:
    """Of the seconds (dense, own) of each round; None where a coarse clock did not move in one."""
    return median(dense / own for dense, own in rounds) if all(own for _, own in rounds) else None


def _entry(
    workload: Workload, label: str, samples: Mapping[str, list[tuple[float, float]]], num_steps: int, clock: str
) -> dict[str, Any]:
    wall, cpu = ([sample[each] / num_steps for sample in samples[label]] for each in (0, 1))
    speedups = [
        _median_ratio([(dense[each], own[each]) for dense, own in zip(samples[DENSE], samples[label], strict=True)])
        for each in (0, 1)
    ]
    speedup, seconds = speedups[CLOCKS.index(clock)], median((wall, cpu)[CLOCKS.index(clock)])
    if speedup is None:
        raise _too_little(workload)
    return {
        **vars(workload),
        "model": label,
        "seconds": seconds,
        "tokens_per_second": workload.num_tokens / seconds,
        "cpu_seconds": median(cpu),
        "speedup": speedup,
        "cpu_speedup": speedups[1],
        "samples_seconds": wall,
        "samples_cpu_seconds": cpu,
    }


def _too_little(workload: Workload) -> UserError:
    return UserError(f"{workload} is too little work to be timed here: a clock did not move in one round of it")


def _prepare(model: PreTrainedModel, workload: Workload, decode_tokens: int, fixed_cache: bool) -> Callable[[], object]:
    """One measurement of ``workload``, to be repeated: prompts and caches are made here."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (workload.batch_size, workload.length), generator=generator).to(
        model.device
    )

    def empty() -> Cache:
        if fixed_cache:
            return StaticCache(config=model.config, max_cache_len=workload.length + decode_tokens)
        return DynamicCache(config=model.config)

    @torch.inference_mode()
    def prefill(cache: Cache, forward: Callable[..., Any] = model) -> Tensor:
        return forward(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    @torch.inference_mode()
    def prefill_again() -> None:
        filled.reset()
        prefill(filled)

    if workload.phase == "prefill" and not fixed_cache:
        return lambda: prefill(empty())
    filled = empty()
    # a fixed cache takes its memory in its first forward, which the compiler must not see
    first = prefill(filled, model.forward if fixed_cache else model)
    if workload.phase == "prefill":
        return prefill_again

    @torch.inference_mode()
    def decode() -> None:
        token = first
        for _ in range(decode_tokens):
            token = model(token, past_key_values=filled, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        _forget(filled, decode_tokens)

    return decode


def capture(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The kernels of ``step`` as one CUDA graph, to be launched again. It runs twice before, on a stream of its own."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _forget(cache: Cache, num_tokens: int) -> None:
    """Take the last ``num_tokens`` out of ``cache``; a fixed one has no ``crop``."""
    if isinstance(cache, StaticCache):
        layers: list[Any] = cache.layers
        for layer in layers:
            layer.cumulative_length.sub_(num_tokens)
    else:
        cache.crop(-num_tokens)


def _seconds(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Wall and processor seconds of ``step``, to the end of its work on the device."""
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    synchronise(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _weight_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int | None]]:
    """Fills in the bytes needed at the highest point inside, beyond what was in use before; None if unknown."""
    found: list[int | None] = [None]
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident("VmRSS", reset=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    after = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")
    if before is not None and after is not None:
        found[0] = max(0, after - before)


def _resident(name: str, *, reset: bool = False) -> int | None:
    """Resident bytes of this process on Linux, now or at their highest since the last reset; None elsewhere."""
    try:
        if reset:
            ctypes.CDLL(None).malloc_trim(0)  # else the step may find what it needs in memory that was freed but kept
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except (OSError, AttributeError):  # another system, or another C library
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    return None if found is None else 1024 * int(found[1])
