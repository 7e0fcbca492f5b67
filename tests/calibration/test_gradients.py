"""What each token's output does to the loss, against numerical derivatives."""

import torch

from modegpt.calibration.gradients import output_sensitivity, summed_loss
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model


def test_output_sensitivity_is_the_squared_slope_of_the_loss() -> None:
    model = dense_model("opt").double()
    task = task_of(model, 0.3, num_samples=2)
    linears = [
        linear
        for layer in model.model.decoder.layers
        for linear in (task.family.output(layer), task.family.down(layer))
    ]
    weights = output_sensitivity(task.calibration, linears, batch_size=1)
    ids = task.calibration.tokens.ids
    assert all(weight.shape == ids.shape for weight in weights)
    assert task.calibration.meter.backward_passes == 1
    window, token, step = 1, 3, 1e-5
    for linear, weight in zip(linears, weights, strict=True):
        slopes = []
        for direction in torch.eye(linear.out_features, dtype=torch.float64):
            losses = []
            for sign in (1, -1):
                moved = torch.zeros(1, ids.shape[1], linear.out_features, dtype=torch.float64)
                moved[0, token] = sign * step * direction
                hook = linear.register_forward_hook(lambda _, __, y, moved=moved: y + moved.view_as(y))
                with torch.no_grad():
                    losses.append(summed_loss(model, ids[window : window + 1]))
                hook.remove()
            slopes.append((losses[0] - losses[1]) / (2 * step))
        torch.testing.assert_close(
            weight[window, token].double(), torch.stack(slopes).square().sum(), rtol=1e-4, atol=1e-10
        )
        assert (
            weight[:, :-1].min() > 0 and weight[:, -1].max() == 0
        )  # nothing is predicted from the last token of a window


def test_nothing_is_left_on_the_model() -> None:
    model = dense_model("llama")
    task = task_of(model, 0.3, num_samples=2)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    output_sensitivity(task.calibration, [task.family.down(model.model.layers[0])], batch_size=2)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.model.layers[0].mlp.down_proj._forward_hooks
