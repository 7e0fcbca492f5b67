"""Saving a compressed model so that it is there whole or not at all, and loading models, refusing what is damaged."""

import json
import logging
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modegpt.data.embedded import TINY_MODELS
from modegpt.data.hub import hub_access
from modegpt.errors import UserError, shortened
from modegpt.files import partial_folder, read_json, replacing, sync
from modegpt.models import family_of, is_compressed, unfused
from modegpt.models.card import model_card
from modegpt.models.families import check_supported
from modegpt.models.fit import check_names, check_sizes, check_tied, check_unquantised, check_vocabulary
from modegpt.models.gguf import check_gguf, config_in, gguf_file, without_quantisation
from modegpt.models.integrity import MANIFEST, check_config, check_files, check_finite, describe_files, stored_sizes

EMBEDDED = "embedded:"
CONTENT_ERRORS = (
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    SafetensorError,
    StrictDataclassError,
    ImportError,
    pickle.UnpicklingError,
)
"""What Transformers raises for a damaged or foreign checkpoint; none of it names the way out."""
LOADING_ERRORS = (*CONTENT_ERRORS, OSError)


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    card: Mapping[str, Any],
    *,
    max_shard_size: str = "5GB",
    files: Mapping[str, Callable[[Path], None]] | None = None,
    run: str | None = None,
) -> Path:
    """Write ``model`` as a Hugging Face checkpoint that loads with or without this package.

    Everything goes to a hidden folder beside ``directory`` first, is synced, sealed by a manifest of
    sizes and sha256 sums, and moved into place in one step: a kill leaves the old checkpoint or none, and the next
    call removes the folder.

    Args:
        card: the run's record (or as much of it as there is), from which the model card is written.
        files: what goes beside it, by file name: a function that writes it to a path.
        run: the identity of the run that made it. What the same run made before, with other rounding, is replaced.

    Returns the directory. An identical checkpoint there is left alone.

    Raises:
        UserError: something else is in ``directory``, or it cannot be written.
    """
    directory = Path(directory)
    check_destination(directory)
    with saving(directory) as partial:
        with quiet():
            model.save_pretrained(partial, max_shard_size=max_shard_size)
            tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(model_card(model, card), encoding="utf-8")
        for name, write in (files or {}).items():
            write(partial / name)
        publish(partial, directory, run=run)
    return directory


@contextmanager
def saving(directory: Path) -> Iterator[Path]:
    """A folder beside ``directory`` for the block to fill and publish; whatever cannot be written is a UserError."""
    try:
        with partial_folder(directory.parent, f".{directory.name}.partial-") as partial:
            yield partial
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:  # as tokenizers raises
            raise
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise UserError(f"cannot save a model to {directory}: {reason}") from error


def publish(partial: Path, directory: Path, *, run: str | None = None) -> None:
    """Seal the complete checkpoint in ``partial`` by its manifest and move it to ``directory``.

    An identical one there is left alone, another one of the same ``run`` replaced.
    Raises UserError when something else is there.
    """
    manifest = {"format": 1, "files": describe_files(partial)} | ({"run": run} if run else {})
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    umask = _umask()
    for path in (*partial.rglob("*"), partial):  # safetensors and mkdtemp make what they write the owner's alone
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        sync(path)
    if _same_checkpoint(partial, directory):
        return
    if run is not None and saved_by(directory) == run:
        shutil.rmtree(directory)
    try:
        os.rename(partial, directory)  # replaces an empty directory, refuses any other
    except OSError as error:
        raise UserError(
            f"{directory} already holds another checkpoint; choose another or remove it ({error.strerror})"
        ) from None
    sync(directory.parent)


def saved_by(directory: Path) -> str | None:
    """The identity of the run that made the checkpoint in ``directory``, if there is one that says so."""
    if not (directory / MANIFEST).is_file():
        return None
    run = read_json(directory / MANIFEST).get("run")
    return None if run is None else str(run)


