"""Layer by layer from disk to disk: the same arithmetic as in memory, in the same order, so the same bits."""

import shutil
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modegpt.methods.base import Compressed, CompressionTask, LayerByLayer
from modegpt.models import empty_compressed, merged_tensors
from modegpt.models.checkpoints import quiet
from modegpt.models.integrity import check_tensor_finite
from modegpt.streaming.hidden import DiskStorage
from modegpt.streaming.model import StreamedModel
from modegpt.streaming.shards import SINGLE, Shards, write_index
from modegpt.streaming.workspace import Position, Workspace


@dataclass
class StreamedCompression:
    """One compression out of core.

    Args:
        task: with a calibration of ``streamed.model``, which has no data of its own and no cache.
        on_disk: hidden states lie in files between layers instead of in memory.
    """

    method: LayerByLayer
    task: CompressionTask
    streamed: StreamedModel
    workspace: Workspace
    on_disk: bool = False

    def __post_init__(self) -> None:
        calibration = self.task.calibration
        storage = DiskStorage(
            self.streamed.model,
            self.streamed,
            calibration.meter,
            directory=self.workspace.passing if self.on_disk else None,
        )
        self.task = replace(self.task, calibration=replace(calibration, storage=storage))

    def run(self) -> tuple[Compressed, int]:
        """Write every compressed layer to the workspace, going on from where an earlier process got to.

        Returns what ``method.compress`` does, its model without data, and how many layers were found finished.
        """
        task, calibration = self.task, self.task.calibration
        num_layers = calibration.num_layers
        position = self.workspace.position() or self._begin()
        assert position.begun is not None
        found = position.next_layer
        walk = self.method.walk(task, position.begun, found)
        position.restore(walk.generator)
        walk.moved = position.moved
        if found:
            self.workspace.restore(walk.streams, found)
        for index in calibration.progress.track(range(found, num_layers), "compression", unit="layer"):
            with calibration.stored.layer(index) as layer:
                self.workspace.begin_layer(walk.streams, index)
                shape, changed, report = walk.layer(index, layer)
                with calibration.meter.stage("saving"):
                    self._write_layer(index, merged_tensors(task.family, layer, changed))
                    del changed  # or it would live through the next layer
                    position.shapes.append(shape)
                    position.reports.append(report)
                    position.next_layer, position.moved = index + 1, walk.moved
                    position.remember(walk.generator)
                    self.workspace.save(position, walk.streams)
        calibration.meter.calibration_tokens = calibration.tokens.num_tokens
        model = empty_compressed(self.streamed.model, position.shapes)
        return walk.finish(model, position.reports), found

    def complete(self, compressed: Compressed, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write all that makes the layers a checkpoint of the ``compressed`` model.

        These are the tensors outside the layers, the index, the configuration, the modeling file and the tokenizer.
        """
        model, files = compressed.model, self.workspace.directory / "files"
        shutil.rmtree(files, ignore_errors=True)
        with quiet():
            model.save_pretrained(files, state_dict={})
            tokenizer.save_pretrained(files)
        (files / SINGLE).unlink(missing_ok=True)  # holds nothing: the weights are here already
        for path in files.iterdir():
            path.replace(self.workspace.checkpoint / path.name)
        for shard, names in self._outer_shards().items():
            tensors = {name: compressed.outer.get(name, self.streamed.tensor(name)) for name in names}
            for name in compressed.outer.keys() & tensors.keys():
                check_tensor_finite(name, tensors[name])
            self.workspace.write(tensors, shard=shard, num_shards=self._num_shards)
        write_index(self.workspace.checkpoint, model.num_parameters())
        shards, tied = Shards(self.workspace.checkpoint), self.streamed.tied
        expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
        assert expected == {name: shards.shape(name) for name in shards.files}, (
            "the files are not the model that was planned"
        )

    def _begin(self) -> Position:
        position = Position(begun=self.method.begin(self.task))
        assert position.begun is not None
        if position.begun.influence is not None:
            for warning in self.method.foresee(self.task, position.begun.influence):
                self.task.calibration.progress.say(f"warning: {warning}")
        position.remember(self.task.generator())
        self.workspace.save(position, {})
        return position

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
