"""MoDeGPT improved without a gradient, at the same budget and on the same calibration tokens."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from modegpt.allocation.engines import ENGINES
from modegpt.allocation.exchange import exchange, most_removed
from modegpt.allocation.policies import Entropic, Uniform
from modegpt.allocation.ranks import RankPlan, missed_target
from modegpt.calibration.stream import HiddenStates
from modegpt.cost.work import forward_cost
from modegpt.decompositions.cr import QueryKeyCR
from modegpt.decompositions.elimination import MLPElimination
from modegpt.decompositions.nystrom import MLPNystrom
from modegpt.decompositions.svd import ValueOutputSVD, ValueOutputSVDAttention
from modegpt.errors import UserError
from modegpt.methods.base import Begun, Compressed, CompressionTask, LayerByLayer, Reduced
from modegpt.methods.modegpt import MoDeGPT, assemble_layer, report
from modegpt.methods.plus.again import planned_again
from modegpt.methods.plus.nested import FILE, NestedLayer, cut, nest, write_orders
from modegpt.methods.plus.query_key import sample
from modegpt.methods.plus.sensitivity import Costs, KeptCosts, perturbed_passes, rank_costs
from modegpt.methods.plus.sequential import SequentialPass
from modegpt.methods.plus.streams import Split
from modegpt.methods.plus.switches import Switches
from modegpt.methods.plus.temperature import Compared, sharpened_norm
from modegpt.models import Family, LayerShape, build_compressed, decoder_layers


@dataclass(frozen=True)
class MoDeGPTPlus(Switches, LayerByLayer):
    """Sequential, error-correcting MoDeGPT: the ingredients are the fields of ``Switches``, the steps in ``LayerPass``.

    Two streams walk the layers: dense X and compressed X~. In each layer the input maps are aligned, the query-key dims
    are chosen on X~, the value-output subspace on the attention output Z~ that the reduced queries and keys leave, and
    the MLP channels on the hidden states h~ behind the reduced attention. A refit solves, in float64, from sums over
    calibration tokens,

        min_W ||Z~ W - (Z W_O + beta (X - X~))||^2 + lambda ||D^1/2 (W - W_0)||^2,   D = diag(Z~^T Z~),

    all heads jointly (h and X' for the MLP), W_0 the map of the aligned weights on the compressed stream's own
    features, for A the identity. lambda is the one of ``regression.RIDGES``, or infinity, that errs least on every
    fourth calibration window, solved again on all of them. Each expert of a mixture is solved for alone, on the tokens
    that the router sends it from X~, for its own dense output and its share of what all experts lack. Where a norm
    stands behind a block, errors count as what they move its output by (``Sums``).

    Cost: of each layer, the dense one once, the compressed one's projections on ``query_key_windows``, its attention
    and its MLP once; Gram matrices on Z~ and h~ as the paper's with cross moments 2 T (H d + n) d_h, 6 T d_h^2 for the
    alignment, up to 3 n^3 for the elimination and 8 solves of k^3/3 a module; the allocation one statistics pass over a
    quarter of the windows, 3 n^3, and three eighths of a pass over all windows for the perturbed forwards, up to one
    and a half where there are few tokens, once for all rates where there is a cache; the temperature some 1024 tokens
    through both models. Memory beside the layer's: both residual streams, five tensors of their size, and Z~ or h~.
    Differs from the paper in all of this; ranks, budgets and the treatment of biases and heads are those of
    ``MoDeGPT``.
    """

    name: ClassVar[str] = "modegpt_plus"
    shared: ClassVar[bool] = True
    experts: ClassVar[bool] = True
    revision: ClassVar[int] = 5
    retired: ClassVar[dict[str, Any]] = {"centred": False}

    def revision_for(self, family: Family | None) -> int:
        """6 where norms stand behind the blocks, which were not looked through before."""
        return 6 if family is not None and family.branch_norms else self.revision

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
        if self.allocation == "loss":
            most = most_removed(self.faithful().budgets(task), self.faithful().even_plan(task), cap=self.cap)
            if most < task.sparsity and (missed := missed_target(most, task.sparsity)):
                task.calibration.progress.say(f"warning: with method.cap={self.cap:g}, {missed}")

    def foresee(self, task: CompressionTask, influence: Sequence[float]) -> list[str]:
        """Warn of what the allocation makes of the influence."""
        return self.faithful().foresee(task, influence)

    @property
    def whole_model(self) -> str | None:
        """What looks at all layers at once."""
        if self.nested:
            return "method.nested=true"
        return f"method.rounds={self.rounds}" if self.rounds else None

    def begin(self, task: CompressionTask) -> Begun:
        """Plan ranks."""
        calibration = task.calibration
        influence = calibration.block_influence().tolist() if self.allocation == "entropic" else None
        costs = self._costs(task) if self.allocation == "loss" and task.sparsity > 0 else None
        plan = self.plan(task, costs=costs, influence=influence)
        if self.rounds and costs is not None:
            with calibration.meter.stage("allocation", counted=True):
                plan = planned_again(
                    calibration,
                    self.faithful().statistics_read(task.family),
                    plan,
                    lambda costs: self.plan(task, costs=costs),
                    skip_layers=self.skip_layers,
                    rounds=self.rounds,
                )
        return Begun(plan, influence)

    def walk(self, task: CompressionTask, begun: Begun, first: int = 0) -> "PlusWalk":
        """Take both streams through the layers, and where there is a temperature to fit its own two."""
        calibration, generator, compared = task.calibration, task.generator(), None
        if self.temperature and begun.plan.achieved > 0 and task.family.final_norm(task.model) is not None:
            with calibration.meter.stage("temperature", counted=True):
                compared = Compared.of(
                    calibration.stored,
                    calibration.tokens.ids,
                    batch_size=calibration.batch_size,
                    world=calibration.world,
                )
        done = SequentialPass.start(
            calibration,
            self,
            generator=generator,
            skip_layers=self.skip_layers,
            compared=compared,
            finished=first == calibration.num_layers,
        )
        return PlusWalk(self, task, begun, done)

    def compress(self, task: CompressionTask) -> Compressed:
        """Plan ranks, take both streams through the layers, fit the temperature."""
        if self.nested:
            return self._nested(task)
        calibration = task.calibration
        walk = self.walk(task, self.begin(task))
        layers = calibration.progress.track(decoder_layers(task.model), "layers", unit="layer")
        done = [walk.layer(index, layer) for index, layer in enumerate(layers)]
        shapes, tensors, reports = (list(column) for column in zip(*done, strict=True))
        calibration.meter.calibration_tokens = calibration.tokens.num_tokens
        compressed = walk.finish(build_compressed(task.model, shapes, tensors), reports)
        compressed.model.load_state_dict(compressed.outer, strict=False, assign=True)
        return compressed

    def plan(self, task: CompressionTask, *, costs: Costs | None, influence: list[float] | None = None) -> RankPlan:
        """Ranks that meet the target: by what each costs where that is known, else over layers by ``allocation``."""
        plan = self.faithful().plan(task, influence)
        if costs is None or plan.target == 0:
            return plan
        return exchange(costs, self.faithful().budgets(task), plan, cap=self.cap)

    def likely_shapes(self, task: CompressionTask, influence: Sequence[float]) -> list[LayerShape]:
        """Those of the paper's method."""
        return self.faithful().likely_shapes(task, influence)

    def _costs(self, task: CompressionTask) -> Costs:
        calibration, modules = task.calibration, self.faithful().statistics_read(task.family)
        kept = (
            None if calibration.cache is None else KeptCosts(calibration.cache, modules, self.shares, self.skip_layers)
        )
        with calibration.meter.stage("allocation", counted=True):
            if kept is not None and (costs := kept.load(calibration.num_layers)) is not None:
                return costs
            costs = rank_costs(calibration, modules, self.shares, self.skip_layers)
            calibration.meter.forward_passes += perturbed_passes(calibration, modules, num_shares=len(self.shares))
            if kept is not None:
                kept.store(costs)
        return costs

    def _nested(self, task: CompressionTask) -> Compressed:
        """Order every dim on the dense stream, and cut to the plan; at sparsity 0 the orders are kept as well."""
        costs = self._costs(task) if self.allocation == "loss" else None
        plan = self.plan(task, costs=costs)
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
        compressed = self.cut(task, plan, nested)
        if plan.target > 0:
            return compressed
        return replace(compressed, files={FILE: partial(write_orders, layers=nested, costs=costs, method=asdict(self))})

    def cut(self, task: CompressionTask, plan: RankPlan, nested: list[NestedLayer]) -> Compressed:
        """The model at the ranks of ``plan`` from orders made before; no activations."""
        shapes, tensors, reports = [], [], []
        for index, (layer, orders) in enumerate(zip(decoder_layers(task.model), nested, strict=True)):
            reductions = cut(task.family, layer, orders, plan.ranks[index])
            shape, changed = assemble_layer(task.family, task.model.config, reductions)
            shapes.append(shape)
            tensors.append(changed)
            reports.append(report(index, reductions, plan.ranks[index], task))
        return Compressed(build_compressed(task.model, shapes, tensors), reports, details=planned(plan))


def planned(plan: RankPlan) -> dict[str, Any]:
    """What was planned, for the record."""
    return {"planned_sparsity": plan.achieved, "plan_target": plan.target}


@dataclass
class PlusWalk:
    """A ``LayerWalk``: the sequential pass to the ranks of a plan."""

    method: MoDeGPTPlus
    task: CompressionTask
    begun: Begun
    done: SequentialPass

    @property
    def streams(self) -> dict[str, HiddenStates]:
        """Those of the pass, and behind the last layer those of the temperature alone."""
        return self.done.streams

    @property
    def generator(self) -> torch.Generator:
        """Of the query positions that the query-key selection looks at."""
        return self.done.generator

    @property
    def moved(self) -> bool:
        """Whether a layer was changed."""
        return self.done.moved

    @moved.setter
    def moved(self, moved: bool) -> None:
        self.done.moved = moved

    def layer(self, index: int, layer: nn.Module) -> Reduced:
        """The next step of the pass."""
        task, ranks, meter = self.task, self.begun.plan.ranks[index], self.task.calibration.meter
        with meter.stage("layers", counted=True) as metered:
            before = metered.of("forward")
            reduced = self.done.layer(index, layer, ranks)
        one_pass = forward_cost(task.model).flops(*task.calibration.tokens.ids.shape)
        meter.forward_passes += (metered.of("forward") - before) / one_pass
        facts = report(index, reduced.reductions, ranks, task)
        facts["numerics"] |= {f"{name}_input": numerics for name, numerics in reduced.alignment.items()}
        return reduced.shape, reduced.tensors, facts

    def finish(self, model: PreTrainedModel, reports: list[dict[str, Any]]) -> Compressed:
        """Fit the temperature."""
        task, influence = self.task, self.begun.influence
        details, outer = planned(self.begun.plan), {}
        if self.done.compared is not None and self.moved:
            with task.calibration.meter.stage("temperature", counted=True):
                s = self.done.compared.inverse_temperature()
                with task.calibration.stored.outer(head=False) as dense:
                    outer = sharpened_norm(dense, task.family, s)
            details["inverse_temperature"] = s
        warnings = [] if influence is None else self.method.foresee(task, influence)
        return Compressed(model, reports, influence=influence, details=details, warnings=warnings, outer=outer)
