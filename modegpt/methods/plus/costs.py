"""FLOPs of the sequential pass, estimated from shapes."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from modegpt.calibration.calibration import layer_flops
from modegpt.methods.plus.switches import Switches
from modegpt.models import Family, LayerShape, dense_shape

NUM_SOLVES = 4
"""Of a regression whose ridge is chosen: about three ridges are tried, then all rows solved."""


@dataclass(frozen=True)
class LayerWork:
    """FLOPs of one layer: what runs of the model (``forward``), and the sums, selections and solves."""

    forward: float
    algebra: float


def layer_work(
    model: PreTrainedModel,
    family: Family,
    layer: nn.Module,
    ids: Tensor,
    shape: LayerShape,
    options: Switches,
    sampled_windows: int,
) -> LayerWork:
    """Of a layer that came out in ``shape``, all of its modules reduced or refitted.

    The dense layer once; the compressed one's projections on ``sampled_windows``, its attention, its MLP up to the down projection and,
    reduced, whole; then Gram and cross moments, the elimination, and the solves of each module for the local and the dense target.
    """
    (num_samples, length), T = ids.shape, ids.numel()
    d_h, H, dense = model.config.hidden_size, model.config.num_attention_heads, dense_shape(model.config)
    d, n = dense.qk_head_dim, dense.intermediate_size
    inputs = 1 if family.gate_path is None else 2
    projections = 2.0 * d_h * sum(linear(layer).out_features for linear in (family.query, family.key, family.value))
    attention = 2.0 * H * d * num_samples * length**2
    forward, algebra = layer_flops(model, ids), 0.0
    if options.sequential:
        forward += T * projections + attention + 2.0 * T * H * d * d_h
        forward += 2.0 * T * d_h * n * inputs + 2.0 * T * d_h * shape.intermediate_size * (inputs + 1)
    if shape.qk_head_dim < dense.qk_head_dim:
        sampled = min(sampled_windows, num_samples)
        forward += sampled * length * projections
        algebra += 2.0 * sampled * H * d * d * length * (1 + options.queries_per_window)
    for features, kept in ((H * d, H * shape.v_head_dim), (n, shape.intermediate_size)):
        algebra += (2 if options.fisher else 1) * T * features * (features + 2.0 * d_h) + 4.0 * features**2 * d_h
        algebra += len(options.gammas) * 2 * NUM_SOLVES * (kept**3 / 3 + 4.0 * kept**2 * d_h)
    if options.align:
        algebra += 2 * (3.0 * T * d_h**2 + NUM_SOLVES * (d_h**3 / 3 + 4.0 * d_h**3))
    algebra += len(options.gammas) * (n**3 + 2.0 * n**2 * d_h + 2.0 * (n**3 - shape.intermediate_size**3))
    return LayerWork(forward=forward, algebra=algebra)
