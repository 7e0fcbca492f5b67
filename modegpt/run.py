"""The main job: load, score the dense model, calibrate, compress, score again, record."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.calibration.cache import StatisticsCache, statistics_key
from modegpt.calibration.calibration import Calibration
from modegpt.calibration.world import World, device_of, join_world
from modegpt.config import RunConfig
from modegpt.cost.machine import measure_ceiling
from modegpt.cost.metering import CostMeter
from modegpt.cost.work import metered_forwards
from modegpt.data.fingerprints import fingerprint_tokenizer
from modegpt.data.texts import load_documents, tokenize_stream
from modegpt.data.tokens import CalibrationTokens, draw_windows, resolve_sequence_length
from modegpt.errors import UserError
from modegpt.evaluation.dense_cache import cached_scores, default_cache_directory, dense_key
from modegpt.evaluation.evaluate import PreparedEvaluation, evaluate, prepare_evaluation
from modegpt.evaluation.throughput import beside_dense
from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.methods.registry import SHARED, decides, make_method, settled
from modegpt.models import family_of, is_compressed
from modegpt.models.checkpoints import check_destination, load_model, load_tokenizer, save_checkpoint
from modegpt.models.integrity import check_finite, fingerprint_weights
from modegpt.progress import Progress
from modegpt.records.pictures import save_pictures
from modegpt.records.provenance import hardware
from modegpt.records.recording import make_record, model_name
from modegpt.records.store import RecordStore, identity, load_record
from modegpt.records.summary import summary
from modegpt.records.tracking import make_tracker
from modegpt.recovery.job import Recovery, make_recovery, prepare_recovery
from modegpt.streaming.job import OutOfCore, check_streams, open_dense


@dataclass
class Run:
    """One run's ingredients, loaded and checked; nothing expensive has happened yet."""

    config: RunConfig
    command: str
    method: Method | None
    store: RecordStore
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    evaluation: PreparedEvaluation
    task: CompressionTask | None
    weights_sha256: str
    tokenizer_sha256: str
    progress: Progress
    meter: CostMeter
    world: World
    device: str
    out_of_core: OutOfCore | None = None
    recovery: Recovery | None = None

    @property
    def name(self) -> str:
        """What tells this run from its neighbours in a listing."""
        config = self.config
        parts = [model_name(config), config.method["name"]]
        if self.method is not None:
            if config.method["name"] == "modegpt":
                chosen = (
                    config.decomposition.mlp["name"],
                    config.decomposition.query_key["name"],
                    config.decomposition.value_output["name"],
                )
                parts += [] if chosen == ("nystrom", "cr", "svd") else list(chosen)
                parts.append(config.allocation["name"])
            parts += [f"s{100 * config.compression.sparsity:g}", f"seed{config.calibration.seed}"]
            parts += [f"{self.recovery.name}-{self.recovery.lora.targets}"] if self.recovery else []
        return "-".join(parts)

    @property
    def decides(self) -> dict[str, Any]:
        """Everything that decides the result, free of paths."""
        calibration, recovery = self.config.calibration, self.recovery
        return {
            **decides(self.config),
            **(
                {"recovery": recovery.decides()} if recovery else {}
            ),  # absent, not null: runs without it keep their identity
            "model": {
                "weights_sha256": self.weights_sha256,
                "tokenizer_sha256": self.tokenizer_sha256,
                "dtype": str(self.model.dtype),
            },
            "calibration": self.task
            and {"tokens_sha256": self.task.calibration.tokens.sha256, "precision": calibration.precision}
            | ({"recovery_tokens_sha256": recovery.tokens.sha256} if recovery else {}),
            "evaluation": self.evaluation.fingerprint(),
            **({"throughput": self.throughput_decides()} if self.config.evaluation.throughput.workloads else {}),
        }

    def throughput_decides(self) -> dict[str, Any]:
        """What speeds depend on beside the model: how they are measured, and on which machine."""
        parts = hardware()
        device = (
            parts["gpus"][torch.device(self.device).index or 0]["name"]
            if torch.device(self.device).type == "cuda"
            else parts["cpu"]
        )
        return asdict(self.config.evaluation.throughput) | {"device": device, "num_threads": parts["num_threads"]}

    @property
    def directory(self) -> Path:
        return self.store.directory(
            experiment=self.config.output.experiment, name=self.name, hash=identity(self.decides)
        )

    @property
    def checkpoint(self) -> Path | None:
        """Where the compressed model is to be saved, if at all."""
        wanted = self.config.output.save_model
        return None if wanted is None else self.directory / "model" if wanted == "auto" else Path(wanted)


