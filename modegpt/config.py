"""The main job's configuration as plain dataclasses: one place for keys, types, defaults and ranges.

``conf/`` holds the values, ``cli/`` reads them into these classes, the rest of the package is called with their
fields. Ranges are checked when an object is made, so an instance is a valid configuration; the options of a
method, decomposition or allocation belong to the class that implements it and are checked by ``build``.
"""

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from modegpt.errors import UserError
from modegpt.evaluation.spec import EvaluationSpec

Built = TypeVar("Built")

TEXT_SOURCES = ("tiny", "wikitext2", "alpaca", "c4", "jsonl", "text")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
TRACKING_MODES = ("offline", "online", "disabled")
BUDGETS = ("exact", "nearest")
PAPER = {"mlp": "nystrom", "query_key": "cr", "value_output": "svd"}
"""The paper's decomposition of each module."""


def unknown(where: str, given: object, choices: Iterable[str]) -> UserError:
    """The error for a value of ``where`` that is not among ``choices``: names them, and the nearest if there is one."""
    return _unknown(f"{where}={given}", str(given), choices)


def unknown_key(key: str, choices: Iterable[str]) -> UserError:
    """The same for a dotted key whose last part is not among ``choices``."""
    return _unknown(key, key.rpartition(".")[2], choices)


def _unknown(subject: str, given: str, choices: Iterable[str]) -> UserError:
    choices = sorted(choices)
    near = difflib.get_close_matches(given, choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return UserError(f"{subject} is not known; choose from {', '.join(choices)}{hint}")


def build(choices: Mapping[str, type[Built]], options: Mapping[str, Any], where: str) -> Built:
    """Make ``choices[options["name"]]`` from the remaining options, its dataclass fields.

    Raises:
        UserError: unknown name or option (the valid ones are named), a missing option, or a value of the wrong type.
    """
    options = dict(options)
    name = options.pop("name", None)
    if name not in choices:
        raise unknown(f"{where}.name", name, choices)
    cls = choices[name]
    known = {option.name: option for option in fields(cls) if option.init}
    hints = typing.get_type_hints(cls)
    for key, value in options.items():
        if key not in known:
            raise (
                unknown_key(f"{where}.{key}", known)
                if known
                else UserError(f"{where}.{key} is not known: {name} has no options")
            )
        if not _fits(value, hints[key]):
            raise UserError(f"{where}.{key}={value} has the wrong type: expected {_type_name(hints[key])}")
    for key, option in known.items():
        if key not in options and option.default is MISSING and option.default_factory is MISSING:
            raise UserError(f"{where}.{key} is missing: {name} needs it")
    return cls(**options)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is one of the type ``hint`` (an integer is a float, a list is a tuple, a bool no number)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(member, arguments[0]) for member in value)
    if origin is not None:
        return isinstance(value, origin)
    if isinstance(value, bool) and hint is not bool:
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def _type_name(hint: Any) -> str:
    return (
        getattr(hint, "__name__", None)
        if isinstance(hint, type) and not typing.get_args(hint)
        else str(hint).replace("typing.", "")
    )


