"""The stock form of a compressed model: the family's own class, the same logits, its price; and what has none."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from modegpt.cli import export as command
from modegpt.errors import UserError
from modegpt.models import (
    build_compressed,
    cache_bytes_per_token,
    decoder_layers,
    dense_shape,
    family_of,
    layer_shapes,
)
from modegpt.models.build import empty_compressed
from modegpt.models.checkpoints import load_model, save_checkpoint
from modegpt.models.export import CPU_PAGES, paged_model, stock_model
from tests.models.family_table import (
    CONFIGS,
    dense_model,
    native_model,
    sliced_model,
    smaller_shape,
    tokens,
    with_shared_pairs,
)
from tests.models.saved import tiny_tokenizer


@torch.inference_mode()
def assert_same_function(stock: PreTrainedModel, model: PreTrainedModel) -> None:
    for length in (1, 12):
        torch.testing.assert_close(
            stock(tokens(length=length)).logits, model(tokens(length=length)).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_compressed_model(name: str) -> None:
    dense = dense_model(name)
    wide = smaller_shape(dense.config)
    if family_of(dense.config).head_norms:
        wide = dataclasses.replace(wide, qk_head_dim=dense_shape(dense.config).qk_head_dim)
    narrow = dataclasses.replace(wide, intermediate_size=17, v_head_dim=3)
    layers = [sliced_model(dense, shape)[0] for shape in (wide, narrow, dense_shape(dense.config))]
    tensors = [decoder_layers(each)[index].state_dict() for index, each in enumerate(layers)]
    model = build_compressed(dense, [layer_shapes(each.config)[0] for each in layers], tensors)
    stock, report = stock_model(model)
    assert type(stock) is type(native_model(name)) and type(stock).__module__.startswith("transformers.models")
    assert_same_function(stock, model)
    assert report.exported.num_parameters == stock.num_parameters() == native_model(name).num_parameters()
    assert report.padding > 0 and report.gains_nothing and report.dense == report.exported
    assert report.exported.cache_bytes == cache_bytes_per_token(dense.config, torch.float32)
    assert report.compressed.weight_bytes == 4 * model.num_parameters()


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "olmo2"])
def test_heads_that_lost_dims_of_their_norm_have_no_stock_form(name: str) -> None:
    model, _ = sliced_model(dense_model(name))
    with pytest.raises(UserError, match=f"{name} has one norm for all heads of a layer.*query_key=none"):
        stock_model(model)


@pytest.mark.parametrize("name", ["llama", "llama3-rope-tied", "llama-multihead-biased", "mistral-no-window", "gemma"])
@torch.inference_mode()
def test_one_set_of_frequencies_needs_no_zeros(name: str, tmp_path: Path) -> None:
    """The family's own class with smaller heads: the same logits, saved and loaded, and a smaller cache."""
    model = with_shared_pairs(name)
    stock, report = stock_model(model)
    assert stock.config.head_dim == 6 and report.padding == 0 and "Nothing was filled up" in str(report)
    assert report.exported.cache_bytes == report.dense.cache_bytes * 6 // 8
    stock.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for each in (stock, loaded):
        torch.testing.assert_close(each(tokens()).logits, model(tokens()).logits, rtol=1e-5, atol=5e-6)
    scaled = with_shared_pairs(name)
    scaled.model.rotary_emb.attention_scaling = 1.1
    assert stock_model(scaled)[0].config.head_dim == 8
    other = with_shared_pairs(name)
    decoder_layers(other)[1].self_attn.rope_index[1, 1] = 1
    assert stock_model(other)[0].config.head_dim == 8
    assert_same_function(stock_model(other)[0], other)


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "phi3"])
def test_equal_widths_cost_nothing(name: str) -> None:
    dense = dense_model(name)
    shape = dataclasses.replace(dense_shape(dense.config), intermediate_size=24)
    model, _ = sliced_model(dense, shape)
    stock, report = stock_model(model)
    assert_same_function(stock, model)
    assert report.padding == 0 and "Nothing was filled up" in str(report) and not report.gains_nothing
    assert report.dense.num_parameters == native_model(name).num_parameters() > report.exported.num_parameters
    wider, padded = stock_model(model, width_multiple=16)
    assert_same_function(wider, model)
    assert (
        padded.padding > 0
        and decoder_layers(wider)[0].get_submodule("fc2" if name == "opt" else "mlp.down_proj").in_features == 32
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "llama-wide-heads"])
def test_missing_heads_layers_and_widths(name: str) -> None:
    """A layer without heads, one without an MLP, one gone; all layers lose the same head where the family has room."""
    dense = dense_model(name)
    full = dense_shape(dense.config)
    few = dataclasses.replace(full, num_kv_heads=full.num_kv_heads // 2)
    none = dataclasses.replace(full, num_kv_heads=0, intermediate_size=0)
    size, group = full.qk_head_dim, dense.config.num_attention_heads // full.num_kv_heads
    family_layers = decoder_layers(dense)

    def cut(index: int, count: int, width: int) -> dict[str, torch.Tensor]:
        tensors = dict(family_layers[index].state_dict())
        for path in ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"):
            rows = count * size * (1 if path in ("k_proj", "v_proj") else group)
            for key in [key for key in tensors if f".{path}." in key]:
                if path in ("o_proj", "out_proj"):
                    tensors[key] = tensors[key][:, :rows] if key.endswith("weight") else tensors[key]
                else:
                    tensors[key] = tensors[key][:rows]
        for key, tensor in tensors.items():
            if key.startswith(("mlp.down_proj", "fc2")):
                tensors[key] = tensor[:, :width] if key.endswith("weight") else tensor
            elif key.startswith(("mlp.", "fc1")):
                tensors[key] = tensor[:width]
        return tensors

    changed = [cut(0, few.num_kv_heads, full.intermediate_size), cut(2, 0, 0)]
    model = build_compressed(dense, [few, none], changed, kept_layers=[0, 2])
    stock, report = stock_model(model)
    assert_same_function(stock, model)
    assert stock.config.num_hidden_layers == 2
    assert report.dense.num_parameters == native_model(name).num_parameters()  # the layer that is gone counts
    assert (stock.config.num_attention_heads < dense.config.num_attention_heads) == name.startswith("llama")


def with_biases(name: str, *paths: str) -> PreTrainedModel:
    dense = dense_model(name)
    shape = dataclasses.replace(smaller_shape(dense.config), extra_biases=paths)
    tensors = [dict(layer.state_dict()) for layer in decoder_layers(sliced_model(dense)[0])]
    for layer in tensors:
        layer |= {f"{path}.bias": torch.randn(dense.config.hidden_size) for path in paths}
    return build_compressed(dense, [shape] * len(tensors), tensors)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("llama", "mlp.down_proj"),
        ("llama", "self_attn.o_proj"),
        ("qwen2", "self_attn.o_proj"),
        ("gemma", "self_attn.o_proj"),
    ],
)
def test_added_biases_find_a_place(name: str, path: str) -> None:
    """Where the family can switch them on; and in Qwen2, whose output has none, as a value that is always 1."""
    model = with_biases(name, path)
    assert_same_function(stock_model(model)[0], model)


