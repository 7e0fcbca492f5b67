"""Causal language models whose residual stream is narrower than their family's (SliceGPT), as Hugging Face models.

One self-contained file: it is saved beside the weights and loads with ``trust_remote_code=True``. Norms
have no weights (they are folded into the maps that follow) and each of a layer's two residual
connections passes through a shortcut matrix, from the basis of one block's input to the next one's.

SliceGPT: Ashkboos et al., ICLR 2024, arXiv 2401.15024, sections 3.2 to 3.4.
"""

# The mixins use what the families' classes define, and each family's ``forward`` has a signature of its own.
# mypy: disable-error-code="attr-defined, call-arg, misc"

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP


@dataclass(kw_only=True)
class SlicedFields:
    """What a sliced model's configuration adds to its family's. ``hidden_size`` keeps the dense value.

    Args:
        stream_sizes: width of the residual stream entering each block (attention and MLP of layer 0, of layer
            1, ...) and, last, the head: 2 * num_hidden_layers + 1 sizes. None: ``hidden_size`` everywhere.
        tie_word_embeddings: always False; the head takes the final norm's weights and another basis.

    Raises:
        ValueError: a list of the wrong length, or a width outside 1..hidden_size.
    """

    stream_sizes: list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        count = 2 * self.num_hidden_layers + 1
        if self.stream_sizes is None:
            self.stream_sizes = [self.hidden_size] * count
        if len(self.stream_sizes) != count:
            raise ValueError(
                f"stream_sizes has {len(self.stream_sizes)} entries; {self.num_hidden_layers} layers need {count}"
            )
        if not all(1 <= size <= self.hidden_size for size in self.stream_sizes):
            raise ValueError(f"stream_sizes must lie in 1..{self.hidden_size}, got {self.stream_sizes}")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be false in a sliced model")


