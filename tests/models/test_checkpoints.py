"""A checkpoint is whole or it is refused, with the file named; saving leaves the old one or none."""

import json
import os
import re
import shutil
import signal
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

from modegpt.data.fingerprints import fingerprint_tokenizer
from modegpt.errors import UserError
from modegpt.models import checkpoints
from modegpt.models.checkpoints import check_destination, load_model, load_tokenizer, present, save_checkpoint, saved_by
from modegpt.models.integrity import MANIFEST, fingerprint_weights
from modegpt.streaming.model import StreamedModel
from tests.models.family_table import dense_model, native_model, tokens
from tests.models.saved import RECORD, compressed, tiny_tokenizer
from tests.processes import CLEAN


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return compressed("llama")


@pytest.fixture(scope="module")
def _saved(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(
        model, tiny_tokenizer(), tmp_path_factory.mktemp("saved") / "model", RECORD, max_shard_size="30KB"
    )


@pytest.fixture
def saved(_saved: Path, tmp_path: Path) -> Path:
    """A copy of a sharded checkpoint, to damage."""
    return Path(shutil.copytree(_saved, tmp_path / "model"))


def load(path: Path | str) -> PreTrainedModel:
    return load_model(str(path), "auto", "cpu")


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def test_the_folder_holds_all_that_people_need(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert (
        tokenizer | {"config.json", "generation_config.json", "modeling_modegpt.py", "README.md", MANIFEST} <= names
        and len(shards(saved)) > 1
    )
    config = json.loads((saved / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_modegpt.MoDeGPTLlamaForCausalLM" and config[
        "qk_head_dims"
    ] == [6, 6, 6]
    card = (saved / "README.md").read_text()
    assert (
        "| ppl_tiny_64 | 3.5000 | 4.2500 |" in card and "30.12 %" in card and "modegpt compression.sparsity=0.3" in card
    )
    assert "base_model: someone/tiny" in card and "trust_remote_code=True" in card and "| num_samples | 16 |" in card


def test_loading_again_gives_the_same_model(saved: Path, model: PreTrainedModel) -> None:
    again = load(saved)
    assert not again.training and fingerprint_weights(again) == fingerprint_weights(model)
    assert fingerprint_tokenizer(load_tokenizer(str(saved))) == fingerprint_tokenizer(tiny_tokenizer())
    assert load_model(str(saved), "bfloat16", "cpu").dtype == torch.bfloat16
    assert load_model(str(saved), "bfloat16", "cpu").model.rotary_emb.inv_freq.dtype == torch.float32


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "target", "reason"),
    [
        (truncate, 1, "truncated"),
        (flip_a_bit, 0, "not the file that was saved"),
        (Path.unlink, 1, "is missing"),
        (flip_a_bit, "modeling_modegpt.py", "not the file that was saved"),
        (Path.unlink, "generation_config.json", "is missing"),
        (truncate, "config.json", "truncated"),
    ],
)
def test_a_damaged_file_is_named(saved: Path, damage, target: int | str, reason: str) -> None:
    path = shards(saved)[target] if isinstance(target, int) else saved / target
    damage(path)
    with pytest.raises(UserError, match=reason) as error:
        load(saved)
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_does_not_belong_is_named(saved: Path) -> None:
    shutil.copy(shards(saved)[0], saved / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors does not belong"):
        load(saved)


def test_the_card_may_be_edited(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    load(saved)


@pytest.mark.parametrize("damage", ["truncated shard", "missing shard", "missing tensor", "nan", "header"])
def test_without_a_manifest_damage_is_still_found(tmp_path: Path, damage: str) -> None:
    """As for any checkpoint of Transformers' own; a tensor that is not there is never made up."""
    native_model("llama").save_pretrained(tmp_path / "plain", max_shard_size="30KB")
    shard = shards(tmp_path / "plain")[1]
    expected = shard.name
    if damage == "truncated shard":
        truncate(shard)
    elif damage == "missing shard":
        shard.unlink()
    elif damage == "header":
        shard.write_bytes(b"\x01\x02")
    else:
        tensors = load_file(shard)
        name = next(iter(tensors))
        expected = name
        if damage == "nan":
            tensors[name].view(-1)[0] = float("nan")
        else:
            del tensors[name]
        save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        load(tmp_path / "plain")
    assert expected in str(error.value)


def test_the_file_beside_the_weights_never_makes_weights_up(saved: Path) -> None:
    """The class itself refuses too, for those who load without this package."""
    from transformers import AutoModelForCausalLM

    index = json.loads((saved / "model.safetensors.index.json").read_text())
    name = next(key for key in index["weight_map"] if key.endswith("o_proj.weight"))
    shard = saved / index["weight_map"].pop(name)
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks .*{name}"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_saving_never_replaces_something_else(saved: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    save_checkpoint(
        model, tiny_tokenizer(), saved, {"name": "another card"}, max_shard_size="30KB"
    )  # identical: left alone
    with pytest.raises(UserError, match="already holds another checkpoint"):
        save_checkpoint(compressed("llama3-rope-tied"), tiny_tokenizer(), saved, {})
    assert before == {path.name: path.read_bytes() for path in saved.iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not a saved checkpoint"):
        check_destination(tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot save"):
        check_destination(tmp_path / "file")
    with pytest.raises(UserError, match="cannot save"):
        check_destination(tmp_path / "file" / "below")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine", "model"], "something was left behind"


def test_only_the_same_run_replaces_its_checkpoint(model: PreTrainedModel, tmp_path: Path) -> None:
    """Computed again, it may round differently."""
    other = compressed("llama3-rope-tied")
    place = save_checkpoint(model, tiny_tokenizer(), tmp_path / "model", {}, run="a" * 64)
    assert saved_by(place) == "a" * 64
    with pytest.raises(UserError, match="already holds another checkpoint"):
        save_checkpoint(other, tiny_tokenizer(), place, {}, run="b" * 64)
    assert fingerprint_weights(load(place)) == fingerprint_weights(model)
    save_checkpoint(other, tiny_tokenizer(), place, {}, run="a" * 64)
    assert fingerprint_weights(load(place)) == fingerprint_weights(other)
    assert saved_by(tmp_path / "none") is None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_empty_folder_is_used_and_parents_are_made(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert load(save_checkpoint(model, tiny_tokenizer(), tmp_path / "empty", {})) is not None
    assert load(save_checkpoint(model, tiny_tokenizer(), tmp_path / "a" / "b", {})) is not None


def _save_and_die(point: str, directory: Path) -> None:
    """Runs in a child process: SIGKILL where ``checkpoints.point`` would be called."""

    def die(*_, **__) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    owner, _, name = point.rpartition(".")
    setattr(getattr(checkpoints, owner) if owner else checkpoints, name, die)
    save_checkpoint(compressed("llama"), tiny_tokenizer(), directory, RECORD)


@pytest.mark.parametrize("point", ["model_card", "describe_files", "sync", "os.rename"])
def test_a_kill_leaves_the_old_checkpoint_or_none(tmp_path: Path, point: str) -> None:
    process = CLEAN.Process(target=_save_and_die, args=(point, tmp_path / "model"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    load(save_checkpoint(compressed("llama"), tiny_tokenizer(), tmp_path / "model", RECORD))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/at/all", "no model directory at /nowhere/at/all"),
        ("./nowhere", "no model directory"),
        ("embedded:gpt", "no embedded model 'gpt'; there are tiny-llama, tiny-olmoe, tiny-opt, tiny-qwen3"),
        ("someone/model-that-is-not-here", "model=local model.path=DIRECTORY"),
    ],
)
def test_what_is_not_there_is_explained(path: str, message: str) -> None:
    for function in (load_model, load_tokenizer):
        with pytest.raises(UserError) as error:
            function(path)
        assert message in str(error.value)


def test_what_is_not_a_supported_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config.json"):
        load(tmp_path)
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'gpt2' is not supported; supported are gemma, .*llama"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "big"}')
    with pytest.raises(UserError, match=r"config.json has hidden_size='big'; it must be a whole number"):
        load(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        load(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "config.json has num_attention_heads=0; it must be a whole number"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"hidden_size": -8}, "hidden_size=-8"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers=10000000; it must be at most 10000"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "its rope_theta must be a positive number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1.0}}, "its factor must be a positive number"),
        ({"dtype": "float7"}, "config.json has dtype='float7'; it must be a type of PyTorch"),
        ({"dtype": 5}, "dtype=5"),
        ({"hidden_act": "nonsense"}, "hidden_act='nonsense'; Transformers knows no such activation function"),
        ({"rope_parameters": {"rope_type": "nonsense"}}, "its rope_type must be one of default, .*linear"),
        ({"rope_scaling": {"type": "nonsense", "factor": 2.0}}, "its rope_type must be one of default"),
        ({"rope_parameters": 5}, "rope_parameters=5"),
    ],
)
def test_a_configuration_out_of_range_names_the_field(
    changes: dict, message: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    native_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    capfd.readouterr()
    for function in (load_model, load_tokenizer):  # the tokenizer comes first in a run
        with pytest.raises(UserError, match=message):
            function(str(tmp_path))
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors.index.json", "[]"),
        ("model.safetensors.index.json", '{"weight_map": 5}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}}'),
        ("model.safetensors.index.json", "[" * 100_000),
        ("modegpt_manifest.json", "[]"),
        ("modegpt_manifest.json", '{"files": {"config.json": 7}}'),
        ("modegpt_manifest.json", '{"a":' * 50_000),
        ("config.json", "[1]"),
        ("config.json", "[" * 100_000),
        ("generation_config.json", "[]"),
        ("tokenizer_config.json", "[]"),
        ("special_tokens_map.json", '"text"'),
    ],
)
def test_json_of_another_form_names_the_file(name: str, content: str, tmp_path: Path) -> None:
    native_model("llama").save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name):
        load_model(str(tmp_path))


