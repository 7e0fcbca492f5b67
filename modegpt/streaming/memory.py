"""What an out-of-core compression will need at most, from shapes alone, and what there is.

The peak is the largest of a few moments: embedding, observing a layer, decomposing it, scoring the model, and what plus
does beside. Each is a sum of parts. What a statistic and what a decomposition take is for them to say:
``Statistic.num_elements`` and ``Variant.solver_elements``.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from modegpt.calibration.moments import CHUNK_ROWS
from modegpt.calibration.statistics import STATISTICS, sizes_of
from modegpt.cost.metering import peak_memory_bytes
from modegpt.decompositions.modules import Sizes
from modegpt.errors import UserError
from modegpt.evaluation.evaluate import PreparedEvaluation
from modegpt.evaluation.likelihood import CHUNK_ELEMENTS
from modegpt.methods.base import CompressionTask, LayerByLayer
from modegpt.methods.modegpt import MODULES, MoDeGPT
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.methods.plus.sensitivity import compared_positions, measured_windows
from modegpt.methods.plus.temperature import CHUNK_TOKENS, ENOUGH_TOKENS, MOST_LOGITS
from modegpt.models import decoder_layers
from modegpt.streaming.model import StreamedModel

FLOAT32, FLOAT64 = 4, 8
MARGIN, LIBRARIES = 0.1, 2**27
"""What allocators and libraries hold beside the counted bytes: a share of these, and bytes whatever the size.

9 and 16 % were seen for 7B and 1.3B shapes.
"""


@dataclass(frozen=True)
class Prediction:
    """Bytes needed at most, by part, at the fullest moment of the host and of the device where that is another."""

    host: dict[str, int]
    device: dict[str, int]

    @property
    def host_bytes(self) -> int:
        """All of the host's."""
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        """All of the device's."""
        return sum(self.device.values())

    def record(self) -> dict[str, dict[str, int]]:
        """For the run's record."""
        return {
            where: {"total": sum(parts.values()), **parts}
            for where, parts in (("host", self.host), ("device", self.device))
            if parts
        }


def predict(
    method: LayerByLayer,
    task: CompressionTask,
    streamed: StreamedModel,
    evaluation: PreparedEvaluation,
    *,
    on_disk: bool,
) -> Prediction:
    """The peak of ``method`` on ``task`` and of the scores around it.

    ``on_disk``: hidden states of the calibration lie in files.
    """
    config, model = streamed.model.config, streamed.model
    sizes, itemsize = sizes_of(config), model.dtype.itemsize
    state = model.state_dict()

    def stored(names: Iterable[str]) -> list[int]:
        return [state[name].numel() * itemsize for name in names]

    of_layer = stored(name for name in streamed.sources if name.startswith(f"{streamed.layers_prefix}0."))
    outer, head = (
        stored(name for name in streamed.outer_names(head=head) if name not in streamed.tied) for head in (False, True)
    )
    layer, largest = sum(of_layer), max(*of_layer, *head)
    streamed_layer = layer + max(of_layer)

    def forward(num_tokens: int) -> int:
        of_mlps = 3 * sizes.n * getattr(config, "num_experts_per_tok", 1)
        return num_tokens * (6 * sizes.H * sizes.d + 2 * sizes.d_h + of_mlps) * itemsize

    tokens, batch_size = task.calibration.tokens, task.calibration.batch_size
    batch_tokens = min(batch_size, len(tokens.ids)) * tokens.ids.shape[1]
    own_tokens = sum(batch.numel() for batch in task.calibration.share(even=True))
    one_batch = batch_tokens * sizes.d_h * itemsize
    extra = plus_bytes(method, task, sizes, on_disk=on_disk) if isinstance(method, MoDeGPTPlus) else NOTHING
    names = (method.faithful() if isinstance(method, MoDeGPTPlus) else method).required_statistics(task.family)
    statistics = FLOAT64 * sum(STATISTICS[name].num_elements(sizes) for name in names)
    hidden = (2 * one_batch if on_disk else own_tokens * sizes.d_h * itemsize + one_batch) + extra["streams"]
    chunk_rows = min(CHUNK_ROWS[task.calibration.precision], batch_tokens) if names else 0
    chunk = FLOAT64 * chunk_rows * max(sizes.n, sizes.H * sizes.d) * 2
    moments = {
        "embedding": {"weights": sum(outer) + largest, "hidden states": hidden},
        "observing": {
            "weights": streamed_layer,
            "statistics": statistics,
            "activations": forward(batch_tokens) + chunk,
            "hidden states": hidden,
        },
        "decomposing": {
            "weights": layer + extra["copies"],
            "statistics": max(statistics, extra["sums"]),
            "solver": solver_bytes(method, task, sizes),
            "hidden states": hidden,
        },
        "saving": {"weights": 2 * layer, "statistics": statistics, "hidden states": hidden},
        "selecting": {"weights": layer, "activations": extra["states"], "hidden states": hidden},
        "comparing": {
            "weights": (sum(head) + largest) * (1 if itemsize >= FLOAT32 else 2),
            "logits": extra["logits"],
            "hidden states": hidden,
        },
    }
    if evaluation.text is not None:
        scored = max(evaluation.text.batch_tokens, max(evaluation.text.windows))
        logits = scored * config.vocab_size * itemsize * 2 + 3 * 4 * CHUNK_ELEMENTS
        states = (evaluation.text.token_ids.numel() + scored) * sizes.d_h * itemsize
        moments["scoring"] = {"weights": sum(head) + largest, "hidden states": states, "logits": logits}
        moments["walking"] = {"weights": streamed_layer, "hidden states": states, "activations": forward(scored)}
    fullest = max(moments.values(), key=lambda parts: sum(parts.values()))
    fullest["margin"] = round(MARGIN * sum(fullest.values())) + LIBRARIES
    if streamed.device.type == "cpu":
        return Prediction(host={"process": resident_bytes(), **fullest}, device={})
    copies = {"weights": 2 * max(layer, largest) + one_batch}
    return Prediction(host={"process": resident_bytes(), **copies}, device=fullest)


