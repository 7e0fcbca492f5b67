"""The public Python API: compress a Transformers model, score it, load it again.

    import modegpt

    model = modegpt.load("meta-llama/Llama-2-7b-hf")
    tokenizer = modegpt.load_tokenizer("meta-llama/Llama-2-7b-hf")
    smaller = modegpt.compress(model, tokenizer, "wikitext2", sparsity=0.3)
    modegpt.evaluate(smaller, tokenizer, "wikitext2")
    smaller.save_pretrained("llama-30")

The main job (``modegpt.run``) draws its tokens, checks its task and compresses by the same functions.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from modegpt.backend import InMemory, Scores
from modegpt.config import (
    PAPER,
    TARGETS,
    CalibrationConfig,
    CompressionConfig,
    DecompositionConfig,
    ModelConfig,
    ModuleSparsity,
    RankMultiple,
    RunConfig,
    unknown_key,
)
from modegpt.cost.metering import CostMeter
from modegpt.data.texts import SOURCES, Documents, load_documents
from modegpt.errors import UserError
from modegpt.evaluation.evaluate import evaluate as score
from modegpt.evaluation.evaluate import prepare_evaluation
from modegpt.evaluation.spec import EvaluationSpec, PerplexitySpec, ZeroShotSpec
from modegpt.files import read_json
from modegpt.methods.base import Compressed, make_task
from modegpt.methods.registry import make_method, settled
from modegpt.models import is_compressed, unfused
from modegpt.models.checkpoints import load_model, load_tokenizer
from modegpt.models.saving import REPORT
from modegpt.prepare import calibration_tokens
from modegpt.progress import Progress
from modegpt.records.provenance import package_versions
from modegpt.records.recording import calibration_facts, compression_facts, model_facts, model_name

__all__ = ["compress", "evaluate", "load", "load_tokenizer"]

Texts = Sequence[str] | str
TEXTS = "texts"
"""What reports and scores call a list of strings."""
RANKS = tuple(option.name for option in fields(CompressionConfig) if option.name not in TARGETS | {"sparsity"})
"""Options about ranks, which every method that plans ranks takes."""
KEYWORDS = ("sparsity", "method", *(option.name for option in fields(CalibrationConfig)), "bos", "quiet")
CONFIGURATION_KEY = re.compile(r"\b(?:calibration|compression|decomposition|method|evaluation\.\w+)[./](?=[a-z])")


def compress(
    model: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Texts,
    *,
    sparsity: float = 0.3,
    method: str = "modegpt",
    num_samples: int = 128,
    sequence_length: int | str = "auto",
    seed: int = 0,
    batch_size: int = 8,
    precision: str = "float64",
    bos: str = "auto",
    quiet: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Compress a causal language model in closed form, calibrated on ``texts``. No gradient, no training.

    The compressed model is a Transformers model: ``generate``, ``save_pretrained`` and ``push_to_hub`` work. What is
    saved loads with ``AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)``, without this package too.

    Its ``modegpt_report`` says what was done: ``model`` (the dense one), ``calibration``, ``compression`` (the achieved
    sparsity; sparsity, ranks and relative errors of every layer), ``options``, ``cost`` and ``packages``. Saving the
    model writes it as ``modegpt_report.json``, and a model card made of it. Scores in
    ``modegpt_report["metrics"] = {"dense": ..., "compressed": ...}``, as ``evaluate`` returns them, go into the card.

    Args:
        model: a dense model on one device, or the path or hub name of one. It is not changed; the compressed model
            shares the tensors that stay as they are, such as embeddings.
        tokenizer: the model's; None loads the one at the path.
        texts: a list of strings, or the name of a text source: wikitext2, alpaca, c4, tiny.
        sparsity: share of the block-linear weights to remove, in [0, 1).
        method: modegpt (the paper's), modegpt_plus, or a baseline such as slicegpt; ``modegpt --help`` lists them.
        num_samples: windows drawn from the text.
        sequence_length: tokens a window; ``"auto"`` is 2048, or the model's context where that is shorter.
        seed: of the windows drawn, and of what is random in the method.
        batch_size: windows in one forward pass.
        precision: ``"float64"`` or ``"float32"``, of the products inside the Gram matrices.
        bos: ``"each_window"`` puts a BOS in front of each window, ``"stream_start"`` leaves it at the text's start;
            ``"auto"`` is what the family was trained with.
        quiet: show no progress.
        options: the method's own. For modegpt: ``mlp``, ``query_key``, ``value_output`` (the decomposition of a module)
            and ``allocation``, each a name, or a dict of ``name`` and its options; ``none`` leaves a module dense.
            For methods that plan ranks: ``module_sparsity``, ``rank_multiple``, ``budget``, ``skip_layers``,
            ``layer_sparsity``, ``engine``. For any other method: the fields of its class, such as ``alpha`` of asvd.

    Raises:
        UserError: a ValueError of one line that says what was wrong and what would be right: an unknown option, too
            little text, a model that is compressed already or of another family.

    Example:
        >>> smaller = compress("embedded:tiny-llama", None, "tiny", sparsity=0.3, num_samples=32)
        >>> round(smaller.modegpt_report["compression"]["achieved_sparsity"], 2)
        0.3
    """
    with _plain_names():
        config = _config(
            model if isinstance(model, str | Path) else _path(model) or type(model).__name__,
            sparsity=sparsity,
            method=method,
            calibration=CalibrationConfig(
                num_samples=num_samples,
                sequence_length=sequence_length,
                seed=seed,
                batch_size=batch_size,
                precision=precision,
            ),
            bos=bos,
            options=options,
        )
        if make_method(config) is None:  # which refuses wrong options before anything is loaded
            raise UserError("method=dense compresses nothing; modegpt.evaluate scores a dense model")
        documents = _documents(texts, split="calibration")
        model, tokenizer = _opened(model, tokenizer)
        config = settled(config, device=model.device, model_config=model.config)
        with _evaluating(model):
            compressed, report = _compressed(config, unfused(model), tokenizer, documents, Progress(quiet))
        report["model"]["path"], report["options"] = _hub_name(model), options
    smaller: Any = compressed.model
    smaller.modegpt_report, smaller.modegpt_files = report, compressed.files
    return smaller