def test_a_tokenizer_without_tokens_is_called_empty(tmp_path: Path) -> None:
    native_model("llama").save_pretrained(tmp_path)
    empty = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=empty, unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer of .* is empty: it has no token but special ones"):
        load_tokenizer(str(tmp_path))


HUGE = struct.pack("<Q", 20 * 2**30)


def test_a_header_longer_than_the_format_allows_is_refused_unread(tmp_path: Path) -> None:
    """A sparse file of 20 GiB: to read its header whole would take as much memory."""
    native_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(HUGE)
    os.truncate(path, 8 + 20 * 2**30)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"model.safetensors is damaged: its header would have 21474836480 bytes"):
        load(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize("place", ["model.safetensors", "pytorch_model.bin"])
def test_a_pipe_in_the_place_of_weights_is_not_waited_for(tmp_path: Path, place: str) -> None:
    native_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / place)
    with pytest.raises(UserError, match=f"{place} is no file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers=2, but the weights have more: model.layers.2."),
        ({"num_hidden_layers": 4}, "lacks 9 of its tensors, first model.layers.3.* has num_hidden_layers=4"),
        ({"num_attention_heads": 8}, "num_attention_heads=8, .*layers.0.self_attn.o_proj.weight is 32 x 32 and not"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4, .*layers.0.self_attn.k_proj.weight is 16 x 32 and not"),
        ({"intermediate_size": 48}, "intermediate_size=48, .*layers.0.mlp.down_proj.weight is 32 x 40 and not 32 x 48"),
        ({"hidden_size": 64}, "has hidden_size=64, but model.layers.0.input_layernorm.weight is 32 and not 64"),
        ({"vocab_size": 99}, "vocab_size=99, .*lm_head.weight is 61 x 32 and not 99 x 32"),
        ({"model_type": "opt"}, "lacks 52 of its tensors"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=true, but lm_head.weight is stored with other values"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config with quant_method='gptq'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config with quant_method='awq'"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config with quant_method='unknown'"),
    ],
)
def test_a_configuration_of_other_weights_names_the_field(
    changes: dict, message: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """In memory and out of core alike, and without a word of how to load it all the same."""
    native_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    capfd.readouterr()
    for function in (load_model, StreamedModel.open):
        with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}.*{message}") as error:
            function(str(tmp_path))
        assert "ignore_mismatched_sizes" not in str(error.value)
    assert "".join(capfd.readouterr()) == ""


