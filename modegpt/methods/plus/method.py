"""MoDeGPT improved without a gradient: what the paper leaves on the table at the same budget and the same calibration tokens."""

from dataclasses import asdict, dataclass, field, replace
from functools import partial

from torch import Tensor

from modegpt.allocation.exchange import exchange
from modegpt.allocation.policies import Entropic, Uniform
from modegpt.allocation.ranks import RankPlan
from modegpt.calibration.calibration import layer_flops
from modegpt.calibration.gradients import output_sensitivity
from modegpt.calibration.stream import HiddenStates
from modegpt.decompositions import MLPElimination, MLPNystrom, QueryKeyCR, ValueOutputSVD, ValueOutputSVDAttention
from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.methods.modegpt import MODULES, MoDeGPT, assemble_layer, module_budgets, report
from modegpt.methods.plus.attention_states import sample
from modegpt.methods.plus.costs import layer_work
from modegpt.methods.plus.kept_costs import KeptCosts
from modegpt.methods.plus.layer import LayerPass
from modegpt.methods.plus.nested import FILE, NestedLayer, cut, nest, write_orders
from modegpt.methods.plus.sensitivity import Costs, perturbed_passes, rank_costs
from modegpt.methods.plus.streams import Split
from modegpt.methods.plus.switches import Switches
from modegpt.methods.plus.temperature import fit_inverse_temperature, sharpen
from modegpt.models import build_compressed, compressed_config, decoder_layers, dense_shape


