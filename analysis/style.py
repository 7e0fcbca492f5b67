"""Names and looks: one label, colour, marker and line for each method and variant, in every table and figure.

Colours are Okabe and Ito's and Tol's, told apart by the colour-blind; markers and lines tell the series apart in grey.
"""

from typing import Any

LABELS = {
    "dense": "Dense",
    "modegpt": "MoDeGPT",
    "modegpt_plus": "MoDeGPT plus",
    "modegpt_uniform": "MoDeGPT, uniform allocation",
    "random": "Random",
    "magnitude": "Magnitude",
    "svd": "SVD",
    "asvd": "ASVD",
    "svd_llm": "SVD-LLM",
    "slicegpt": "SliceGPT",
    "shortgpt": "ShortGPT",
    "sleb": "SLEB",
    "flap": "FLAP",
    "llm_pruner": "LLM-Pruner",
    "llm_surgeon": "LLM Surgeon",
    "obc": "Structured OBC",
    "slimgpt": "SlimGPT",
    "lems": "LEMS",
    "tyr": "Týr",
    "2ssp": "2SSP",
    "nystrom": "Nyström",
    "nystrom_bias": "Nyström, bias corrected",
    "columns": "Columns",
    "elimination": "Greedy elimination",
    "elimination_centred": "Greedy elimination, keys centred",
    "cr": "CR",
    "cr_pairs": "CR, pair score",
    "cr_shared": "CR, one set of frequencies",
    "svd_per_head": "SVD, per head",
    "svd_attention": "SVD, attention output",
    "kept": "As if the kept dims were all",
    "scale": "One factor, fitted",
    "offset": "A factor and an offset",
    "pairs": "A factor for each pair and an offset",
    "uniform": "Uniform",
    "entropic": "Entropic",
    "entropic_cap": "Entropic, by cap",
    "inverse": "Inverse",
    "mlp": "MLP",
    "query_key": "Query-key",
    "value_output": "Value-output",
    "tiny": "tiny corpus",
    "calib_800.jsonl": "TinyStories",
    "eval_200.jsonl": "TinyStories",
    "wikitext2": "WikiText-2",
    "wiki.test.head.raw": "WikiText-2 (first 100 kB)",
    "wiki.test.raw": "WikiText-2",
    "alpaca": "Alpaca",
}
"""How settings are called in print; what is not here is printed as it is."""

LOOKS = {
    "modegpt": ("#000000", "o", "-"),
    "modegpt_plus": ("#44AA99", "h", "-"),
    "random": ("#999999", "x", ":"),
    "magnitude": ("#666666", "+", ":"),
    "svd": ("#E69F00", "s", "--"),
    "asvd": ("#B8860B", "D", "--"),
    "svd_llm": ("#D55E00", "^", "--"),
    "slicegpt": ("#0072B2", "v", "-"),
    "shortgpt": ("#56B4E9", "<", "-."),
    "sleb": ("#332288", ">", "-."),
    "flap": ("#009E73", "P", "-"),
    "llm_pruner": ("#CC79A7", "X", "--"),
    "llm_surgeon": ("#882255", "*", "-"),
    "obc": ("#117733", "p", "--"),
    "slimgpt": ("#AA4499", "d", "-."),
    "lems": ("#999933", "h", "-"),
    "tyr": ("#661100", "8", "--"),
    "2ssp": ("#6699CC", "H", ":"),
}
"""Colour, marker and line of each method."""

CYCLE = (
    ("#000000", "o", "-"),
    ("#0072B2", "s", "--"),
    ("#D55E00", "^", "-."),
    ("#009E73", "D", "-"),
    ("#CC79A7", "v", "--"),
    ("#E69F00", "P", "-."),
    ("#56B4E9", "X", ":"),
)
"""For series that are not methods, in order of appearance; controls keep their own look."""


def label(value: Any) -> str:
    """A setting in print."""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:g}"
    return LABELS.get(value, f"{value:g}" if isinstance(value, float) else str(value)) if value is not None else "-"


def looks(series: list[Any], *, of_methods: bool) -> dict[Any, tuple[str, str, str]]:
    """Colour, marker and line for each member of ``series``, the same in every figure for the same method.

    ``of_methods``: methods have their own; variants of a method among them take one of the others.
    """
    if of_methods:
        variants = iter(CYCLE[1:])  # the first is MoDeGPT's
        return {each: LOOKS[each] if each in LOOKS else next(variants) for each in series}
    own = iter(CYCLE * 2)
    return {each: LOOKS[each] if each in ("random", "magnitude") else next(own) for each in series}
