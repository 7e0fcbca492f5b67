"""Causal language models whose layers differ in size: the form in which a compressed model is saved and loaded.

Self-contained on purpose: a checkpoint carries a copy of this file, so that it loads with ``trust_remote_code=True``
where the package that made it is not installed.

Per layer, the head size of queries and keys, the head size of values, the number of key/value heads and the MLP width
are free; any linear map may be stored as two factors and may have a bias that the family does not give it. Every layer
keeps its family's own norms, residuals, masks and cache. Queries and keys that lost rotary pairs keep the original
frequencies of those that stayed (``rope_index``, one row per key/value head), and the softmax keeps the original scale.
"""

# The mixins use what the families' classes define, and each family's ``forward`` has a signature of its own.
# mypy: disable-error-code="attr-defined, call-arg, misc"

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import transformers

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"this model needs transformers >= 5; found {transformers.__version__}")

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half


@dataclass(frozen=True)
class Family:
    """One family: its classes in Transformers, where it keeps its linear maps, and what sets it apart.

    Paths are of modules, in the model for ``layers`` and in a layer for the rest.
    """

    model_type: str
    classes: str
    """What the names of its classes in Transformers begin with."""
    config: str | None = None
    """The same for its configuration, where that differs."""
    module: str | None = None
    """Its folder in ``transformers.models``, where that is not called by its model type."""
    layers: str = "model.layers"
    query_path: str = "self_attn.q_proj"
    key_path: str = "self_attn.k_proj"
    value_path: str = "self_attn.v_proj"
    output_path: str = "self_attn.o_proj"
    gate_path: str | None = "mlp.gate_proj"
    """None where the MLP is not gated."""
    up_path: str = "mlp.up_proj"
    down_path: str = "mlp.down_proj"
    experts_path: str | None = None
    """Where a mixture of experts keeps its experts, each an MLP at the paths above, its number in place of ``*``."""
    router_path: str | None = None
    attention_path: str = "self_attn"
    query_norm_path: str | None = None
    key_norm_path: str | None = None
    """Norms of queries and keys in front of the rotation; None where there are none."""
    joint_norms: bool = False
    """One norm spans all heads, and not each head."""
    heads_first: bool = False
    """Its own attention gives these norms (batch, heads, sequence, d), and not (batch, sequence, heads, d)."""
    branch_norms: Mapping[str, str] = field(default_factory=dict)
    """Norms between the output of a block (``attention``, ``mlp``) and the sum that it enters."""
    final_norm_path: str = "model.norm"
    norm_offset: float = 0.0
    """What a norm adds to its weight."""
    rope: bool = True
    query_prescaled: bool = False
    """Queries are scaled in front of the attention function, and not in it."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Maps that the family stores as one: path of the fused map to the paths of its parts, in row order."""
    stored: Mapping[str, str] = field(default_factory=dict)
    """What parts of paths are called in its checkpoints, where that differs."""

    @property
    def compressed(self) -> str:
        """The name of its compressed model class."""
        return f"MoDeGPT{self.classes}ForCausalLM"

    @property
    def taken_apart(self) -> bool:
        """Whether a dense model of the family is compressed in another form than its own."""
        return bool(self.fused) or self.experts_path is not None

    def stored_name(self, name: str) -> str:
        """What its checkpoints call tensor ``name`` of a model that is taken apart."""
        for part, stored in self.stored.items():
            name = name.replace(f".{part}.", f".{stored}.")
        return name

    @property
    def head_norms(self) -> bool:
        """Whether queries and keys pass through norms."""
        return self.query_norm_path is not None

    def final_norm(self, model: nn.Module) -> nn.Module | None:
        """The norm in front of the head; None where the model has none."""
        parent, _, name = self.final_norm_path.rpartition(".")
        return getattr(model.get_submodule(parent), name, None)

    def attention(self, layer: nn.Module) -> nn.Module:
        """The attention of a layer."""
        return layer.get_submodule(self.attention_path)

    def rotates(self, layer: nn.Module) -> bool:
        """Whether a rotary embedding stands between queries and keys of a layer."""
        return self.rope and bool(getattr(self.attention(layer), "use_rope", True))

    def query(self, layer: nn.Module) -> nn.Linear:
        """The query projection of a layer."""
        return linear_at(layer, self.query_path)

    def key(self, layer: nn.Module) -> nn.Linear:
        """The key projection of a layer."""
        return linear_at(layer, self.key_path)

    def value(self, layer: nn.Module) -> nn.Linear:
        """The value projection of a layer."""
        return linear_at(layer, self.value_path)

    def output(self, layer: nn.Module) -> nn.Linear:
        """The output projection of a layer's attention."""
        return linear_at(layer, self.output_path)

    def gate(self, layer: nn.Module) -> nn.Linear | None:
        """The gate projection of a layer's MLP; None where the MLP is not gated."""
        return None if self.gate_path is None else linear_at(layer, self.gate_path)

    def up(self, layer: nn.Module) -> nn.Linear:
        """The up projection of a layer's MLP."""
        return linear_at(layer, self.up_path)

    def down(self, layer: nn.Module) -> nn.Linear:
        """The down projection of a layer's MLP."""
        return linear_at(layer, self.down_path)

    def of_experts(self, path: str, num_experts: int) -> list[str]:
        """``path`` of each expert; itself where there is but one MLP."""
        return [path] if self.experts_path is None else [path.replace("*", str(e)) for e in range(num_experts)]

    def downs(self, layer: nn.Module) -> list[nn.Linear]:
        """The down projection of each expert of a layer, or of its one MLP."""
        count = 1 if self.experts_path is None else len(self.experts(layer))
        return [linear_at(layer, path) for path in self.of_experts(self.down_path, count)]

    def experts(self, layer: nn.Module) -> "Experts":
        """The experts of a layer of a mixture."""
        assert self.experts_path is not None, f"{self.model_type} has no experts"
        return cast(Experts, layer.get_submodule(self.experts_path))

    def mlp_ends(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        """What reads a layer's MLP input first, and what makes its output: two linear maps, or all experts twice."""
        if self.experts_path is not None:
            return (self.experts(layer),) * 2
        return self.gate(layer) or self.up(layer), self.down(layer)

    def seen_share(self, config: Any) -> float:
        """The share of all tokens that an expert sees on average; 1 where there is but one MLP."""
        return 1.0 if self.experts_path is None else config.num_experts_per_tok / config.num_experts


def linear_at(layer: nn.Module, path: str) -> nn.Linear:
    """The linear map at ``path`` in a layer.

    A compressed layer may hold two factors there (``LowRankLinear``), which have the same sizes and the same call, but
    no weight of their own.
    """
    return cast(nn.Linear, layer.get_submodule(path))


HEAD_NORMS: dict[str, Any] = {"query_norm_path": "self_attn.q_norm", "key_norm_path": "self_attn.k_norm"}
BRANCH_NORMS = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
EXPERTS: dict[str, Any] = {
    **{f"{role}_path": f"mlp.experts.*.{role}_proj" for role in ("gate", "up", "down")},
    "experts_path": "mlp.experts",
    "router_path": "mlp.gate",
}
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral"),
        Family("qwen2", "Qwen2"),
        Family("qwen3", "Qwen3", **HEAD_NORMS),
        Family(
            "opt",
            "OPT",
            layers="model.decoder.layers",
            final_norm_path="model.decoder.final_layer_norm",
            output_path="self_attn.out_proj",
            gate_path=None,
            up_path="fc1",
            down_path="fc2",
            rope=False,
            query_prescaled=True,
        ),
        Family("gemma", "Gemma", norm_offset=1.0),
        Family(
            "gemma3_text",
            "Gemma3",
            config="Gemma3Text",
            module="gemma3",
            norm_offset=1.0,
            heads_first=True,
            branch_norms=BRANCH_NORMS,
            **HEAD_NORMS,
        ),
        Family("olmo2", "Olmo2", joint_norms=True, branch_norms=BRANCH_NORMS, **HEAD_NORMS),
        Family("smollm3", "SmolLM3"),
        Family(
            "phi3",
            "Phi3",
            fused={
                "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
            },
        ),
        Family(
            "mixtral",
            "Mixtral",
            stored={"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
            **EXPERTS,
        ),
        Family("qwen3_moe", "Qwen3Moe", **HEAD_NORMS, **EXPERTS),
        Family("olmoe", "Olmoe", joint_norms=True, **HEAD_NORMS, **EXPERTS),
    )
}
"""Every family, by its model type. An entry is all that a new one needs."""


