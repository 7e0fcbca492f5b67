"""Which statistics of a layer exist, and how hooks collect them while the layer runs.

A new statistic is one entry of ``STATISTICS``; a decomposition that reads it names it in ``required``.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from modegpt.allocation.influence import BlockInfluence
from modegpt.calibration.moments import FirstMoment, SecondMoment, beside
from modegpt.calibration.world import World
from modegpt.decompositions.head_norm import norm_shares
from modegpt.decompositions.modules import HeadNorm, Sizes
from modegpt.models import Family, dense_shape, family_of
from modegpt.models.weights import key_norm, normalised_heads, query_norm

Statistics = dict[str, Tensor]
"""The collected statistics of one layer, by their names in ``STATISTICS``."""


def rotate(states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
    """Apply the rotary embedding to ``states`` (batch, sequence, heads, d).

    Pairs are (i, i + d/2). None: no rotation.
    """
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


def head_states(observer: "LayerObserver", states: Tensor) -> Tensor:
    """(..., heads d) to (..., heads, d)."""
    return states.unflatten(-1, (-1, observer.head_dim))


def query_states(observer: "LayerObserver", states: Tensor) -> Tensor:
    """Queries as they enter the product: after bias, head norm and rotation."""
    return observer.rotated(observer.family.query_norm_path, head_states(observer, states))


def key_states(observer: "LayerObserver", states: Tensor) -> Tensor:
    """Keys as they enter the product: after bias, head norm and rotation."""
    return observer.rotated(observer.family.key_norm_path, head_states(observer, states))


def query_shares(observer: "LayerObserver", states: Tensor) -> Tensor:
    """What each pair of a query head adds to the mean square in its norm, see ``decompositions/head_norm.py``."""
    return _shares(query_norm(observer.family, observer.layer), head_states(observer, states))


def key_shares(observer: "LayerObserver", states: Tensor) -> Tensor:
    """The same of key heads."""
    return _shares(key_norm(observer.family, observer.layer), head_states(observer, states))


def _shares(norm: HeadNorm | None, states: Tensor) -> Tensor:
    assert norm is not None, "only head norms have shares"
    return norm_shares(states, norm)


def unbiased_states(observer: "LayerObserver", states: Tensor) -> Tensor:
    """Values, or values mixed by attention, (..., heads, d): the value bias of each head taken off."""
    states = head_states(observer, states)
    bias = observer.family.value(observer.layer).bias
    if bias is None:
        return states
    b_V = head_states(observer, bias)
    return states - b_V.repeat_interleave(states.shape[-2] // len(b_V), dim=0)


def whole(observer: "LayerObserver", states: Tensor) -> Tensor:
    """What passes, as it is."""
    return states


def squared(observer: "LayerObserver", states: Tensor) -> Tensor:
    """The square of every element; of half-precision states in float32, where it is exact."""
    return states.to(torch.promote_types(states.dtype, torch.float32)).square()


def squared_unbiased_states(observer: "LayerObserver", states: Tensor) -> Tensor:
    """The square of every element of ``unbiased_states``."""
    return squared(observer, unbiased_states(observer, states))


@dataclass(frozen=True)
class Statistic:
    """One statistic of a layer.

    Args:
        shape: in the letters of ``Sizes``, products spelled with a space. Where the last letter comes twice the
            statistic is a Gram matrix, or one a head: an unnormalised float64 sum over tokens. Else it is a mean.
        linear: the role in ``Family`` of the linear map at which it is taken; None: it is taken at the residual stream,
            or at every expert.
        side: whether the map's input or output is looked at.
        rows: from what passes there to what is summed.
    """

    shape: tuple[str, ...]
    linear: str | None = None
    side: str = "input"
    rows: Callable[["LayerObserver", Tensor], Tensor] = whole

    @property
    def is_gram(self) -> bool:
        """Whether it is a second moment."""
        return len(self.shape) > 1 and self.shape[-1] == self.shape[-2]

    def num_elements(self, sizes: Sizes) -> int:
        """Its elements in a layer of these sizes."""
        return math.prod(getattr(sizes, letter) for side in self.shape for letter in side.split())


STATISTICS: dict[str, Statistic] = {
    # the attention's input: what query, key and value projections read
    "attention.C_x": Statistic(("d_h", "d_h"), "query"),
    # the two sides of the product, by query and by key head
    "query_key.C_Q": Statistic(("H", "d", "d"), "query", "output", query_states),
    "query_key.C_K": Statistic(("H_kv", "d", "d"), "key", "output", key_states),
    "query_key.mean_K": Statistic(("H_kv", "d"), "key", "output", key_states),
    # where the family has norms of heads: what pairs contribute to them
    "query_key.N_Q": Statistic(("G_Q", "F_Q", "F_Q"), "query", "output", query_shares),
    "query_key.N_K": Statistic(("G_K", "F_K", "F_K"), "key", "output", key_shares),
    # the values, and what the output projection reads of them
    "value_output.G": Statistic(("H_kv", "d", "d"), "value", "output", unbiased_states),
    "value_output.A": Statistic(("H", "d", "d"), "output", "input", unbiased_states),
    "value_output.mean": Statistic(("H", "d"), "output", "input", unbiased_states),
    "value_output.mean_square": Statistic(("H", "d"), "output", "input", squared_unbiased_states),
    # the output projection's whole input, bias included
    "value_output.C_o": Statistic(("H d", "H d"), "output"),
    # the MLP's input, and the down projection's
    "mlp.C_x": Statistic(("d_h", "d_h"), "up"),
    "mlp.C": Statistic(("n", "n"), "down"),
    "mlp.mean": Statistic(("n",), "down"),
    "mlp.mean_square": Statistic(("n",), "down", "input", squared),
    # what each expert reads, and its down projection: the tokens that it sees, here as they enter the sum, and their
    # share of all; means count the tokens that it does not see as zeros
    "experts.C_x": Statistic(("E", "d_h", "d_h"), None),
    "experts.C": Statistic(("E", "n", "n"), None),
    "experts.mean": Statistic(("E", "n"), None),
    "experts.mean_square": Statistic(("E", "n"), None, "input", squared),
    "experts.share": Statistic(("E",), None),
    # block influence 1 - mean cos(x_l, x_{l+1}), and how many tokens all of these are over
    "layer.influence": Statistic(()),
    "layer.num_tokens": Statistic(()),
}
"""Every statistic that a layer can be asked for."""


def sizes_of(config: PreTrainedConfig) -> Sizes:
    """The letters of a layer of a dense model."""
    shape = dense_shape(config)
    return Sizes(
        d_h=config.hidden_size,
        n=shape.intermediate_size,
        H=config.num_attention_heads,
        H_kv=shape.num_kv_heads,
        d=shape.qk_head_dim,
        joint_norms=family_of(config).joint_norms,
        E=getattr(config, "num_experts", 1),
    )


@dataclass
class LayerObserver:
    """Collects the statistics ``names`` of one layer while it runs inside ``watching``.

    ``stream``: of a GPU, where sums are formed beside the forward; None: in line with it. The numbers are the same.
    """

    family: Family
    layer: nn.Module
    head_dim: int
    names: frozenset[str]
    precision: torch.dtype = torch.float64
    stream: torch.cuda.Stream | None = None
    moments: dict[str, SecondMoment | FirstMoment] = field(default_factory=dict)
    num_tokens: int = 0
    influence: BlockInfluence = field(default_factory=BlockInfluence)
    position_embeddings: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        unknown = self.names - STATISTICS.keys()
        assert not unknown, f"unknown statistics {sorted(unknown)}"

    def rotated(self, norm_path: str | None, states: Tensor) -> Tensor:
        """``states`` (..., heads, d) after the norm at ``norm_path``, if there is one, and the layer's rotation."""
        states = normalised_heads(self.family, self.layer, norm_path, states)
        return rotate(states, self.position_embeddings if self.family.rotates(self.layer) else None)

    @contextmanager
    def watching(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Hook the layer's linears. ``arguments`` are those the layer is called with (for the rotary embedding)."""
        self.position_embeddings = arguments.get("position_embeddings")
        handles = [
            self._hook(name, statistic, statistic.linear)
            for name, statistic in STATISTICS.items()
            if name in self.names and statistic.linear is not None
        ]
        if any(name.startswith("experts.") for name in self.names):
            handles += self._hook_experts()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if self.stream is not None:
                torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def _hook(self, name: str, statistic: Statistic, role: str) -> RemovableHandle:
        linear: nn.Linear = getattr(self.family, role)(self.layer)
        if statistic.side == "input":
            return linear.register_forward_pre_hook(lambda _, args: self._add(name, statistic, args[0]))
        return linear.register_forward_hook(lambda _, __, out: self._add(name, statistic, out))

    def _hook_experts(self) -> list[RemovableHandle]:
        experts, downs = self.family.experts(self.layer), self.family.downs(self.layer)
        count, device = len(downs), downs[0].weight.device
        for name, size in (("experts.C_x", downs[0].out_features), ("experts.C", downs[0].in_features)):
            if name in self.names and name not in self.moments:
                self.moments[name] = SecondMoment.zeros(count, size, device=device, precision=self.precision)
        means = [name for name in ("experts.mean", "experts.mean_square") if name in self.names]
        for name in means:
            self.moments.setdefault(name, FirstMoment.zeros(count, downs[0].in_features, device=device))
        share = self.moments.setdefault("experts.share", FirstMoment.zeros(count, device=device))

        def add(name: str, index: int, rows: Tensor) -> None:
            if name in self.moments:
                with beside(self.stream, rows):
                    of_one = self.moments[name].sums[index : index + 1]
                    SecondMoment(of_one, self.precision).update(rows.unsqueeze(1))

        def read(index: int, rows: Tensor) -> None:
            share.sums[index] += len(rows)
            add("experts.C_x", index, rows)

        def reduced(index: int, rows: Tensor) -> None:
            add("experts.C", index, rows)
            for name in means:
                with beside(self.stream, rows):
                    FirstMoment(self.moments[name].sums[index]).update(STATISTICS[name].rows(self, rows))

        return [
            *(
                expert.register_forward_pre_hook(lambda _, args, index=index: read(index, args[0]))
                for index, expert in enumerate(experts)
            ),
            *(
                down.register_forward_pre_hook(lambda _, args, index=index: reduced(index, args[0]))
                for index, down in enumerate(downs)
            ),
        ]

    def _add(self, name: str, statistic: Statistic, states: Tensor) -> None:
        """Add the rows of ``states`` to the sum called ``name``."""
        rows = statistic.rows(self, states)
        size = rows.shape[-(len(statistic.shape) - statistic.is_gram) :]
        rows = rows.reshape(-1, *size)
        if statistic.is_gram and len(size) == 1:
            rows = rows.unsqueeze(1)
        if name not in self.moments:
            self.moments[name] = (
                SecondMoment.zeros(*rows.shape[1:], device=rows.device, precision=self.precision)
                if statistic.is_gram
                else FirstMoment.zeros(*size, device=rows.device)
            )
        with beside(self.stream, rows):
            self.moments[name].update(rows)

    def residual(self, x_in: Tensor, x_out: Tensor) -> None:
        """See one batch of the residual stream, (batch, sequence, d_h), entering and leaving the layer."""
        self.num_tokens += x_in.shape[:-1].numel()
        if "layer.influence" in self.names:
            self.influence.update(x_in, x_out)

    def pool(self, world: World, *, num_batches: int) -> None:
        """Make the sums those over the tokens of all processes, which have ``num_batches`` batches."""
        if world.size == 1:
            return
        counts = torch.zeros(2 + num_batches, dtype=torch.float64)
        counts[:2] = torch.tensor([self.num_tokens, self.influence.num_tokens])
        counts[2:][world.rank :: world.size][: len(self.influence.totals)] = torch.tensor(
            self.influence.totals, dtype=torch.float64
        )
        counts = counts.to(next(self.layer.parameters()).device)
        world.pool([*(moment.sums for _, moment in sorted(self.moments.items())), counts])
        self.num_tokens, self.influence.num_tokens = map(int, counts[:2])
        self.influence.totals = counts[2:].tolist()

    def result(self) -> Statistics:
        """The collected statistics, on the layer's device."""
        statistics: Statistics = {}
        for name, moment in self.moments.items():
            if isinstance(moment, FirstMoment):
                statistics[name] = moment.value / self.num_tokens
            else:
                statistics[name] = moment.value if len(STATISTICS[name].shape) > 2 else moment.value.squeeze(0)
        if "layer.influence" in self.names:
            statistics["layer.influence"] = torch.tensor(self.influence.value(), dtype=torch.float64)
        if "layer.num_tokens" in self.names:
            statistics["layer.num_tokens"] = torch.tensor(self.num_tokens)
        missing = self.names - statistics.keys()
        assert not missing, f"hooks saw nothing for {sorted(missing)}"
        return statistics