def run(config: RunConfig, *, command: str) -> Path:
    """Do the main job and return the path of its record, which is the finished one if there is one already."""
    prepared = prepare(config, command=command)
    store, output = prepared.store, config.output
    done = prepared.world.told(
        store.existing(experiment=output.experiment, name=prepared.name, decides=prepared.decides)
    )
    if done is not None and not output.overwrite:
        path = prepared.directory / "record.json"
        prepared.progress.say(f"this run is finished already: {path} (output.overwrite=true computes it again)")
        prepared.world.leave()
        if prepared.world.leads:
            print(summary(done, record_path=path))
        return path
    stage = Stage()
    try:
        return execute(prepared, stage)
    except (Exception, KeyboardInterrupt) as error:
        message = str(error) or type(error).__name__
        store.write_error(
            experiment=output.experiment,
            name=prepared.name,
            decides=prepared.decides,
            stage=stage.name,
            message=message,
            command=command,
        )
        raise


@dataclass
class Stage:
    """Where the run is, for the note that a failure leaves."""

    name: str = "start"


def prepare(config: RunConfig, *, command: str) -> Run:
    """Load and check everything; every refusal that needs no forward pass happens here."""
    device = device_of(config.model.device)
    world = join_world(
        device,
        what=f"method={config.method['name']}",
        shared=config.method["name"] in SHARED and not config.out_of_core.enabled,
    )
    progress, meter = Progress(config.quiet or not world.leads), CostMeter()
    method, training = make_method(config), make_recovery(config)  # which refuse before anything is loaded
    if config.model.device_map is not None and method is not None:
        raise UserError(
            "model.device_map spreads a model to be scored: set method=dense; out_of_core.enabled=true compresses one that is larger than the device"
        )
    if config.model.device_map is not None and config.evaluation.throughput.workloads:
        raise UserError("evaluation.throughput is measured on one device: leave out model.device_map")
    store = RecordStore(config.output.root)
    store.check_writable()
    if (path := config.model.path) is None:
        raise UserError(
            "model.path is missing: give a local directory or a hub name, e.g. model=local model.path=DIRECTORY"
        )
    tokenizer = load_tokenizer(path, config.model.revision)
    progress.say(f"loading {model_name(config)}")
    device, out_of_core = world.device(device), None
    if config.out_of_core.enabled:
        check_streams(
            method, name=config.method["name"], save_model=config.output.save_model, evaluation=config.evaluation
        )
        with meter.stage("loading"):  # every weight is read once, to be checked and identified
            out_of_core = open_dense(path, dtype=config.model.dtype, device=device, options=config.out_of_core)
            model, weights_sha256 = out_of_core.streamed.model, out_of_core.streamed.fingerprint()
    else:
        with meter.stage("loading"):
            wanted = config.model
            model = load_model(
                path,
                wanted.dtype,
                device,
                wanted.revision,
                device_map=wanted.device_map,
                max_memory=wanted.memory_limits,
            )
            weights_sha256 = fingerprint_weights(model)
    family, task = family_of(model.config), None
    config = settled(config, device=device, model_config=model.config)
    method = make_method(config)
    if method is not None:
        if is_compressed(model.config):
            raise UserError(
                f"{path} is compressed already; score it with method=dense, or compress the dense model it was made of"
            )
        if (reason := method.applicable(family)) is not None:
            raise UserError(f"method={config.method['name']} cannot compress {family.model_type} models: {reason}")
        tokens = calibration_tokens(config, tokenizer, model)
        calibration = Calibration(
            model=model,
            tokens=tokens,
            batch_size=config.calibration.batch_size,
            precision=getattr(torch, config.calibration.precision),
            cache=None
            if out_of_core or world.size > 1
            else statistics_cache(config, weights_sha256=weights_sha256, tokens=tokens, model=model),
            progress=progress,
            meter=meter,
            world=world,
        )
        task = CompressionTask(calibration=calibration, sparsity=config.compression.sparsity, seed=config.seed)
        method.check(task)
        if out_of_core is None:
            calibration.check_activations()
        if isinstance(config.output.save_model, str) and config.output.save_model != "auto":
            check_destination(config.output.save_model)
    elif config.output.save_model is not None:
        raise UserError("output.save_model has no effect with method=dense: there is no compressed model")
    evaluation = prepare_evaluation(config.evaluation, tokenizer=tokenizer, model_config=model.config)
    config.evaluation.throughput.check(evaluation.context)
    recovery = training and prepare_recovery(config, training, tokenizer=tokenizer, context=evaluation.context)
    if out_of_core is not None:
        measure_ceiling(
            device, model.dtype
        )  # libraries keep memory from their first products on, which the plan is to count
        out_of_core.plan(method, task, evaluation)
    return Run(
        config=config,
        command=command,
        method=method,
        store=store,
        model=model,
        tokenizer=tokenizer,
        evaluation=evaluation,
        task=task,
        weights_sha256=weights_sha256,
        tokenizer_sha256=fingerprint_tokenizer(tokenizer),
        progress=progress,
        meter=meter,
        world=world,
        device=device,
        out_of_core=out_of_core,
        recovery=recovery,
    )