@dataclass(kw_only=True)
class CompressedFields:
    """What a compressed model's configuration adds to its family's, one entry per layer; None means dense.

    The family's own fields (head count, head size, width) keep the dense values.

    Raises:
        ValueError: a list of the wrong length or a size that the dense model does not contain.
    """

    qk_head_dims: list[int] | None = None
    v_head_dims: list[int] | None = None
    kv_head_counts: list[int] | None = None
    intermediate_sizes: list[int] | None = None
    linear_ranks: list[dict[str, int]] | None = None
    extra_biases: list[list[str]] | None = None
    kept_layers: list[int] | None = None
    num_dense_layers: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.allow_global_per_layer_attribute_access = True  # ``head_dim`` is the dense one, pages are per layer
        self._fill("qk_head_dims", dense=self.dense_head_dim, at_least=1)
        self._fill("v_head_dims", dense=self.dense_head_dim, at_least=1)
        self._fill("kv_head_counts", dense=self.dense_kv_heads, at_least=0)
        self._fill("intermediate_sizes", dense=self.dense_width, at_least=0)
        if hasattr(self, "rope_parameters") and any(size % 2 for size in self.qk_head_dims or ()):
            raise ValueError(f"qk_head_dims must be even, because rotary pairs stay whole, got {self.qk_head_dims}")
        self._fill("linear_ranks", dense={})
        self._fill("extra_biases", dense=[])
        if self.kept_layers is None:
            self.kept_layers = list(range(self.num_hidden_layers))
        self._fill("kept_layers", dense=None)
        if self.num_dense_layers is None:
            self.num_dense_layers = 1 + max(self.kept_layers)

    def _fill(self, name: str, *, dense: Any, at_least: int | None = None) -> None:
        """Give every layer the dense value where nothing is said, and check what is said."""
        values = getattr(self, name)
        if values is None:
            values = [dense] * self.num_hidden_layers
            setattr(self, name, values)
        if len(values) != self.num_hidden_layers:
            raise ValueError(f"{name} has {len(values)} entries for {self.num_hidden_layers} layers")
        if at_least is not None and not all(at_least <= value <= dense for value in values):
            raise ValueError(f"{name} must lie in {at_least}..{dense}, got {values}")

    @property
    def dense_kv_heads(self) -> int:
        """Key/value heads of the dense model."""
        return getattr(self, "num_key_value_heads", None) or self.num_attention_heads

    @property
    def dense_head_dim(self) -> int:
        """Head size of the dense model."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    @property
    def dense_width(self) -> int:
        """MLP width of the dense model."""
        for name in ("ffn_dim", "moe_intermediate_size"):
            if hasattr(self, name):
                return getattr(self, name)
        return self.intermediate_size

    def page_size(self, index: int) -> int:
        """What an engine that pages its cache keeps of a key and of a value in layer ``index``, in elements a head.

        It is the dense head size unless ``per_layer_config`` says otherwise.
        """
        own = self.per_layer_config[index] if getattr(self, "is_heterogeneous", False) else self
        return getattr(own, "head_dim", None) or self.dense_head_dim

    def head_sizes(self, index: int) -> tuple[int, int, int]:
        """Columns of the query, key and value projections of layer ``index``."""
        assert self.kv_head_counts and self.qk_head_dims and self.v_head_dims
        num_kv_heads, qk_dim = self.kv_head_counts[index], self.qk_head_dims[index]
        group = self.num_attention_heads // self.dense_kv_heads
        return group * num_kv_heads * qk_dim, num_kv_heads * qk_dim, num_kv_heads * self.v_head_dims[index]


class LowRankLinear(nn.Module):
    """``y = (x A) B + b``: a linear map stored as two factors of inner size ``rank``."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self.B(self.A(x))


