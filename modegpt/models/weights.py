"""The bridge between a layer's linear maps and the paper's matrices.

``nn.Linear`` stores ``weight`` as (out, in) and computes ``x weight^T``; the paper's ``W`` is
(in, out) with row vectors ``x W``. Heads are a leading dimension: head ``h`` of a projection is
rows ``h d .. (h+1) d`` of its weight. All that is read is a view of the layer's own tensors.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from modegpt.decompositions.modules import (
    ExpertWeights,
    HeadNorm,
    LowRank,
    MLPWeights,
    QueryKeyWeights,
    ValueOutputWeights,
)
from modegpt.models.families import Family, family_of
from modegpt.models.shapes import LayerShape, empty_dense_layer


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a dense or compressed model, in order."""
    return cast(nn.ModuleList, model.get_submodule(family_of(model.config).layers))


def block_linear_parameters(model: PreTrainedModel) -> int:
    """Weights of the linear maps inside the decoder layers: every parameter there with two dimensions or more.

    Factors of low-rank maps, all experts and any added matrices count in full; embeddings, head, norms, biases and the
    routers of experts do not.
    """
    router = family_of(model.config).router_path
    return sum(
        parameter.numel()
        for name, parameter in decoder_layers(model).named_parameters()
        if parameter.ndim >= 2 and (router is None or f".{router}." not in name)
    )


def read_mlps(family: Family, layer: nn.Module) -> MLPWeights | ExpertWeights:
    """The MLP of a layer, or all its experts."""
    if family.experts_path is None:
        return read_mlp(family, layer)
    experts = []
    for expert in layer.get_submodule(family.experts_path).children():
        W_U, W_G, W_D = (_matrix(getattr(expert, name)) for name in ("up_proj", "gate_proj", "down_proj"))
        experts.append(MLPWeights(W_U=W_U, W_G=W_G, W_D=W_D))
    return ExpertWeights(tuple(experts))


def read_mlp(family: Family, layer: nn.Module) -> MLPWeights:
    """The one MLP of a layer: W_U, W_G (d_h, n), W_D (n, d_h) and their biases."""
    up, gate, down = family.up(layer), family.gate(layer), family.down(layer)
    return MLPWeights(
        W_U=_matrix(up),
        W_G=None if gate is None else _matrix(gate),
        W_D=_matrix(down),
        b_U=bias_of(up),
        b_G=None if gate is None else bias_of(gate),
        b_D=bias_of(down),
    )


def output_gain(family: Family, layer: nn.Module, block: str) -> Tensor | None:
    """What the norm behind a block (``attention`` or ``mlp``) multiplies each of its outputs by, (d_h,) float64; None
    where the family has no norm there.

    At least a thousandth of the largest, so that what is multiplied by it can be divided by it again.
    """
    path = family.branch_norms.get(block)
    if path is None:
        return None
    norm: Any = layer.get_submodule(path)
    gain = (norm.weight.detach().double() + family.norm_offset).abs()
    return gain.clamp(min=1e-3 * float(gain.max()))


def gained(W: Tensor, gain: Tensor | None) -> Tensor:
    """W (..., d_h) for outputs that are multiplied by ``gain`` (d_h,); W itself where there is none."""
    return W if gain is None else W * gain


def ungained(W: Tensor, gain: Tensor | None) -> Tensor:
    """What ``gained`` makes W of."""
    return gained(W, None if gain is None else 1 / gain)


def read_query_key(family: Family, layer: nn.Module) -> QueryKeyWeights:
    """Queries and keys of a dense layer by head: W_Q (H, d_h, d), W_K (H_kv, d_h, d), biases (heads, d)."""
    (W_Q, b_Q), (W_K, b_K) = (
        _by_head(linear, _head_dim(layer, family)) for linear in (family.query(layer), family.key(layer))
    )
    return QueryKeyWeights(
        W_Q=W_Q,
        W_K=W_K,
        b_Q=b_Q,
        b_K=b_K,
        rope=family.rotates(layer),
        norm_Q=query_norm(family, layer),
        norm_K=key_norm(family, layer),
    )