def test_factors_are_multiplied_out() -> None:
    dense = dense_model("llama")
    shape = dataclasses.replace(dense_shape(dense.config), linear_ranks={"mlp.up_proj": 5})
    tensors = [dict(layer.state_dict()) for layer in decoder_layers(dense)]
    for layer in tensors:
        weight = layer.pop("mlp.up_proj.weight")
        layer |= {
            "mlp.up_proj.A.weight": torch.randn(5, weight.shape[1]),
            "mlp.up_proj.B.weight": torch.randn(weight.shape[0], 5),
        }
    model = build_compressed(dense, [shape] * len(tensors), tensors)
    assert_same_function(stock_model(model)[0], model)


def test_what_has_no_stock_form_is_refused() -> None:
    with pytest.raises(UserError, match=r"layer 0: mlp.down_proj has a bias, which mistral models cannot store"):
        stock_model(with_biases("mistral", "mlp.down_proj"))
    with pytest.raises(UserError, match="family's own form already"):
        stock_model(native_model("llama"))
    from modegpt.models.modeling_sliced import MODELS

    sliced = MODELS[0](
        MODELS[0].config_class(
            **{key: value for key, value in CONFIGS["llama"].to_dict().items() if key != "model_type"}
        )
    )
    with pytest.raises(UserError, match="SliceGPT"):
        stock_model(sliced)


def test_the_command(tmp_path, capsys) -> None:
    """A checkpoint in, a checkpoint out that loads as Llama with nothing of this package in it."""
    model, _ = sliced_model(dense_model("llama"))
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "ours", {})
    assert command.main([str(tmp_path / "ours"), str(tmp_path / "stock")]) == 0
    told = capsys.readouterr().out
    sizes = [native_model("llama").num_parameters(), model.num_parameters()]
    assert all(f"{count:,} | {4 * count:,}" in " ".join(told.split()) for count in sizes)
    assert "| exported " in told and told.rpartition("written")[0] in (tmp_path / "stock" / "README.md").read_text()
    assert (
        not list((tmp_path / "stock").glob("*.py"))
        and "modegpt" not in (tmp_path / "stock" / "config.json").read_text()
    )
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(stock).__name__ == "LlamaForCausalLM"
    assert_same_function(stock.eval(), model)
    assert AutoTokenizer.from_pretrained(tmp_path / "stock").get_vocab() == tiny_tokenizer().get_vocab()
    assert command.main([str(tmp_path / "stock"), str(tmp_path / "again")]) == 2
    assert command.main([str(tmp_path / "nowhere"), str(tmp_path / "again")]) == 2
    assert command.main([str(tmp_path / "ours"), str(tmp_path / "stock"), "--width-multiple", "16"]) == 2
    errors = capsys.readouterr().err
    assert (
        "own form already" in errors and "no model directory" in errors and "already holds another checkpoint" in errors
    )