def _one_of(where: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise unknown(where, value, choices)


def _at_least(where: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise UserError(f"{where}={value} is too small: at least {minimum}")


def _sparsity(where: str, value: float | None) -> None:
    if value is not None and not 0 <= value < 1:
        raise UserError(f"{where}={value} is outside [0, 1): it is the share of the weights to remove")


@dataclass
class OutputConfig:
    """Where results go: ``root/experiment/<name of the run>/record.json``."""

    root: str = "results"
    experiment: str = "runs"
    overwrite: bool = False
    """Compute and write again what has a record already (the old record is kept beside the new one)."""
    save_model: str | None = None
    """Where the compressed model is saved as a checkpoint: a directory, ``auto`` (beside the record) or nowhere."""
    pictures: bool = True
    """Draw the record's pictures beside it; a sweep of many small runs spends a sixth of its time on them."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.experiment):
            raise UserError(
                f"output.experiment={self.experiment} must be one directory name of letters, digits, '.', '_' and '-'"
            )


@dataclass
class OutOfCoreConfig:
    """Compress layer by layer from disk to disk, for models that do not fit in memory. Decides no result."""

    enabled: bool = False
    hidden_states: str = "memory"
    """Where calibration's hidden states wait between layers: ``memory`` (of the model's device) or ``disk``."""
    max_host_bytes: int | None = None
    """Refuse what is predicted to need more host memory than this; null: than is available."""

    def __post_init__(self) -> None:
        _one_of("out_of_core.hidden_states", self.hidden_states, ("memory", "disk"))
        _at_least("out_of_core.max_host_bytes", self.max_host_bytes, 1)


@dataclass
class CacheConfig:
    """What is reused between runs: calibration statistics and dense scores."""

    dir: str | None = None
    """Null: ``$MODEGPT_CACHE``, or ``modegpt`` in the user's cache directory."""
    max_bytes: int = 20_000_000_000
    """The cache's size limit; 0 keeps nothing."""

    def __post_init__(self) -> None:
        _at_least("cache.max_bytes", self.max_bytes, 0)


@dataclass
class ModelConfig:
    """The dense model. ``path``: a hub name, a local directory, or ``embedded:NAME`` for one that ships with the package."""

    name: str | None = None
    """What records call it."""
    path: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    """``auto`` keeps the checkpoint's."""
    device: str = "auto"
    """``auto``: the first GPU if there is one, else the CPU."""
    device_map: str | None = None
    """How accelerate spreads a model to be scored over all GPUs, memory and disk (``method=dense``); null: ``device`` holds it whole."""
    max_memory: list[str] = field(default_factory=list)
    """What the map may use of each place: ``[0:70GiB,1:70GiB,cpu:100GiB]``; empty: what is free."""

    def __post_init__(self) -> None:
        _one_of("model.dtype", self.dtype, DTYPES)
        if self.device_map is not None:
            _one_of("model.device_map", self.device_map, DEVICE_MAPS)
            if self.device != "auto":
                raise UserError(
                    f"model.device={self.device} has no effect with model.device_map={self.device_map}; leave it out"
                )
        elif self.max_memory:
            raise UserError("model.max_memory has no effect without model.device_map")
        for limit in self.max_memory:
            if not re.fullmatch(r"(cpu|\d+):\d+(\.\d+)?[KMGT]i?B", limit):
                raise UserError(
                    f"model.max_memory=[{limit}] is not understood: give the number of a GPU, or cpu, and a size, for example 0:70GiB"
                )
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise UserError(
                f"model.device={self.device} is not known; choose from auto, cpu, cuda, cuda:0, cuda:1, ..., mps"
            )

    @property
    def memory_limits(self) -> dict[int | str, str]:
        """``max_memory`` by place, a GPU by its number."""
        pairs = (limit.split(":") for limit in self.max_memory)
        return {int(place) if place.isdigit() else place: size for place, size in pairs}


@dataclass
class DecompositionConfig:
    """One decomposition for each module type: ``name`` and that variant's options. ``none`` leaves the module dense."""

    mlp: dict[str, Any] = field(default_factory=dict)
    query_key: dict[str, Any] = field(default_factory=dict)
    value_output: dict[str, Any] = field(default_factory=dict)


@dataclass
class CalibrationConfig:
    """The text whose activations are matched."""

    source: str = "tiny"
    path: str | None = None
    """A local file of the source's form; null: the embedded text or the hub."""
    num_samples: int = 128
    sequence_length: int | str = "auto"
    """Tokens a sample. ``auto``: 2048, or the model's context where that is shorter."""
    seed: int = 0
    batch_size: int = 8
    precision: str = "float64"
    """Of the products inside the correlation matrices; they are summed in float64 either way."""

    def __post_init__(self) -> None:
        _one_of("calibration.source", self.source, TEXT_SOURCES)
        if self.source in ("jsonl", "text") and self.path is None:
            raise UserError(f"calibration.path is missing: calibration={self.source} reads a file")
        if isinstance(self.sequence_length, str) and self.sequence_length != "auto":
            raise UserError(
                f"calibration.sequence_length={self.sequence_length} is neither a number of tokens nor auto"
            )
        if isinstance(self.sequence_length, int):
            _at_least("calibration.sequence_length", self.sequence_length, 2)
        _at_least("calibration.num_samples", self.num_samples, 1)
        _at_least("calibration.batch_size", self.batch_size, 1)
        _at_least("calibration.seed", self.seed, 0)
        _one_of("calibration.precision", self.precision, ("float64", "float32"))


@dataclass
class ModuleSparsity:
    """A sparsity for one module type in place of the layer's; null follows the layer."""

    mlp: float | None = None
    query_key: float | None = None
    value_output: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _sparsity(f"compression.module_sparsity.{name}", value)


@dataclass
class RankMultiple:
    """Kept ranks are multiples of this; null: what the model's device likes (``compression/multiples.py``)."""

    mlp: int | None = None
    query_key: int | None = None
    value_output: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _at_least(f"compression.rank_multiple.{name}", value, 1)


@dataclass
class CompressionConfig:
    """How much is removed, and where."""

    sparsity: float = 0.3
    """Share of the block-linear weights to remove, in [0, 1)."""
    module_sparsity: ModuleSparsity = field(default_factory=ModuleSparsity)
    rank_multiple: RankMultiple = field(default_factory=RankMultiple)
    budget: str = "exact"
    """``exact``: integer ranks are adjusted until the target is met; ``nearest``: each rank is rounded on its own."""
    skip_layers: list[int] = field(default_factory=list)
    """Layers left dense, counted from 0."""
    layer_sparsity: list[float] | None = None
    """One sparsity a layer, for ``allocation=explicit``."""

    def __post_init__(self) -> None:
        _sparsity("compression.sparsity", self.sparsity)
        _one_of("compression.budget", self.budget, BUDGETS)
        for index in self.skip_layers:
            _at_least("compression.skip_layers", index, 0)
        for value in self.layer_sparsity or []:
            _sparsity("compression.layer_sparsity", value)


@dataclass
class TrackingConfig:
    """The mirror of the record in W&B."""

    mode: str = "offline"
    project: str = "modegpt"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _one_of("tracking.mode", self.mode, TRACKING_MODES)


@dataclass
class RunConfig:
    """One run of the main job."""

    seed: int = 0
    threads: int | None = None
    """CPU threads; null: PyTorch's choice."""
    quiet: bool = False
    output: OutputConfig = field(default_factory=OutputConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    out_of_core: OutOfCoreConfig = field(default_factory=OutOfCoreConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: dict[str, Any] = field(default_factory=dict)
    decomposition: DecompositionConfig = field(default_factory=DecompositionConfig)
    allocation: dict[str, Any] = field(default_factory=dict)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    recovery: dict[str, Any] = field(default_factory=lambda: {"name": "none"})
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.model.path is None or self.model.name is None:
            raise UserError(
                "model.path is missing: a local directory (model=local model.path=DIR) or a hub name (model=hub model.path=OWNER/NAME)"
            )
        _at_least("seed", self.seed, 0)
        _at_least("threads", self.threads, 1)
