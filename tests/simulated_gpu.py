"""The main job on a simulated GPU: ``python -m tests.simulated_gpu OVERRIDES``.

Tensors say that they are on ``cuda:0`` and keep their numbers on the CPU, where every operation runs. What a GPU
refuses is refused: an operation on tensors of both devices (tensors without dimensions and CPU indices excepted, as
there) and numpy's view of device memory. What this cannot show is speed, rounding, kernels that lack a data type, and
gradients, for which autograd wants a real device. It is a process of its own, because PyTorch's table of devices is
changed for good.
"""

import ctypes
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

GPU = torch.device("cuda", 0)
MEMORY_BYTES = 80 * 2**30
GUARDS, META_DEVICE, CUDA_DEVICE = "_ZN3c104impl26device_guard_impl_registryE", 14, 1
MOVES = ("aten::to", "aten::_to_copy", "aten::copy_")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")

LAUNCHES: list[Callable[[str, list[Tensor], list[Tensor]], None]] = []
"""Called after each operation on the device, but for views: its name, and the tensors that it read and wrote."""


class OnGpu(Tensor):
    """A tensor of device ``cuda:0`` around ``values``, a CPU tensor."""

    @staticmethod
    def __new__(cls, values: Tensor):
        like = {
            "strides": values.stride(),
            "storage_offset": values.storage_offset(),
            "dtype": values.dtype,
            "requires_grad": values.requires_grad,
        }
        return Tensor._make_wrapper_subclass(cls, values.shape, device=GPU, **like)

    def __init__(self, values: Tensor):
        self.held = values

    def __repr__(self):
        return f"OnGpu({self.held})"

    def untyped_storage(self):
        return self.held.untyped_storage()

    def tolist(self):
        return self.held.tolist()

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @property
    def data(self):
        return OnGpu(self.held.detach())

    @data.setter
    def data(self, other):
        Tensor.data.__set__(self, other)
        self.held = other.held

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), keywords=None):
        return computed(operation, arguments, keywords or {})


class Device(TorchDispatchMode):
    """Sends what makes a tensor on the simulated device, or reads one, to ``computed``."""

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        everything = list(tree_iter((arguments, keywords)))
        if any(
            isinstance(each, OnGpu) or (isinstance(each, torch.device) and each.type == "cuda") for each in everything
        ):
            return computed(operation, arguments, keywords or {})
        return operation(*arguments, **(keywords or {}))


def computed(operation: Any, arguments: tuple, keywords: dict) -> Any:
    """``operation`` by the CPU. Raises RuntimeError where the devices of its tensors do not go together."""
    schema = operation._schema
    everything = list(tree_iter((arguments, keywords)))
    tensors = [each for each in everything if isinstance(each, Tensor)]
    asked = [each.type for each in everything if isinstance(each, torch.device)]
    if schema.name == "aten::to" and not asked and len(tensors) == 2:  # to(other)
        asked = [tensors[1].device.type]
    on_gpu = any(isinstance(each, OnGpu) for each in tensors)
    if on_gpu and schema.name not in MOVES:
        indices = set(map(id, tree_iter(arguments[1]))) if schema.name in INDEXED else set()
        strangers = [each for each in tensors if not isinstance(each, OnGpu) and each.dim() and id(each) not in indices]
        if strangers or (indices and not isinstance(arguments[0], OnGpu)):
            raise RuntimeError(
                f"{schema.name}: tensors on cuda:0 and on the CPU, of shapes {[tuple(each.shape) for each in tensors]}"
            )
    if schema.name == "aten::_fused_sdp_choice":
        return 0  # attention by its definition
    inside, named = tree_map(_on_cpu, (arguments, keywords))
    if "out_dtype" in [each.name for each in schema.arguments]:  # which CPU kernels do not have
        return OnGpu(torch.bmm(inside[0].float(), inside[1].float()))
    result = operation(*inside, **named)
    written = [
        keywords.get(each.name, arguments[place] if place < len(arguments) else None)
        for place, each in enumerate(schema.arguments)
        if each.alias_info and each.alias_info.is_write
    ]
    to_gpu = asked[0] == "cuda" if asked else on_gpu
    if not written and to_gpu:
        result = tree_map(lambda each: OnGpu(each) if isinstance(each, Tensor) else each, result)
    if LAUNCHES and not operation.is_view:
        changed = [each for each in tree_iter(written or result) if isinstance(each, OnGpu)]
        reads = [each for each in tensors if isinstance(each, OnGpu) and not any(each is other for other in changed)]
        for launch in LAUNCHES:
            launch(schema.name, reads, changed)
    if written:
        return None if not schema.returns else written[0] if len(schema.returns) == 1 else tuple(written)
    return result


def _on_cpu(each: Any) -> Any:
    if isinstance(each, OnGpu):
        return each.held
    return torch.device("cpu") if isinstance(each, torch.device) and each.type == "cuda" else each


class Generator(torch.Generator):
    """Draws on the CPU, whatever device it is made for."""

    def __new__(cls, device: Any = "cpu"):
        return super().__new__(cls)


def guards() -> Any:
    """PyTorch's table of what to do when the current device changes, one entry a kind of device; None if not found."""
    library = ctypes.CDLL(next((Path(torch.__file__).parent / "lib").glob("libc10.*")))
    try:
        return (ctypes.c_void_p * 20).in_dll(library, GUARDS)
    except ValueError:
        return None


@contextmanager
def simulated_gpu():
    """Within, ``torch.cuda`` has one device."""
    guards()[CUDA_DEVICE] = guards()[META_DEVICE]  # which does nothing
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) makes a CPU tensor and moves it
    torch.__future__.set_swap_module_params_on_conversion(True)
    properties = SimpleNamespace(name="Simulated GPU", total_memory=MEMORY_BYTES, major=9, minor=0)
    functions = {
        **dict.fromkeys(("_lazy_init", "synchronize", "reset_peak_memory_stats", "set_rng_state"), lambda *_: None),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "current_device"), lambda *_: 0),
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_rng_state": lambda _: torch.zeros(1, dtype=torch.uint8),
        "get_device_properties": lambda _: properties,
        "mem_get_info": lambda _: (MEMORY_BYTES, MEMORY_BYTES),
    }
    move = Tensor.to

    # "cuda" is the current device, which nothing tells here
    def to(self: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        return move(self, *map(_indexed, arguments), **{name: _indexed(value) for name, value in keywords.items()})

    with pytest.MonkeyPatch.context() as patched, Device():
        for name, function in functions.items():
            patched.setattr(torch.cuda, name, function)
        patched.setattr(torch, "Generator", Generator)
        patched.setattr(Tensor, "to", to)
        yield


def _indexed(each: Any) -> Any:
    return GPU if isinstance(each, str | torch.device) and str(each) == "cuda" else each


def main() -> int:
    from modegpt.cli.main import main as job
    from modegpt.cost import machine

    machine.SIZE["cuda"], machine.COPY_BYTES["cuda"] = 64, 2**10  # nothing to measure
    with simulated_gpu():
        return job(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