def evaluate(
    model: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Texts | None = None,
    *,
    tasks: Sequence[str] | str | None = None,
    windows: Sequence[int] | int | str = "auto",
    batch_tokens: int = 4096,
    batch_size: int = 32,
    limit: int | None = None,
    data_path: str | None = None,
    num_fewshot: int | None = 0,
    apply_chat_template: bool = False,
    bos: str = "auto",
    quiet: bool = False,
) -> Scores:
    """Score a dense or compressed model: perplexity on ``texts``, zero-shot accuracy on ``tasks``.

    Args:
        model: a causal language model, or its path or hub name.
        tokenizer: the model's; None loads the one at the path.
        texts: a list of strings, joined by blank lines, or the name of a text source, whose test split is scored.
        tasks: ``"tiny"``, ``"paper"``, the name of a task of lm-evaluation-harness, or a list of such names.
        windows: window lengths in tokens; ``"auto"``: 2048 where it fits, and the model's context up to 4096.
        batch_tokens: tokens in one forward pass of the perplexity.
        batch_size: requests in one forward pass of the tasks.
        limit: score only the first items of each task.
        data_path: folder of local files of the tasks, read instead of the hub.
        num_fewshot: examples in the prompts of the tasks; None: each task's own number.
        apply_chat_template: ask the tasks as the tokenizer's chat template does.
        bos: as in ``compress``; a perplexity of windows that begin with a BOS is ``ppl_<source>_<window>_bos``.
        quiet: show no progress.

    Returns ``{"perplexity": {"ppl_<source>_<window>": {"value": ...}}, "zeroshot": {task: {"value": ...}}}``, where the
    source of a list of strings is ``texts``; ``evaluation.evaluate.evaluate`` describes every field.

    Raises:
        UserError: nothing to score, an unknown task or source, a text shorter than a window, or NaN in the logits.

    Example:
        >>> scores = evaluate("embedded:tiny-llama", None, "tiny", windows=[256])
        >>> list(scores["perplexity"])
        ['ppl_tiny_256']
    """
    with _plain_names():
        if texts is None and tasks is None:
            raise UserError("there is nothing to score: give texts, tasks or both")
        model, tokenizer = _opened(model, tokenizer)
        documents = None if texts is None else _documents(texts, split="test")
        names = tasks if tasks is None or isinstance(tasks, str) else list(tasks)
        spec = EvaluationSpec(
            PerplexitySpec(
                source=None if documents is None else documents.source,
                windows=windows if isinstance(windows, str | int) else list(windows),
                batch_tokens=batch_tokens,
            ),
            ZeroShotSpec(
                tasks=names,
                data_path=data_path,
                batch_size=batch_size,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=apply_chat_template,
            ),
        )
        prepared = prepare_evaluation(
            spec, tokenizer=tokenizer, model_config=model.config, documents=documents, bos=bos
        )
        with _evaluating(model):
            return score(model, prepared, label=type(model).__name__, progress=Progress(quiet))


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a dense or compressed model in evaluation mode, and check that it is whole.

    A compressed model that was saved with its ``modegpt_report`` has it again. ``load_tokenizer`` loads the tokenizer.

    Args:
        path: a local directory, a GGUF file, a hub name, or one that the package has: ``embedded:`` and
            ``tiny-llama``, ``tiny-opt``, ``tiny-qwen3`` or ``tiny-olmoe``.
        dtype: ``"auto"`` keeps the checkpoint's; of a GGUF file it is float32.
        device: ``"auto"`` is the first GPU, or else the CPU.
        revision: of a model on the hub.

    Raises:
        UserError: no such model, another family, or a damaged or incomplete checkpoint; the file is named.

    Example:
        >>> load("embedded:tiny-llama").config.num_hidden_layers
        6
    """
    model: Any = load_model(str(path), dtype, device, revision)
    if is_compressed(model.config):
        model.modegpt_report = _saved_report(Path(path).expanduser(), str(path), revision)
    return model


def _saved_report(directory: Path, name: str, revision: str | None) -> dict[str, Any] | None:
    """The report beside the model in ``directory``, or else called ``name`` on the hub; None where there is none."""
    file: str | Path | None = directory / REPORT
    if not directory.is_dir():
        file = cached_file(name, REPORT, revision=revision, _raise_exceptions_for_missing_entries=False)
    return read_json(Path(file)) if file is not None and Path(file).is_file() else None


def _opened(
    model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """``model`` and ``tokenizer``, loaded where a path stands for them."""
    if isinstance(model, str | Path):
        return load(model), load_tokenizer(str(model)) if tokenizer is None else tokenizer
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"model should be a Transformers model or the path of one, not a {type(model).__name__}")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise UserError("the model is spread over several devices; load it without device_map")
    if getattr(model, "is_quantized", False):
        raise UserError("the model is quantised; load it without quantization_config, and quantise what comes out")
    if tokenizer is None:
        raise UserError("tokenizer is missing: it is known only where model is a path")
    return model, tokenizer


def _documents(texts: Texts, *, split: str) -> Documents:
    """``texts``, read where a text source stands for them."""
    if isinstance(texts, str):
        if texts not in SOURCES:
            raise UserError(f"texts={texts[:40]!r} should be a list of strings, or one of {', '.join(SOURCES)}")
        return load_documents(texts, path=None, split=split)
    documents = Documents(source=TEXTS, texts=tuple(texts))
    if not all(isinstance(text, str) for text in documents):
        raise UserError("texts should be a list of strings; for a data set give the column, such as rows['text']")
    if not any(text.strip() for text in documents):
        raise UserError("texts holds no text: every string is empty")
    return documents


def _config(
    path: str | Path,
    *,
    sparsity: float,
    method: str,
    calibration: CalibrationConfig,
    bos: str,
    options: Mapping[str, Any],
) -> RunConfig:
    """The main job's configuration of the same compression."""
    rest = dict(options)
    ranks = {option: rest.pop(option) for option in RANKS if option in rest}
    for option, cls in (("module_sparsity", ModuleSparsity), ("rank_multiple", RankMultiple)):
        if option in ranks:
            ranks[option] = _by_module(cls, option, ranks[option])
    if "skip_layers" in ranks:
        ranks["skip_layers"] = list(ranks["skip_layers"])
    decomposition, allocation = {}, {}
    if method == "modegpt":
        decomposition = {module: _named(rest.pop(module, default)) for module, default in PAPER.items()}
        allocation = _named(rest.pop("allocation", "entropic"))
        if rest:
            raise unknown_key(sorted(rest)[0], [*PAPER, "allocation", *RANKS, *KEYWORDS])
    return RunConfig(
        seed=calibration.seed,
        model=ModelConfig(name=str(path), path=str(path), bos=bos),
        method={"name": method} | rest,
        decomposition=DecompositionConfig(**decomposition),
        allocation=allocation,
        calibration=calibration,
        compression=CompressionConfig(sparsity=sparsity, **ranks),
    )


