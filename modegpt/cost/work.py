"""FLOPs and bytes: of any block of code by watching it run, and of a model's forward by formula."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel

from modegpt.models import decoder_layers, family_of
from modegpt.models.shapes import layer_shapes

aten = torch.ops.aten
Account = tuple[str, torch.dtype, float, float]
"""Kind, precision, FLOPs and bytes."""


class Add(Protocol):
    """What takes an account of work, such as ``Stage.add``."""

    def __call__(self, kind: str, dtype: torch.dtype, *, flops: float, bytes: float = 0.0) -> None:
        """Count ``flops`` of one kind in one precision, and the ``bytes`` they read and write."""


@dataclass(frozen=True)
class ForwardCost:
    """What a batch of equally long sequences costs in a stack of decoder layers.

    Args:
        num_weights: entries of the linear maps.
        num_columns: inputs and outputs of the linear maps, summed.
        attention_columns: query (= key) and value columns over all query heads, summed over layers.
        dtype: of weights and activations.
    """

    num_weights: int
    num_columns: int
    attention_columns: int
    dtype: torch.dtype

    def flops(self, num_sequences: int, length: int) -> float:
        """Linears: 2 per weight and token; attention: query-key and value products over the causal half."""
        return (
            2.0 * self.num_weights * num_sequences * length + float(self.attention_columns) * num_sequences * length**2
        )

    def bytes(self, num_sequences: int, length: int) -> float:
        """Weights once, inputs and outputs of the linear maps once: norms and activations count as fused into them."""
        return float(self.dtype.itemsize) * (self.num_weights + self.num_columns * num_sequences * length)


def forward_cost(model: PreTrainedModel) -> ForwardCost:
    """The cost of all decoder layers of ``model``, dense or compressed; embeddings and head are not in it."""
    config = model.config
    group = config.num_attention_heads // getattr(config, "num_key_value_heads", config.num_attention_heads)
    attention_columns = sum(
        shape.num_kv_heads * group * (shape.qk_head_dim + shape.v_head_dim) for shape in layer_shapes(config)
    )
    family = family_of(config)
    experts_path, share = family.experts_path, family.seen_share(config)
    # the maps, each with the share of the tokens that it sees
    linears = [
        (module, share if experts_path is not None and f".{experts_path}." in name else 1.0)
        for name, module in decoder_layers(model).named_modules()
        if isinstance(module, nn.Linear)
    ]
    idle = sum((1 - seen) * linear.in_features * linear.out_features for linear, seen in linears)
    return ForwardCost(
        num_weights=sum(each.numel() for each in decoder_layers(model).parameters() if each.ndim >= 2) - round(idle),
        num_columns=round(sum(seen * (linear.in_features + linear.out_features) for linear, seen in linears)),
        attention_columns=attention_columns,
        dtype=model.dtype,
    )


@contextmanager
def metered_forwards(model: PreTrainedModel, add: Add) -> Iterator[None]:
    """Report to ``add`` what every forward of ``model`` costs inside the block, head and padding included, by formula.

    For scoring, which is little but forwards: to watch each of their operations takes 2 to 6 % of a small model's time.
    """
    cost, head = forward_cost(model), model.get_output_embeddings()

    def on_model(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        add("forward", cost.dtype, flops=cost.flops(*ids.shape), bytes=cost.bytes(*ids.shape))

    def on_head(module: nn.Linear, args: tuple[Tensor]) -> None:
        rows, columns = args[0].shape[:-1].numel(), sum(module.weight.shape)
        add(
            "forward",
            cost.dtype,
            flops=2.0 * rows * module.weight.numel(),
            bytes=cost.dtype.itemsize * float(module.weight.numel() + rows * columns),
        )

    handles = [model.register_forward_pre_hook(on_model, with_kwargs=True), head.register_forward_pre_hook(on_head)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cubic(factor: float) -> Callable[..., float]:
    def flops(A: Tensor, *_: Any, **__: Any) -> float:
        *batch, rows, columns = A.shape
        return factor * math.prod(batch) * max(rows, columns) * min(rows, columns) ** 2

    return flops


def _triangular(A: Tensor, B: Tensor, **_: Any) -> float:
    return float(B.numel() * A.shape[-1])


def _product(*args: Any, **_: Any) -> float:
    A, B = _operands(args)
    return 2.0 * A.numel() * B.shape[-1]


def _linear(x: Tensor, W: Tensor, *_: Any) -> float:
    return 2.0 * x.numel() * len(W)


def _operands(args: tuple) -> tuple[Tensor, Tensor]:
    """A (..., m, k) and B (..., k, n) of a product; a third tensor, before them, is what it is added to."""
    A, B = [leaf for leaf in args if isinstance(leaf, Tensor)][-2:]
    return A, B


def _causal(square: Callable[..., int], num_operands: int) -> Callable[..., float]:
    """Half of what the whole ``square`` of queries and keys takes: a decoder's attention skips the rest.

    Keys and values of fewer heads count as repeated, which ``square`` knows in newer versions of PyTorch only.
    """

    def flops(*args: Any, **_: Any) -> float:
        num_heads = args[0].shape[1]
        return (
            square(*((batch, num_heads, *rest) for batch, _, *rest in (arg.shape for arg in args[:num_operands]))) / 2
        )

    return flops


FACTORISATIONS: dict[Any, Callable[..., float]] = {
    aten.linalg_cholesky_ex: _cubic(1 / 3),
    aten.cholesky_inverse: _cubic(2 / 3),
    aten.cholesky_solve: lambda B, L, *_, **__: 2.0 * B.numel() * L.shape[-1],
    aten.linalg_solve_triangular: _triangular,
    aten.linalg_inv_ex: _cubic(2),
    aten._linalg_solve_ex: lambda A, B, **_: _cubic(2 / 3)(A) + 2.0 * B.numel() * A.shape[-1],
    aten.linalg_lu_factor_ex: _cubic(2 / 3),
    aten.linalg_qr: _cubic(4),
    aten._linalg_eigh: _cubic(9),
    aten._linalg_svd: _cubic(20),
}
"""FLOPs of LAPACK's work. Exact to leading order down to the LU; about right (Golub and Van Loan, vectors included) for
what iterates."""

PRODUCTS: dict[Any, Callable[..., float]] = dict.fromkeys(
    (aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_), _product
)
"""All products of matrices, to which PyTorch reduces its other functions."""

ATTENTION: dict[Any, Callable[..., float]] = {
    getattr(aten, f"_scaled_dot_product_{kernel}_attention{device}{suffix}"): _causal(square, num_operands)
    for kernel, device in (("flash", "_for_cpu"), ("flash", ""), ("efficient", ""), ("cudnn", ""))
    for suffix, square, num_operands in (("", sdpa_flop_count, 3), ("_backward", sdpa_backward_flop_count, 4))
}
"""Fused attention, forward and backward."""


WORK = ("mm", "matmul", "linear", "einsum", "attention", "linalg_", "cholesky", "backward")
"""What the names of PyTorch's functions have in them that may form products or factorise."""


