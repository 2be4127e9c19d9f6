from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import ModelError
from rlhf.import_model import import_model, is_complete
from tests.fakes import SilentConsole
from tests.tiny import CHAT_TEMPLATE, make_tiny_model

NUM_HEADS, NUM_KV_HEADS = 4, 2
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits[0]


def as_gguf(folder: Path, path: Path) -> Path:
    """The tiny model as a GGUF file in llama.cpp's layout, its MLP in 8 bits: rounded in `folder`, too."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config["vocab_size"])
    special = {token["content"] for token in tokenizer["added_tokens"]}
    vocabulary = sorted(
        (tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}).items(),
        key=lambda item: item[1],
    )
    # A GGUF file must have a merge, and a merge needs a token: the last special one, which no test text has.
    symbols = [symbol for symbol, _ in vocabulary[:-1]] + ["zq"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(symbols)
    writer.add_token_types([3 if symbol in special else 1 for symbol in symbols])
    writer.add_token_merges(["z q"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template(CHAT_TEMPLATE)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        array = tensor.numpy()
        if "mlp" in name:
            packed = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            weights[name] = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0).copy())
            writer.add_tensor(gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name(name), rotated(name, array))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def rotated(name: str, array: np.ndarray) -> np.ndarray:
    """llama.cpp keeps the two halves of a rotary pair next to each other."""
    heads = {"q_proj": NUM_HEADS, "k_proj": NUM_KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return array
    half = array.shape[0] // heads // 2
    return np.ascontiguousarray(array.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(array.shape))


def test_a_folder_comes_out_as_the_same_model(tiny_model: Path, tmp_path: Path) -> None:
    console = SilentConsole()
    dest = import_model(str(tiny_model), tmp_path / "deep" / "model", console=console)
    assert is_complete(dest)
    assert torch.equal(logits(dest), logits(tiny_model))
    assert not console.warned
    assert [path.name for path in dest.parent.iterdir()] == ["model"]


def test_a_gguf_file_comes_out_as_plain_float32_weights_with_its_tokenizer(tmp_path: Path) -> None:
    original = make_tiny_model(tmp_path / "tiny")
    source = as_gguf(original, tmp_path / "tiny.gguf")
    dest = import_model(str(source), tmp_path / "model", console=SilentConsole())
    assert "quantization_config" not in json.loads((dest / "config.json").read_text())
    assert {tensor.dtype for tensor in load_file(dest / "model.safetensors").values()} == {torch.float32}
    assert torch.allclose(logits(dest), logits(original), atol=1e-5)
    chat = [{"role": "user", "content": "Is it 12, or né?"}]
    ids = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for folder in (original, dest)
    ]
    assert ids[0] == ids[1]
    assert max(AutoTokenizer.from_pretrained(dest).get_vocab().values()) == 261


def test_the_weights_take_the_dtype_that_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    dest = import_model(str(tiny_model), tmp_path / "model", console=SilentConsole(), dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(dest / "model.safetensors").values()} == {torch.bfloat16}


def test_generation_ends_at_the_token_that_ends_a_turn_too(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "tiny")
    template = source / "chat_template.jinja"
    template.write_text(CHAT_TEMPLATE.replace("+ eos_token", "+ '<|system|>'"))
    dest = import_model(str(source), tmp_path / "model", console=SilentConsole())
    tokenizer = AutoTokenizer.from_pretrained(dest)
    ends = json.loads((dest / "generation_config.json").read_text())["eos_token_id"]
    assert ends == sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|system|>")])


def test_a_model_without_a_chat_template_is_imported_with_a_warning(tmp_path: Path) -> None:
    source, console = make_tiny_model(tmp_path / "tiny"), SilentConsole()
    (source / "chat_template.jinja").unlink()
    import_model(str(source), tmp_path / "model", console=console)
    assert len(console.warned) == 1
    assert "chat template" in console.warned[0]


def test_a_complete_model_at_the_destination_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    dest = tmp_path / "model"
    shutil.copytree(tiny_model, dest)
    before = {path: path.stat().st_mtime_ns for path in dest.iterdir()}
    console = SilentConsole()
    assert import_model("/nowhere/at/all.gguf", dest, console=console) == dest
    assert before == {path: path.stat().st_mtime_ns for path in dest.iterdir()}
    assert "holds a model already" in console.said[0]


def test_an_import_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "tiny")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not finite numbers: model\.norm\.weight"):
        import_model(str(source), tmp_path / "out" / "model", console=SilentConsole())
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["tenfold"])
    tokenizer.save_pretrained(source)
    with pytest.raises(ModelError, match="no embedding for: tenfold"):
        import_model(str(source), tmp_path / "model", console=SilentConsole())


def test_missing_weights_are_named(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "tiny")
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights: model\.layers\.1\.mlp\.up_proj\.weight"):
        import_model(str(source), tmp_path / "model", console=SilentConsole())


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("missing.gguf", "does not exist"),
        ("missing/deeply/model", "does not exist"),
        ("empty", "has no config.json"),
        ("notes.txt", "is not a GGUF file: it starts with b'hell'"),
        ("cut.gguf", "cannot be read as a causal language model"),
        ("bad_json", "cannot be read as a causal language model"),
        ("nobody/no-model", "the hub did not give it"),
    ],
)
def test_a_source_that_cannot_be_used_is_told_with_a_remedy(
    source: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("notes.txt").write_text("hello")
    Path("cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x01")
    Path("bad_json").mkdir()
    Path("bad_json/config.json").write_text("{")
    with pytest.raises(ModelError) as caught:
        import_model(source, Path("model"), console=SilentConsole())
    assert source in caught.value.problem
    assert problem in caught.value.problem
    assert caught.value.remedy
    assert not Path("model").exists()


@pytest.mark.parametrize("what", ["a file", "a folder with something else", "below a file"])
def test_a_destination_that_cannot_be_used_is_told_with_a_remedy(what: str, tiny_model: Path, tmp_path: Path) -> None:
    dest = tmp_path / "model"
    if what == "a folder with something else":
        dest.mkdir()
        (dest / "diary.txt").write_text("dear diary")
    else:
        dest.write_text("a file")
    with pytest.raises(ModelError) as caught:
        import_model(str(tiny_model), dest / "deeper" if what == "below a file" else dest, console=SilentConsole())
    assert str(dest) in caught.value.problem
    assert caught.value.remedy
