"""MoDeGPT: every layer's three modules decomposed on the dense model's statistics, layer by layer.

Source: MoDeGPT (arXiv 2408.09632): Type I (MLP), Type II (query-key), Type III (value-output) and the
global sparsity allocation. Any module's decomposition can be swapped for another variant.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from modegpt.allocation.engines import ENGINES
from modegpt.allocation.policies import POLICIES, Explicit, Policy, Uniform
from modegpt.allocation.ranks import (
    ModuleBudget,
    RankPlan,
    free_sparsity,
    integer_ranks,
    is_free,
    missed_target,
)
from modegpt.calibration.statistics import Statistics
from modegpt.calibration.stream import HiddenStates
from modegpt.calibration.world import World
from modegpt.config import CompressionConfig, DecompositionConfig, build, decisive, spelled, unknown
from modegpt.decompositions import VARIANTS, experts
from modegpt.decompositions.cr import QueryKeyShared
from modegpt.decompositions.modules import ExpertWeights, LowRank, MLPWeights, QueryKeyWeights, Reduction, Variant
from modegpt.decompositions.svd import MLPSVD, QueryKeySVD
from modegpt.errors import UserError
from modegpt.methods.base import Begun, Compressed, CompressionTask, LayerByLayer, RankMethod, Reduced
from modegpt.models import (
    Family,
    LayerShape,
    block_linear_parameters,
    build_compressed,
    decoder_layers,
    dense_shape,
    layer_tensors,
    read_mlps,
    read_query_key,
    read_value_output,
    rotary_frequencies,
)

MODULES = ("mlp", "query_key", "value_output")
READ: dict[str, Callable[[Family, nn.Module], Any]] = {
    "mlp": read_mlps,
    "query_key": read_query_key,
    "value_output": read_value_output,
}
"""How each module of a dense layer is read."""


def _variant(module: str, options: Mapping[str, Any]) -> Variant | None:
    if options.get("name") == "none":
        return None
    choices = VARIANTS[module]
    if options.get("name") not in choices:
        raise unknown(f"decomposition/{module}", options.get("name"), [*choices, "none"])
    return build(choices, options, f"decomposition.{module}")


def _policy(options: Mapping[str, Any], layer_sparsity: Sequence[float] | None) -> Policy:
    if options.get("name") == "explicit":
        if layer_sparsity is None:
            raise UserError("allocation=explicit needs compression.layer_sparsity=[...], one sparsity a layer")
        options = {**options, "values": layer_sparsity}
    elif layer_sparsity is not None:
        raise UserError(
            f"compression.layer_sparsity has no effect with allocation={options.get('name')}; use allocation=explicit"
        )
    return build(POLICIES, options, "allocation")


def module_budgets(
    config: PreTrainedConfig,
    family: Family,
    *,
    rank_multiple: dict[str, int],
    targets: dict[str, float | None],
    frozen: Sequence[str],
) -> dict[str, ModuleBudget]:
    """What a dense layer of ``config`` offers to remove, by module."""
    shape = dense_shape(config)
    num_heads = config.num_attention_heads
    per_head_dim = config.hidden_size * (num_heads + shape.num_kv_heads)
    matrices = (2 if family.gate_path is None else 3) * (1 if family.experts_path is None else config.num_experts)
    sizes = {
        "mlp": (shape.intermediate_size, 1, config.hidden_size * matrices),
        "query_key": (shape.qk_head_dim, 2 if family.rope else 1, per_head_dim),
        "value_output": (shape.v_head_dim, 1, per_head_dim),
    }
    return {
        module: ModuleBudget(
            size=size,
            unit=_common_multiple(unit, rank_multiple.get(module, 1)),
            parameters_per_dimension=parameters,
            sparsity=targets.get(module),
            frozen=module in frozen,
        )
        for module, (size, unit, parameters) in sizes.items()
    }


def _common_multiple(unit: int, multiple: int) -> int:
    return multiple if multiple % unit == 0 else multiple * unit


@dataclass(frozen=True)
class MoDeGPT(LayerByLayer):
    """The paper's method, each choice a field; those that rule the ranks are ``RankMethod``'s.

    Args:
        mlp, query_key, value_output: the decomposition of each module; None leaves it dense.
        allocation: sparsity over layers.

    The target is the share of all block-linear weights: what a frozen module or a skipped layer keeps,
    the others remove. Where every module has a sparsity of its own, these alone decide.
    """

    name: ClassVar[str] = "modegpt"
    reads: ClassVar[frozenset[str]] = RankMethod.reads | {"layer_sparsity"}
    shared: ClassVar[bool] = True
    experts: ClassVar[bool] = True

    mlp: Variant | None = field(metadata={"key": "decomposition/mlp"})
    query_key: Variant | None = field(metadata={"key": "decomposition/query_key"})
    value_output: Variant | None = field(metadata={"key": "decomposition/value_output"})
    allocation: Policy = field(metadata={"key": "allocation"})

    @classmethod
    def elsewhere(
        cls, *, compression: CompressionConfig, decomposition: DecompositionConfig, allocation: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The decompositions, the allocation, and what ``compression`` says about ranks."""
        variants = {module: _variant(module, getattr(decomposition, module)) for module in MODULES}
        policy = {"allocation": _policy(allocation, compression.layer_sparsity)}
        ranks = super().elsewhere(compression=compression, decomposition=decomposition, allocation=allocation)
        return variants | policy | ranks

    def choices(self) -> dict[str, Any]:
        """With the decompositions and the allocation."""
        decomposition, allocation = self._chosen(spelled)
        return super().choices() | {"decomposition": DecompositionConfig(**decomposition), "allocation": allocation}

    def identity(self, *, sparsity: float, seed: int, family: Family | None = None) -> dict[str, Any]:
        """With the decompositions, the allocation and all that rules the ranks."""
        identity = super().identity(sparsity=sparsity, seed=seed, family=family)
        if isinstance(self.allocation, Explicit):
            identity["compression"]["layer_sparsity"] = list(self.allocation.values)
        decomposition, allocation = self._chosen(decisive)
        return identity | {"decomposition": decomposition, "allocation": allocation}

    def _chosen(self, write: Callable[[Mapping[str, type], object], dict[str, Any]]) -> tuple[dict, dict]:
        """The decomposition of each module and the allocation, each as ``write`` puts it."""
        variants = {module: getattr(self, module) for module in MODULES}
        decomposition = {
            module: {"name": "none"} if variant is None else write(VARIANTS[module], variant)
            for module, variant in variants.items()
        }
        return decomposition, write(POLICIES, self.allocation)

    @property
    def one_head_size(self) -> bool:
        """Whether all heads of all layers get one size and one set of frequencies, in the family's own class."""
        return ENGINES[self.engine].one_width and isinstance(self.query_key, QueryKeyShared)

    @property
    def whole(self) -> tuple[str, ...]:
        """As the engine wants it, but heads of one size, which it runs."""
        return () if self.one_head_size else super().whole

    def variants(self) -> dict[str, Variant | None]:
        """The decomposition of each module; None where it stays dense, as the engine may want it."""
        whole = self.whole
        return {module: None if module in whole else getattr(self, module) for module in MODULES}

    def budgets(self, task: CompressionTask) -> list[dict[str, ModuleBudget]]:
        """What every layer offers to remove. Raises UserError for a skipped layer that the model has not."""
        num_layers = task.calibration.num_layers
        outside = [index for index in self.skip_layers if index >= num_layers]
        if outside:
            raise UserError(
                f"compression.skip_layers names layer {outside[0]}, but the model has layers 0 to {num_layers - 1}"
            )
        config, variants, engine = task.model.config, self.variants(), ENGINES[self.engine]
        multiples = self.rank_multiple | {"mlp": math.lcm(self.rank_multiple.get("mlp") or 1, engine.mlp_multiple)}
        if self.one_head_size:  # whose values are as large as queries and keys
            unit = _common_multiple(2, math.lcm(*(multiples.get(module) or 1 for module in MODULES[1:])))
            multiples |= {"query_key": unit, "value_output": unit}
        frozen = [module for module, variant in variants.items() if variant is None]
        compressible = module_budgets(
            config, task.family, rank_multiple=multiples, targets=self.module_sparsity, frozen=frozen
        )
        skipped = module_budgets(config, task.family, rank_multiple={}, targets={}, frozen=MODULES)
        return [skipped if index in self.skip_layers else compressible for index in range(num_layers)]

    def plan(self, task: CompressionTask, influence: Sequence[float] | None) -> RankPlan:
        """Integer ranks for every layer and module. Raises UserError for a target that cannot be met."""
        layers = self.budgets(task)
        free = self._free_layers(layers)
        sparsities = [0.0] * len(layers)
        if free:
            seen = None if influence is None else [influence[index] for index in free]
            mean = free_sparsity(task.sparsity, layers)
            allocated = self.allocation(seen, num_layers=len(free), sparsity=mean, generator=task.generator())
            for index, sparsity in zip(free, allocated, strict=True):
                sparsities[index] = sparsity
        return integer_ranks(sparsities, layers, budget=self.budget, alike=ENGINES[self.engine].one_width)

    def even_plan(self, task: CompressionTask) -> RankPlan:
        """The ranks at one sparsity for all layers, where the allocation would look at activations first.

        Of all allocations this one takes least of the layer that it takes most of.
        """
        even = replace(self, allocation=Uniform()) if self.allocation.needs_influence else self
        return even.plan(task, None)

    def likely_shapes(self, task: CompressionTask, influence: Sequence[float]) -> list[LayerShape]:
        """Those of the plan by that ``influence``."""
        if isinstance(self.mlp, MLPSVD):
            raise UserError("the sizes of decomposition/mlp=svd are not those of its ranks")
        dense = dense_shape(task.model.config)
        return [
            replace(
                dense,
                qk_head_dim=ranks["query_key"],
                v_head_dim=ranks["value_output"],
                intermediate_size=ranks["mlp"],
            )
            for ranks in self.plan(task, influence).ranks
        ]

    @staticmethod
    def _free_layers(layers: Sequence[dict[str, ModuleBudget]]) -> list[int]:
        """The layers over which the allocation spreads the target."""
        return [index for index, layer in enumerate(layers) if any(map(is_free, layer.values()))]

    def check(self, task: CompressionTask) -> None:
        """Refuse a decomposition that does not apply, and ranks that cannot be met where they are known beforehand."""
        layer = decoder_layers(task.model)[0]
        for module, variant in self.variants().items():
            reason = None if variant is None else _applicable(variant, READ[module](task.family, layer))
            if reason is not None:
                raise UserError(f"decomposition/{module} does not apply to {task.family.model_type}: {reason}")
        if ENGINES[self.engine].one_width and (self.skip_layers or not isinstance(self.allocation, Uniform)):
            raise UserError(
                f"engine={self.engine} gives all layers one width: it needs allocation=uniform and no "
                "compression.skip_layers"
            )
        if self.one_head_size:
            self._check_heads(task)
        layers = self.budgets(task)
        if self._free_layers(layers):
            self.allocation.check(free_sparsity(task.sparsity, layers))
        if missed := missed_target(self.even_plan(task).achieved, task.sparsity):
            task.calibration.progress.say(f"warning, by the ranks planned so far: {missed}")

    def _check_heads(self, task: CompressionTask) -> None:
        """Refuse what would give heads of two sizes, or a family that has no place for another one."""
        alike = self.module_sparsity.get("query_key") == self.module_sparsity.get("value_output")
        if self.value_output is None or not alike:
            raise UserError(
                f"engine={self.engine} with decomposition/query_key=cr_shared gives queries, keys and values one size: "
                "it needs a decomposition of value_output, and the same module_sparsity for both"
            )
        if getattr(task.model.config, "head_dim", None) is None:
            raise UserError(
                f"{task.family.model_type} states no head size, so engine={self.engine} keeps its attention whole: "
                "leave decomposition/query_key=cr_shared out"
            )

    def foresee(self, task: CompressionTask, influence: Sequence[float]) -> list[str]:
        """Warn of an influence that the allocation makes too much of."""
        layers = self.budgets(task)
        if not (free := self._free_layers(layers)):
            return []
        warning = self.allocation.warning([influence[index] for index in free], free_sparsity(task.sparsity, layers))
        return [warning] if warning else []

    def statistics_read(self, family: Family) -> dict[str, frozenset[str]]:
        """Of each module that may be reduced, the statistics that its decomposition reads."""
        read = {
            module: variant.reads(head_norms=family.head_norms)
            for module, variant in self.variants().items()
            if variant is not None
        }
        if family.experts_path is not None and "mlp" in read:
            read["mlp"] = experts.REQUIRED
        return read

    def required_statistics(self, family: Family) -> frozenset[str]:
        """Names of the statistics of a layer that its decompositions read."""
        return frozenset().union(*self.statistics_read(family).values())

    def compress(self, task: CompressionTask) -> Compressed:
        """Allocate, then reduce every layer on the dense model's statistics."""
        begun = self.begin(task)
        return self.compress_to(task, begun.plan, begun.influence)

    def begin(self, task: CompressionTask) -> Begun:
        """Allocate."""
        names = self.required_statistics(task.family)
        needed = self.allocation.needs_influence
        influence = task.calibration.block_influence(also=names).tolist() if needed else None
        return Begun(self.plan(task, influence), influence)

    def walk(self, task: CompressionTask, begun: Begun, first: int = 0) -> "StatisticsWalk":
        """Reduce layer after layer on the dense model's statistics."""
        observed = self.required_statistics(task.family) and first < task.calibration.num_layers
        streams = {"dense": task.calibration.embed()} if observed else {}
        return StatisticsWalk(self, task, begun, streams, task.generator())

    def compress_to(self, task: CompressionTask, plan: RankPlan, influence: list[float] | None = None) -> Compressed:
        """Reduce every layer to the ranks of ``plan`` on the dense model's statistics."""
        calibration, names = task.calibration, self.required_statistics(task.family)
        generator = task.generator()
        nothing: Iterable[Statistics] = calibration.progress.track(
            [{}] * calibration.num_layers, "decomposition", unit="layer"
        )
        statistics_of = calibration.statistics(names, loop="decomposition") if names else nothing
        layers = zip(decoder_layers(task.model), plan.ranks, statistics_of, strict=True)
        jobs = (
            partial(self.compress_layer, task, index, layer, ranks, statistics, generator)
            for index, (layer, ranks, statistics) in enumerate(layers)
        )
        # what draws has to draw for every layer
        draws = any(variant is not None and variant.draws for variant in self.variants().values())
        done = (World() if draws else calibration.world).divided(jobs, task.model.device)
        shapes, tensors, reports = (list(column) for column in zip(*done, strict=True))
        return self.finish(task, plan, build_compressed(task.model, shapes, tensors), reports, influence)

    def compress_layer(
        self,
        task: CompressionTask,
        index: int,
        layer: nn.Module,
        ranks: dict[str, int],
        statistics: Statistics,
        generator: torch.Generator,
    ) -> tuple[LayerShape, dict[str, Tensor], dict[str, Any]]:
        """Layer ``index`` reduced to ``ranks``: its shape, the tensors that changed and its report.

        Tensors are named as by ``layer_tensors``.
        """
        with task.calibration.meter.stage("decomposition", counted=True):
            reductions = self._reduce(task, layer, ranks, statistics, generator, index)
        return *assemble_layer(task.family, task.model.config, reductions), report(index, reductions, ranks, task)

    def finish(
        self,
        task: CompressionTask,
        plan: RankPlan,
        model: PreTrainedModel,
        reports: list[dict[str, Any]],
        influence: list[float] | None,
    ) -> Compressed:
        """Check that the weights of ``model`` changed as planned, and say how."""
        _check_budget(task, plan, model)
        details: dict[str, Any] = {"planned_sparsity": plan.achieved, "plan_target": plan.target}
        if cost := _query_key_cost(reports):
            details["query_key_cost"] = cost
        warnings = [] if influence is None else self.foresee(task, influence)
        return Compressed(model=model, layers=reports, influence=influence, details=details, warnings=warnings)

    def _reduce(
        self,
        task: CompressionTask,
        layer: nn.Module,
        ranks: dict[str, int],
        statistics: Statistics,
        generator: torch.Generator,
        index: int,
    ) -> dict[str, Reduction]:
        """The reduced modules of one layer; a module at full rank is left out."""
        reductions = {}
        for module, variant in self.variants().items():
            weights = READ[module](task.family, layer)
            if variant is None or ranks[module] == weights.inner_size:
                continue
            if module == "query_key" and task.family.rope and not weights.rope:
                variant = QueryKeySVD()  # the optimum, which a rotation rules out in the family's other layers
            if isinstance(weights, QueryKeyWeights) and weights.rope:
                weights = replace(weights, frequencies=rotary_frequencies(task.model))
            try:
                reduce: Any = variant
                if isinstance(weights, ExpertWeights):
                    reduce = partial(experts.reduce_experts, reduce)
                reductions[module] = reduce(weights, statistics, ranks[module], generator)
            except UserError as error:
                raise UserError(f"layer {index}, {module}: {error}") from error
        return reductions


