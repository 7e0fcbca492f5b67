"""A compressed model as one GGUF file, which llama.cpp runs without this package.

Of llama.cpp's architectures ``deci`` takes a width and a number of heads for each layer, with one head size for all,
so MLPs keep their widths (up to a multiple that quantised rows want) and heads get zeros up to the dense size. Families
with norms or an activation that ``deci`` has not are written in their own architecture, which has one width.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.errors import UserError
from modegpt.files import read_json, replacing
from modegpt.models import Family, decoder_layers, family_of
from modegpt.models.deci import ATTENTION, MLP, check_deci, deci_layer, deci_sizes, outside_layers, untied
from modegpt.models.export import (
    ExportReport,
    Size,
    common_heads,
    dense_size,
    fixed_frequencies,
    frequency_factors,
    stock_model,
)
from modegpt.models.families import RESIZED
from modegpt.models.weights import bias_of
from modegpt.progress import errors_only

TYPES = {"f32": 1, "f16": 1, "q8_0": 32, "q4_0": 32, "q4_k": 256}
"""What weights are stored as, and the multiple that the rows of a matrix must have for it."""
OWN = ("gemma", "qwen3")
"""Families that llama.cpp knows by their own name, with one width."""
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD_BREAKS = {SHORT + r"\p{N}{1,3}" + REST: "llama-bpe", SHORT + r"\p{N}" + REST: "qwen2"}
"""Expressions by which byte-level tokenizers break text into words, and llama.cpp's names for them."""
ROPE_FACTORS = "rope factors"


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    kind: str = "f16",
    width_multiple: int | None = None,
    accept: Callable[[ExportReport], object] = lambda report: None,
) -> ExportReport:
    """Write the compressed ``model`` to ``path``, whole or not at all; returns what it costs.

    Args:
        kind: one of ``TYPES``. Matrices whose rows are no multiple of what it wants are stored as q8_0, or else f16;
            embeddings and the head are q8_0 instead of 4 bits. Norms and biases are f32.
        width_multiple: MLP widths are rounded up to a multiple of this; None: of what ``kind`` wants.
        accept: sees the price before anything is written, and may raise.

    Raises:
        UserError: the package gguf is missing, or llama.cpp has no architecture, no rotary scaling or no tokenizer
            like these.
    """
    if find_spec("gguf") is None:
        raise UserError("writing GGUF files needs the package gguf: pip install gguf")
    import gguf

    layout = _layout(model, width_multiple or TYPES[kind])
    writer = gguf.GGUFWriter(None, layout.arch)
    _add_sizes(writer, model, layout)
    writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7, "q4_0": 2, "q4_k": 14}[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, tokenizer, model.config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[layout.arch.upper()], len(layout.widths))
    num_parameters = num_bytes = 0
    stored: Counter[str] = Counter()
    for name, tensor in layout.tensors():
        array = tensor.to(torch.float32).numpy()
        wanted = "f32" if array.ndim == 1 else _fitting(kind, array.shape[1], inside=".layers." in name)
        place = "rope_freqs.weight" if name == ROPE_FACTORS else names.get_name(name, (".weight", ".bias"))
        assert place is not None, name
        stored[wanted] += array.ndim == 2
        num_parameters += 0 if name == ROPE_FACTORS else array.size
        num_bytes += _add_tensor(writer, place, array, wanted)
    cache = 2 * 2 * layout.head_dim * sum(layout.kv_heads)  # keys and values in f16, llama.cpp's own choice
    hint = (
        f"Zeros fill heads to {layout.head_dim}, and widths to {min(layout.widths)}..{max(layout.widths)} "
        f"(compressed: {min(model.config.intermediate_sizes)}..{max(model.config.intermediate_sizes)})."
    )
    note = f"llama.cpp's architecture {layout.arch}; matrices as {_listed(stored)}; its cache is f16."
    report = ExportReport(dense_size(model), Size.of(model), Size(num_parameters, num_bytes, cache), hint, note)
    accept(report)
    with replacing(path) as partial:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return report


@dataclass(frozen=True)
class _Layout:
    """A model in llama.cpp's terms; ``tensors`` yields names of Transformers and data."""

    arch: str
    widths: list[int]
    kv_heads: list[int]
    heads: list[int]
    head_dim: int
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]


def _layout(model: PreTrainedModel, width_multiple: int) -> _Layout:
    if not model.config.model_type.startswith(RESIZED):
        raise UserError(f"{model.config.model_type} is not a model of layers of free sizes; use llama.cpp's converter")
    family = family_of(model.config)
    if family.model_type in OWN:
        return _own_layout(model, family, width_multiple)
    return _deci_layout(model, family, width_multiple)