def test_sizes_are_compared_before_a_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(UserError, match="intermediate_size=48"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "holds .*q_proj.bias, for which config.json has no place"),
        ("model.layers.1.mlp.up_proj.qweight", "holds quantised weights, first model.layers.1.mlp.up_proj.qweight"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
    ],
)
def test_a_tensor_without_a_place_is_named(
    name: str, message: str | None, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    native_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(4)}, path, metadata={"format": "pt"})
    capfd.readouterr()
    for function in (load_model, StreamedModel.open):
        if message is None:  # what old versions of Transformers saved, and nothing reads
            function(str(tmp_path))
            continue
        with pytest.raises(UserError, match=message):
            function(str(tmp_path))
    assert "".join(capfd.readouterr()) == ""


class Payload:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.system, (f"touch {self.place}",)


def test_a_pickle_is_read_for_tensors_alone(tmp_path: Path) -> None:
    model = native_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert fingerprint_weights(load(tmp_path)) == fingerprint_weights(model)
    torch.save({"a": Payload(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle that holds more than tensors \(posix.system\)"):
        load(tmp_path)
    for content in (b"", b"text", b"PK\x03\x04 no archive"):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"pytorch_model.bin is .*; give the checkpoint as safetensors") as error:
            load(tmp_path)
        assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [{"truncation": -1}, {"pre_tokenizer": {"type": "Nonsense"}}, {"model": 5}, {"added_tokens": [{"id": {}}]}],
)
def test_a_tokenizer_of_another_form_is_one_line(changes: dict, tmp_path: Path) -> None:
    native_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=f"^cannot load {tmp_path}: "):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_file_that_could_be_read_for_ever_is_refused(tmp_path: Path) -> None:
    native_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"tokenizer.json is no file"):
        load_tokenizer(str(tmp_path))
    path.unlink()
    path.touch()
    os.truncate(path, 20 * 2**30)
    with pytest.raises(UserError, match=r"tokenizer.json is damaged: it has 21474836480 bytes"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    native_model("llama").save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["w99"])  # which no text need hold; several models have such
    tokenizer.save_pretrained(tmp_path)
    load_tokenizer(str(tmp_path))
    words = {word: index for index, word in enumerate(["<pad>", *(f"w{index}" for index in range(3, 80))])}
    larger = Tokenizer(WordLevel(words, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=larger, pad_token="<pad>").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the tokenizer has ids up to 77, but config.json has vocab_size=61"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("device", ["cuda", "cuda:9", "mps"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"model.device={device} is not there: PyTorch finds cpu on this machine"):
        load_model("/nowhere", device=device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [present(each) for each in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]
    with pytest.raises(UserError, match="PyTorch finds cpu, cuda, cuda:0, cuda:1 on this machine"):
        present("cuda:2")


def test_dense_checkpoints_load_and_fused_ones_come_apart(tmp_path: Path) -> None:
    native = native_model("phi3")
    native.save_pretrained(tmp_path / "phi3")
    loaded = load(tmp_path / "phi3")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, native(tokens()).logits, rtol=0, atol=1e-5)
    assert loaded.model.layers[0].self_attn.q_proj.weight.shape == (32, 32)
    save_checkpoint(loaded, tiny_tokenizer(), tmp_path / "again", {})
    assert fingerprint_weights(load(tmp_path / "again")) == fingerprint_weights(loaded)


def test_fingerprints_see_every_value_and_nothing_else() -> None:
    model = dense_model("llama")
    first = fingerprint_weights(model)
    assert first == fingerprint_weights(dense_model("llama"))
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert fingerprint_weights(model) != first
    tokenizer = tiny_tokenizer()
    before = fingerprint_tokenizer(tokenizer)
    tokenizer(["w3", "w4 w5"], padding=True, truncation=True, max_length=2)
    assert fingerprint_tokenizer(tokenizer) == before
    tokenizer.add_tokens(["w99"])
    assert fingerprint_tokenizer(tokenizer) != before
