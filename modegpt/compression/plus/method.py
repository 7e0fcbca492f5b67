"""MoDeGPT improved without a gradient: what the paper leaves on the table at the same budget and the same calibration tokens."""

from dataclasses import dataclass, field

from modegpt.allocation.exchange import exchange
from modegpt.allocation.policies import Entropic, Uniform
from modegpt.allocation.ranks import RankPlan
from modegpt.architectures import build_compressed, decoder_layers, dense_shape
from modegpt.calibration.calibration import layer_flops
from modegpt.calibration.stream import HiddenStates
from modegpt.compression.modegpt import MODULES, STATISTIC, MoDeGPT, module_budgets, report
from modegpt.compression.plus.costs import layer_work
from modegpt.compression.plus.layer import LayerPass
from modegpt.compression.plus.sensitivity import perturbed_passes, rank_costs
from modegpt.compression.plus.streams import Split
from modegpt.compression.plus.switches import Switches
from modegpt.compression.task import Compressed, CompressionTask, Method
from modegpt.decompositions import MLPElimination, MLPNystrom, QueryKeyCR, ValueOutputSVD, ValueOutputSVDAttention


@dataclass(frozen=True)
class MoDeGPTPlus(Switches, Method):
    """Sequential, error-correcting MoDeGPT; the ingredients are the fields of ``Switches``.

    Two streams walk the layers: dense X and compressed X~. In each layer the query-key dims are chosen on X~; then the value-output
    subspace, on the attention output Z~ that the reduced queries and keys leave, and W_O refitted; then the MLP channels, on the
    hidden states h~ behind the reduced attention, and W_D refitted. A refit solves, in float64, from sums over calibration tokens,

        min_W ||Z~ W - (Z W_O + beta (X - X~))||^2 + lambda ||D^1/2 (W - W_0)||^2,   D = diag(Z~^T Z~),

    all heads jointly (h and X' for the MLP), W_0 the map of the dense weights on the compressed stream's own features. lambda is the one of
    ``regression.RIDGES``, or infinity, that errs least on every fourth calibration window, solved again on all of them.

    Cost: of each layer, the dense one once, the compressed one's projections on ``query_key_windows``, its attention and its MLP once and the
    reduced MLP again; Gram matrices on Z~ and h~ as the paper's with cross moments 2 T (H d + n) d_h, up to 8 n^3 for the elimination
    and 14 solves of k^3/3 a module; the allocation one statistics pass over a quarter of the windows, 8 n^3, and about three quarters of a
    pass over all windows for the perturbed forwards. Memory beside the layer's: both residual streams and four tensors of their size.
    Differs from the paper in all of this; ranks, budgets and the treatment of biases and heads are those of ``MoDeGPT``.

    Args:
        module_sparsity, rank_multiple, budget, skip_layers: as for ``MoDeGPT``.
    """

    module_sparsity: dict[str, float | None] = field(default_factory=dict)
    rank_multiple: dict[str, int] = field(default_factory=dict)
    budget: str = "exact"
    skip_layers: tuple[int, ...] = ()

    def faithful(self) -> MoDeGPT:
        """The paper's method with this one's selections, as far as it has them: for ranks, and for errors in closed form."""
        return MoDeGPT(
            mlp=MLPElimination() if self.mlp == "elimination" else MLPNystrom(),
            query_key=QueryKeyCR(),
            value_output=ValueOutputSVDAttention() if self.value_output == "attention" else ValueOutputSVD(),
            allocation=Entropic() if self.allocation == "entropic" else Uniform(),
            module_sparsity=self.module_sparsity,
            rank_multiple=self.rank_multiple,
            budget=self.budget,
            skip_layers=self.skip_layers,
        )

    def check(self, task: CompressionTask) -> None:
        self.faithful().check(task)

    def compress(self, task: CompressionTask) -> Compressed:
        calibration = task.calibration
        influence = calibration.block_influence().tolist() if self.allocation == "entropic" else None
        plan = self.faithful().plan(task, influence)
        if self.allocation == "loss" and plan.target > 0:
            with calibration.meter.stage("allocation") as metered:
                plan = self._exchanged(task, plan)
                passes = perturbed_passes(calibration, num_modules=len(MODULES), num_shares=len(self.shares))
                metered.flops += passes * calibration.num_layers * layer_flops(task.model, calibration.tokens.ids)
                metered.flops += calibration.num_layers * 8.0 * dense_shape(task.model.config).intermediate_size ** 3
                calibration.meter.forward_passes += passes
        dense, split = calibration.embed(), Split.of(calibration.tokens.ids, batch_size=calibration.batch_size)
        compressed = HiddenStates(list(dense.batches), dense.arguments)
        generator = task.generator()
        shapes, tensors, reports, changed_so_far = [], [], [], False
        for index, layer in enumerate(calibration.progress.track(decoder_layers(task.model), "layers", unit="layer")):
            stream = compressed if self.sequential else HiddenStates(list(dense.batches), dense.arguments)
            work = LayerPass(task.family, task.model.config, layer, index, stream, split, self, calibration.precision, generator)
            with calibration.meter.stage("layers") as metered:
                shape, changed = work.reduce(plan.ranks[index], dense, refit_whole=bool(self.refit and changed_so_far and index not in self.skip_layers))
                changed_so_far = changed_so_far or bool(changed)
                ids = calibration.tokens.ids
                cost = layer_work(task.model, task.family, layer, ids, shape, self, sampled_windows=split.batches_with(self.query_key_windows) * calibration.batch_size)
                metered.flops += cost.forward + cost.algebra
                calibration.meter.forward_passes += cost.forward / layer_flops(task.model, ids) / calibration.num_layers
            shapes.append(shape)
            tensors.append(changed)
            reports.append(report(index, work.reductions, plan.ranks[index], task))
        calibration.meter.calibration_tokens = calibration.tokens.num_tokens
        details = {"planned_sparsity": plan.achieved, "plan_target": plan.target}
        return Compressed(model=build_compressed(task.model, shapes, tensors), layers=reports, influence=influence, details=details)

    def _exchanged(self, task: CompressionTask, plan: RankPlan) -> RankPlan:
        """Ranks that remove as much as ``plan`` does, by what each costs."""
        faithful, config = self.faithful(), task.model.config
        frozen = [module for module, variant in faithful.variants(task.family).items() if variant is None]
        compressible = module_budgets(config, task.family, rank_multiple=self.rank_multiple, targets=self.module_sparsity, frozen=frozen)
        skipped = module_budgets(config, task.family, rank_multiple={}, targets={}, frozen=MODULES)
        layers = [skipped if index in self.skip_layers else compressible for index in range(task.calibration.num_layers)]
        needed = {
            module: frozenset(STATISTIC[module][key] for key in variant.required)
            for module, variant in faithful.variants(task.family).items()
            if variant is not None
        }
        return exchange(rank_costs(task.calibration, needed, self.shares, self.skip_layers), layers, plan, cap=self.cap)