class WorkCounter(TorchFunctionMode):
    """While it is entered, reports to ``add`` FLOPs of products and factorisations, and the bytes they read and write.

    A product of a tensor with itself is of the kind ``gram``, any other inside ``forward`` of the kind ``forward``, and
    else a ``product``; what LAPACK does is a ``factorisation``. Other operations count as fused into these. To pass one
    over takes some microseconds; to see into a function, some for each operation: only ``WORK`` is seen into.
    """

    def __init__(self, add: Add) -> None:
        super().__init__()
        self.operations = _Operations(add)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run ``func``, under watch where it may be work."""
        if func is nn.functional.linear and not kwargs and args[0].ndim > 1:  # most of all work, and known from outside
            result = func(*args)
            self.operations.report("product", _linear, args, result)
            return result
        if not _may_be_work(func):
            return func(*args, **kwargs) if kwargs else func(*args)
        with self.operations:
            return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Every operation inside a function."""

    def __init__(self, add: Add) -> None:
        super().__init__()
        self.add = add
        self.in_forward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        counted = _counted(func)
        if counted is not None:
            self.report(*counted, args, result, **(kwargs or {}))
        return result

    def report(self, kind: str, formula: Callable[..., float], args: tuple, result: Any, **kwargs: Any) -> None:
        """Hand on what one operation took."""
        if kind == "product":
            kind = "gram" if formula is _product and _is_gram(args) else "forward" if self.in_forward else kind
        results = result if isinstance(result, list | tuple) else (result,)
        num_bytes = sum(leaf.nbytes for leaf in (*args, *results) if isinstance(leaf, Tensor))
        dtype = next(leaf.dtype for leaf in args if isinstance(leaf, Tensor))
        self.add(kind, dtype, flops=float(formula(*args, **kwargs)), bytes=num_bytes)

    @contextmanager
    def written_down(self) -> Iterator[list[Account]]:
        """All that is handed on inside, as a list too."""
        add, accounts = self.add, []

        def both(kind: str, dtype: torch.dtype, *, flops: float, bytes: float = 0.0) -> None:
            add(kind, dtype, flops=flops, bytes=bytes)
            accounts.append((kind, dtype, flops, bytes))

        self.add = both
        try:
            yield accounts
        finally:
            self.add = add