@dataclass
class StatisticsWalk:
    """A ``LayerWalk``: each layer is reduced on the statistics that are collected on the way through it."""

    method: MoDeGPT
    task: CompressionTask
    begun: Begun
    streams: dict[str, HiddenStates]
    generator: torch.Generator
    moved: bool = False

    def layer(self, index: int, layer: nn.Module) -> Reduced:
        """Observe ``layer`` and reduce it."""
        calibration, names = self.task.calibration, self.method.required_statistics(self.task.family)
        statistics: Statistics = {}
        if names:
            with calibration.meter.stage("statistics", counted=True):
                statistics = calibration.observe(self.streams["dense"], index, names, world=calibration.world)
        if index + 1 == calibration.num_layers:
            self.streams.clear()
        ranks = self.begun.plan.ranks[index]
        return self.method.compress_layer(self.task, index, layer, ranks, statistics, self.generator)

    def finish(self, model: PreTrainedModel, reports: list[dict[str, Any]]) -> Compressed:
        """Check and say what changed."""
        return self.method.finish(self.task, self.begun.plan, model, reports, self.begun.influence)


def assemble_layer(
    family: Family, config: PreTrainedConfig, reductions: dict[str, Reduction]
) -> tuple[LayerShape, dict[str, Tensor]]:
    """The shape and the changed tensors of a layer whose modules became ``reductions``."""
    dense = dense_shape(config)
    weights = {module: reduction.weights for module, reduction in reductions.items()}
    mlp, query_key, value_output = (weights.get(module) for module in MODULES)
    linear_ranks, biases = {}, []
    if isinstance(mlp, MLPWeights):
        paths = {"W_U": family.up_path, "W_G": family.gate_path, "W_D": family.down_path}
        linear_ranks = {
            path: getattr(mlp, name).A.shape[1]
            for name, path in paths.items()
            if path is not None and isinstance(getattr(mlp, name), LowRank)
        }
        biases += [family.down_path] if mlp.b_D is not None else []
    if value_output is not None and value_output.b_O is not None:
        biases.append(family.output_path)
    shape = LayerShape(
        qk_head_dim=dense.qk_head_dim if query_key is None else query_key.inner_size,
        v_head_dim=dense.v_head_dim if value_output is None else value_output.inner_size,
        intermediate_size=dense.intermediate_size if mlp is None else mlp.inner_size,
        num_kv_heads=dense.num_kv_heads,
        linear_ranks=linear_ranks,
        extra_biases=tuple(biases),
    )
    return shape, layer_tensors(family, config, shape, mlp=mlp, query_key=query_key, value_output=value_output)


