"""MoDeGPT layer by layer from disk to disk: the same arithmetic as in memory, in the same order, so the same bits."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.calibration.statistics import Statistics
from modegpt.calibration.stream import HiddenStates
from modegpt.methods.base import Compressed, CompressionTask
from modegpt.methods.modegpt import MoDeGPT
from modegpt.models import empty_compressed, merged_tensors
from modegpt.models.checkpoints import quiet
from modegpt.models.integrity import check_tensor_finite
from modegpt.streaming.hidden import arguments_alone, embedded
from modegpt.streaming.model import StreamedModel
from modegpt.streaming.shards import SINGLE, Shards, write_index
from modegpt.streaming.workspace import Position, Workspace

INFLUENCE = frozenset({"layer.influence"})


@dataclass
class StreamedCompression:
    """One compression out of core.

    Args:
        task: with a calibration of ``streamed.model``, which has no data of its own and no cache.
        on_disk: hidden states lie in files between layers instead of in memory.
    """

    method: MoDeGPT
    task: CompressionTask
    streamed: StreamedModel
    workspace: Workspace
    on_disk: bool = False

    def run(self) -> tuple[Compressed, int]:
        """Write every compressed layer to the workspace, going on from where an earlier process got to.

        Returns what ``MoDeGPT.compress`` does, its model without data, and how many layers were found finished.
        """
        method, task, calibration = self.method, self.task, self.task.calibration
        num_layers, names = calibration.num_layers, method.required_statistics(task.family)
        position = self.workspace.position() or self._begin()
        found = position.next_layer
        plan, generator = method.plan(task, position.influence), task.generator()
        position.restore(generator)
        hidden = self._hidden(position.next_layer) if names and found < num_layers else None
        for index in calibration.progress.track(range(found, num_layers), "compression", unit="layer"):
            with self._layer(index) as layer:
                statistics = {} if hidden is None else self._observe(hidden, index, names, stage="statistics")
                shape, changed, report = method.compress_layer(
                    task, index, layer, plan.ranks[index], statistics, generator
                )
                del statistics
                with calibration.meter.stage("saving"):
                    self._write_layer(index, merged_tensors(task.family, layer, changed))
                    del changed  # or it would live through the next layer
                    position.shapes.append(shape)
                    position.reports.append(report)
                    position.next_layer = index + 1
                    position.remember(generator)
                    self.workspace.save(position, hidden if index + 1 < num_layers else None)
        calibration.meter.calibration_tokens = calibration.tokens.num_tokens
        model = empty_compressed(self.streamed.model, position.shapes)
        return method.finish(task, plan, model, position.reports, position.influence), found

    def complete(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write all that makes the layers a checkpoint of ``model``.

        These are the tensors outside the layers, the index, the configuration, the modeling file and the tokenizer.
        """
        files = self.workspace.directory / "files"
        shutil.rmtree(files, ignore_errors=True)
        with quiet():
            model.save_pretrained(files, state_dict={})
            tokenizer.save_pretrained(files)
        (files / SINGLE).unlink(missing_ok=True)  # holds nothing: the weights are here already
        for path in files.iterdir():
            path.replace(self.workspace.checkpoint / path.name)
        for shard, names in self._outer_shards().items():
            self.workspace.write(
                {name: self.streamed.tensor(name) for name in names}, shard=shard, num_shards=self._num_shards
            )
        write_index(self.workspace.checkpoint, model.num_parameters())
        shards, tied = Shards(self.workspace.checkpoint), self.streamed.tied
        expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
        assert expected == {name: shards.shape(name) for name in shards.files}, (
            "the files are not the model that was planned"
        )

    def _begin(self) -> Position:
        position = Position(influence=self._block_influence() if self.method.allocation.needs_influence else None)
        if position.influence is not None:
            for warning in self.method.foresee(self.task, position.influence):
                self.task.calibration.progress.say(f"warning: {warning}")
        position.remember(self.task.generator())
        self.workspace.save(position, None)
        return position

    def _block_influence(self) -> list[float]:
        """A first walk, without Gram matrices."""
        calibration = self.task.calibration
        hidden, influence = self._hidden(0), []
        for index in calibration.progress.track(range(calibration.num_layers), "block influence", unit="layer"):
            with self._layer(index):
                influence.append(float(self._observe(hidden, index, INFLUENCE, stage="influence")["layer.influence"]))
        return influence

    def _observe(self, hidden: HiddenStates, index: int, names: frozenset[str], *, stage: str) -> Statistics:
        """Run the loaded layer ``index`` on ``hidden``, which moves on, and return its statistics."""
        calibration = self.task.calibration
        self.workspace.begin_layer(hidden, index)
        with calibration.meter.stage(stage, counted=True):
            return calibration.observe(hidden, index, names)

    @contextmanager
    def _layer(self, index: int) -> Iterator[nn.Module]:
        """Layer ``index``, loaded; only the loading is metered."""
        with ExitStack() as stack:
            with self.task.calibration.meter.stage("reading"):
                layer = stack.enter_context(self.streamed.layer(index))
            yield layer

    def _hidden(self, layer: int) -> HiddenStates:
        """The hidden states in front of ``layer``: embedded for the first, from the workspace for another."""
        calibration = self.task.calibration
        ids, batch_size = calibration.tokens.ids, calibration.batch_size
        with calibration.meter.stage("embedding"):
            if layer == 0:
                return embedded(
                    self.streamed,
                    ids,
                    batch_size=batch_size,
                    directory=self.workspace.hidden(0) if self.on_disk else None,
                )
            arguments = arguments_alone(self.streamed, ids, batch_size=batch_size)
            batches = self.workspace.batches(layer, num_batches=-(-len(ids) // batch_size), device=self.streamed.device)
            return HiddenStates(batches=batches.as_list() if self.on_disk else list(batches), arguments=arguments)

    def _write_layer(self, index: int, tensors: dict[str, Tensor]) -> None:
        named = {f"{self.streamed.layers_prefix}{index}.{name}": tensor for name, tensor in tensors.items()}
        for name, tensor in named.items():
            check_tensor_finite(name, tensor)
        self.workspace.write(named, shard=index + 1, num_shards=self._num_shards)

    def _outer_shards(self) -> dict[int, list[str]]:
        """Names of the tensors outside the layers by shard: the first has what is before them, the last the rest."""
        names = list(self.streamed.sources)
        first = next(index for index, name in enumerate(names) if name.startswith(self.streamed.layers_prefix))
        outer = [name for name in self.streamed.outer_names(head=True) if name not in self.streamed.tied]
        before = [name for name in outer if names.index(name) < first]
        behind = [name for name in outer if name not in before]
        return {0: before} | ({self.task.calibration.num_layers + 1: behind} if behind else {})

    @property
    def _num_shards(self) -> int:
        return self.task.calibration.num_layers + len(self._outer_shards())