@contextmanager
def forward() -> Iterator[None]:
    """A model, or a layer, runs inside: its products are of the kind ``forward``."""
    operations = [counter.operations for counter in _counters()]
    before = [each.in_forward for each in operations]
    for each in operations:
        each.in_forward = True
    try:
        yield
    finally:
        for each, flag in zip(operations, before, strict=True):
            each.in_forward = flag


class Alike:
    """Forwards of one layer, or model, that do the same work on every input of a shape, hooks included.

    The first of each shape is watched, and the others count as it did: nothing looks at what they do.
    """

    def __init__(self) -> None:
        self.accounts: dict[tuple[int, ...], list[Account]] = {}

    @contextmanager
    def forward(self, shape: tuple[int, ...]) -> Iterator[None]:
        """As ``forward``; one on inputs of ``shape``."""
        counters = _counters()
        if not counters:
            yield
        elif shape in self.accounts and len(counters) == len(_get_current_function_mode_stack()) == 1:
            [counter] = counters
            for kind, dtype, flops, num_bytes in self.accounts[shape]:
                counter.operations.add(kind, dtype, flops=flops, bytes=num_bytes)
            counter.__exit__(None, None, None)
            try:
                yield
            finally:
                counter.__enter__()
        else:
            with forward(), counters[-1].operations.written_down() as account:
                self.accounts[shape] = account
                yield


def _counters() -> list[WorkCounter]:
    return [mode for mode in _get_current_function_mode_stack() if isinstance(mode, WorkCounter)]


@functools.cache
def _may_be_work(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "grad" or any(part in name for part in WORK)


@functools.cache
def _counted(func: Any) -> tuple[str, Callable[..., float]] | None:
    """What an operation counts as, and the formula of its FLOPs; None for what is neither product nor factorisation."""
    packet = func.overloadpacket
    if packet in FACTORISATIONS:
        return "factorisation", FACTORISATIONS[packet]
    formula = PRODUCTS.get(packet) or ATTENTION.get(packet)
    return None if formula is None else ("product", formula)


def _is_gram(args: tuple) -> bool:
    """Whether the two operands of a product are views of one tensor, as in ``x^T x``."""
    A, B = _operands(args)
    return A.untyped_storage().data_ptr() == B.untyped_storage().data_ptr()
