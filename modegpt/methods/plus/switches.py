"""What MoDeGPTPlus can be told, apart from ranks: each ingredient a switch."""

from dataclasses import dataclass, field

from modegpt.config import unknown
from modegpt.errors import UserError

CHOICES = {
    "mlp": ("leverage", "elimination"),
    "query_key": ("paper", "checked"),
    "value_output": ("values", "attention"),
    "bias": ("none", "own"),
    "allocation": ("uniform", "entropic", "loss"),
}


@dataclass(frozen=True)
class Switches:
    """The ingredients. All at their first choice, False and 0: the paper's method with a ridge in the output solves.

    Args:
        sequential: statistics from the stream of the model compressed so far rather than the dense one.
        refit: solve the output matrices against the dense stream's target rather than the dense weights' on the same
            inputs.
        beta: share of the residual stream's error made so far that each refit corrects; nothing where a norm stands
            between the refit output and the stream (Gemma 3, OLMo 2).
        align: solve the input matrices for what the dense ones make of the dense stream, from the compressed stream.
        mlp: channels by ridge leverage (paper) or by backward elimination of what the output loses least by.
        query_key: the paper's score; ``checked``: its selection, that by logit error with pair interactions and that by
            the attention output's first-order error compete on held-out windows for each key head.
        value_output: the subspace by the Gram of the values (paper) or of the attention's output.
        bias: a constant feature in each output solve: never, or where the family has a bias for it.
        allocation: sparsity over layers, uniform or entropic (paper's defaults), or over layers and modules by measured
            divergence.
        shares: of a module's dims; the divergence is measured without each of these (``allocation=loss``).
        cap: largest share any module loses (``allocation=loss``).
        rounds: how often the budget is shared out again by what modules cost in the model as planned; a plan is kept
            where it diverges less on other calibration windows (``allocation=loss``).
        temperature: the compressed model's logits multiplied by the number at which its predictions diverge least from
            the dense model's.
        nested: every module's dims ordered once on the dense stream, whatever the rate, and cut to it; needs
            ``sequential=False``.
        queries_per_window: positions of each window whose attention the query-key selection looks at.
        query_key_windows: windows it is fitted on; those held out among the same batches check it.
    """

    sequential: bool = True
    refit: bool = True
    beta: float = 1.0
    align: bool = True
    mlp: str = "elimination"
    query_key: str = "checked"
    value_output: str = "attention"
    bias: str = "own"
    allocation: str = "loss"
    shares: tuple[float, ...] = (0.25, 0.5)
    cap: float = 0.9
    rounds: int = field(default=0, metadata={"before": 0})
    temperature: bool = field(default=True, metadata={"before": False})
    nested: bool = False
    queries_per_window: int = 32
    query_key_windows: int = 32

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown(f"method.{name}", getattr(self, name), choices)
        if not 0 <= self.beta <= 1:
            raise UserError(
                f"method.beta={self.beta} is outside [0, 1]: it is the share of the error made so far that is corrected"
            )
        if not 0 < self.cap < 1:
            raise UserError(f"method.cap={self.cap} must lie between 0 and 1: it is a share of a module's dims")
        if not self.shares or any(not 0 < share < 1 for share in self.shares):
            raise UserError(
                f"method.shares={list(self.shares)} must be numbers between 0 and 1: shares of a module's dims"
            )
        if self.rounds < 0 or (self.rounds and (self.allocation != "loss" or self.nested)):
            raise UserError(
                f"method.rounds={self.rounds}: a number of times that method.allocation=loss is to be measured again, "
                "and not with method.nested=true"
            )
        for name in ("queries_per_window", "query_key_windows"):
            if getattr(self, name) < 1:
                raise UserError(f"method.{name}={getattr(self, name)} is too small: at least 1")
        self._check_combinations()

    def _check_combinations(self) -> None:
        for name in ("refit", "align"):
            if getattr(self, name) and not self.sequential:
                raise UserError(
                    f"method.{name}=true needs method.sequential=true: "
                    "without it both streams are the same and there is nothing to correct"
                )
        if self.nested and (self.sequential or self.temperature or self.allocation == "entropic"):
            raise UserError(
                "method.nested=true needs method.sequential=false (with refit=false, align=false), "
                "method.temperature=false and method.allocation=loss or uniform: its orders serve every rate"
            )
