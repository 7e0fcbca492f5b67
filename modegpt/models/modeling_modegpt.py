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

import warnings
from dataclasses import dataclass
from typing import Any

import transformers

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"this model needs transformers >= 5; found {transformers.__version__}")

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import GemmaConfig, LlamaConfig, MistralConfig, OPTConfig, Phi3Config, Qwen2Config, Qwen3Config
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaDecoderLayer, GemmaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    eager_attention_forward,
    rotate_half,
)
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralMLP,
)
from transformers.models.opt.modeling_opt import OPTAttention, OPTDecoderLayer, OPTForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3DecoderLayer, Phi3ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3ForCausalLM


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
        return self.ffn_dim if hasattr(self, "ffn_dim") else self.intermediate_size

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


def _linear(in_features: int, out_features: int, bias: bool, rank: int | None) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # a layer without heads or MLP has some
        if rank is None:
            return nn.Linear(in_features, out_features, bias)
        return LowRankLinear(in_features, out_features, rank, bias)


def _attend(
    implementation: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention with head sizes E (query, key) and Ev (value), kept off the kernels' slow unfused path.

    Fused kernels want E == Ev, so the smaller is padded with zeros, which changes nothing in the result; a single
    query is faster by the definition. Returns (batch, sequence, heads, Ev) and the weights if asked for.
    """
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    num_heads, E, num_kv_heads, Ev = query.shape[1], query.shape[-1], value.shape[1], value.shape[-1]
    size, spare = max(E, Ev), 0
    if kwargs.get("cache") is not None:  # continuous batching: the pages of every layer have the dense model's size
        size, spare = module.head_dim, module.config.dense_kv_heads - num_kv_heads
    elif Ev == E or implementation == "eager":
        return attention(module, query, key, value, mask, **kwargs)
    elif implementation == "sdpa" and query.shape[2] == 1 and not kwargs["dropout"]:
        return _attend_once(query, key, value, mask, kwargs["scaling"]), None
    elif query.is_cuda:
        size = -(-size // 8) * 8
    added = (spare * module.num_key_value_groups, spare, spare)
    padded = (
        pad(states, (0, size - states.shape[-1], 0, 0, 0, heads))
        for states, heads in zip((query, key, value), added, strict=True)
    )
    out, weights = attention(module, *padded, mask, **kwargs)
    return out[:, :, :num_heads, :Ev], weights


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


class CompressedAttention:
    """Mixin in front of a family's attention: the same computation on the sizes of its layer."""

    query_prescaled = False
    output = "o_proj"

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.num_kv_heads = config.kv_head_counts[layer_idx]
        self.qk_dim, self.v_dim = config.qk_head_dims[layer_idx], config.v_head_dims[layer_idx]
        self.num_key_value_groups = config.num_attention_heads // config.dense_kv_heads
        self.attention_dropout = config.attention_dropout
        self.window = getattr(self, "sliding_window", getattr(config, "sliding_window", None))
        self.has_rope_index = hasattr(config, "rope_parameters") and self.qk_dim < self.head_dim
        if self.has_rope_index:
            # Persistent: from_pretrained leaves non-persistent buffers of custom modules uninitialised.
            self.register_buffer(
                "rope_index", torch.arange(self.qk_dim // 2).repeat(self.num_kv_heads, 1), persistent=True
            )

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (batch, sequence, heads, qk_dim) and values (batch, sequence, heads, v_dim)."""
        shape, query = hidden_states.shape[:-1], self.q_proj(hidden_states)
        if self.query_prescaled:  # here and not in the softmax, as the family does, so that rounding agrees to the bit
            query = query * self.scaling
        query = query.view(*shape, -1, self.qk_dim)
        key = self.k_proj(hidden_states).view(*shape, -1, self.qk_dim)
        return query, key, self.v_proj(hidden_states).view(*shape, -1, self.v_dim)

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate (batch, heads, sequence, qk_dim) by the frequencies that each key/value head kept.

        ``cos`` and ``sin`` are the family's tables, (batch, sequence, head size).
        """
        if not self.has_rope_index:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin
        # (batch, sequence, head size) to (batch, key/value heads, 1, sequence, qk_dim); a table's halves are equal
        halves = (
            table.index_select(-1, self.rope_index.flatten()).unflatten(-1, self.rope_index.shape).transpose(1, 2)
            for table in (cos, sin)
        )
        cos, sin = (torch.cat((half, half), dim=-1).unsqueeze(2) for half in halves)
        # the queries of a key/value head and its key as one tensor: half as many small operations
        states = torch.cat(
            (query.unflatten(1, (self.num_kv_heads, self.num_key_value_groups)), key.unsqueeze(2)), dim=2
        )
        states = states * cos + rotate_half(states) * sin
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
        output = getattr(self, self.output)
        if self.num_kv_heads == 0:
            if past_key_values is not None:
                # A cache counts positions by what its layers store, so a layer without heads stores a blank.
                blank = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
                past_key_values.update(blank, blank, self.layer_idx)
            return output(hidden_states[..., :0]), None
        query, key, value = (states.transpose(1, 2) for states in self.project(hidden_states))
        if position_embeddings is not None:
            query, key = self.rotate(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        states, weights = _attend(
            self.config._attn_implementation,
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=1.0 if self.query_prescaled else self.scaling,
            sliding_window=self.window,
            **kwargs,
        )
        return output(states.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class CompressedCausalLM:
    """Mixin in front of a family's causal language model: gives each layer its size."""

    attention_class: type
    layer_class: type

    def __init__(self, config: Any):
        super().__init__(config)
        for index, layer in enumerate(self.get_decoder().layers):
            self.resize_layer(layer, config, index)
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
        ranks, biases = config.linear_ranks[index], config.extra_biases[index]
        for path, (in_features, out_features) in cls.linear_sizes(config, index).items():
            owner, _, name = path.rpartition(".")
            parent = layer.get_submodule(owner)
            bias = path in biases or getattr(parent, name).bias is not None
            setattr(parent, name, _linear(in_features, out_features, bias, ranks.get(path)))

    @classmethod
    def linear_sizes(cls, config: Any, index: int) -> dict[str, tuple[int, int]]:
        """(in, out) features of every linear map of layer ``index``, by its path in the layer."""
        query, key, value = config.head_sizes(index)
        hidden, width = config.hidden_size, config.intermediate_sizes[index]
        group = config.num_attention_heads // config.dense_kv_heads
        return {
            "self_attn.q_proj": (hidden, query),
            "self_attn.k_proj": (hidden, key),
            "self_attn.v_proj": (hidden, value),
            f"self_attn.{cls.attention_class.output}": (group * value, hidden),
            **cls.mlp_sizes(hidden, width),
        }

    @classmethod
    def mlp_sizes(cls, hidden: int, width: int) -> dict[str, tuple[int, int]]:
        """(in, out) features of the MLP's linear maps, by their path in the layer."""
        return {"mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width), "mlp.down_proj": (width, hidden)}


@strict
class MoDeGPTLlamaConfig(CompressedFields, LlamaConfig):
    """``LlamaConfig`` with a size for each layer."""

    model_type = "modegpt_llama"


class MoDeGPTLlamaAttention(CompressedAttention, LlamaAttention):
    """``LlamaAttention`` with head sizes of its layer's own."""


class MoDeGPTLlamaForCausalLM(CompressedCausalLM, LlamaForCausalLM):
    """``LlamaForCausalLM`` with layers of free sizes."""

    config_class, attention_class, layer_class = MoDeGPTLlamaConfig, MoDeGPTLlamaAttention, LlamaDecoderLayer


@strict
class MoDeGPTMistralConfig(CompressedFields, MistralConfig):
    """``MistralConfig`` with a size for each layer."""

    model_type = "modegpt_mistral"


class MoDeGPTMistralAttention(CompressedAttention, MistralAttention):
    """``MistralAttention`` with head sizes of its layer's own."""


class MoDeGPTMistralForCausalLM(CompressedCausalLM, MistralForCausalLM):
    """``MistralForCausalLM`` with layers of free sizes."""

    config_class, attention_class, layer_class = MoDeGPTMistralConfig, MoDeGPTMistralAttention, MistralDecoderLayer


@strict
class MoDeGPTQwen2Config(CompressedFields, Qwen2Config):
    """``Qwen2Config`` with a size for each layer."""

    model_type = "modegpt_qwen2"


class MoDeGPTQwen2Attention(CompressedAttention, Qwen2Attention):
    """``Qwen2Attention`` with head sizes of its layer's own."""


class MoDeGPTQwen2ForCausalLM(CompressedCausalLM, Qwen2ForCausalLM):
    """``Qwen2ForCausalLM`` with layers of free sizes."""

    config_class, attention_class, layer_class = MoDeGPTQwen2Config, MoDeGPTQwen2Attention, Qwen2DecoderLayer


@strict
class MoDeGPTQwen3Config(CompressedFields, Qwen3Config):
    """Queries and keys stay dense: their norm's statistics span the whole head."""

    model_type = "modegpt_qwen3"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if any(size != self.dense_head_dim for size in self.qk_head_dims or ()):
            raise ValueError(
                f"qk_head_dims must stay {self.dense_head_dim}: the head norm of queries and keys spans the whole head"
            )


class MoDeGPTQwen3Attention(CompressedAttention, Qwen3Attention):
    """``Qwen3Attention`` with head sizes of its layer's own."""

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys after their norm, and values."""
        query, key, value = super().project(hidden_states)
        return self.q_norm(query), self.k_norm(key), value


class MoDeGPTQwen3ForCausalLM(CompressedCausalLM, Qwen3ForCausalLM):
    """``Qwen3ForCausalLM`` with layers of free sizes."""

    config_class, attention_class, layer_class = MoDeGPTQwen3Config, MoDeGPTQwen3Attention, Qwen3DecoderLayer


@strict
class MoDeGPTOPTConfig(CompressedFields, OPTConfig):
    """``OPTConfig`` with a size for each layer."""

    model_type = "modegpt_opt"


class MoDeGPTOPTAttention(CompressedAttention, OPTAttention):
    """``OPTAttention`` with head sizes of its layer's own."""

    query_prescaled = True
    output = "out_proj"


class MoDeGPTOPTForCausalLM(CompressedCausalLM, OPTForCausalLM):
    """``OPTForCausalLM`` with layers of free sizes."""

    config_class, attention_class, layer_class = MoDeGPTOPTConfig, MoDeGPTOPTAttention, OPTDecoderLayer

    @classmethod
    def mlp_sizes(cls, hidden: int, width: int) -> dict[str, tuple[int, int]]:
        """(in, out) features of the MLP's linear maps, by their path in the layer."""
        return {"fc1": (hidden, width), "fc2": (width, hidden)}


@strict
class MoDeGPTGemmaConfig(CompressedFields, GemmaConfig):
    """``GemmaConfig`` with a size for each layer."""

    model_type = "modegpt_gemma"


class MoDeGPTGemmaAttention(CompressedAttention, GemmaAttention):
    """``GemmaAttention`` with head sizes of its layer's own."""


class MoDeGPTGemmaForCausalLM(CompressedCausalLM, GemmaForCausalLM):
    """``GemmaForCausalLM`` with layers of free sizes."""

    config_class, attention_class, layer_class = MoDeGPTGemmaConfig, MoDeGPTGemmaAttention, GemmaDecoderLayer


@strict
class MoDeGPTPhi3Config(CompressedFields, Phi3Config):
    """``Phi3Config`` with a size for each layer."""

    model_type = "modegpt_phi3"


class MoDeGPTPhi3Attention(CompressedAttention, Phi3Attention):
    """The family's fused projection, taken apart."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.qkv_proj
        for name, size in zip(("q_proj", "k_proj", "v_proj"), config.head_sizes(layer_idx), strict=True):
            setattr(self, name, nn.Linear(config.hidden_size, size, bias=False))


class MoDeGPTPhi3ForCausalLM(CompressedCausalLM, Phi3ForCausalLM):
    """``Phi3ForCausalLM`` with layers of free sizes."""

    config_class, attention_class, layer_class = MoDeGPTPhi3Config, MoDeGPTPhi3Attention, Phi3DecoderLayer

    @classmethod
    def resize_layer(cls, layer: Any, config: Any, index: int) -> None:
        """Give a decoder ``layer`` the sizes of layer ``index``, its fused projections taken apart."""
        layer.mlp = MistralMLP(config)  # the same gated MLP with gate and up apart
        super().resize_layer(layer, config, index)


MODELS = (
    MoDeGPTLlamaForCausalLM,
    MoDeGPTMistralForCausalLM,
    MoDeGPTQwen2ForCausalLM,
    MoDeGPTQwen3ForCausalLM,
    MoDeGPTOPTForCausalLM,
    MoDeGPTGemmaForCausalLM,
    MoDeGPTPhi3ForCausalLM,
)
"""Every compressed model class; a new family joins here."""
