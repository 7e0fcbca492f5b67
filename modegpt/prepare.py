"""The first step of the main job: load everything, check everything, and say what decides the result."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.backend import Backend, InMemory, Target
from modegpt.cache import cache_directory
from modegpt.calibration.cache import StatisticsCache
from modegpt.calibration.world import World, join_world
from modegpt.config import ModelConfig, RunConfig, build
from modegpt.cost.metering import CostMeter
from modegpt.data.fingerprints import fingerprint_tokenizer
from modegpt.data.hub import commit_of_file
from modegpt.data.texts import Documents, load_documents
from modegpt.data.tokens import CalibrationTokens, draw_tokens, window_bos
from modegpt.errors import UserError
from modegpt.evaluation.begun import Begun
from modegpt.evaluation.evaluate import PreparedEvaluation, prepare_evaluation
from modegpt.files import json_sha256
from modegpt.methods.base import CompressionTask, Method, make_task, whole_model
from modegpt.methods.registry import decides, make_method, settled
from modegpt.methods.targets import aimed
from modegpt.models.checkpoints import EMBEDDED, check_destination, load_tokenizer, present
from modegpt.models.families import family_name
from modegpt.progress import Course, Progress
from modegpt.records.recording import model_name, run_name, speed_decides
from modegpt.records.store import RecordStore, identity
from modegpt.recovery.job import RECOVERIES, Recovery, check_recovery, prepare_recovery
from modegpt.recovery.lora import Lora
from modegpt.streaming.job import OutOfCore, check_streams


@dataclass
class Run:
    """One run's ingredients, loaded and checked; nothing expensive has happened yet.

    ``method`` and ``task`` are None for a run that only scores the dense model. ``stage`` is where the run is, for the
    note that a failure leaves. ``unsaved``: errors of what could not be written beside the record. ``begun``: scores
    that an interruption leaves to the next start.
    """

    config: RunConfig
    command: str
    backend: Backend
    tokenizer: PreTrainedTokenizerBase
    method: Method | None
    task: CompressionTask | None
    evaluation: PreparedEvaluation
    recovery: Recovery | None
    decides: dict[str, Any]
    store: RecordStore
    progress: Progress
    meter: CostMeter
    world: World
    device: str
    aim: dict[str, Any] = field(default_factory=dict)
    """What is known of a target in bytes or in speed."""
    commits: dict[str, str] = field(default_factory=dict)
    """Of what came from the hub, by repository (``models/OWNER/NAME``)."""
    stage: str = "start"
    unsaved: list[Exception] = field(default_factory=list)
    begun: list[Begun] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What tells this run from its neighbours in a listing."""
        return run_name(self.config, recovery=None if self.recovery is None else self.recovery.label)

    @property
    def directory(self) -> Path:
        """Where the run's record goes."""
        return self.store.directory(
            experiment=self.config.output.experiment, name=self.name, hash=identity(self.decides)
        )

    @property
    def target(self) -> Target:
        """Where the compressed model goes."""
        wanted = self.config.output.save_model
        directory = None if wanted is None else self.directory / "model" if wanted == "auto" else Path(wanted)
        return Target(directory, self.tokenizer, self.decides, identity(self.decides))


