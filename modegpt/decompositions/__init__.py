"""Decompositions of the three modules of a layer: pure functions on tensors, one dataclass a variant, named here."""

from modegpt.decompositions.controls import (
    MLPMagnitude,
    MLPRandom,
    QueryKeyMagnitude,
    QueryKeyRandom,
    ValueOutputMagnitude,
    ValueOutputRandom,
)
from modegpt.decompositions.cr import QueryKeyCR, QueryKeyCRPairs
from modegpt.decompositions.elimination import MLPElimination, ValueOutputColumns
from modegpt.decompositions.modules import Variant
from modegpt.decompositions.nystrom import MLPColumns, MLPNystrom, MLPNystromBias
from modegpt.decompositions.svd import (
    MLPSVD,
    QueryKeySVD,
    ValueOutputSVD,
    ValueOutputSVDAttention,
    ValueOutputSVDPerHead,
)

MLP_VARIANTS: dict[str, type[Variant]] = {
    "nystrom": MLPNystrom,
    "nystrom_bias": MLPNystromBias,
    "columns": MLPColumns,
    "elimination": MLPElimination,
    "svd": MLPSVD,
    "magnitude": MLPMagnitude,
    "random": MLPRandom,
}
QUERY_KEY_VARIANTS: dict[str, type[Variant]] = {
    "cr": QueryKeyCR,
    "cr_pairs": QueryKeyCRPairs,
    "svd": QueryKeySVD,
    "magnitude": QueryKeyMagnitude,
    "random": QueryKeyRandom,
}
VALUE_OUTPUT_VARIANTS: dict[str, type[Variant]] = {
    "svd": ValueOutputSVD,
    "svd_per_head": ValueOutputSVDPerHead,
    "svd_attention": ValueOutputSVDAttention,
    "columns": ValueOutputColumns,
    "magnitude": ValueOutputMagnitude,
    "random": ValueOutputRandom,
}
