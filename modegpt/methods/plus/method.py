"""MoDeGPT improved without a gradient, at the same budget and on the same calibration tokens."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import ClassVar

from modegpt.allocation.engines import ENGINES
from modegpt.allocation.exchange import exchange
from modegpt.allocation.policies import Entropic, Uniform
from modegpt.allocation.ranks import RankPlan
from modegpt.calibration.gradients import output_sensitivity
from modegpt.cost.work import forward_cost
from modegpt.decompositions.cr import QueryKeyCR
from modegpt.decompositions.elimination import MLPElimination
from modegpt.decompositions.nystrom import MLPNystrom
from modegpt.decompositions.svd import ValueOutputSVD, ValueOutputSVDAttention
from modegpt.errors import UserError
from modegpt.methods.base import Compressed, CompressionTask, RankMethod
from modegpt.methods.modegpt import MoDeGPT, assemble_layer, report
from modegpt.methods.plus.again import planned_again
from modegpt.methods.plus.nested import FILE, NestedLayer, cut, nest, write_orders
from modegpt.methods.plus.query_key import sample
from modegpt.methods.plus.sensitivity import Costs, KeptCosts, perturbed_passes, rank_costs
from modegpt.methods.plus.sequential import SequentialPass, TokenWeights
from modegpt.methods.plus.streams import Split
from modegpt.methods.plus.switches import Switches
from modegpt.methods.plus.temperature import Compared, sharpened_norm
from modegpt.models import Family, LayerShape, build_compressed, decoder_layers


@dataclass(frozen=True)
class MoDeGPTPlus(Switches, RankMethod):
    """Sequential, error-correcting MoDeGPT: the ingredients are the fields of ``Switches``, the steps in ``LayerPass``.

    Two streams walk the layers: dense X and compressed X~. In each layer the input maps are aligned, the query-key dims
    are chosen on X~, the value-output subspace on the attention output Z~ that the reduced queries and keys leave, and
    the MLP channels on the hidden states h~ behind the reduced attention. A refit solves, in float64, from sums over
    calibration tokens,

        min_W ||Z~ W - (Z W_O + beta (X - X~))||^2 + lambda ||D^1/2 (W - W_0)||^2,   D = diag(Z~^T Z~),

    all heads jointly (h and X' for the MLP), W_0 the map of the aligned weights on the compressed stream's own
    features, for A the identity. lambda is the one of ``regression.RIDGES``, or infinity, that errs least on every
    fourth calibration window, solved again on all of them. Each expert of a mixture is solved for alone, on the tokens
    that the router sends it from X~, for its own dense output and its share of what all experts lack.

    Cost: of each layer, the dense one once, the compressed one's projections on ``query_key_windows``, its attention
    and its MLP once and the reduced MLP again; Gram matrices on Z~ and h~ as the paper's with cross moments 2 T (H d +
    n) d_h, 6 T d_h^2 for the alignment, up to 3 n^3 for the elimination and 8 solves of k^3/3 a module; the allocation
    one statistics pass over a quarter of the windows, 3 n^3, and about half a pass over all windows for the perturbed
    forwards, up to two where there are few tokens, once for all rates where there is a cache; the temperature some 4096
    tokens through both models. Memory beside the layer's: both residual streams and six tensors of their size.
    Differs from the paper in all of this; ranks, budgets and the treatment of biases and heads are those of
    ``MoDeGPT``.
    """

    name: ClassVar[str] = "modegpt_plus"
    experts: ClassVar[bool] = True

    def applicable(self, family: Family) -> str | None:
        """Orders of experts' channels are not kept."""
        if family.experts_path is not None and self.nested:
            return "method.nested=true does not know mixtures of experts"
        return super().applicable(family)

    def faithful(self) -> MoDeGPT:
        """The paper's method with this one's selections, as far as it has them: for ranks and closed-form errors."""
        return MoDeGPT(
            mlp=MLPElimination() if self.mlp == "elimination" else MLPNystrom(),
            query_key=QueryKeyCR(),
            value_output=ValueOutputSVDAttention() if self.value_output == "attention" else ValueOutputSVD(),
            allocation=Entropic() if self.allocation == "entropic" else Uniform(),
            **self.rules,
        )

    def check(self, task: CompressionTask) -> None:
        """Raise UserError for a target that cannot be met, or ranks by measured loss where all layers are alike."""
        if ENGINES[self.engine].one_width and self.allocation == "loss":
            raise UserError(f"engine={self.engine} gives all layers one width: it needs method.allocation=uniform")
        self.faithful().check(task)

    def foresee(self, task: CompressionTask, influence: Sequence[float]) -> list[str]:
        """Warn of what the allocation makes of the influence."""
        return self.faithful().foresee(task, influence)

    def compress(self, task: CompressionTask) -> Compressed:
        """Plan ranks, take both streams through the layers, fit the temperature."""
        calibration = task.calibration
        influence = calibration.block_influence().tolist() if self.allocation == "entropic" else None
        costs = self._costs(task) if self.allocation == "loss" and (task.sparsity > 0 or self.nested) else None
        plan = self.plan(task, costs=costs, influence=influence)
        if self.nested:
            return self._nested(task, plan, costs, influence)
        if self.rounds and costs is not None:
            with calibration.meter.stage("allocation", counted=True):
                plan = planned_again(
                    calibration,
                    self.faithful().statistics_read(task.family),
                    plan,
                    lambda costs: self.plan(task, costs=costs),
                    num_shares=len(self.shares),
                    skip_layers=self.skip_layers,
                    rounds=self.rounds,
                )
        walk = SequentialPass.start(
            calibration,
            self,
            generator=task.generator(),
            skip_layers=self.skip_layers,
            token_weights=self._token_weights(task) if self.fisher else None,
            compared=self._compared(task, plan),
        )
        shapes, tensors, reports = [], [], []
        for index, layer in enumerate(calibration.progress.track(decoder_layers(task.model), "layers", unit="layer")):
            with calibration.meter.stage("layers", counted=True) as metered:
                done = walk.layer(index, layer, plan.ranks[index])
            shapes.append(done.shape)
            tensors.append(done.tensors)
            reports.append(report(index, done.reductions, plan.ranks[index], task))
            reports[-1]["numerics"] |= {f"{name}_input": facts for name, facts in done.alignment.items()}
        one_pass = forward_cost(task.model).flops(*calibration.tokens.ids.shape)
        calibration.meter.forward_passes += metered.of("forward") / one_pass
        calibration.meter.calibration_tokens = calibration.tokens.num_tokens
        finished = self._finished(task, plan, shapes, tensors, reports, influence)
        if walk.compared is not None and walk.moved:
            with calibration.meter.stage("temperature", counted=True):
                s = walk.compared.inverse_temperature()
                finished.model.load_state_dict(sharpened_norm(task.model, task.family, s), strict=False, assign=True)
            finished.details["inverse_temperature"] = s
        return finished

    def _compared(self, task: CompressionTask, plan: RankPlan) -> Compared | None:
        """The streams to fit the temperature on; None where there is none to fit."""
        if not self.temperature or plan.achieved == 0 or task.family.final_norm(task.model) is None:
            return None
        calibration = task.calibration
        with calibration.meter.stage("temperature", counted=True):
            return Compared.of(calibration.stored, calibration.tokens.ids, batch_size=calibration.batch_size)

    def plan(self, task: CompressionTask, *, costs: Costs | None, influence: list[float] | None = None) -> RankPlan:
        """Ranks that meet the target: by what each costs where that is known, else over layers by ``allocation``."""
        plan = self.faithful().plan(task, influence)
        if costs is None or plan.target == 0:
            return plan
        return exchange(costs, self.faithful().budgets(task), plan, cap=self.cap)

    def likely_shapes(self, task: CompressionTask) -> list[LayerShape]:
        """Those of the paper's method."""
        return self.faithful().likely_shapes(task)

    def _token_weights(self, task: CompressionTask) -> list[TokenWeights]:
        """The weight of every token for each layer and module with an output solve. One backward pass."""
        calibration, family, layers = task.calibration, task.family, decoder_layers(task.model)
        last = [linear for layer in layers for linear in (family.output(layer), family.mlp_ends(layer)[1])]
        weights = iter(output_sensitivity(calibration, last, batch_size=calibration.batch_size))
        return [
            {module: next(weights).split(calibration.batch_size) for module in ("value_output", "mlp")} for _ in layers
        ]

    def _costs(self, task: CompressionTask) -> Costs:
        calibration, modules = task.calibration, self.faithful().statistics_read(task.family)
        kept = (
            None if calibration.cache is None else KeptCosts(calibration.cache, modules, self.shares, self.skip_layers)
        )
        with calibration.meter.stage("allocation", counted=True):
            if kept is not None and (costs := kept.load(calibration.num_layers)) is not None:
                return costs
            costs = rank_costs(calibration, modules, self.shares, self.skip_layers)
            calibration.meter.forward_passes += perturbed_passes(
                calibration, num_modules=len(modules), num_shares=len(self.shares)
            )
            if kept is not None:
                kept.store(costs)
        return costs

    def _nested(
        self, task: CompressionTask, plan: RankPlan, costs: Costs | None, influence: list[float] | None
    ) -> Compressed:
        """Order every dim on the dense stream, and cut to ``plan``; at sparsity 0 the orders are kept as well."""
        modules = self.faithful().statistics_read(task.family)
        calibration, generator = task.calibration, task.generator()
        names, hidden = frozenset().union(*modules.values()), calibration.embed()
        split = Split.of(calibration.tokens.ids, batch_size=calibration.batch_size)
        nested = []
        for index, layer in enumerate(calibration.progress.track(decoder_layers(task.model), "orders", unit="layer")):
            with calibration.meter.stage("orders", counted=True):
                states = None
                if "query_key" in modules:
                    states = sample(
                        task.family,
                        layer,
                        index,
                        hidden,
                        split,
                        num_windows=self.query_key_windows,
                        queries_per_window=self.queries_per_window,
                        precision=calibration.precision,
                        generator=generator,
                    )
                nested.append(nest(task.family, layer, calibration.observe(hidden, index, names), states))
        calibration.meter.calibration_tokens = calibration.tokens.num_tokens
        compressed = self.cut(task, plan, nested, influence)
        if plan.target > 0:
            return compressed
        return replace(compressed, files={FILE: partial(write_orders, layers=nested, costs=costs, method=asdict(self))})

    def cut(
        self, task: CompressionTask, plan: RankPlan, nested: list[NestedLayer], influence: list[float] | None = None
    ) -> Compressed:
        """The model at the ranks of ``plan`` from orders made before; no activations."""
        shapes, tensors, reports = [], [], []
        for index, (layer, orders) in enumerate(zip(decoder_layers(task.model), nested, strict=True)):
            reductions = cut(task.family, layer, orders, plan.ranks[index])
            shape, changed = assemble_layer(task.family, task.model.config, reductions)
            shapes.append(shape)
            tensors.append(changed)
            reports.append(report(index, reductions, plan.ranks[index], task))
        return self._finished(task, plan, shapes, tensors, reports, influence)

    def _finished(
        self,
        task: CompressionTask,
        plan: RankPlan,
        shapes: list,
        tensors: list,
        reports: list,
        influence: list[float] | None,
    ) -> Compressed:
        details = {"planned_sparsity": plan.achieved, "plan_target": plan.target}
        return Compressed(
            model=build_compressed(task.model, shapes, tensors),
            layers=reports,
            influence=influence,
            details=details,
            warnings=[] if influence is None else self.foresee(task, influence),
        )