def prepare(config: RunConfig, *, command: str) -> Run:
    """Load and check everything; every refusal that needs no forward pass happens here."""
    method, training = make_method(config), make_recovery(config)  # which refuse before anything is loaded
    check_options(config, method)
    store = RecordStore(config.output.root)
    store.check_writable()
    wanted = str(present(config.model.device))
    alone = whole_model(method)
    world = join_world(
        wanted,
        what=alone or f"method={config.method['name']}",
        shared=method is not None and method.shared and alone is None,
    )
    device = world.device(wanted)
    progress, meter = Progress(config.quiet or not world.leads, course=Course(stages(config, method))), CostMeter()

    path = config.model.path
    assert path is not None, "a configuration without a model was accepted"
    tokenizer = load_tokenizer(path, config.model.revision)
    progress.say(f"loading {model_name(config)}")
    with meter.stage("loading"):  # every weight is read once, to be checked and identified
        backend = open_backend(path, config, device=device)
        weights_sha256 = backend.fingerprint()
    config = settled(config, device=device, model_config=backend.model.config)
    method, task, commits, aim = make_method(config), None, commit_of_model(config.model), {}
    documents: Documents | None = None
    if method is not None:
        documents = load_documents(config.calibration.source, path=config.calibration.path, split="calibration")
        commits |= documents.commits
        tokens = calibration_tokens(config, documents, tokenizer, backend.model)
        if config.compression.target is not None:
            with meter.stage("target"):
                found = aimed(config, method, backend.model, tokens, say=progress.say) if world.leads else None
            config, aim = world.told(found)
        task = make_task(
            method,
            backend.model,
            tokens,
            method_name=config.method["name"],
            sparsity=config.compression.sparsity,
            seed=config.seed,
            batch_size=config.calibration.batch_size,
            precision=config.calibration.precision,
            cache=None if world.size > 1 else statistics_cache(config, weights_sha256, tokens, backend.model),
            progress=progress,
            meter=meter,
            world=world,
        )
    evaluation = prepare_evaluation(
        config.evaluation, tokenizer=tokenizer, model_config=backend.model.config, bos=config.model.bos
    )
    config.evaluation.throughput.check(evaluation.context)
    recovery = None
    if training is not None:
        assert documents is not None, "recovery trains on the calibration text of a method"
        recovery = plan_recovery(config, training, documents, tokenizer=tokenizer, model=backend.model)
    backend.check(method, task, evaluation)
    return Run(
        config=config,
        command=command,
        backend=backend,
        tokenizer=tokenizer,
        method=method,
        task=task,
        evaluation=evaluation,
        recovery=recovery,
        decides={
            "model": {
                "weights_sha256": weights_sha256,
                "tokenizer_sha256": fingerprint_tokenizer(tokenizer),
                "dtype": str(backend.model.dtype),
            },
            **what_decides(config, task, evaluation, recovery, device=device),
        },
        store=store,
        progress=progress,
        meter=meter,
        world=world,
        device=device,
        aim=aim,
        commits=commits | evaluation.commits,
    )


def commit_of_model(wanted: ModelConfig) -> dict[str, str]:
    """The commit that the model has on the hub, by its repository there; empty for one of a directory."""
    path = str(wanted.path)
    if path.startswith(EMBEDDED) or Path(path).expanduser().exists():
        return {}
    commit = commit_of_file(path, "config.json", wanted.revision)
    return {} if commit is None else {f"models/{path}": commit}


def stages(config: RunConfig, method: Method | None) -> tuple[str, ...]:
    """The stages of a run as progress names them, apart from the method's own loops."""
    recovered = config.recovery.get("name") != "none"
    return (
        "dense",
        *(["compressed"] if method is not None else []),
        *(["recovery", "recovered"] if recovered else []),
        *(["throughput"] if config.evaluation.throughput.workloads else []),
    )


def check_options(config: RunConfig, method: Method | None) -> None:
    """Refuse combinations of options that no model could make possible. Raises UserError."""
    model, save_model = config.model, config.output.save_model
    if method is None and config.compression.target is not None:
        raise UserError(f"compression.{config.compression.target} has no effect with method=dense; leave it out")
    if config.compression.target_speedup is not None and config.out_of_core.enabled:
        raise UserError("compression.target_speedup times whole models in memory: leave out out_of_core.enabled")
    if model.local and not (str(model.path).startswith(EMBEDDED) or Path(str(model.path)).expanduser().exists()):
        raise UserError(f"no model directory at {model.path}; to ask the hub, set model=hub")
    if model.device_map is not None and method is not None:
        raise UserError(
            "model.device_map spreads a model to be scored: set method=dense; "
            "out_of_core.enabled=true compresses one that is larger than the device"
        )
    if model.device_map is not None and config.evaluation.throughput.workloads:
        raise UserError("evaluation.throughput is measured on one device: leave out model.device_map")
    if config.out_of_core.enabled:
        check_streams(method, name=config.method["name"], save_model=save_model, evaluation=config.evaluation)
    if method is None and save_model is not None:
        raise UserError("output.save_model has no effect with method=dense: there is no compressed model")
    if save_model not in (None, "auto"):
        check_destination(save_model)


