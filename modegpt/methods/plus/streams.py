"""The dense and the compressed residual stream in front of one layer, and what runs of the layer show on the way."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modegpt.calibration.stream import HiddenStates
from modegpt.calibration.world import ALONE, World
from modegpt.cost.work import Alike
from modegpt.methods.divergence import StandIns, acting_as
from modegpt.models import Family

HELD_OUT_EVERY = 4
"""Every fourth calibration window is held out: ridges and selections are chosen on it, then solved on all."""

Tap = tuple[nn.Module, str]
"""A module and ``"output"`` or one of ``ARGUMENTS``."""

Known = Callable[[int], StandIns]
"""By the number of a batch, modules that return what is known of it, so that they do not run again."""

ARGUMENTS = {"input": 0, "experts": 1, "shares": 2}
"""Arguments of a module, by place. All experts together have the latter two: those of each token, and their shares."""


class _Seen(Exception):
    """The last tap has fired: the rest of the layer is not needed."""


@dataclass(frozen=True)
class Observation:
    """One batch: its number, the layer's input and output, and what each tap saw, all (batch, sequence, features).

    ``output`` is None where the run stopped early.
    """

    batch: int
    x: Tensor
    seen: dict[str, Tensor]
    output: Tensor | None


@torch.no_grad()
def observe(
    layer: nn.Module,
    index: int,
    hidden: HiddenStates,
    taps: Mapping[str, Tap],
    *,
    stop: bool,
    known: Sequence[Known] = (),
) -> Iterator[Observation]:
    """Run ``layer`` (number ``index``) on every batch of ``hidden``, which stays as it is.

    Args:
        stop: only until every tap has fired.
        known: what does not run again.
    """
    alike = Alike()
    for b, x in enumerate(hidden.batches):
        seen: dict[str, Tensor] = {}
        with _tapped(taps, seen, stop), acting_as([stand_in for each in known for stand_in in each(b)]):
            try:
                with alike.forward(x.shape):
                    output = layer(x, **hidden.layer_arguments(index, x))
            except _Seen:
                output = None
        yield Observation(b, x, {name: value.reshape(*x.shape[:2], -1) for name, value in seen.items()}, output)


def known_attention(family: Family, layer: nn.Module, outputs: Sequence[Tensor]) -> Known:
    """What the attention of ``layer`` returns of each batch, (batch, sequence, d_h)."""

    def stand_ins(batch: int) -> StandIns:
        states = outputs[batch]
        return [(family.attention(layer), lambda *_, **__: (states, None))]

    return stand_ins


def known_mlp(family: Family, layer: nn.Module, outputs: Sequence[Tensor]) -> Known:
    """What the down projection of ``layer`` returns of each batch, (batch, sequence, d_h); its input is not made."""
    readers = [layer.get_submodule(path) for path in (family.gate_path, family.up_path) if path]

    def stand_ins(batch: int) -> StandIns:
        states = outputs[batch]
        down = (family.down(layer), lambda h: states.reshape(*h.shape[:-1], -1))
        return [down, *((reader, lambda x: x[..., :1]) for reader in readers)]

    return stand_ins


@contextmanager
def _tapped(taps: Mapping[str, Tap], seen: dict[str, Tensor], stop: bool) -> Iterator[None]:
    def keep(name: str, value: Tensor) -> None:
        seen[name] = value
        if stop and len(seen) == len(taps):
            raise _Seen

    def hook(name: str, module: nn.Module, side: str) -> RemovableHandle:
        if side == "output":
            return module.register_forward_hook(lambda _, __, out: keep(name, out))
        return module.register_forward_pre_hook(lambda _, args: keep(name, args[ARGUMENTS[side]]))

    handles = [hook(name, *tap) for name, tap in taps.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Split:
    """Which calibration tokens are held out: whole windows, or the end of the only one.

    Args:
        held: one mask (batch, sequence) a batch, of all processes.
        world: these processes, which have the batches by turns; each goes by the numbers of its own.
    """

    held: list[Tensor]
    world: World = ALONE

    @classmethod
    def of(cls, ids: Tensor, *, batch_size: int, world: World = ALONE) -> "Split":
        """Every ``HELD_OUT_EVERY``-th window of ``ids`` (windows, length) is held out."""
        held = torch.zeros(ids.shape, dtype=torch.bool)
        if len(ids) > 1:
            held[min(HELD_OUT_EVERY, len(ids)) - 1 :: HELD_OUT_EVERY] = True
        else:
            held[:, -(-ids.shape[1] * (HELD_OUT_EVERY - 1) // HELD_OUT_EVERY) :] = True
        return cls(list(held.split(batch_size)), world)

    def number(self, batch: int) -> int | None:
        """Of all batches, which this process's is; None for one that is there for evenness and counts for nothing."""
        number = self.world.rank + batch * self.world.size
        return number if number < len(self.held) else None

    def counting(self, batch: int, rows: Tensor) -> Tensor:
        """``rows`` (batch, ...), or none of them where the batch counts for nothing."""
        return rows[:0] if self.number(batch) is None else rows

    def parts(
        self, batch: int, *rows: Tensor, tokens: Tensor | None = None
    ) -> Iterator[tuple[bool, tuple[Tensor, ...]]]:
        """For both parts, whether it is held out, and its (rows, features) of (batch, sequence, features) tensors.

        A part without rows is left out, unless other processes may have some. tokens: where in the batch the rows of
        (t, features) tensors are from, (t,), if these are not of all tokens.
        """
        number = self.number(batch)
        held = self.held[number or 0]
        if tokens is not None:
            held = held.flatten()[tokens.to(held.device)]
        elif (held.all(dim=1) == held.any(dim=1)).all():
            held = held[:, 0]  # whole windows, which copy faster than rows
        for part in (False, True):
            index = ((held == part) & (number is not None)).to(rows[0].device)
            if self.world.size > 1 or index.any():
                yield part, tuple(tensor[index].reshape(-1, tensor.shape[-1]) for tensor in rows)

    def first(self, num_windows: int) -> list[tuple[Tensor, Tensor]]:
        """Of each batch, of all processes, until there are ``num_windows`` windows to fit on: these, and those held
        out, at most as many.

        The only window, which both parts share, is in either.
        """
        left, found = [num_windows] * 2, []
        for held in self.held:
            fit, check = ((held == part).any(dim=1).nonzero().squeeze(1)[: left[part]] for part in (False, True))
            found.append((fit, check))
            left = [left[False] - len(fit), left[True] - len(check)]
            if not left[False]:
                break
        return found