def test_what_is_no_smaller_than_dense_wants_force(tmp_path: Path, capsys) -> None:
    """One layer as wide as the dense one, and zeros fill all others up to it."""
    dense = dense_model("llama")
    narrow, full = smaller_shape(dense.config), dense_shape(dense.config)
    cut = [sliced_model(dense, shape)[0] for shape in (narrow, narrow, full)]
    tensors = [decoder_layers(each)[index].state_dict() for index, each in enumerate(cut)]
    model = build_compressed(dense, [narrow, narrow, full], tensors)
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "ours", {})
    assert command.main([str(tmp_path / "ours"), str(tmp_path / "stock")]) == 2
    told = capsys.readouterr()
    assert "no smaller than the dense model; --force" in told.err and "| dense " in told.out
    assert not (tmp_path / "stock").exists()
    assert command.main([str(tmp_path / "ours"), str(tmp_path / "stock"), "--force"]) == 0
    assert (tmp_path / "stock" / "model.safetensors").is_file()


def test_others_can_read_what_is_written(tmp_path: Path) -> None:
    """Files have the permissions that the user's mask leaves, whatever their writer gave them."""
    model, _ = sliced_model(dense_model("llama"))
    mask = os.umask(0o027)
    try:
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "ours", {})
    finally:
        os.umask(mask)
    assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o750
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "ours").iterdir()}
    assert modes and set(modes.values()) == {0o640}, modes


def test_modules_whose_maps_cannot_be_fused_alike_have_other_children() -> None:
    """vLLM decides it once for a class of modules and the names of their children, and takes hold of ``nn.Linear``."""
    dense = dense_model("llama")
    ranks: list[dict[str, int]] = [{}, {"mlp.up_proj": 5}, {"mlp.down_proj": 5}]
    shapes = [dataclasses.replace(dense_shape(dense.config), linear_ranks=each) for each in ranks]
    layers = decoder_layers(empty_compressed(dense, shapes))
    children = [tuple(name for name, _ in layer.get_submodule("mlp").named_children()) for layer in layers]
    assert len(set(children)) == 3
    assert [isinstance(layer.get_submodule("mlp.up_proj"), torch.nn.Linear) for layer in layers] == [True, False, True]


def test_experts_for_an_engine_that_has_none_of_their_sizes(tmp_path: Path) -> None:
    """vLLM takes a list of experts for ones of the dense width, and does not compile how many tokens each sees."""
    model = sliced_model(dense_model("olmoe"))[0]
    experts = decoder_layers(model)[0].get_submodule("mlp.experts")
    assert not isinstance(experts, torch.nn.ModuleList) and [name for name, _ in experts.named_children()] == list(
        "0123"
    )
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "ours", {})
    assert command.main([str(tmp_path / "ours"), str(tmp_path / "paged"), "--engine", "vllm"]) == 0
    assert "--trust-remote-code --enforce-eager" in (tmp_path / "paged" / "README.md").read_text()


def test_pages_for_an_engine_that_takes_all_sizes(tmp_path: Path, capsys) -> None:
    """The checkpoint itself, whose configuration tells the page of each layer, with all of the same code and logits."""
    dense = dense_model("llama-wide-heads")
    narrow, full = dataclasses.replace(smaller_shape(dense.config), v_head_dim=3), dense_shape(dense.config)
    cut = [sliced_model(dense, shape)[0] for shape in (narrow, narrow, full)]
    tensors = [decoder_layers(each)[index].state_dict() for index, each in enumerate(cut)]
    model = build_compressed(dense, [dataclasses.replace(narrow, qk_head_dim=12)] * 2 + [full], tensors)
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "ours", {})
    arguments = [str(tmp_path / "ours"), str(tmp_path / "paged"), "--engine", "vllm"]
    assert command.main(arguments) == 0
    told = " ".join(capsys.readouterr().out.split())
    sizes = f"{model.num_parameters():,} | {4 * model.num_parameters():,}"
    assert f"| exported | {sizes} | {4 * 2 * 2 * (16 + 16 + 16):,} |" in told and "pages of 16" in told
    again = load_model(str(tmp_path / "paged"), device="cpu")
    assert [again.config.page_size(index) for index in range(3)] == [16, 16, 16]
    assert_same_function(again, model)
    again, report = paged_model(again, pages="cpu")
    assert [again.config.page_size(index) for index in range(3)] == [32, 32, 32] and 32 in CPU_PAGES
    assert report.exported.cache_bytes == 4 * 2 * 2 * 96 > report.dense.cache_bytes
    ids = tokens()
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    static = again.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, model.generate(ids, **options))
    with pytest.raises(UserError, match="no layers of free sizes"):
        paged_model(native_model("llama"), pages="gpu")
    empty = dataclasses.replace(full, intermediate_size=0)
    layers = [dict(layer.state_dict()) for layer in decoder_layers(sliced_model(dense, empty)[0])]
    without_mlp = build_compressed(dense, [empty] * 3, layers)
    assert not isinstance(decoder_layers(without_mlp)[0].get_submodule("mlp.down_proj"), torch.nn.Linear)
    assert paged_model(without_mlp, pages="cpu")[1].padding == 0
