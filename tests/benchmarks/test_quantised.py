"""What the benchmark of quantised weights does to value-output factors, and that it changes no function."""

import torch

from modegpt.models import decoder_layers, layer_shapes
from tests.models.family_table import dense_model, sliced_model, tokens
from tests.scripts import load_script

MODULE = load_script("benchmarks/quantised")


@torch.inference_mode()
def test_the_scale_of_a_product_moves_to_one_side_and_the_function_stays() -> None:
    model = sliced_model(dense_model("llama"))[0]
    expected, heads = model(tokens()).logits, layer_shapes(model.config)[0].num_kv_heads
    for values, path, dims in ((True, "o_proj", (0, 2)), (False, "v_proj", (2,))):
        changed = MODULE.one_sided(model, values=values)
        model.load_state_dict(changed, strict=False)
        assert torch.allclose(model(tokens()).logits, expected, rtol=0, atol=1e-5)
        W = decoder_layers(model)[0].get_submodule(f"self_attn.{path}").weight
        size = layer_shapes(model.config)[0].v_head_dim
        unit = W.unflatten(1, (heads, -1, size)) if path == "o_proj" else W.unflatten(0, (heads, -1))
        assert torch.allclose(unit.norm(dim=dims), torch.ones(heads, size), atol=1e-5)


def test_matrices_of_the_layers_are_rounded_in_place_whatever_their_rows() -> None:
    model = sliced_model(dense_model("llama"))[0]
    rounded, own = MODULE.rounded(model, "q8_0"), model.state_dict()
    assert len(rounded) == 7 * len(decoder_layers(model)) and any(W.shape[1] % 32 for W in rounded.values())
    for name, W in rounded.items():
        # half a step of 127, which the largest of a block sets, and the rounding of the scale to 16 bits
        assert W.shape == own[name].shape and not torch.equal(W, own[name])
        assert (W - own[name]).abs().max() < own[name].abs().max() / 127 * 0.6