NOTHING = dict.fromkeys(("streams", "copies", "sums", "states", "logits"), 0)


def plus_bytes(method: MoDeGPTPlus, task: CompressionTask, sizes: Sizes, *, on_disk: bool) -> dict[str, int]:
    """What plus needs beside what the paper's method does, at most.

    streams: the residual stream of the compressed model, what is seen of every batch in one layer, and the changed
    models of the allocation or those of the temperature. copies: the weights that are aligned and reduced. sums: of the
    largest solve, for both parts of the windows; those of all experts are made at once, and one of them at a time is
    filled up. states: of the attention on the windows that the query-key selection looks at. logits: of the predictions
    that are compared.
    """
    ids, batch_size, itemsize = task.calibration.tokens.ids, task.calibration.batch_size, task.model.dtype.itemsize
    num_samples, length = ids.shape
    size = task.calibration.world.size
    seen = min(batch_size, num_samples) if on_disk else sum(map(len, task.calibration.share(even=True)))
    of_token = max(7 * sizes.d_h + 2 * sizes.H * sizes.d, 6 * sizes.d_h + sizes.n) * itemsize
    num_layers, vocabulary = len(decoder_layers(task.model)), task.model.config.vocab_size
    measured = measured_windows(ids, num_layers=num_layers)
    of_layer = len(MODULES) * len(method.shares)
    models = 1 if on_disk else 1 + of_layer * -(-num_layers // size)
    compared = min(ENOUGH_TOKENS + length, ids.numel())
    m = max(sizes.n, sizes.H * sizes.d, sizes.d_h) + 1
    experts = 1 if task.family.experts_path is None else task.model.config.num_experts
    windows = min(2 * method.query_key_windows, num_samples)
    attended = min(batch_size, windows) * sizes.H * method.queries_per_window * length
    positions = compared_positions(measured, vocabulary=vocabulary)
    predictions = measured.numel() if positions is None else len(measured) * len(positions)
    return {
        "streams": seen * length * of_token + max(measured.numel() * models, 2 * compared) * sizes.d_h * FLOAT32,
        "copies": 2 * sum(each.numel() for each in decoder_layers(task.model)[0].parameters()) * itemsize,
        "sums": (2 * experts + (3 if experts > 1 else 0)) * FLOAT64 * m * (m + sizes.d_h),
        "states": windows * length * (2 * sizes.H + sizes.H_kv) * sizes.d * itemsize + 6 * FLOAT32 * attended,
        "logits": max(
            (2 * FLOAT32 + FLOAT64) * predictions * vocabulary,
            FLOAT32 * (min(MOST_LOGITS, compared * vocabulary) + 4 * CHUNK_TOKENS * vocabulary),
        ),
    }


def solver_bytes(method: LayerByLayer, task: CompressionTask, sizes: Sizes) -> int:
    """What the greediest of the decompositions holds, at the largest MLP width that may be kept."""
    widest = sizes.n
    if isinstance(method, MoDeGPTPlus):
        # more than the elimination: a refit of nearly all features, its sums of both parts of the windows, and the two
        # matrices of a factorisation
        m = max(widest, sizes.H * sizes.d) + 1
        return FLOAT64 * (4 * m**2 + 8 * m * sizes.d_h)
    assert isinstance(method, MoDeGPT)
    if not method.allocation.needs_influence:
        widest = max(ranks["mlp"] for ranks in method.plan(task, None).ranks)
    variants = [variant for variant in method.variants().values() if variant is not None]
    return FLOAT64 * max((variant.solver_elements(sizes, widest) for variant in variants), default=0)


def check_fits(
    prediction: Prediction, task: CompressionTask, streamed: StreamedModel, *, on_disk: bool, max_host_bytes: int | None
) -> dict[str, int]:
    """What is available to this process, by place; processes of one machine share its memory evenly.

    Raises UserError when that is less than what ``prediction`` needs, saying what would fit.
    """
    available = {"host": resident_bytes() + available_host_bytes() // task.calibration.world.local_size}
    if max_host_bytes is not None:
        available["host"] = min(available["host"], max_host_bytes)
    needed = {"host": prediction.host}
    if streamed.device.type == "cuda":
        available["device"], needed["device"] = torch.cuda.mem_get_info(streamed.device)[0], prediction.device
    for place, parts in needed.items():
        excess = sum(parts.values()) - available[place]
        if excess > 0:
            spelled = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
            raise UserError(
                f"out of core this needs about {gib(sum(parts.values()))} of {place} memory ({spelled}) and "
                f"{gib(available[place])} are available; {_remedy(parts, excess, task, on_disk)}"
            )
    return available


def _remedy(parts: Mapping[str, int], excess: int, task: CompressionTask, on_disk: bool) -> str:
    """What would fit, in the user's terms."""
    states, num_samples = parts.get("hidden states", 0), len(task.calibration.tokens.ids)
    if "logits" in parts:
        return "lower evaluation.perplexity.batch_tokens, or score nothing: evaluation=none"
    fitting = int(num_samples * (states - excess) / states) if states else 0
    if fitting >= 1 and not on_disk:
        return f"calibration.num_samples={fitting} would fit, or out_of_core.hidden_states=disk"
    if parts.get("activations", 0) > excess and task.calibration.batch_size > 1:
        fitting = max(1, int(task.calibration.batch_size * (1 - excess / parts["activations"])))
        return f"calibration.batch_size={fitting} would fit"
    return (
        "no number of samples would fit, as one layer alone needs more: leave its MLP dense (decomposition/mlp=none) "
        "or use a larger machine"
    )


def available_host_bytes() -> int:
    """Memory this process can still take: what the system calls available, or less where a control group says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([available, *_group_limits()])


def _group_limits(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each control group (version 2 or 1) above this process leaves it.

    File pages that can be dropped count as left.
    """
    left: list[int] = []
    try:
        groups = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return left
    for _, controllers, path in groups:
        if controllers not in ("", "memory"):
            continue
        top, limit, usage = (
            (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else (root, "memory.max", "memory.current")
        )
        folder = top / path.lstrip("/")
        for place in (folder, *folder.parents):
            try:
                text = (place / limit).read_text().strip()
                counts = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                if text != "max":
                    left.append(
                        max(0, int(text) - int((place / usage).read_text()) + int(counts.get("inactive_file", 0)))
                    )
            except (OSError, ValueError):
                pass
            if place == top:
                break
    return left


def resident_bytes() -> int:
    """Memory this process holds now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory_bytes()["host"]


def gib(num_bytes: float) -> str:
    """In GiB, for a message."""
    return f"{num_bytes / 2**30:.2f} GiB"