class EmptyLinear(nn.Module):
    """A linear map without inputs or without outputs, in a layer that lost its heads or its MLP.

    It is no ``nn.Linear``, because engines hand those to kernels that want entries.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out): nothing, or the bias."""
        return nn.functional.linear(x, self.weight, self.bias)


def _linear(in_features: int, out_features: int, bias: bool, rank: int | None) -> nn.Module:
    if rank is not None:
        return LowRankLinear(in_features, out_features, rank, bias)
    return (nn.Linear if in_features and out_features else EmptyLinear)(in_features, out_features, bias)


def _attend_once(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of one query a sequence.

    The queries of a key/value head are the rows of one product, so that no key is repeated.
    """
    batch, num_heads, _, E = query.shape
    scores = torch.matmul(scaling * query.reshape(batch, key.shape[1], -1, E), key.transpose(2, 3))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, value).reshape(batch, 1, num_heads, -1)


class SlicedHeadNorm(nn.Module):
    """``w_i q_i / sqrt(sum_j c_j q_j^2 + eps)``: the RMSNorm of heads of which some dims are left.

    Each head has a weight w, a share c of each dim in what stands for the mean square of the whole head, and an eps of
    its own; where the norm is ``joint`` the sum is over all heads. Buffers, because they are fitted and not learned.
    """

    weight: Tensor
    energy: Tensor
    eps: Tensor

    def __init__(self, num_heads: int, size: int, joint: bool):
        super().__init__()
        self.joint = joint
        self.register_buffer("weight", torch.ones(num_heads, size))
        self.register_buffer("energy", torch.full((num_heads, size), 1.0 / size))
        self.register_buffer("eps", torch.zeros(1 if joint else num_heads))

    def forward(self, states: Tensor) -> Tensor:
        """(..., heads, size) to the same shape; computed in float32 at least."""
        x = states.to(torch.promote_types(states.dtype, torch.float32))
        return normed_heads(x, self.weight, self.energy, self.eps, joint=self.joint).to(states.dtype)


def normed_heads(x: Tensor, w: Tensor, c: Tensor, eps: Tensor, *, joint: bool) -> Tensor:
    """``w_i x_i / sqrt(sum_j c_j x_j^2 + eps)`` of each head of x (..., heads, size), the sum over all if ``joint``."""
    n = (c * x.square()).sum(dim=-1)
    n = (n.sum(dim=-1, keepdim=True) if joint else n) + eps
    return w * x * n.rsqrt().unsqueeze(-1)


class CompressedAttention:
    """Mixin in front of a family's attention: the same computation on the sizes of its layer."""

    family: Family

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        _take_apart(self, self.family, self.family.attention_path)
        self.num_kv_heads = config.kv_head_counts[layer_idx]
        self.qk_dim, self.v_dim = config.qk_head_dims[layer_idx], config.v_head_dims[layer_idx]
        self.num_key_value_groups = config.num_attention_heads // config.dense_kv_heads
        self.page_size = config.page_size(layer_idx)
        self.attention_dropout = config.attention_dropout
        self.softmax_scale = 1.0 if self.family.query_prescaled else self.scaling
        self.window = getattr(self, "sliding_window", getattr(config, "sliding_window", None))
        self.rotated = self.family.rope and getattr(self, "use_rope", True)
        self.has_rope_index = self.rotated and self.qk_dim < self.head_dim
        if self.has_rope_index:
            # Persistent: from_pretrained leaves non-persistent buffers of custom modules uninitialised.
            self.register_buffer(
                "rope_index", torch.arange(self.qk_dim // 2).repeat(self.num_kv_heads, 1), persistent=True
            )
        joint = self.family.joint_norms
        self.has_sliced_norms = self.family.head_norms and (
            self.qk_dim < self.head_dim or (joint and self.num_kv_heads < config.dense_kv_heads)
        )
        if self.has_sliced_norms:
            self.q_norm = SlicedHeadNorm(self.num_kv_heads * self.num_key_value_groups, self.qk_dim, joint)
            self.k_norm = SlicedHeadNorm(self.num_kv_heads, self.qk_dim, joint)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (batch, sequence, heads, qk_dim) and values (batch, sequence, heads, v_dim).

        Queries and keys are those after the norms of their heads, where the family has these. Where an engine divides
        maps among processes, the heads are those of this one.

        Raises:
            ValueError: norms of cut heads, which need all of them.
        """
        shape, query, key = hidden_states.shape[:-1], self.q_proj(hidden_states), self.k_proj(hidden_states)
        if (
            self.family.query_prescaled
        ):  # and not in the softmax, as the family does, so that rounding agrees to the bit
            query = query * self.scaling
        spans_all = self.family.joint_norms and not self.has_sliced_norms
        if spans_all:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (states.view(*shape, -1, self.qk_dim) for states in (query, key))
        if self.has_sliced_norms and key.shape[2] < self.num_kv_heads:
            raise ValueError("norms of cut heads need all heads in one process: run without tensor parallel")
        if self.family.head_norms and not spans_all:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, self.v_proj(hidden_states).view(*shape, -1, self.v_dim)

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate (batch, heads, sequence, qk_dim) by the frequencies that each key/value head kept.

        ``cos`` and ``sin`` are the family's tables, (batch, sequence, head size); where they are of a wider type, as
        in OLMo 2, so is the product.
        """
        dtype = query.dtype
        if not self.has_rope_index:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            query, key = query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin
            return (query, key) if query.dtype == dtype else (query.to(dtype), key.to(dtype))
        kept, heads = self.rope_index, key.shape[1]
        if heads < self.num_kv_heads:  # an engine divides the maps, and says on them which part is here
            part = next(module.tp_rank for module in self.modules() if hasattr(module, "tp_rank"))
            kept = kept[part * heads : (part + 1) * heads]
        # (batch, sequence, head size) to (batch, key/value heads, 1, sequence, qk_dim / 2); a table's halves are equal
        index, shape = kept.flatten(), (*cos.shape[:2], 1, *kept.shape)
        cos, sin = (table.index_select(-1, index).view(shape).transpose(1, 3) for table in (cos, sin))
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        # the queries of a key/value head and its key as one tensor: half as many small operations
        states = torch.cat((query.unflatten(1, (heads, self.num_key_value_groups)), key.unsqueeze(2)), dim=2)
        states = states * cos + states.roll(self.qk_dim // 2, dims=-1) * sin
        states = states if states.dtype == dtype else states.to(dtype)  # no operation where there is nothing to do
        return states[:, :, :-1].flatten(1, 2), states[:, :, -1]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``hidden_states`` (batch, sequence, d_h) to the same shape, with the attention weights if asked for."""
        output = getattr(self, self.family.output_path.rpartition(".")[2])
        if self.num_kv_heads == 0:
            if past_key_values is not None:
                # A cache counts positions by what its layers store, so a layer without heads stores a blank.
                blank = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
                past_key_values.update(blank, blank, self.layer_idx)
            return output(hidden_states[..., :0]), None
        query, key, value = (states.transpose(1, 2) for states in self.project(hidden_states))
        if self.rotated:
            assert position_embeddings is not None, "the model gives its layers a rotary embedding"
            query, key = self.rotate(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        shape, num_heads, implementation = hidden_states.shape[:-1], query.shape[1], self.config._attn_implementation
        dropout = self.attention_dropout if self.training else 0.0
        fits = self.qk_dim == self.v_dim
        # of equal sizes the fused kernel takes over on a GPU, and keeps the scores of fewer bits in float32
        product = not (fits and (query.is_cuda or query.dtype != torch.float32))
        if implementation == "sdpa" and shape[1] == 1 and product and not (dropout or kwargs.get("cache") is not None):
            states, weights = _attend_once(query, key, value, attention_mask, self.softmax_scale), None
        else:
            if implementation == "vllm" or kwargs.get("cache") is not None or not (fits or implementation == "eager"):
                query, key, value = self.fill(query, key, value, paged=kwargs.get("cache") is not None)
            # in this form, and here, because engines read the source for it
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
            states, weights = attend(
                self,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=self.softmax_scale,
                sliding_window=self.window,
                **kwargs,
            )
            states = states.reshape(*shape, query.shape[1], value.shape[-1])[..., :num_heads, : self.v_dim]
        return output(states.reshape(*shape, -1).contiguous()), weights

    def fill(self, query: Tensor, key: Tensor, value: Tensor, *, paged: bool) -> tuple[Tensor, ...]:
        """Queries, keys and values with the zeros that their kernel wants, which change nothing in the result.

        Fused kernels want one head size for all three. Engines that page their cache want the dense model's heads, of
        the size of the layer's pages; in continuous batching (``paged``) these are the dense model's too.
        """
        size, heads = max(self.qk_dim, self.v_dim), key.shape[1]
        if paged or self.config._attn_implementation == "vllm":
            size = self.head_dim if paged else self.page_size
            heads = self.config.dense_kv_heads * heads // self.num_kv_heads
        elif query.is_cuda:
            size = -(-size // 8) * 8
        spare = heads - key.shape[1]
        added = (spare * self.num_key_value_groups, spare, spare)
        return tuple(
            pad(states, (0, size - states.shape[-1], 0, 0, 0, more))
            for states, more in zip((query, key, value), added, strict=True)
        )


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``: the MLP of a family that stores gate and up as one map, taken apart."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, config: Any):
        super().__init__()
        self.act_fn = ACT2FN[config.hidden_act]
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, nn.Linear(1, 1, bias=False, device="meta"))

    def hidden(self, x: Tensor, share: Tensor | None = None) -> Tensor:
        """What the last map reads of x (..., d_h), times ``share`` (..., 1) if given."""
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return h if share is None else (h * share).to(h.dtype)

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor:
        """(..., d_h) to the same shape, times ``share`` (..., 1) if given."""
        return self.down_proj(self.hidden(x, share))


class Experts(nn.Module):
    """The experts of a layer, each an MLP by itself, by number.

    What a down projection reads is weighted as its output enters the sum, so that statistics taken there are those of
    what the experts contribute. It is no ``nn.ModuleList``, which vLLM would take for experts of the dense width.
    """

    def __init__(self, config: Any):
        super().__init__()
        for index in range(config.num_experts):
            self.add_module(str(index), GatedMLP(config))

    def __len__(self) -> int:
        """How many there are."""
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        """Each expert."""
        return self.children()

    def __getitem__(self, index: int) -> GatedMLP:
        """The expert of this number."""
        return cast(GatedMLP, self._modules[str(index)])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, d_h), with the experts of each token and their shares (tokens, top k), to (tokens, d_h)."""
        total = torch.zeros_like(hidden_states)
        for index, token, share in self.routed(top_k_index, top_k_weights):
            total.index_add_(0, token, self[index](hidden_states[token], share).to(total.dtype))
        return total

    def routed(self, top_k_index: Tensor, top_k_weights: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each expert that some token sees: its number, these tokens (t,) and its share of each (t, 1)."""
        for index in range(len(self)):
            token, place = torch.where(top_k_index == index)
            if len(token):
                yield index, token, top_k_weights[token, place].unsqueeze(-1)


def _take_apart(attention: Any, family: Family, path: str) -> None:
    """Empty maps in place of one that ``family`` stores as one in its ``attention``, which is at ``path``."""
    for fused, parts in family.fused.items():
        if fused.startswith(f"{path}."):
            delattr(attention, fused.rpartition(".")[2])
            for part in parts:
                setattr(attention, part.rpartition(".")[2], nn.Linear(1, 1, bias=False, device="meta"))


class CompressedCausalLM:
    """Mixin in front of a family's causal language model: gives each layer its size."""

    family: Family
    attention_class: type
    layer_class: type

    def __init__(self, config: Any):
        super().__init__(config)
        for index, layer in enumerate(self.get_decoder().layers):
            self.resize_layer(layer, config, index)
        name = f"{__name__.rpartition('.')[2]}.{type(self).__name__.replace('ForCausalLM', 'Model')}"
        config.auto_map = (getattr(config, "auto_map", None) or {}) | {"AutoModel": name}
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in Transformers, but weights that are missing are a ValueError and not made at random."""
        model, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if report["missing_keys"]:
            raise ValueError(f"the checkpoint lacks {sorted(report['missing_keys'])}")
        return (model, report) if output_loading_info else model

    @classmethod
    def make_layer(cls, config: Any, index: int) -> nn.Module:
        """Decoder layer ``index`` of the compressed model, by itself."""
        layer = cls.layer_class(config, index)
        cls.resize_layer(layer, config, index)
        return layer

    @classmethod
    def resize_layer(cls, layer: Any, config: Any, index: int) -> None:
        """Give a family's decoder ``layer`` the sizes of layer ``index``."""
        layer.self_attn = cls.attention_class(config, index)
        if any(path.startswith("mlp.") for path in cls.family.fused):
            layer.mlp = GatedMLP(config)
        if cls.family.experts_path is not None:
            layer.set_submodule(cls.family.experts_path, Experts(config))
        ranks, biases = config.linear_ranks[index], config.extra_biases[index]
        for path, (in_features, out_features) in cls.linear_sizes(config, index).items():
            owner, _, name = path.rpartition(".")
            parent = layer.get_submodule(owner)
            bias = path in biases or getattr(parent, name).bias is not None
            setattr(parent, name, _linear(in_features, out_features, bias, ranks.get(path)))
            if not isinstance(getattr(parent, name), nn.Linear):
                # engines tell by a module's class and the names of its children whether they can fuse its maps
                parent.add_module(f"apart_{name}", nn.Identity())

    @classmethod
    def linear_sizes(cls, config: Any, index: int) -> dict[str, tuple[int, int]]:
        """(in, out) features of every linear map of layer ``index``, by its path in the layer."""
        query, key, value = config.head_sizes(index)
        hidden, width = config.hidden_size, config.intermediate_sizes[index]
        group = config.num_attention_heads // config.dense_kv_heads
        family = cls.family
        sizes = {
            family.query_path: (hidden, query),
            family.key_path: (hidden, key),
            family.value_path: (hidden, value),
            family.output_path: (group * value, hidden),
        }
        of_mlp = (
            (family.gate_path, (hidden, width)),
            (family.up_path, (hidden, width)),
            (family.down_path, (width, hidden)),
        )
        for path, size in of_mlp:
            if path is not None:
                sizes |= dict.fromkeys(family.of_experts(path, getattr(config, "num_experts", 1)), size)
        return sizes


class CompressedModel:
    """Mixin in front of a family's model without its head, for engines that bring a head of their own."""

    causal_class: type[CompressedCausalLM]

    def __init__(self, config: Any):
        super().__init__(config)
        for index, layer in enumerate(self.get_decoder().layers):
            self.causal_class.resize_layer(layer, config, index)
        self.post_init()


def _declare(family: Family) -> Any:
    """The compressed model class of ``family``, with those of its configuration and attention, in this module."""
    folder = family.module or family.model_type
    native = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")

    def declare(kind: str, *bases: type, **attributes: Any) -> Any:
        name = f"MoDeGPT{family.classes}{kind}"
        about = f"``{bases[-1].__name__}`` with layers of free sizes."
        globals()[name] = type(name, bases, {"__module__": __name__, "__doc__": about, **attributes})
        return globals()[name]

    config = declare(
        "Config",
        CompressedFields,
        getattr(native, f"{family.config or family.classes}Config"),
        model_type=f"modegpt_{family.model_type}",
    )
    attention = declare("Attention", CompressedAttention, getattr(native, f"{family.classes}Attention"), family=family)
    causal = declare(
        "ForCausalLM",
        CompressedCausalLM,
        getattr(native, f"{family.classes}ForCausalLM"),
        family=family,
        config_class=strict(config),
        attention_class=attention,
        layer_class=getattr(native, f"{family.classes}DecoderLayer"),
    )
    without_head = getattr(native, f"{family.config or family.classes}Model")
    declare("Model", CompressedModel, without_head, config_class=config, causal_class=causal)
    return causal


MODELS: tuple[Any, ...] = tuple(_declare(family) for family in FAMILIES.values())
"""Every compressed model class."""
