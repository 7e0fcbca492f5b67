"""Decompositions of the three modules of a layer: pure functions on tensors, one dataclass a variant.

A new decomposition is one class in one file, imported and named here.
"""

from collections.abc import Mapping
from typing import Any

from modegpt.decompositions.controls import (
    MLPMagnitude,
    MLPRandom,
    QueryKeyMagnitude,
    QueryKeyRandom,
    ValueOutputMagnitude,
    ValueOutputRandom,
)
from modegpt.decompositions.cr import (
    QueryKeyCR,
    QueryKeyCRPairs,
    QueryKeyElimination,
    QueryKeyEliminationCentred,
    QueryKeyShared,
)
from modegpt.decompositions.elimination import MLPElimination, ValueOutputColumns
from modegpt.decompositions.modules import MLPVariant, QueryKeyVariant, ValueOutputVariant, Variant
from modegpt.decompositions.nystrom import MLPColumns, MLPNystrom, MLPNystromBias
from modegpt.decompositions.svd import (
    MLPSVD,
    QueryKeySVD,
    ValueOutputSVD,
    ValueOutputSVDAttention,
    ValueOutputSVDPerHead,
)

MLP_VARIANTS: dict[str, type[MLPVariant]] = {
    "nystrom": MLPNystrom,
    "nystrom_bias": MLPNystromBias,
    "columns": MLPColumns,
    "elimination": MLPElimination,
    "svd": MLPSVD,
    "magnitude": MLPMagnitude,
    "random": MLPRandom,
}
QUERY_KEY_VARIANTS: dict[str, type[QueryKeyVariant]] = {
    "cr": QueryKeyCR,
    "cr_pairs": QueryKeyCRPairs,
    "cr_shared": QueryKeyShared,
    "elimination": QueryKeyElimination,
    "elimination_centred": QueryKeyEliminationCentred,
    "svd": QueryKeySVD,
    "magnitude": QueryKeyMagnitude,
    "random": QueryKeyRandom,
}
VALUE_OUTPUT_VARIANTS: dict[str, type[ValueOutputVariant]] = {
    "svd": ValueOutputSVD,
    "svd_per_head": ValueOutputSVDPerHead,
    "svd_attention": ValueOutputSVDAttention,
    "columns": ValueOutputColumns,
    "magnitude": ValueOutputMagnitude,
    "random": ValueOutputRandom,
}
VARIANTS: dict[str, Mapping[str, type[Variant[Any]]]] = {
    "mlp": MLP_VARIANTS,
    "query_key": QUERY_KEY_VARIANTS,
    "value_output": VALUE_OUTPUT_VARIANTS,
}
"""Every decomposition by module and by name; ``VARIANTS[module][name].label`` is what tables and figures call it."""
