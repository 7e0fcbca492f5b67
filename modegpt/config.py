"""The main job's configuration as plain dataclasses: one place for keys, types, defaults and ranges.

``conf/`` names the choices, ``cli/`` reads them into these classes, the rest of the package is called with their
fields. Ranges are checked when an object is made, so an instance is a valid configuration. The options of a method,
decomposition, allocation or recovery, with their defaults, are the fields of the class that implements it; ``build``
checks them.
"""

import difflib
import inspect
import json
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from modegpt.allocation.engines import ENGINES
from modegpt.errors import UserError
from modegpt.evaluation.spec import PHASES, EvaluationSpec

Built = TypeVar("Built")

TEXT_SOURCES = ("tiny", "wikitext2", "alpaca", "c4", "jsonl", "text")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
TRACKING_MODES = ("offline", "online", "disabled")
BUDGETS = ("exact", "nearest")
BOS_HABITS = ("auto", "each_window", "stream_start")
"""Where a text's BOS token stands: in front of every window, or where the tokenizer puts it, at the text's start."""
LARGEST = 2**63 - 1
"""The largest integer that PyTorch takes, for a seed or a size."""
MOST_THREADS = 1024
"""More than any machine's cores; a system has room for some ten thousand."""
TARGETS = frozenset({"target_bytes", "target_speedup", "target_phase", "target_context", "target_batch"})
"""Options of ``compression`` from which its sparsity is found; none of them decides anything else."""
TAKEN_OUT = {
    "method.centred": "logit errors about the mean over keys decided the same or worse",
    "method.query_key=rescaled": "kept queries turned and scaled gained nothing beside all else",
    "method.bias=added": "a bias added to every module made no difference",
    "method.fisher": "moments weighted by the loss helped one model of four and took a backward pass",
    "method.measured": "cut as the pass cuts them, queries and keys look cheaper than they are in long windows",
}
"""Settings of modegpt_plus that were measured and did not hold. Older records still name them."""
PAPER = {"mlp": "nystrom", "query_key": "cr", "value_output": "svd"}
"""The paper's decomposition of each module."""


def unknown(where: str, given: object, choices: Iterable[str]) -> UserError:
    """The error for a value of ``where`` that is not among ``choices``: names them, and the nearest if there is one."""
    return _unknown(f"{where}={given}", str(given), choices)


def unknown_key(key: str, choices: Iterable[str]) -> UserError:
    """The same for a dotted key whose last part is not among ``choices``."""
    return _unknown(key, key.rpartition(".")[2], choices)