def write_card(model: PreTrainedModel, directory: Path, card: Mapping[str, Any]) -> None:
    """Put a new model card beside a saved ``model``. Raises UserError when it cannot be written."""
    try:
        with replacing(directory / "README.md") as temporary:
            temporary.write_text(model_card(model, card), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {directory / 'README.md'}: {error.strerror}") from error


def check_destination(directory: str | Path) -> None:
    """Find out before the work whether a checkpoint could be saved to ``directory``; makes its parent folders.

    Raises:
        UserError: it holds files that are not a checkpoint of ours, or cannot be written.
    """
    directory = Path(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.exists() and any(directory.iterdir()) and not (directory / MANIFEST).is_file():
            raise UserError(
                f"{directory} already holds files that are not a saved checkpoint; choose another directory"
            )
    except OSError as error:
        raise UserError(f"cannot save a model to {directory}: {error.strerror}") from None
    if not os.access(directory.parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot save a model to {directory}: no permission to write in {directory.parent}")


def _same_checkpoint(partial: Path, directory: Path) -> bool:
    if not (directory / MANIFEST).is_file():
        return False
    check_files(directory)
    return bool(read_json(directory / MANIFEST)["files"] == read_json(partial / MANIFEST)["files"])


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_model(
    path: str,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    *,
    device_map: str | None = None,
    max_memory: Mapping[int | str, str] | None = None,
) -> PreTrainedModel:
    """Load a dense or compressed causal language model, in eval mode.

    Args:
        path: a local directory, a GGUF file, a name on the hub, or ``embedded:NAME`` for a model that ships with the
            package.
        dtype: ``"auto"`` keeps the checkpoint's; of a GGUF file it is float32.
        device: ``"auto"`` is the first CUDA device, or else the CPU.
        device_map, max_memory: spread it over devices, memory and disk instead, by accelerate's strategy of this name
            and within these limits by place; such a model can be run, not changed.

    A family with fused projections comes back with them taken apart (views of the same tensors).

    Raises:
        UserError: no such model, an unsupported family, a damaged or incomplete checkpoint (the file or
            tensor is named; nothing is ever initialised at random), or NaN or inf in a weight.
    """
    device, in_file = present(device), gguf_file(path)
    if in_file and dtype == "auto":
        dtype = torch.float32
    with located(path) as source:
        config = load_config(path, source, revision)
        if family_of(config).taken_apart and device_map is not None and not is_compressed(config):
            raise UserError(
                f"model.device_map cannot spread a dense {config.model_type} model: "
                "its fused projections or experts are taken apart when it is loaded"
            )
        if Path(source).is_dir():
            check_sizes(path, config, sizes_apart(config, stored_sizes(Path(source))))
        spread = {} if device_map is None else {"device_map": device_map, "max_memory": max_memory or None}
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                revision=revision,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, and refused here
                **spread,
                **in_file,
            )
    model, report = loaded
    check_names(path, config, missing=report["missing_keys"], extra=report["unexpected_keys"])
    check_sizes(path, config, report["mismatched_keys"])
    if in_file:
        model = without_quantisation(model)
    check_finite(model)
    if device_map is not None:
        return model.eval()
    check_tied(path, model)
    apart: Any = unfused(model)  # Transformers' type of ``to`` asks for a model, not a device
    return apart.to(device).eval()


def sizes_apart(
    config: PreTrainedConfig, stored: Mapping[str, list[int]]
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Name, stored size and size of each tensor that a model of ``config`` has under the same name in another size.

    Before a weight is read. Tensors that Transformers would rename or stack when it loads them are not among them.
    """
    with torch.device("meta"), quiet():
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    for name, tensor in model.state_dict().items():
        if name in stored and stored[name] != list(tensor.shape):
            yield name, stored[name], list(tensor.shape)


def load_config(path: str, source: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration in ``source``, which is what is ``located`` at ``path``.

    Raises:
        UserError: an unsupported family, quantised weights, or a value that Transformers would stumble over.
    """
    written = _written(path, source, revision)
    check_supported(str(written.get("model_type")))
    check_unquantised(written, path)
    check_config(written, path)
    if gguf_file(path):
        config = AutoConfig.for_model(**written)
        config.name_or_path = source
        return config
    return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)


def _written(path: str, source: str, revision: str | None) -> dict[str, Any]:
    """What the configuration in ``source`` says, which is what is ``located`` at ``path``."""
    if gguf_file(path):
        return config_in(Path(source, Path(path).name))
    return PreTrainedConfig.get_config_dict(source, revision=revision)[0]


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, by the same names as ``load_model``.

    Raises UserError when there is none, an empty one, or one that is larger than the model's embedding.
    """
    with located(path) as source:
        written = _written(path, source, revision)
        check_config(written, path)  # which Transformers reads too, before it knows a tokenizer's class
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False, **gguf_file(path))
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise UserError(f"the tokenizer of {path} is empty: it has no token but special ones")
    if isinstance(written.get("vocab_size"), int):
        check_supported(str(written.get("model_type")))  # before a size that a family may not mean
        check_vocabulary(path, tokenizer, written["vocab_size"])
    return tokenizer


def present(device: str | torch.device) -> str | torch.device:
    """``device``; for ``auto`` the first GPU if there is one, else the CPU. Raises UserError where it is not there."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if num_gpus else "cpu"
    wanted = torch.device(device)
    there = {"cuda": (wanted.index or 0) < num_gpus, "mps": torch.backends.mps.is_available()}
    if not there.get(wanted.type, True):
        gpus = ["cuda", *(f"cuda:{index}" for index in range(num_gpus))] if num_gpus else []
        found = ["cpu", *gpus, *(["mps"] if there["mps"] else [])]
        raise UserError(f"model.device={device} is not there: PyTorch finds {', '.join(found)} on this machine")
    return device


@contextmanager
def located(path: str) -> Iterator[str]:
    """What Transformers should open for ``path``: a checked local directory, or the same name with the hub at hand.

    Failures inside come out as a UserError of one line that names the model.
    """
    embedded = path.startswith(EMBEDDED)
    directory = _embedded(path.removeprefix(EMBEDDED)) if embedded else Path(path).expanduser()
    if gguf_file(path):
        check_gguf(directory)
        with _explained(path, (*LOADING_ERRORS, struct.error)), quiet():
            yield str(directory.parent)
        return
    if directory.exists():
        _check_directory(directory)
        with _explained(path, LOADING_ERRORS):
            yield str(directory)
        return
    if embedded or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise UserError(f"no model directory at {path}")
    with hub_access(path, "give a local copy: model=local model.path=DIRECTORY"), _explained(path, CONTENT_ERRORS):
        yield path


def _embedded(name: str) -> Path:
    if name not in TINY_MODELS:
        raise UserError(f"no embedded model {name!r}; there are {', '.join(sorted(TINY_MODELS))}")
    return TINY_MODELS[name]


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise UserError(f"{directory} is a file; give the directory of a Hugging Face checkpoint")
    if not os.access(directory, os.R_OK | os.X_OK):
        raise UserError(f"no permission to read {directory}")
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json; give the directory of a Hugging Face checkpoint")
    try:
        check_files(directory)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None


@contextmanager
def _explained(path: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, errors) and type(error) is not Exception:  # which is all that tokenizers raises
            raise
        told = shortened(str(error))
        if isinstance(error, pickle.UnpicklingError):  # whose text advises to run what the file says
            told = "its weights are a pickle that holds more than tensors; give a safetensors checkpoint"
        bare = isinstance(error, LookupError | TypeError | AttributeError | ArithmeticError | AssertionError)
        kind = f"{type(error).__name__}: " if bare and not isinstance(error, StrictDataclassError) else ""
        raise UserError(f"cannot load {path}: {kind}{told}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """No bars from Transformers, as a run shows its own, and no report of what does not fit, which is refused."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_no_report)
    try:
        yield
    finally:
        logger.removeFilter(_no_report)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _no_report(entry: logging.LogRecord) -> bool:
    return not any(part in entry.getMessage() for part in ("LOAD REPORT", "will NOT tie them"))