def rotary_frequencies(model: PreTrainedModel) -> Tensor | None:
    """Radians a token of each rotary pair of a head (d/2,); None where the model rotates nothing, or layers differ.

    Made anew, because a model may be without data.
    """
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    return None if rotary is None else getattr(type(rotary)(config=model.config), "inv_freq", None)


def query_norm(family: Family, layer: nn.Module) -> HeadNorm | None:
    """The norm of queries in a dense layer, w and c (H, d), eps (H,) or (1,) over all heads; None without."""
    return _head_norm(family, layer, family.query_norm_path, family.query(layer))


def key_norm(family: Family, layer: nn.Module) -> HeadNorm | None:
    """The norm of keys in a dense layer, w and c (H_kv, d), eps (H_kv,) or (1,) over all heads; None without."""
    return _head_norm(family, layer, family.key_norm_path, family.key(layer))


def _head_norm(family: Family, layer: nn.Module, path: str | None, linear: nn.Linear) -> HeadNorm | None:
    if path is None:
        return None
    norm: Any = layer.get_submodule(path)
    size, weight = _head_dim(layer, family), family.norm_offset + norm.weight.detach()
    num_heads = linear.out_features // size
    w = weight.view(num_heads, size) if family.joint_norms else weight.expand(num_heads, size)
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    count = 1 if family.joint_norms else num_heads
    return HeadNorm(w=w, c=torch.full_like(w, 1 / weight.numel()), eps=w.new_full((count,), eps))


@torch.no_grad()
def normalised_heads(family: Family, layer: nn.Module, norm_path: str | None, states: Tensor) -> Tensor:
    """Query or key states (..., heads, d) of a dense layer after the norm at ``norm_path``, if there is one."""
    if norm_path is None:
        return states
    norm = layer.get_submodule(norm_path)
    return norm(states.flatten(-2)).view(states.shape) if family.joint_norms else norm(states)


def read_value_output(family: Family, layer: nn.Module) -> ValueOutputWeights:
    """Values and output of a dense layer by head: W_V (H_kv, d_h, d), W_O (H, d, d_h), b_V (H_kv, d), b_O (d_h,)."""
    size, output = _head_dim(layer, family), family.output(layer)
    W_V, b_V = _by_head(family.value(layer), size)
    W_O = output.weight.detach().T.unflatten(0, (-1, size))
    return ValueOutputWeights(W_V=W_V, W_O=W_O, b_V=b_V, b_O=bias_of(output))


def bias_of(linear: Any) -> Tensor | None:
    """The bias (out,) of a linear map or of a pair of factors."""
    bias = linear.bias if hasattr(linear, "weight") else linear.B.bias
    return None if bias is None else bias.detach()


def _matrix(linear: Any) -> Tensor | LowRank:
    if hasattr(linear, "weight"):
        return linear.weight.detach().T
    return LowRank(A=linear.A.weight.detach().T, B=linear.B.weight.detach().T)


def _head_dim(layer: nn.Module, family: Family) -> int:
    return cast(int, family.attention(layer).head_dim)


def _by_head(linear: nn.Linear, size: int) -> tuple[Tensor, Tensor | None]:
    bias = bias_of(linear)
    W = linear.weight.detach().unflatten(0, (-1, size)).transpose(1, 2)
    return W, None if bias is None else bias.unflatten(0, (-1, size))


