"""ShortGPT: drop the layers that change the residual stream least.

Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024, arXiv 2403.03853,
section 3.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.methods.layer_dropping import drop_layers, num_dropped_layers


@dataclass(frozen=True)
class ShortGPT(Method):
    """The layers of lowest block influence ``1 - mean cos(x_l, x_{l+1})`` go, measured once on the dense model.

    As many as come nearest to the task's sparsity. Layers of equal influence go from the front.
    """

    name: ClassVar[str] = "shortgpt"
    experts: ClassVar[bool] = True

    @torch.no_grad()
    def compress(self, task: CompressionTask) -> Compressed:
        """Measure block influence and drop the layers of lowest."""
        influence = task.calibration.block_influence()
        order = influence.argsort(stable=True).tolist()
        dropped = order[: num_dropped_layers(task.sparsity, len(order))]
        return drop_layers(task, dropped, influence=influence.tolist())