def _unknown(subject: str, given: str, choices: Iterable[str]) -> UserError:
    if subject in TAKEN_OUT:
        return UserError(f"{subject} was taken out in November 2026: {TAKEN_OUT[subject]} (docs/plus_choices.md)")
    choices = sorted(choices)
    near = difflib.get_close_matches(given, choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return UserError(f"{subject} is not known; choose from {', '.join(choices)}{hint}")


def build(choices: Mapping[str, type[Built]], options: Mapping[str, Any], where: str, **given: Any) -> Built:
    """Make ``choices[options["name"]]`` from the remaining options, its dataclass fields.

    Args:
        choices: the classes to choose from, by name.
        options: what ``where`` of the configuration holds.
        where: dotted key, for messages.
        given: fields that are set elsewhere in the configuration (``metadata={"key": ...}``).

    Raises:
        UserError: unknown name or option (the valid ones are named), a missing option, or a value of the wrong type.
    """
    chosen = dict(options)
    name = chosen.pop("name", None)
    if name not in choices:
        raise unknown(f"{where}.name", name, choices)
    cls = choices[name]
    known, hints = options_of(cls), typing.get_type_hints(cls)
    for key, value in chosen.items():
        if key not in known:
            raise _no_option(cls, name, key, where)
        try:  # as strict JSON: a list is a tuple and an integer a float, but a bool is no number
            TypeAdapter(hints[key]).validate_json(json.dumps(value, default=repr), strict=True)
        except ValidationError:
            raise UserError(
                f"{where}.{key}={value} has the wrong type: expected {inspect.formatannotation(hints[key])}"
            ) from None
        if not _finite(value):
            raise UserError(f"{where}.{key}={value} is out of range: it must be finite")
    for key in known:
        if key not in chosen and key not in defaults(cls):
            raise UserError(f"{where}.{key} is missing: {name} needs it")
    return cls(**chosen, **given)


def _no_option(cls: type, name: str, key: str, where: str) -> UserError:
    known, elsewhere = options_of(cls), {field.name: field.metadata.get("key") for field in _fields(cls)}
    if elsewhere.get(key) is not None:
        return UserError(f"{where}.{key} is not known: set {elsewhere[key]}")
    return unknown_key(f"{where}.{key}", known) if known else UserError(f"{where}.{key}: {name} has no options")


def options_of(cls: type) -> dict[str, Field]:
    """The options of a method, decomposition, allocation or recovery: the fields that are not set elsewhere."""
    return {field.name: field for field in _fields(cls) if field.init and "key" not in field.metadata}


def _fields(cls: type) -> tuple[Field, ...]:
    return fields(cls) if is_dataclass(cls) else ()


def defaults(cls: type) -> dict[str, Any]:
    """The options of ``cls`` at their defaults, as YAML holds them; one that must be given is left out."""
    found = {key: field.default for key, field in options_of(cls).items() if field.default is not MISSING}
    made = {key: field.default_factory for key, field in options_of(cls).items()}
    return _plain(found | {key: make() for key, make in made.items() if make is not MISSING})


def spelled(choices: Mapping[str, type], built: object) -> dict[str, Any]:
    """The inverse of ``build``: the name of ``built`` among ``choices`` and its options, as YAML holds them."""
    [name] = [name for name, cls in choices.items() if type(built) is cls]
    return {"name": name} | {key: _plain(getattr(built, key)) for key in options_of(type(built))}


def decisive(choices: Mapping[str, type], built: object) -> dict[str, Any]:
    """``spelled`` for the identity of a run.

    An option that is younger than the first records says with ``metadata={"before": value}`` what runs did before it.
    At that value it is left out: such a run does what the old one did, and keeps its identity.
    """
    options = options_of(type(built)).items()
    before = {key: _plain(option.metadata["before"]) for key, option in options if "before" in option.metadata}
    chosen = spelled(choices, built).items()
    return {key: value for key, value in chosen if key not in before or value != before[key]}


def _plain(value: Any) -> Any:
    """``value`` with lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    return [_plain(member) for member in value] if isinstance(value, list | tuple) else value


def read_bytes(where: str, text: str) -> int:
    """A number of bytes, with or without a unit (kB, MB, GB, TB, KiB, MiB, GiB, TiB). Raises UserError."""
    read = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kKMGT])(i?)B|B)?", text)
    if read is None or float(read[1]) == 0:
        raise UserError(f"{where}={text} is not understood: give a number of bytes, such as 4GiB or 800MB")
    exponent = 0 if read[2] is None else 1 + "kmgt".index(read[2].lower())
    return int(float(read[1]) * (1024 if read[3] else 1000) ** exponent)


def _one_of(where: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise unknown(where, value, choices)


def _at_least(where: str, value: int | None, minimum: int, maximum: int = LARGEST) -> None:
    if value is not None and value < minimum:
        raise UserError(f"{where}={value} is too small: at least {minimum}")
    if value is not None and value > maximum:
        raise UserError(f"{where}={value} is too large: at most {maximum}")


def _finite(value: Any) -> bool:
    """Whether no number in ``value`` is NaN, infinite or an integer that PyTorch does not take."""
    if isinstance(value, dict | list | tuple):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int | float) or abs(value) <= LARGEST


def _check_text(value: Any, where: str = "") -> None:
    """Refuse strings that no file system or no record can hold, wherever in ``value`` they are."""
    if isinstance(value, dict):
        for key, member in value.items():
            _check_text(member, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for member in value:
            _check_text(member, where)
    elif isinstance(value, str) and not _writable(value):
        shown = value.encode("utf-8", "backslashreplace").decode().replace(chr(0), "\\0")
        raise UserError(f"{where}={shown} holds a character that cannot be written (NUL, or no valid UTF-8)")


def _writable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


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
    """The dense model.

    ``path``: a hub name, a directory, a GGUF file, or ``embedded:NAME`` for one that ships with the package.
    """

    name: str | None = None
    """What records call it."""
    path: str | None = None
    local: bool = False
    """``path`` is a directory, whatever it looks like: the hub is not asked."""
    revision: str | None = None
    bos: str = "auto"
    """Where the text of calibration and perplexity has its BOS: ``each_window``, ``stream_start`` (the field's custom),
    or ``auto``, as the family was trained."""
    dtype: str = "auto"
    """``auto`` keeps the checkpoint's."""
    device: str = "auto"
    """``auto``: the first GPU if there is one, else the CPU."""
    device_map: str | None = None
    """How accelerate spreads a model to be scored over all GPUs, memory and disk (``method=dense``).

    Null: ``device`` holds it whole.
    """
    max_memory: list[str] = field(default_factory=list)
    """What the map may use of each place: ``[0:70GiB,1:70GiB,cpu:100GiB]``; empty: what is free."""

    def __post_init__(self) -> None:
        _one_of("model.dtype", self.dtype, DTYPES)
        _one_of("model.bos", self.bos, BOS_HABITS)
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
                    f"model.max_memory=[{limit}] is not understood: give the number of a GPU, or cpu, and a size, "
                    "for example 0:70GiB"
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
    """Kept ranks are multiples of this; null: what the model's device likes (``methods/multiples.py``)."""

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
    engine: str = "any"
    """Whose sizes the ranks keep to (``allocation/engines.py``)."""
    target_bytes: str | None = None
    """What the compressed model may take, such as ``4GiB``: the sparsity is found from it."""
    target_speedup: float | None = None
    """How many times as fast as the dense model on this machine: timed models of such sizes give the sparsity."""
    target_phase: str = "decode"
    """What has to be faster: one more token of each sequence (``decode``), or its prompt (``prefill``)."""
    target_context: int = 0
    """Tokens of each sequence.

    Their keys and values count to ``target_bytes`` (0: weights alone); ``target_speedup`` is measured behind so many
    (0: 512, or what the model's context leaves).
    """
    target_batch: int = 1
    """Sequences of ``target_context`` tokens at once."""

    def __post_init__(self) -> None:
        _sparsity("compression.sparsity", self.sparsity)
        _one_of("compression.budget", self.budget, BUDGETS)
        _one_of("engine", self.engine, ENGINES)
        self._check_targets()
        _at_least("compression.target_context", self.target_context, 0)
        _at_least("compression.target_batch", self.target_batch, 1)
        for index in self.skip_layers:
            _at_least("compression.skip_layers", index, 0)
        for value in self.layer_sparsity or []:
            _sparsity("compression.layer_sparsity", value)

    @property
    def target(self) -> str | None:
        """Which option its sparsity is found from; None: it is given."""
        names = ("target_bytes", "target_speedup")
        return next((name for name in names if getattr(self, name) is not None), None)

    def _check_targets(self) -> None:
        _one_of("compression.target_phase", self.target_phase, PHASES)
        if self.target_bytes is not None:
            read_bytes("compression.target_bytes", self.target_bytes)
        elif self.target_speedup is None and (self.target_context or self.target_batch != 1):
            raise UserError(
                "compression.target_context and target_batch have no effect without target_bytes or target_speedup"
            )
        if self.target_speedup is None and self.target_phase != "decode":
            raise UserError("compression.target_phase has no effect without target_speedup")
        if self.target_speedup is not None and self.target_bytes is not None:
            raise UserError("compression.target_bytes and target_speedup are two targets: give one")
        if self.target_speedup is not None and not 1 < self.target_speedup < float("inf"):
            raise UserError(f"compression.target_speedup={self.target_speedup} should be above 1, such as 1.3")


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
                "model.path is missing: a local directory (model=local model.path=DIR) "
                "or a hub name (model=hub model.path=OWNER/NAME)"
            )
        _at_least("seed", self.seed, 0)
        _at_least("threads", self.threads, 1, MOST_THREADS)
        _check_text(asdict(self))