def _own_layout(model: PreTrainedModel, family: Family, width_multiple: int) -> _Layout:
    """The family's own form; where a norm adds something to its weight, llama.cpp wants it added."""
    stock, _ = stock_model(model, width_multiple=width_multiple)
    count, own, offset = model.config.num_hidden_layers, stock.config, family.norm_offset
    if own.head_dim < model.config.dense_head_dim:
        raise UserError(f"llama.cpp's architecture {family.model_type} has no frequencies of one's own")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in untied(stock):
            yield name, tensor + offset if offset and "norm" in name else tensor

    kv_heads, heads = [own.num_key_value_heads] * count, [own.num_attention_heads] * count
    return _Layout(
        family.model_type, [own.intermediate_size] * count, kv_heads, heads, model.config.dense_head_dim, tensors
    )


def _deci_layout(model: PreTrainedModel, family: Family, width_multiple: int) -> _Layout:
    """``deci``'s rotary pairs are neighbours where Transformers' are halves of a head."""
    check_deci(model, engine="llama.cpp's architecture deci")
    config, (size, _) = model.config, common_heads(model)
    widths, kv_heads = deci_sizes(model, width_multiple)
    factors = _rope_factors(model)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from outside_layers(model)
        if factors is not None:
            yield ROPE_FACTORS, factors
        for index, layer in enumerate(decoder_layers(model)):
            biased = {path for path in (*ATTENTION, *MLP) if bias_of(layer.get_submodule(path)) is not None}
            made = deci_layer(
                layer,
                config,
                head_dim=size,
                width=widths[index],
                num_kv_heads=kv_heads[index],
                biased=biased,
                where=f"layer {index}",
            )
            for name, tensor in made.items():
                if name.startswith((f"{family.query_path}.", f"{family.key_path}.")):
                    tensor = tensor.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)
                yield f"{family.layers}.{index}.{name}", tensor

    heads = [count * (config.num_attention_heads // config.dense_kv_heads) for count in kv_heads]
    return _Layout("deci", widths, kv_heads, heads, size, tensors)


def _rope_factors(model: PreTrainedModel) -> Tensor | None:
    """What divides each default frequency to give the model's own; None where these are the default ones."""
    if not fixed_frequencies(model):
        kind = model.config.rope_parameters["rope_type"]
        raise UserError(f"rotary scaling of type {kind} has no form in llama.cpp's architecture deci")
    factors = frequency_factors(model).float()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors


def _add_sizes(writer: Any, model: PreTrainedModel, layout: _Layout) -> None:
    """The keys that say what there is of each thing."""
    config = model.config

    def one_or_each(sizes: list[int]) -> int | list[int]:
        return sizes if layout.arch == "deci" else sizes[0]

    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layout.widths))
    writer.add_feed_forward_length(one_or_each(layout.widths))
    writer.add_head_count(one_or_each(layout.heads))
    writer.add_head_count_kv(one_or_each(layout.kv_heads))
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_rope_dimension_count(layout.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(model.config.vocab_size)


def _fitting(kind: str, row: int, *, inside: bool) -> str:
    """What a matrix with rows of ``row`` entries is stored as, where ``kind`` was asked for."""
    if kind in ("q4_0", "q4_k") and (row % TYPES[kind] or not inside):
        kind = "q8_0"
    return "f16" if kind == "q8_0" and row % TYPES["q8_0"] else kind


def _listed(stored: Counter[str]) -> str:
    return ", ".join(f"{kind} ({count})" for kind, count in stored.items() if count)


def _add_tensor(writer: Any, name: str, array: NDArray[np.float32], kind: str) -> int:
    """Add ``array`` as ``kind``; returns its bytes."""
    import gguf

    if kind == "q4_k":
        data = quantise_q4_k(array)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    else:
        stored_as = gguf.GGMLQuantizationType[kind.upper()]
        data = gguf.quants.quantize(np.ascontiguousarray(array), stored_as)
        writer.add_tensor(name, data, raw_dtype=stored_as)
    return int(data.nbytes)


def quantise_q4_k(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rows of a multiple of 256 entries as llama.cpp's Q4_K: 144 bytes for each 256.

    In groups of 32, ``x = d s q - e m`` with q of 4 bits, s and m of 6, and d and e of 16 for each 256. From the range
    of a group, s and m are refitted to the roundings by least squares.
    """
    x = rows.reshape(-1, 8, 32)
    low = np.minimum(x.min(-1, keepdims=True), 0.0)
    step = np.maximum(x.max(-1, keepdims=True) - low, 1e-12) / 15
    for _ in range(4):
        q = np.clip(np.rint((x - low) / step), 0, 15)
        spread = q - q.mean(-1, keepdims=True)
        norm = np.square(spread).sum(-1, keepdims=True)
        fitted = (spread * x).sum(-1, keepdims=True) / np.maximum(norm, 1e-12)
        step = np.where((norm > 0) & (fitted > 0), fitted, step)
        low = np.minimum((x - step * q).mean(-1, keepdims=True), 0.0)
    d, e = (
        np.maximum(each.max(1, keepdims=True) / 63, 1e-7).astype(np.float16).astype(np.float32) for each in (step, -low)
    )
    s, m = (np.clip(np.rint(each), 0, 63).astype(np.uint8) for each in (step / d, -low / e))
    q = np.clip(np.rint((x + e * m) / np.maximum(d * s, 1e-12)), 0, 15).astype(np.uint8)
    s, m = s[..., 0], m[..., 0]
    scales = [part[:, :4] | (part[:, 4:] >> 4 << 6) for part in (s, m)]
    scales.append((s[:, 4:] & 15) | (m[:, 4:] & 15) << 4)
    nibbles = (q[:, 0::2] | q[:, 1::2] << 4).reshape(len(x), 128)
    halves = [each[:, 0].astype(np.float16).view(np.uint8) for each in (d, e)]
    return np.concatenate([*halves, *scales, nibbles], axis=1).reshape(len(rows), -1)


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> None:
    """The tokenizer's keys: BPE over bytes, or over characters as SentencePiece has it."""
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        described = read_json(Path(folder) / "tokenizer.json")
        word_breaks = _word_breaks(described)
        with errors_only(["gguf.vocab"]):  # it warns of pairs of sequences, which a file has not
            special = gguf.SpecialVocab(folder, load_merges=word_breaks is not None, n_vocab=num_rows)
    vocabulary: dict[int, str] = {index: token for token, index in described["model"]["vocab"].items()}
    types = {index: gguf.TokenType.NORMAL for index in vocabulary}
    if word_breaks is None:
        types |= {
            index: gguf.TokenType.BYTE for index, token in vocabulary.items() if re.fullmatch("<0x[0-9A-F]{2}>", token)
        }
    for added in described["added_tokens"]:
        vocabulary[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    unknown = described["model"].get("unk_token")
    if unknown is not None and word_breaks is None:
        types[described["model"]["vocab"][unknown]] = gguf.TokenType.UNKNOWN
    rows = range(num_rows)
    writer.add_tokenizer_model("llama" if word_breaks is None else "gpt2")
    writer.add_tokenizer_pre(word_breaks or "default")
    writer.add_token_list([vocabulary.get(index, f"[PAD{index}]") for index in rows])
    writer.add_token_types([types.get(index, gguf.TokenType.UNUSED) for index in rows])
    if word_breaks is None:
        writer.add_token_scores(_scores(described["model"], rows))
        steps = (described["normalizer"] or {}).get("normalizers", [described["normalizer"] or {}])
        writer.add_add_space_prefix(any(step.get("type") == "Prepend" for step in steps))
    special.add_to_gguf(writer, quiet=True)


def _scores(described: Any, rows: range) -> list[float]:
    """SentencePiece joins what has the highest score first: the earlier a merge is listed, the higher."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(described["merges"]):
        ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
    names = {index: token for token, index in described["vocab"].items()}
    return [-float(ranks.get(names.get(index, ""), len(ranks))) for index in rows]


def _word_breaks(described: Any) -> str | None:
    """llama.cpp's name for how a byte-level tokenizer breaks text into words; None for one of SentencePiece's kind."""
    breaks = described["pre_tokenizer"] or {}
    steps = breaks.get("pretokenizers", [breaks])
    kinds = [step.get("type") for step in steps]
    if described["model"]["type"] == "BPE":
        if kinds[-1] != "ByteLevel":
            replaces = "\u2581" in str(described["normalizer"])
            if replaces and kinds in ([None], ["Split"]):
                return None
        elif kinds == ["ByteLevel"] and steps[0]["use_regex"]:
            return "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return "smollm"
        elif kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") in WORD_BREAKS:
            return WORD_BREAKS[steps[0]["pattern"]["Regex"]]
    raise UserError(f"a tokenizer of {described['model']['type']} over {kinds} has no known form in GGUF")
