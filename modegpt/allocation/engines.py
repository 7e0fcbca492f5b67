"""What serving engines can run of a compressed model, as it rules the ranks that allocation may choose."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """The sizes that an engine takes.

    Args:
        whole: modules that keep their full size, unless heads share one set of frequencies where all layers are alike.
        mlp_multiple: MLP widths are multiples of this.
        one_width: the MLPs of all layers are equally wide.
    """

    whole: tuple[str, ...] = ()
    mlp_multiple: int = 1
    one_width: bool = False


ATTENTION = ("query_key", "value_output")
ENGINES = {
    "any": Engine(),
    "stock": Engine(whole=ATTENTION, one_width=True),
    "deci": Engine(whole=ATTENTION, mlp_multiple=256),
    "gguf": Engine(whole=ATTENTION, mlp_multiple=32),
}
"""By name. No engine but vLLM with our code takes heads of two sizes. The family's own class runs smaller heads if all
have one size and one set of rotary frequencies (``decomposition/query_key=cr_shared``), but queries and keys then lose
more than MLPs do at the same budget."""
