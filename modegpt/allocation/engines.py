"""What serving engines can run of a compressed model, as it rules the ranks that allocation may choose."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """The sizes that an engine takes.

    Args:
        whole: modules that keep their full size.
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
"""By name. No engine but vLLM with our code takes heads that differ from the family's: with one size and one set of
rotary frequencies for all heads of all layers, queries and keys lose far more than MLPs do at the same budget."""