def layer_tensors(
    family: Family,
    config: PreTrainedConfig,
    shape: LayerShape,
    *,
    mlp: MLPWeights | ExpertWeights | None = None,
    query_key: QueryKeyWeights | None = None,
    value_output: ValueOutputWeights | None = None,
) -> dict[str, Tensor]:
    """The tensors of a layer of ``shape`` that differ from the dense layer's, named relative to the layer.

    A module given as None is unchanged. A map that appears replaces the dense map whole, bias and all;
    a bias that the family has and the weights lack (folded elsewhere) becomes zeros.

    Raises:
        AssertionError: sizes that contradict ``shape``, or a bias for which neither family nor shape has room.
    """
    tensors: dict[str, Tensor] = {}
    dense = empty_dense_layer(config)
    biased = {name.removesuffix(".bias") for name, _ in dense.named_parameters() if name.endswith(".bias")}
    biased |= set(shape.extra_biases)

    def put(path: str, W: Tensor | LowRank, bias: Tensor | None) -> None:
        assert bias is None or path in biased, f"{path} has a bias but the layer's shape does not say so"
        assert isinstance(W, LowRank) == (path in shape.linear_ranks), f"{path}: factors and shape disagree"
        last = path
        if isinstance(W, LowRank):
            assert W.A.shape[1] == shape.linear_ranks[path], (path, W.A.shape, shape.linear_ranks[path])
            tensors[f"{path}.A.weight"] = W.A.T.contiguous()
            W, last = W.B, f"{path}.B"
        tensors[f"{last}.weight"] = W.T.contiguous()
        if path in biased:
            tensors[f"{last}.bias"] = W.new_zeros(W.shape[1]) if bias is None else bias.contiguous()

    for path, W, bias in () if mlp is None else _mlp_maps(family, mlp, width=shape.intermediate_size):
        put(path, W, bias)
    if query_key is not None:
        num_kv_heads, _, size = query_key.W_K.shape
        assert (num_kv_heads, size) == (shape.num_kv_heads, shape.qk_head_dim), (query_key.W_K.shape, shape)
        put(family.query_path, _joined(query_key.W_Q), _flat(query_key.b_Q))
        put(family.key_path, _joined(query_key.W_K), _flat(query_key.b_K))
        if query_key.rope and size < _head_dim(dense, family):
            pairs = query_key.rope_index
            assert pairs is not None and pairs.shape == (num_kv_heads, size // 2), (pairs, num_kv_heads, size)
            tensors[f"{family.attention_path}.rope_index"] = pairs.contiguous()
        fewer = family.joint_norms and num_kv_heads * size < family.key(dense).out_features
        if family.head_norms and (fewer or size < _head_dim(dense, family)):
            tensors |= _norm_tensors(family, query_key)
    if value_output is not None:
        num_kv_heads, _, size = value_output.W_V.shape
        assert (num_kv_heads, size) == (shape.num_kv_heads, shape.v_head_dim), (value_output.W_V.shape, shape)
        put(family.value_path, _joined(value_output.W_V), _flat(value_output.b_V))
        put(family.output_path, value_output.W_O.flatten(0, 1), value_output.b_O)
    return tensors


def _mlp_maps(
    family: Family, mlp: MLPWeights | ExpertWeights, *, width: int
) -> list[tuple[str, Tensor | LowRank, Tensor | None]]:
    """Path, matrix and bias of each map of an MLP of ``width``, or of all experts."""
    experts = mlp.experts if isinstance(mlp, ExpertWeights) else (mlp,)
    maps: list[tuple[str, Tensor | LowRank, Tensor | None]] = []
    for index, one in enumerate(experts):
        found = one.W_D.A.shape[0] if isinstance(one.W_D, LowRank) else one.W_D.shape[0]
        assert found == width, (found, width)
        assert (one.W_G is None) == (family.gate_path is None), f"{family.model_type} has a gate, or has none"
        of_one = (
            (family.up_path, one.W_U, one.b_U),
            (family.gate_path, one.W_G, one.b_G),
            (family.down_path, one.W_D, one.b_D),
        )
        maps += [
            (family.of_experts(path, len(experts))[index], W, bias)
            for path, W, bias in of_one
            if path is not None and W is not None
        ]
    return maps


def _norm_tensors(family: Family, query_key: QueryKeyWeights) -> dict[str, Tensor]:
    """The tensors of norms of heads that lost dims."""
    tensors = {}
    for path, norm in ((family.query_norm_path, query_key.norm_Q), (family.key_norm_path, query_key.norm_K)):
        assert norm is not None, f"{path} needs a norm for the dims that stay"
        for name, part in (("weight", norm.w), ("energy", norm.c), ("eps", norm.eps)):
            tensors[f"{path}.{name}"] = part.to(query_key.W_Q.dtype).contiguous()
    return tensors


def _joined(W: Tensor) -> Tensor:
    """(heads, in, d) to (in, heads d)."""
    return W.transpose(0, 1).flatten(1)


def _flat(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.flatten()
