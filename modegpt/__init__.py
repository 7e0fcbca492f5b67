"""MoDeGPT: modular decomposition of large language models, reproduced and measured.

The Python API is what this package exports; see ``modegpt.api``. PyTorch and Transformers are imported on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modegpt.api import compress, evaluate, load, load_tokenizer

__all__ = ["compress", "evaluate", "load", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from modegpt import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