def _path(model: Any) -> str:
    """Where ``model`` was loaded from; empty where it was made otherwise."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", ""))


def _hub_name(model: PreTrainedModel) -> str | None:
    """The name of ``model`` on the hub; None for one of a local directory, whose place is nobody else's business."""
    path = _path(model)
    return path if "/" in path and not path.startswith(("/", ".", "~")) and not Path(path).exists() else None


def _named(choice: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"name": choice} if isinstance(choice, str) else dict(choice)


def _by_module(cls: type, option: str, given: Mapping[str, Any]) -> Any:
    if wrong := sorted(given.keys() - set(PAPER)):
        raise unknown_key(f"{option}.{wrong[0]}", PAPER)
    return cls(**given)


def _compressed(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Documents,
    progress: Progress,
) -> tuple[Compressed, dict[str, Any]]:
    """``model`` compressed as ``config`` says, and the report of it."""
    wanted, method, meter = config.calibration, make_method(config), CostMeter()
    assert method is not None
    tokens = calibration_tokens(config, documents, tokenizer, model)
    task = make_task(
        method,
        model,
        tokens,
        method_name=config.method["name"],
        sparsity=config.compression.sparsity,
        seed=config.seed,
        batch_size=wanted.batch_size,
        precision=wanted.precision,
        progress=progress,
        meter=meter,
    )
    with meter.stage("compression"):
        compressed = InMemory(model).compress(method, task)
    return compressed, {
        "model": {"name": model_name(config)} | model_facts(model),
        "calibration": calibration_facts(tokens, source=documents.source, seed=wanted.seed)
        | {"batch_size": wanted.batch_size, "precision": wanted.precision},
        "compression": compression_facts(
            model, compressed, method=config.method["name"], target_sparsity=config.compression.sparsity
        ),
        "cost": meter.summary(),
        "packages": package_versions(),
    }


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """``model`` in evaluation mode, and afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _plain_names() -> Iterator[None]:
    """Let errors name keywords where the main job has keys: ``num_samples`` instead of ``calibration.num_samples``."""
    try:
        yield
    except UserError as error:
        raise UserError(CONFIGURATION_KEY.sub("", str(error))) from None