@dataclass(frozen=True)
class MoDeGPTPlus(Switches, Method):
    """Sequential, error-correcting MoDeGPT; the ingredients are the fields of ``Switches``.

    Two streams walk the layers: dense X and compressed X~. In each layer the input maps are aligned, ``W <- A W`` with
    ``A = argmin ||N(X~) A - N(X)||^2`` over the normed streams N; then the query-key dims are chosen on X~; then the value-output
    subspace, on the attention output Z~ that the reduced queries and keys leave, and W_O refitted; then, aligned likewise, the MLP channels, on
    the hidden states h~ behind the reduced attention, and W_D refitted. A refit solves, in float64, from sums over calibration tokens,

        min_W ||Z~ W - (Z W_O + beta (X - X~))||^2 + lambda ||D^1/2 (W - W_0)||^2,   D = diag(Z~^T Z~),

    all heads jointly (h and X' for the MLP), W_0 the map of the aligned weights on the compressed stream's own features, for A the identity.
    lambda is the one of ``regression.RIDGES``, or infinity, that errs least on every fourth calibration window, solved again on all of them.

    Cost: of each layer, the dense one once, the compressed one's projections on ``query_key_windows``, its attention and its MLP once and the
    reduced MLP again; Gram matrices on Z~ and h~ as the paper's with cross moments 2 T (H d + n) d_h, 6 T d_h^2 for the alignment, up to 3 n^3
    for the elimination and 8 solves of k^3/3 a module; the allocation one statistics pass over a quarter of the windows, 3 n^3, and about
    half a pass over all windows for the perturbed forwards, up to two where there are few tokens, once for all rates where there is a cache; the temperature some 4096 tokens through both models. Memory beside the layer's: both residual streams and six tensors of their size.
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
        costs = self._costs(task) if self.allocation == "loss" and (task.sparsity > 0 or self.nested) else None
        plan = self.plan(task, costs=costs, influence=influence)
        if self.nested:
            return self._nested(task, plan, costs, influence)
        fisher = self._token_weights(task) if self.fisher else None
        dense, split = calibration.embed(), Split.of(calibration.tokens.ids, batch_size=calibration.batch_size)
        compressed = HiddenStates(list(dense.batches), dense.arguments)
        generator, dense_config = task.generator(), compressed_config(task.model.config)
        shapes, tensors, reports, changed_so_far = [], [], [], False
        for index, layer in enumerate(calibration.progress.track(decoder_layers(task.model), "layers", unit="layer")):
            stream = compressed if self.sequential else HiddenStates(list(dense.batches), dense.arguments)
            moved = changed_so_far and index not in self.skip_layers
            work = LayerPass(
                task.family,
                task.model.config,
                dense_config,
                layer,
                index,
                stream,
                split,
                self,
                calibration.precision,
                generator,
                moved,
                fisher and fisher[index],
            )
            with calibration.meter.stage("layers") as metered:
                shape, changed = work.reduce(plan.ranks[index], dense)
                changed_so_far = changed_so_far or bool(changed)
                ids = calibration.tokens.ids
                cost = layer_work(
                    task.model,
                    task.family,
                    layer,
                    ids,
                    shape,
                    self,
                    sampled_windows=split.batches_with(self.query_key_windows) * calibration.batch_size,
                )
                metered.flops += cost.forward + cost.algebra
                calibration.meter.forward_passes += cost.forward / layer_flops(task.model, ids) / calibration.num_layers
            shapes.append(shape)
            tensors.append(changed)
            reports.append(report(index, work.reductions, plan.ranks[index], task))
            reports[-1]["numerics"] |= {f"{name}_input": facts for name, facts in work.alignment.items()}
        calibration.meter.calibration_tokens = calibration.tokens.num_tokens
        finished = self._finished(task, plan, shapes, tensors, reports, influence)
        if self.temperature and changed_so_far and task.family.final_norm(task.model) is not None:
            with calibration.meter.stage("temperature", counted=True):
                s = fit_inverse_temperature(
                    task.model, finished.model, calibration.tokens.ids, batch_size=calibration.batch_size
                )
                sharpen(finished.model, task.family, s)
            finished.details["inverse_temperature"] = s
        return finished

    def plan(self, task: CompressionTask, *, costs: Costs | None, influence: list[float] | None = None) -> RankPlan:
        """Ranks that meet the target: by what each costs where that is known, else over layers by ``allocation``."""
        plan = self.faithful().plan(task, influence)
        if costs is None or plan.target == 0:
            return plan
        config, frozen = task.model.config, [module for module in MODULES if module not in self._modules(task)]
        compressible = module_budgets(
            config, task.family, rank_multiple=self.rank_multiple, targets=self.module_sparsity, frozen=frozen
        )
        skipped = module_budgets(config, task.family, rank_multiple={}, targets={}, frozen=MODULES)
        layers = [
            skipped if index in self.skip_layers else compressible for index in range(task.calibration.num_layers)
        ]
        return exchange(costs, layers, plan, cap=self.cap)

    def _modules(self, task: CompressionTask) -> dict[str, frozenset[str]]:
        """The modules that may be reduced, and the statistics that their decompositions read."""
        variants = self.faithful().variants(task.family)
        return {module: variant.required for module, variant in variants.items() if variant is not None}

    def _token_weights(self, task: CompressionTask) -> list[dict[str, tuple[Tensor, ...]]]:
        """For each layer and module with an output solve, the weight of every token, (batch, sequence) a batch. One backward pass."""
        calibration, family, layers = task.calibration, task.family, decoder_layers(task.model)
        linears = [linear for layer in layers for linear in (family.output(layer), family.down(layer))]
        weights = iter(output_sensitivity(calibration, linears, batch_size=calibration.batch_size))
        return [
            {module: next(weights).split(calibration.batch_size) for module in ("value_output", "mlp")} for _ in layers
        ]

    def _costs(self, task: CompressionTask) -> Costs:
        calibration, modules = task.calibration, self._modules(task)
        kept = (
            None if calibration.cache is None else KeptCosts(calibration.cache, modules, self.shares, self.skip_layers)
        )
        with calibration.meter.stage("allocation") as metered:
            if kept is not None and (costs := kept.load(calibration.num_layers)) is not None:
                return costs
            costs = rank_costs(calibration, modules, self.shares, self.skip_layers)
            passes = perturbed_passes(calibration, num_modules=len(modules), num_shares=len(self.shares))
            metered.flops += calibration.num_layers * (
                passes * layer_flops(task.model, calibration.tokens.ids)
                + 3.0 * dense_shape(task.model.config).intermediate_size ** 3
            )
            calibration.meter.forward_passes += passes
            if kept is not None:
                kept.store(costs)
        return costs

    def _nested(
        self, task: CompressionTask, plan: RankPlan, costs: Costs | None, influence: list[float] | None
    ) -> Compressed:
        """Order every module's dims on the dense stream, and cut to ``plan``; at sparsity 0 the checkpoint carries the orders."""
        calibration, modules = task.calibration, self._modules(task)
        names, hidden = frozenset().union(*modules.values()), calibration.embed()
        split, generator, nested = (
            Split.of(calibration.tokens.ids, batch_size=calibration.batch_size),
            task.generator(),
            [],
        )
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
        calibration.meter.forward_passes += 1
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
            model=build_compressed(task.model, shapes, tensors), layers=reports, influence=influence, details=details
        )
