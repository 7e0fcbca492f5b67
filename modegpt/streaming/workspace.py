"""The folder beside a checkpoint's destination in which it is made: what is finished survives a kill at any moment."""

import fcntl
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modegpt.allocation.ranks import RankPlan
from modegpt.calibration.stream import HiddenStates
from modegpt.calibration.world import ALONE, World
from modegpt.errors import UserError
from modegpt.files import read_json, write_text
from modegpt.methods.base import Begun
from modegpt.models import LayerShape
from modegpt.streaming.hidden import DiskBatches, write_batch
from modegpt.streaming.shards import shard_name, write_shard

POSITION, SETTINGS, LOCK = "position.json", "settings.json", "lock"
KEY_DIGITS = 12


@dataclass
class Position:
    """How far a compression is: layers before ``next_layer`` are written, the hidden states in front of it are on disk.

    ``begun`` is what the method decided before the first; ``generator`` is the state (hex) of the random generator
    after those layers, and ``moved`` whether the method changed one.
    """

    next_layer: int = 0
    begun: Begun | None = None
    generator: str = ""
    moved: bool = False
    shapes: list[LayerShape] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)

    def remember(self, generator: torch.Generator) -> None:
        """Keep the state of ``generator``."""
        self.generator = generator.get_state().numpy().tobytes().hex()

    def restore(self, generator: torch.Generator) -> None:
        """Put ``generator`` into the state that was kept."""
        generator.set_state(torch.frombuffer(bytearray.fromhex(self.generator), dtype=torch.uint8))


class Workspace:
    """``<destination>.partial-<key>``: the growing checkpoint, the hidden states and the position of one run.

    The key is the hash of everything that decides the result, so runs with other settings never meet. One run at a time
    holds it; the lock goes with the process, however that ends. Of several processes of a ``world`` each has hidden
    states of its own, and the first one writes all else.

    Raises:
        UserError: another process works there, or the folder is another run's.
    """

    def __init__(self, destination: Path, key: str, settings: Mapping[str, Any], world: World = ALONE) -> None:
        self.destination, self.world, self._own = destination, world, f"-{world.rank}" if world.rank else ""
        self.directory = destination.with_name(f"{destination.name}.partial-{key[:KEY_DIGITS]}")
        self.checkpoint = self.directory / "checkpoint"
        self.checkpoint.mkdir(parents=True, exist_ok=True)
        self._lock = (self.directory / f"{LOCK}{self._own}").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is making this checkpoint in {self.directory}") from None
        text = json.dumps({"key": key, **settings}, indent=1, sort_keys=True) + "\n"
        known = self.directory / SETTINGS
        if known.is_file() and known.read_text(encoding="utf-8") != text:
            raise UserError(f"{self.directory} holds the work of a run with other settings; remove it")
        if world.leads:
            write_text(known, text)

    def others(self) -> list[Path]:
        """Partial folders of the same destination that other settings left."""
        return sorted(
            path for path in self.directory.parent.glob(f"{self.destination.name}.partial-*") if path != self.directory
        )

    def position(self) -> Position | None:
        """Where an earlier process got to, as the first one finds it; None at the beginning."""
        return self.world.told(self._position() if self.world.leads else None)

    def _position(self) -> Position | None:
        path = self.directory / POSITION
        if not path.is_file():
            return None
        stored = read_json(path)
        shapes = [
            LayerShape(**{**shape, "extra_biases": tuple(shape["extra_biases"])}) for shape in stored.pop("shapes")
        ]
        begun = stored.pop("begun")
        if begun is not None:
            begun = Begun(plan=RankPlan(**begun["plan"]), influence=begun["influence"])
        return Position(shapes=shapes, begun=begun, **stored)

    @property
    def passing(self) -> Path:
        """Where hidden states lie that no later process needs."""
        return self.directory / f"passing{self._own}"

    def hidden(self, layer: int) -> Path:
        """Where the hidden states in front of ``layer`` lie."""
        return self.directory / f"hidden{self._own}" / f"{layer:05d}"

    def restore(self, streams: Mapping[str, HiddenStates], layer: int) -> None:
        """Put into ``streams``, by name, the hidden states in front of ``layer`` that an earlier process left."""
        for name, hidden in streams.items():
            device, num_batches = hidden.batches[0].device, len(hidden.batches)
            batches = DiskBatches(self.hidden(layer) / name, device, num_batches=num_batches)
            hidden.batches = batches.as_list() if isinstance(hidden.batches, DiskBatches) else list(batches)

    def begin_layer(self, streams: Mapping[str, HiddenStates], index: int) -> None:
        """Where batches are on disk, let layer ``index`` write its output apart from its input."""
        for stale in (self.hidden(index - 1), self.hidden(index + 1)):  # done with, and begun by a killed process
            shutil.rmtree(stale, ignore_errors=True)
        for name, hidden in streams.items():
            if isinstance(hidden.batches, DiskBatches):
                hidden.batches = hidden.batches.turned(self.hidden(index + 1) / name).as_list()

    def save(self, position: Position, hidden: Mapping[str, HiddenStates]) -> None:
        """Keep ``hidden``, by name, and then ``position``, after which earlier hidden states go."""
        place = self.hidden(position.next_layer)
        for name, stream in hidden.items():
            if not isinstance(stream.batches, DiskBatches):
                (place / name).mkdir(parents=True, exist_ok=True)
                for index, batch in enumerate(stream.batches):
                    write_batch(place / name, index, batch)
        self.world.meet()
        if self.world.leads:
            write_text(self.directory / POSITION, json.dumps(asdict(position)))
        self.world.meet()
        needed = [place / name for name in hidden]
        for path in self.directory.glob(f"hidden{self._own}/*/*"):
            if path not in needed:
                shutil.rmtree(path)
        for folder in self.directory.glob(f"hidden{self._own}/*"):
            if not any(folder.iterdir()):
                folder.rmdir()

    def write(self, tensors: Mapping[str, Tensor], *, shard: int, num_shards: int) -> None:
        """Write one shard of the checkpoint."""
        if self.world.leads:
            write_shard(tensors, self.checkpoint / shard_name(shard, num_shards))

    def remove(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self.directory)
        self._lock.close()
