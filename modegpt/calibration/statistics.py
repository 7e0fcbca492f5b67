"""Which statistics of a layer exist, and how hooks collect them while the layer runs.

Names, shapes and meaning (all unnormalised float64 sums over calibration tokens, unless stated):

=====================  ==============  =========================================================
attention.C_x          (d_h, d_h)      Gram of the attention input (query, key and value projections)
query_key.C_Q          (H, d, d)       Gram per query head of the states entering the product
query_key.C_K          (H_kv, d, d)    the same for keys: after bias, head norm and rotation
value_output.G         (H_kv, d, d)    Gram of the value states, value bias taken off
value_output.A         (H, d, d)       Gram per query head of the output projection's input, value bias taken off
value_output.mean      (H, d)          mean (not sum) of the same input, value bias taken off
value_output.C_o       (H d, H d)      Gram of the output projection's whole input, bias included
mlp.C_x                (d_h, d_h)      Gram of the MLP's input
mlp.C                  (n, n)          Gram of the down projection's input
mlp.mean               (n,)            mean (not sum) of the down projection's input
layer.influence        ()              block influence 1 - mean cos(x_l, x_{l+1})
=====================  ==============  =========================================================
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modegpt.allocation.influence import BlockInfluence
from modegpt.calibration.moments import FirstMoment, SecondMoment
from modegpt.calibration.world import World
from modegpt.decompositions.modules import MLPStatistics, QueryKeyStatistics, ValueOutputStatistics
from modegpt.models import Family

Statistics = dict[str, Tensor]
"""The collected statistics of one layer, by the names above."""

NAMES = frozenset(
    [
        "attention.C_x",
        "query_key.C_Q",
        "query_key.C_K",
        "value_output.G",
        "value_output.A",
        "value_output.mean",
        "value_output.C_o",
        "mlp.C_x",
        "mlp.C",
        "mlp.mean",
        "layer.influence",
    ]
)


UNGROUPED = frozenset({"attention.C_x", "value_output.C_o", "mlp.C_x", "mlp.C"})
"""Gram matrices of a whole activation rather than one a head."""


def rotate(states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
    """Apply the rotary embedding to ``states`` (batch, sequence, heads, d); pairs are (i, i + d/2). None: no rotation."""
    if position_embeddings is None:
        return states
    cos, sin = (table.unsqueeze(-2) for table in position_embeddings)
    size = cos.shape[-1]
    first, second = states[..., :size].chunk(2, dim=-1)
    sin_first, sin_second = sin.chunk(2, dim=-1)
    rotated = (
        states * cos if size == states.shape[-1] else torch.cat((states[..., :size] * cos, states[..., size:]), dim=-1)
    )
    rotated[..., : size // 2] -= second * sin_first
    rotated[..., size // 2 : size] += first * sin_second
    return rotated


@dataclass
class LayerObserver:
    """Collects the statistics ``names`` of one layer while it runs inside ``watching``."""

    family: Family
    layer: nn.Module
    head_dim: int
    names: frozenset[str]
    precision: torch.dtype = torch.float64
    moments: dict[str, SecondMoment | FirstMoment] = field(default_factory=dict)
    num_tokens: int = 0
    influence: BlockInfluence = field(default_factory=BlockInfluence)

    def __post_init__(self) -> None:
        unknown = self.names - NAMES
        assert not unknown, f"unknown statistics {sorted(unknown)}"

    def _second(self, name: str, rows: Tensor) -> None:
        """Add ``rows`` (..., groups, size) to the Gram matrices called ``name``."""
        if name in self.names:
            rows = rows.reshape(-1, *rows.shape[-2:])
            if name not in self.moments:
                self.moments[name] = SecondMoment.zeros(
                    rows.shape[1], rows.shape[2], device=rows.device, precision=self.precision
                )
            self.moments[name].update(rows)

    def _first(self, name: str, rows: Tensor) -> None:
        """Add ``rows`` (..., size) to the sum called ``name``."""
        if name in self.names:
            rows = rows.reshape(-1, rows.shape[-1])
            if name not in self.moments:
                self.moments[name] = FirstMoment.zeros(rows.shape[1], device=rows.device)
            self.moments[name].update(rows)

    @contextmanager
    def watching(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Hook the layer's linears. ``arguments`` are those the layer is called with (for the rotary embedding)."""
        handles = self._hook(arguments.get("position_embeddings"))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, position_embeddings: tuple[Tensor, Tensor] | None) -> list:
        family, layer = self.family, self.layer
        value, output = family.value(layer), family.output(layer)
        b_V = (
            torch.zeros((), device=value.weight.device)
            if value.bias is None
            else value.bias.unflatten(-1, (-1, self.head_dim))
        )

        def heads(states: Tensor) -> Tensor:
            return states.unflatten(-1, (-1, self.head_dim))

        def on_input(module: nn.Module, tap: Callable[[Tensor], None]):
            return module.register_forward_pre_hook(lambda _, args: tap(args[0]))

        def on_output(module: nn.Module, tap: Callable[[Tensor], None]):
            return module.register_forward_hook(lambda _, __, out: tap(out))

        def query_states(out: Tensor) -> None:
            self._second("query_key.C_Q", rotate(family.normalise_query(layer, heads(out)), position_embeddings))

        def key_states(out: Tensor) -> None:
            self._second("query_key.C_K", rotate(family.normalise_key(layer, heads(out)), position_embeddings))

        def attention_output(x: Tensor) -> None:
            self._second("value_output.C_o", x.unsqueeze(-2))
            states = heads(x)
            if b_V.ndim:
                states = states - b_V.repeat_interleave(states.shape[-2] // b_V.shape[0], dim=0)
            self._second("value_output.A", states)
            self._first("value_output.mean", states.flatten(-2))

        def mlp_hidden(x: Tensor) -> None:
            self._second("mlp.C", x.unsqueeze(-2))
            self._first("mlp.mean", x)

        wanted = {
            ("attention.C_x",): lambda: on_input(
                family.query(layer), lambda x: self._second("attention.C_x", x.unsqueeze(-2))
            ),
            ("query_key.C_Q",): lambda: on_output(family.query(layer), query_states),
            ("query_key.C_K",): lambda: on_output(family.key(layer), key_states),
            ("value_output.G",): lambda: on_output(
                value, lambda out: self._second("value_output.G", heads(out) - b_V if b_V.ndim else heads(out))
            ),
            ("value_output.A", "value_output.mean", "value_output.C_o"): lambda: on_input(output, attention_output),
            ("mlp.C_x",): lambda: on_input(family.up(layer), lambda x: self._second("mlp.C_x", x.unsqueeze(-2))),
            ("mlp.C", "mlp.mean"): lambda: on_input(family.down(layer), mlp_hidden),
        }
        return [hook() for names, hook in wanted.items() if self.names.intersection(names)]

    def residual(self, x_in: Tensor, x_out: Tensor) -> None:
        """See one batch of the residual stream, (batch, sequence, d_h), entering and leaving the layer."""
        self.num_tokens += x_in.shape[:-1].numel()
        if "layer.influence" in self.names:
            self.influence.update(x_in, x_out)

    def pool(self, world: World) -> None:
        """Make the sums those over the tokens of all processes."""
        counts = torch.tensor(
            [self.num_tokens, self.influence.num_tokens, self.influence.total],
            dtype=torch.float64,
            device=next(self.layer.parameters()).device,
        )
        world.pool([*(moment.sums for _, moment in sorted(self.moments.items())), counts])
        self.num_tokens, self.influence.num_tokens, self.influence.total = (
            int(counts[0]),
            int(counts[1]),
            float(counts[2]),
        )

    def result(self) -> Statistics:
        """The collected statistics, on the layer's device."""
        statistics: Statistics = {}
        for name, moment in self.moments.items():
            value = moment.value
            if name.endswith(".mean"):
                value = value / self.num_tokens
            elif name in UNGROUPED:
                value = value.squeeze(0)
            statistics[name] = value
        if "value_output.mean" in statistics:
            statistics["value_output.mean"] = statistics["value_output.mean"].unflatten(-1, (-1, self.head_dim))
        if "layer.influence" in self.names:
            statistics["layer.influence"] = torch.tensor(self.influence.value(), dtype=torch.float64)
        missing = self.names - statistics.keys()
        assert not missing, f"hooks saw nothing for {sorted(missing)}"
        return statistics


def mlp_statistics(statistics: Statistics, num_tokens: int) -> MLPStatistics:
    """What an MLP variant reads; fields that were not collected are None."""
    return MLPStatistics(
        C=statistics.get("mlp.C"), mean=statistics.get("mlp.mean"), C_x=statistics.get("mlp.C_x"), num_tokens=num_tokens
    )


def query_key_statistics(statistics: Statistics, num_tokens: int) -> QueryKeyStatistics:
    """What a query-key variant reads; fields that were not collected are None."""
    return QueryKeyStatistics(
        C_Q=statistics.get("query_key.C_Q"),
        C_K=statistics.get("query_key.C_K"),
        C_x=statistics.get("attention.C_x"),
        num_tokens=num_tokens,
    )


def value_output_statistics(statistics: Statistics, num_tokens: int) -> ValueOutputStatistics:
    """What a value-output variant reads; fields that were not collected are None."""
    return ValueOutputStatistics(
        G=statistics.get("value_output.G"),
        A=statistics.get("value_output.A"),
        C_x=statistics.get("attention.C_x"),
        num_tokens=num_tokens,
    )