def execute(run: Run, stage: Stage) -> Path:
    """Score, compress, score, record, show."""
    config, meter, progress = run.config, run.meter, run.progress

    @contextmanager
    def at(name: str) -> Iterator[None]:
        stage.name = name
        yield

    if not run.world.leads:
        with at("compression"):
            compress(run)
        return run.directory / "record.json"
    with meter.stage("machine ceiling"):
        meter.ceiling = measure_ceiling(run.device, run.model.dtype)
    with at("dense evaluation"), meter.stage("dense evaluation") as metered, metered_forwards(run.model, metered.add):
        dense = dense_scores(run)
    compressed, scores = None, None
    if run.method is not None:
        with at("compression"):
            compressed = compress(run)
        with (
            at("compressed evaluation"),
            meter.stage("compressed evaluation") as metered,
            metered_forwards(compressed.model, metered.add),
        ):
            if run.out_of_core is None:
                scores = evaluate(compressed.model, run.evaluation, label="compressed", progress=progress)
            else:
                scores = run.out_of_core.score_compressed(run.evaluation, progress=progress)
                run.out_of_core.measured(compressed)
    if run.recovery is not None:
        with at("recovery"):
            compressed, scores = recover(run, compressed, scores)
    speeds = None
    if config.evaluation.throughput.workloads:
        with at("throughput"), meter.stage("throughput"):
            speeds = beside_dense(
                run.model, compressed and compressed.model, config.evaluation.throughput, say=progress.say
            )
    with at("record"):
        record = make_record(run, compressed, dense, scores, speeds)
        if run.checkpoint is not None and compressed is not None:
            with meter.stage("saving"):
                if run.out_of_core is None:
                    save_checkpoint(compressed.model, run.tokenizer, run.checkpoint, record, files=compressed.files)
                else:
                    run.out_of_core.publish(compressed, run.checkpoint, record)
            progress.say(f"checkpoint: {run.checkpoint}")
        path = run.store.write(record, overwrite=config.output.overwrite)
    record = load_record(path)
    pictures = save_pictures(record, path.parent) if config.output.pictures else []
    tracker = make_tracker(**asdict(config.tracking))
    tracker.mirror(record, record_path=path, pictures=pictures)
    print(summary(record, record_path=path, pictures=pictures))
    return path


def dense_scores(run: Run) -> dict[str, dict]:
    """The dense model's scores, computed once per (model, evaluation); its perplexity is said first."""
    key = dense_key(
        run.evaluation,
        weights_sha256=run.weights_sha256,
        tokenizer_sha256=run.tokenizer_sha256,
        dtype=str(run.model.dtype),
        device=torch.device(run.device).type,
    )
    score = partial(evaluate, run.model) if run.out_of_core is None else run.out_of_core.score
    scores, reused = cached_scores(
        key, lambda: score(run.evaluation, label="dense", progress=run.progress), directory=cache_directory(run.config)
    )
    if reused:
        for name, score in scores["perplexity"].items():
            run.progress.say(
                f"dense: {name} = {score['value']:.4f} over {score['num_predicted_tokens']} tokens (scored before)"
            )
    return scores


def compress(run: Run) -> Compressed:
    """Run the method and check that what came out can be used."""
    with run.meter.stage("compression"):
        if run.out_of_core is not None:
            return run.out_of_core.compress(
                run.method, run.task, destination=run.checkpoint, decides=run.decides, tokenizer=run.tokenizer
            )
        compressed = run.method.compress(run.task)
        run.world.leave()
    check_finite(compressed.model)
    return compressed


def recover(run: Run, compressed: Compressed, before: dict[str, dict]) -> tuple[Compressed, dict[str, dict]]:
    """Train what was compressed and score it again."""

    def score(model: PreTrainedModel) -> dict[str, dict]:
        check_finite(model)
        with run.meter.stage("recovered evaluation"):
            return evaluate(model, run.evaluation, label="recovered", progress=run.progress)

    model, scores, report = run.recovery.apply(
        compressed.model, before, score=score, meter=run.meter, progress=run.progress
    )
    return replace(compressed, model=model, recovery=report), scores


def statistics_cache(
    config: RunConfig, *, weights_sha256: str, tokens: CalibrationTokens, model: PreTrainedModel
) -> StatisticsCache | None:
    """Where this calibration's statistics live between runs; None where the cache keeps nothing."""
    if config.cache.max_bytes == 0:
        return None
    key = statistics_key(
        weights=weights_sha256,
        tokens=tokens.sha256,
        dtype=str(model.dtype),
        device=model.device.type,
        precision=config.calibration.precision,
        batch_size=config.calibration.batch_size,
    )
    return StatisticsCache(root=cache_directory(config), key=key, max_bytes=config.cache.max_bytes)


def calibration_tokens(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> CalibrationTokens:
    """The calibration windows that ``config`` asks for."""
    wanted = config.calibration
    length = resolve_sequence_length(wanted.sequence_length, int(model.config.max_position_embeddings))
    stream = tokenize_stream(load_documents(wanted.source, path=wanted.path, split="calibration"), tokenizer)
    return draw_windows(stream, num_samples=wanted.num_samples, sequence_length=length, seed=wanted.seed)


def cache_directory(config: RunConfig) -> Path:
    return Path(config.cache.dir) if config.cache.dir else default_cache_directory()