def open_backend(path: str, config: RunConfig, *, device: str) -> Backend:
    """The dense model, whole in memory or out of core."""
    if config.out_of_core.enabled:
        return OutOfCore.open(path, config.model, device=device, options=config.out_of_core)
    return InMemory.open(path, config.model, device=device)


def calibration_tokens(
    config: RunConfig, documents: Documents, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> CalibrationTokens:
    """The calibration windows of ``documents`` that ``config`` asks for."""
    wanted = config.calibration
    return draw_tokens(
        documents,
        tokenizer,
        context=int(model.config.max_position_embeddings),
        vocab_size=model.config.vocab_size,
        num_samples=wanted.num_samples,
        sequence_length=wanted.sequence_length,
        seed=wanted.seed,
        bos=first_token(config, tokenizer, model),
    )


def first_token(config: RunConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int | None:
    """The token in front of each window of calibration, if there is one."""
    return window_bos(config.model.bos, family=family_name(model.config), tokenizer=tokenizer)


def make_recovery(config: RunConfig) -> Lora | None:
    """The training that follows compression; None for none. Raises UserError for one that cannot be."""
    if config.recovery.get("name") == "none":
        return None
    lora = build(RECOVERIES, config.recovery, "recovery")
    check_recovery(config.recovery["name"], method=config.method["name"], out_of_core=config.out_of_core.enabled)
    return lora


def plan_recovery(
    config: RunConfig, lora: Lora, documents: Documents, *, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> Recovery:
    """Draw the training windows of ``lora`` from the calibration text and check them against the test text."""
    test = config.evaluation.perplexity
    return prepare_recovery(
        lora,
        name=config.recovery["name"],
        training=documents,
        test=load_documents(test.source, path=test.path, split="test") if test and test.source else None,
        tokenizer=tokenizer,
        context=int(model.config.max_position_embeddings),
        seed=config.seed,
        bos=first_token(config, tokenizer, model),
    )


def statistics_cache(
    config: RunConfig, weights_sha256: str, tokens: CalibrationTokens, model: PreTrainedModel
) -> StatisticsCache | None:
    """Where this calibration's statistics live between runs; None where there is no cache, or not the whole model."""
    if config.cache.max_bytes == 0 or config.out_of_core.enabled:
        return None
    decides = {
        "weights": weights_sha256,
        "tokens": tokens.sha256,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "precision": config.calibration.precision,
        "batch_size": config.calibration.batch_size,
    }
    return StatisticsCache(
        root=cache_directory(config.cache.dir), key=json_sha256(decides), max_bytes=config.cache.max_bytes
    )


def what_decides(
    config: RunConfig,
    task: CompressionTask | None,
    evaluation: PreparedEvaluation,
    recovery: Recovery | None,
    *,
    device: str,
) -> dict[str, Any]:
    """Everything beside the model that decides the result, free of paths.

    A part that a run has not is absent, so that runs from before there was such a part keep their identity.
    """
    calibration = None
    if task is not None:
        tokens = task.calibration.tokens
        calibration = {"tokens_sha256": tokens.sha256, "precision": config.calibration.precision}
        calibration |= {} if tokens.bos is None else {"bos": "each_window"}
    if calibration is not None and recovery is not None:
        calibration["recovery_tokens_sha256"] = recovery.tokens.sha256
    found = decides(config, None if task is None else task.family) | {
        "calibration": calibration,
        "evaluation": evaluation.fingerprint(),
    }
    if recovery is not None:
        found["recovery"] = recovery.decides()
    if config.evaluation.throughput.workloads:
        found["throughput"] = speed_decides(config.evaluation.throughput, device)
    return found
