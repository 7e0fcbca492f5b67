"""A causal language model whose weights stay on disk: a skeleton on the meta device, filled one layer at a time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from modegpt.errors import UserError
from modegpt.models import decoder_layers, family_of, unfused
from modegpt.models.checkpoints import load_config, located
from modegpt.models.fit import check_names, check_sizes, untied
from modegpt.models.integrity import check_tensor_finite, fingerprint_tensors
from modegpt.streaming.shards import Shards

FLOATING = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass
class StreamedModel:
    """``model`` has every shape and no data, but for what ``outer`` and ``layer`` load while they are open.

    ``sources`` says where each of its tensors is stored: a name in ``shards`` and the rows of it.
    """

    shards: Shards
    model: PreTrainedModel
    device: torch.device
    sources: dict[str, tuple[str, slice]]

    @classmethod
    def open(cls, path: str, *, dtype: str = "auto", device: str = "cpu") -> "StreamedModel":
        """The dense or compressed model in a local directory (or ``embedded:NAME``), in the dtype of ``load_model``.

        Raises UserError for what is not a whole local checkpoint of a supported family in safetensors form.
        """
        if not path.startswith(("embedded:", "/", ".", "~")) and not Path(path).exists():
            raise UserError(
                f"out_of_core reads a local directory and {path} is none; "
                "download it first: model=local model.path=DIRECTORY"
            )
        with located(path) as source:
            config = load_config(path, source)
            shards = Shards(Path(source))
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=_dtype(dtype, config.dtype, shards), trust_remote_code=False
                )
            if (Path(source) / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(source)
            native = model
            model = unfused(native).requires_grad_(False).eval()
            return cls(shards, model, torch.device(device), _sources(model, native, shards))

    @property
    def layers_prefix(self) -> str:
        """What the names of layer tensors start with."""
        return f"{family_of(self.model.config).layers}."

    @property
    def tied(self) -> dict[str, str]:
        """Names of tensors that are another's, and that other's."""
        return _tied(self.model)

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name`` of ``model``, in the model's dtype, on the CPU."""
        stored, rows = self.sources[name]
        tensor = self.shards.read(stored, rows)
        return tensor.to(self.model.dtype) if tensor.is_floating_point() else tensor

    def fingerprint(self) -> str:
        """The ``fingerprint_weights`` of the loaded model, in one pass over the files.

        Raises UserError for NaN or inf in a weight.
        """

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in sorted(self.sources):
                tensor = self.tensor(name)
                check_tensor_finite(name, tensor)
                yield name, tensor

        return fingerprint_tensors(tensors())

    def outer_names(self, *, head: bool) -> list[str]:
        """Names of the tensors outside the layers: embeddings and final norm, with the output head or without."""
        base = f"{self.model.base_model_prefix}."
        return [
            name for name in self.sources if not name.startswith(self.layers_prefix) and (head or name.startswith(base))
        ]

    @contextmanager
    def outer(self, *, head: bool) -> Iterator[PreTrainedModel]:
        """The model with everything but its layers loaded (and but its ``head``, where that is not wanted)."""
        names = [name for name in self.outer_names(head=head) if name not in self.tied]
        self._fill_buffers()
        self.model.load_state_dict(
            {name: self.tensor(name).to(self.device) for name in names}, strict=False, assign=True
        )
        self.model.tie_weights()
        try:
            yield self.model
        finally:
            self.model.to_empty(device="meta")
            self.model.tie_weights()

    def _fill_buffers(self) -> None:
        """Give the modules outside the layers the buffers that are in no checkpoint, as ``from_pretrained`` does."""
        decoder = self.model.get_decoder()
        if hasattr(decoder, "rotary_emb"):
            decoder.rotary_emb = type(decoder.rotary_emb)(config=self.model.config).to(self.device)
        for path, module in self.model.named_modules():
            unstored = [name for name in module._non_persistent_buffers_set if module.get_buffer(name).is_meta]
            if unstored and not f"{path}.".startswith(self.layers_prefix):
                for name in unstored:
                    setattr(module, name, torch.empty_like(module.get_buffer(name), device=self.device))
                self.model._init_weights(module)  # its parameters have no data yet and stay as they are

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer ``index``, loaded; its memory is let go at the end."""
        layer = decoder_layers(self.model)[index]
        names = list(layer.state_dict())
        tensors = {name: self.tensor(f"{self.layers_prefix}{index}.{name}").to(self.device) for name in names}
        layer.load_state_dict(tensors, strict=True, assign=True)
        del tensors
        assert not any(buffer.is_meta for buffer in layer.buffers()), "a layer's buffer is in no checkpoint"
        try:
            yield layer
        finally:
            layer.to_empty(device="meta")


def _dtype(wanted: str, stated: Any, shards: Shards) -> torch.dtype:
    """As ``from_pretrained``: the dtype asked for, else the configuration's, else that of the first floating tensor."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if stated is not None:
        return stated
    return next(FLOATING[dtype] for name in shards.files if (dtype := shards.dtype_of(name)) in FLOATING)


