"""Whether a configuration and a tokenizer belong to the weights beside them."""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modegpt.errors import UserError
from modegpt.models.families import family_of

QUANTISED = re.compile(r"\.(qweight|qzeros|scales|absmax|quant_map|SCB|weight_scale|weight_scale_inv)$")
"""Names of tensors that only quantised checkpoints have."""
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$")
"""Names of tensors that old versions of Transformers saved and nothing reads."""


def check_unquantised(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError for the configuration of a checkpoint in GPTQ, AWQ, bitsandbytes or another such form."""
    quantised = config.get("quantization_config")
    if quantised is None:
        return
    method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
    raise UserError(
        f"{where}: config.json has quantization_config with quant_method={method!r:.40}; "
        "quantised weights cannot be compressed: give the checkpoint before quantisation"
    )


def check_names(path: str, config: PreTrainedConfig, *, missing: Collection[str], extra: Iterable[str]) -> None:
    """Refuse weights that lack tensors of ``config``, or have ``extra`` ones in their layers.

    Warns of extra ones elsewhere, such as a second head. Raises UserError naming the first.
    """
    extra = sorted(name for name in extra if not HARMLESS.search(name))
    if quantised := [name for name in extra if QUANTISED.search(name)]:
        raise UserError(
            f"{path} holds quantised weights, first {quantised[0]}; give the checkpoint before quantisation"
        )
    if missing:
        first = sorted(missing)[0]
        layers = f"; config.json has num_hidden_layers={config.num_hidden_layers}" if _layer(config, first) else ""
        raise UserError(
            f"{path} lacks {len(missing)} of its tensors, first {first}: "
            f"incomplete, or not a causal language model{layers}"
        )
    if not extra:
        return
    for name in extra:
        if (index := _layer(config, name)) is None:
            continue
        if index >= config.num_hidden_layers:
            raise UserError(
                f"{path}: config.json has num_hidden_layers={config.num_hidden_layers}, "
                f"but the weights have more: {name}"
            )
        raise UserError(f"{path} holds {name}, for which config.json has no place; it describes another architecture")
    warnings.warn(f"{path} holds tensors outside its layers that nothing reads, first {extra[0]}", stacklevel=2)


def check_sizes(
    path: str, config: PreTrainedConfig, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]
) -> None:
    """Refuse weights of another size than ``config`` asks for. Raises UserError naming a tensor and the field.

    ``mismatched``: name, stored size and the size asked for of each.
    """
    found = sorted((name, list(stored), list(wanted)) for name, stored, wanted in mismatched)
    for name, stored, wanted in sorted(found, key=lambda each: len(each[1])):  # norms tell a wrong hidden size
        fields = [field for field in _fields(config, name, wanted) if getattr(config, field, None) is not None]
        given = ", ".join(f"{field}={getattr(config, field)}" for field in fields)
        raise UserError(
            f"{path}: config.json has {given}, but {name} is {_times(stored)} and not {_times(wanted)}; "
            "the configuration is that of another model"
        )


def check_tied(path: str, model: PreTrainedModel) -> None:
    """Refuse an output head that is stored with other values than the embedding it should be. Raises UserError."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not embedding.weight:
        raise untied(path, "lm_head.weight", "the embedding")


def untied(path: str, name: str, original: str) -> UserError:
    """The error for a tensor that a configuration calls equal to another, and that is not."""
    return UserError(
        f"{path}: config.json has tie_word_embeddings=true, but {name} is stored with other values than {original}; "
        "set it to false"
    )


def check_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse a tokenizer that turns text into ids that a model with ``vocab_size`` embeddings has not.

    Tokens that were added to it do not count: several models have some that no text of theirs holds.
    Raises UserError.
    """
    added = tokenizer.added_tokens_decoder
    ids = [number for number in tokenizer.get_vocab().values() if number not in added]
    largest = max([*ids, *tokenizer("")["input_ids"]])
    if largest >= vocab_size:
        raise UserError(
            f"{path}: the tokenizer has ids up to {largest}, but config.json has vocab_size={vocab_size}; "
            "they do not belong together"
        )


def _layer(config: PreTrainedConfig, name: str) -> int | None:
    """The number of the layer that a tensor is in."""
    prefix, _, rest = name.partition(f"{family_of(config).layers.rpartition('.')[2]}.")
    number = rest.partition(".")[0]
    return int(number) if prefix != name and number.isdigit() else None


def _fields(config: PreTrainedConfig, name: str, wanted: Sequence[int]) -> tuple[str, ...]:
    """The fields of the configuration that decide the size of a tensor."""
    if len(wanted) == 1 and wanted[0] == config.hidden_size:
        return ("hidden_size",)
    if _layer(config, name) is None:
        return ("vocab_size", "max_position_embeddings", "word_embed_proj_dim", "hidden_size")
    if f".{family_of(config).attention_path}." in name:
        return ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    return ("intermediate_size", "ffn_dim", "hidden_size")


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