def _query_key_cost(reports: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What queries and keys lost under norms of their heads, on average over the layers that lost some.

    The squared error of the logits, relative, with exact norms; and that of the estimates of the norms' mean squares.
    """
    cut = [report for report in reports if "norm_error" in report["numerics"].get("query_key", {})]
    lost = [
        {"logits": report["relative_error"]["query_key"], **report["numerics"]["query_key"]["norm_error"]}
        for report in cut
    ]
    return {name: sum(each[name] for each in lost) / len(lost) for name in ("logits", "query", "key")} if lost else {}


def _applicable(variant: Variant[Any], weights: Any) -> str | None:
    """Why ``variant`` cannot reduce ``weights``, or None."""
    return experts.experts_applicable(variant) if isinstance(weights, ExpertWeights) else variant.applicable(weights)


def report(
    index: int, reductions: dict[str, Reduction], ranks: dict[str, int], task: CompressionTask
) -> dict[str, Any]:
    """One layer of the record: kept ranks, relative error of each module, what the solver had to do."""
    return {
        "index": index,
        "ranks": dict(ranks),
        "relative_error": {
            module: reductions[module].relative_error if module in reductions else 0.0 for module in MODULES
        },
        "numerics": {module: reduction.numerics for module, reduction in reductions.items() if reduction.numerics},
    }


def _check_budget(task: CompressionTask, plan: RankPlan, model: PreTrainedModel) -> None:
    """The weights changed as planned; low-rank factors may store less than planned, never more."""
    plain = not any(model.config.linear_ranks)
    dense, left = block_linear_parameters(task.model), block_linear_parameters(model)
    planned = round(dense * (1 - plan.achieved))
    assert left == planned if plain else left <= planned, f"{left} block-linear weights left, {planned} planned"