def _tied(model: PreTrainedModel) -> dict[str, str]:
    return dict(model.get_expanded_tied_weights_keys(all_submodels=True))


def _sources(model: PreTrainedModel, native: PreTrainedModel, shards: Shards) -> dict[str, tuple[str, slice]]:
    """Where each tensor of ``model`` is stored.

    ``native`` has the fused maps of the family, which ``model`` has apart. Raises UserError for tensors that are
    missing or misshapen, and for tied ones that differ.
    """
    tied, expected = _tied(model), model.state_dict()
    fused = _fused_parts(model) if native is not model else {}
    found = {name: _source(name, model, expected, fused, shards) for name in expected}
    for name, original in tied.items():
        ours, theirs = found[name], found[original]
        if ours and theirs and not torch.equal(shards.read(ours[0]), shards.read(theirs[0])):
            raise untied(str(shards.directory), name, original)
        found[name] = found[original] = theirs or ours
    sources = {name: source for name, source in found.items() if source is not None}
    where, read = str(shards.directory), {stored for stored, _ in sources.values()}
    tied_names = {known for name in tied for known in _stored_names(name, model)}
    check_names(
        where, model.config, missing=expected.keys() - sources.keys(), extra=shards.files.keys() - read - tied_names
    )
    shapes = [
        (stored, shards.shape(stored), list(expected[name].shape), rows) for name, (stored, rows) in sources.items()
    ]
    check_sizes(
        where,
        model.config,
        [
            (stored, shape, wanted)
            for stored, shape, wanted, rows in shapes
            if (shape != wanted and rows == slice(None)) or shape[1:] != wanted[1:]
        ],
    )
    return sources


def _fused_parts(model: PreTrainedModel) -> dict[str, tuple[str, tuple[str, ...]]]:
    """For each map that the family stores inside a fused one: the fused map and all its parts, in order."""
    fused = family_of(model.config).fused
    return {part: (whole, tuple(parts)) for whole, parts in fused.items() for part in parts}


def _source(
    name: str,
    model: PreTrainedModel,
    expected: Mapping[str, Tensor],
    fused: Mapping[str, tuple[str, tuple[str, ...]]],
    shards: Shards,
) -> tuple[str, slice] | None:
    """The stored name and rows of tensor ``name``; None where it is missing."""
    path, _, last = name.rpartition(".")
    rows = slice(None)
    for part, (whole, parts) in fused.items():
        if path.endswith(f".{part}"):
            layer = path.removesuffix(part)
            sizes = [len(expected[f"{layer}{member}.{last}"]) for member in parts]
            start = sum(sizes[: parts.index(part)])
            name, rows = f"{layer}{whole}.{last}", slice(start, start + sizes[parts.index(part)])
            break
    return next(((stored, rows) for stored in _stored_names(name, model) if stored in shards), None)


def _stored_names(name: str, model: PreTrainedModel) -> tuple[str, ...]:
    """How a checkpoint may call tensor ``name``: one of the base model alone has no prefix."""
    names = dict.fromkeys((name, family_of(model.config).stored_name(name)))
    return *names, *(each.removeprefix(f"{model.base_model_prefix}.") for each in names)