class StreamRMSNorm(nn.Module):
    """``x / sqrt(|x|^2 / full_size + eps)`` without weights.

    The mean is over the dense width, whatever is left of it, so that slicing does not rescale what stays.
    """

    def __init__(self, full_size: int, eps: float):
        super().__init__()
        self.full_size, self.eps = full_size, eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., stream size) to the same shape; computed in float32 at least."""
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) / self.full_size + self.eps)).to(x.dtype)


class SlicedLayer:
    """Mixin in front of a family's decoder layer: two blocks, each ``x S + f(norm(x))`` with its shortcut ``S``.

    ``readers`` and ``writers`` name the linears that read the stream and write to it, of either block, those of every
    expert with ``*`` for its number; ``norms`` the two norms, which lose their weights. ``router``: the reader that is
    a mixture's router. ``readers_biased``: readers always have a bias (a LayerNorm's bias is folded into it).
    """

    attention_readers: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_writers: tuple[str, ...] = ("self_attn.o_proj",)
    mlp_readers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_writers: tuple[str, ...] = ("mlp.down_proj",)
    router: str | None = None
    norms = ("input_layernorm", "post_attention_layernorm")
    readers_biased = False

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.take_apart(config)
        sizes = config.stream_sizes[2 * layer_idx : 2 * layer_idx + 3]
        for (readers, writers, shortcut), size, next_size in zip(self.blocks(config), sizes, sizes[1:], strict=False):
            for path in readers:
                self._resize(path, in_features=size, bias=self.readers_biased)
            for path in writers:
                self._resize(path, out_features=next_size)
            setattr(self, shortcut, nn.Linear(size, next_size, bias=False))
        for name in self.norms:
            setattr(self, name, StreamRMSNorm(config.hidden_size, norm_eps(config)))
        self.branch_dropout = getattr(config, "dropout", 0.0)

    def take_apart(self, config: Any) -> None:
        """Replace what the family stores as one by its parts."""

    @classmethod
    def blocks(cls, config: Any) -> tuple[tuple[list[str], list[str], str], ...]:
        """Of either block the paths of its readers and writers, and the name of its shortcut."""

        def each(paths: tuple[str, ...]) -> list[str]:
            counts = (config.num_experts if "*" in path else 1 for path in paths)
            return [path.replace("*", str(e)) for path, count in zip(paths, counts, strict=True) for e in range(count)]

        return (
            (each(cls.attention_readers), each(cls.attention_writers), "attention_shortcut"),
            (each(cls.mlp_readers), each(cls.mlp_writers), "mlp_shortcut"),
        )

    def _resize(
        self, path: str, *, in_features: int | None = None, out_features: int | None = None, bias: bool = False
    ) -> None:
        owner, _, name = path.rpartition(".")
        parent = self.get_submodule(owner)
        linear = getattr(parent, name)
        if path == self.router:
            assert in_features is not None, "a router only reads"
            linear.hidden_dim, linear.weight = in_features, nn.Parameter(torch.empty(len(linear.weight), in_features))
            return
        sizes = in_features or linear.in_features, out_features or linear.out_features
        setattr(parent, name, nn.Linear(*sizes, bias=bias or linear.bias is not None))

    def attention_block(self, x: Tensor, **kwargs: Any) -> Tensor:
        """The attention block on ``x`` (batch, sequence, attention width); out: (batch, sequence, MLP width)."""
        branch, _ = self.self_attn(hidden_states=getattr(self, self.norms[0])(x), **kwargs)
        return self.attention_shortcut(x) + dropout(branch, p=self.branch_dropout, training=self.training)

    def mlp_block(self, x: Tensor) -> Tensor:
        """The MLP block on ``x`` (batch, sequence, MLP width); out: (batch, sequence, next layer's width)."""
        branch = self.mlp_branch(getattr(self, self.norms[1])(x))
        return self.mlp_shortcut(x) + dropout(branch, p=self.branch_dropout, training=self.training)

    def mlp_branch(self, x: Tensor) -> Tensor:
        """The MLP itself, from the normalised stream to what is added to it."""
        return self.mlp(x)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """``hidden_states`` (batch, sequence, this layer's width) to (batch, sequence, next layer's width)."""
        return self.mlp_block(self.attention_block(hidden_states, **kwargs))


class SlicedExperts(nn.Module):
    """The experts of a layer, each an MLP by itself, by number."""

    def __init__(self, config: Any):
        super().__init__()
        width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        for index in range(config.num_experts):
            self.add_module(str(index), Qwen3MoeMLP(config, intermediate_size=width))

    def forward(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """(tokens, in), with the experts of each token and their shares (tokens, top k), to (tokens, out)."""
        writer: Any = self.get_submodule("0.down_proj")
        total = x.new_zeros(len(x), writer.out_features)
        for index, expert in enumerate(self.children()):
            token, place = torch.where(experts == index)
            if len(token):
                total.index_add_(0, token, (expert(x[token]) * shares[token, place].unsqueeze(-1)).to(total.dtype))
        return total


class SlicedMixtureLayer(SlicedLayer):
    """The same of a mixture of experts, whose router reads the stream as they do."""

    mlp_readers = ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
    mlp_writers = ("mlp.experts.*.down_proj",)
    router = "mlp.gate"

    def take_apart(self, config: Any) -> None:
        """Replace what the family stores as one by its parts."""
        self.mlp.experts = SlicedExperts(config)

    def mlp_branch(self, x: Tensor) -> Tensor:
        """The MLP itself, from the normalised stream to what is added to it."""
        flat = x.flatten(0, -2)
        _, shares, experts = self.mlp.gate(flat)
        return self.mlp.experts(flat, experts, shares).unflatten(0, x.shape[:-1])


class SlicedCausalLM:
    """Mixin in front of a family's causal language model: its embeddings, layers, final norm and head are sliced."""

    layer_class: type
    final_norm = "norm"
    head_biased = False

    def __init__(self, config: Any):
        super().__init__(config)
        decoder = self.get_decoder()
        decoder.embed_tokens = nn.Embedding(config.vocab_size, config.stream_sizes[0], decoder.padding_idx)
        decoder.layers = nn.ModuleList(self.layer_class(config, index) for index in range(config.num_hidden_layers))
        setattr(decoder, self.final_norm, StreamRMSNorm(config.hidden_size, norm_eps(config)))
        self.lm_head = nn.Linear(config.stream_sizes[-1], config.vocab_size, bias=self.head_biased)
        self.post_init()


def norm_eps(config: Any) -> float:
    """The epsilon of the family's norms; OPT's LayerNorm keeps torch's."""
    return getattr(config, "rms_norm_eps", 1e-5)


class SlicedOPTBlocks(SlicedLayer):
    """LayerNorm became RMSNorm: its mean subtraction, scale and bias are folded into the maps around it."""

    attention_writers = ("self_attn.out_proj",)
    mlp_readers = ("fc1",)
    mlp_writers = ("fc2",)
    norms = ("self_attn_layer_norm", "final_layer_norm")
    readers_biased = True

    def mlp_branch(self, x: Tensor) -> Tensor:
        """The MLP itself, from the normalised stream to what is added to it."""
        return self.fc2(self.activation_fn(self.fc1(x)))


class SlicedOPTEnds(SlicedCausalLM):
    """Positions are embedded in the sliced stream too, and the head has the final norm's bias."""

    final_norm = "final_layer_norm"
    head_biased = True

    def __init__(self, config: Any):
        super().__init__(config)
        decoder = self.get_decoder()
        decoder.embed_positions = OPTLearnedPositionalEmbedding(config.max_position_embeddings, config.stream_sizes[0])
        self.post_init()


def _declare(
    classes: str, model_type: str, *, layer: type = SlicedLayer, causal: type[SlicedCausalLM] = SlicedCausalLM
) -> Any:
    """The sliced model class of the family whose own are called ``classes``, with those of its configuration and
    layer, in this module.
    """
    native = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")

    def declare(kind: str, mixin: type, base: str, **attributes: Any) -> Any:
        name = f"Sliced{classes}{kind}"
        about = f"``{base}`` on the sliced stream."
        bases = (mixin, getattr(native, base))
        globals()[name] = type(name, bases, {"__module__": __name__, "__doc__": about, **attributes})
        return globals()[name]

    config = declare("Config", SlicedFields, f"{classes}Config", model_type=f"sliced_{model_type}")
    return declare(
        "ForCausalLM",
        causal,
        f"{classes}ForCausalLM",
        config_class=strict(config),
        layer_class=declare("Layer", layer, f"{classes}DecoderLayer"),
    )


MODELS: tuple[Any, ...] = (
    _declare("Llama", "llama"),
    _declare("Mistral", "mistral"),
    _declare("Qwen2", "qwen2"),
    _declare("Qwen3", "qwen3"),
    _declare("OPT", "opt", layer=SlicedOPTBlocks, causal=SlicedOPTEnds),
    _declare("Mixtral", "mixtral", layer=SlicedMixtureLayer),
    _declare("Qwen3Moe", "qwen3_moe", layer=SlicedMixtureLayer),
    _declare("Olmoe", "olmoe", layer=SlicedMixtureLayer),
)
"""Every sliced model class; a new family joins here."""
