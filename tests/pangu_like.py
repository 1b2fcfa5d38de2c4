"""A random small openPangu-Embedded checkpoint in the published layout, for tests."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 4000000.0, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
"""The 1B's proportions: half as many KV heads as heads, FFN wider than the rest, a tied head."""
SPECIAL = ("<unk>", "<s>", "</s>", "[unused9]", "[unused10]", "[unused16]", "[unused17]")
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '[unused9]系统：[unused10]' }}"
    "{% endif %}"
    "{% if message['role'] == 'system' %}"
    "{{ '[unused9]系统：' + message['content'] + '[unused10]' }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[unused9]用户：' + message['content'] + '[unused10]' }}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '[unused9]助手：' + message['content'] + '[unused10]' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[unused9]助手：' }}{% endif %}"
)
"""The turns that the published template writes."""
LIBRARY_IDS = {
    "so yes, 12 = 412.\n\nAnd":
        [277, 281, 306, 286, 300, 47, 281, 267, 281, 64, 281, 268, 49, 259, 308, 274],
    " the  then\n\n\n12a": [265, 281, 265, 295, 259, 13, 267, 282],
    "(a) 5,5 ab1": [43, 282, 44, 281, 56, 47, 56, 275, 283, 52],
    "中文，a": [231, 187, 176, 233, 153, 138, 242, 191, 143, 282],
    "\tthe\x01": [12, 301, 264, 4],
    "1234124": [267, 54, 268, 55],
}  # fmt: skip
"""Ids that sentencepiece 0.2.3 gives for `model_bytes()`."""
MERGED = (
    "▁t", "he", "▁the", "th", "12", "412", "▁1", ".\n\n", "▁▁", "an", "▁an", "nd", "▁a", "en", "so",
    "55", "41",
)  # fmt: skip


def message(*fields: tuple[int, int | float | bytes]) -> bytes:
    """A protobuf message of these (field number, value)."""
    parts = []
    for number, value in fields:
        if isinstance(value, bytes):
            size = len(value)
            length = bytes([size]) if size < 128 else bytes([size & 0x7F | 0x80, size >> 7])
            parts.append(bytes([number << 3 | 2]) + length + value)
        elif isinstance(value, int):
            parts.append(bytes([number << 3, value]))
        else:
            parts.append(bytes([number << 3 | 5]) + struct.pack("<f", value))
    return b"".join(parts)


def pieces() -> list[tuple[str, float, int]]:
    """(Text, score, kind). As in openPangu, digits and marks are byte pieces only."""
    found = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    found += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    found += [(text, 0.0, 4) for text in ("\n\n", "[unused9]", "[unused10]", "[unused16]")]
    found += [(text, -1.0 - n, 1) for n, text in enumerate(MERGED)]
    found += [("[unused17]", 0.0, 4)]
    characters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return found + [(text, -100.0 - n, 1) for n, text in enumerate(characters)]


def model_bytes(*, dummy_prefix: int = 0) -> bytes:
    """A `tokenizer.model` of these pieces."""
    listed = b"".join(
        message((1, message((1, text.encode()), (2, score), (3, kind))))
        for text, score, kind in pieces()
    )
    trainer = message((3, 2)) + b"\x98\x02\x01"  # BPE; field 35, byte fallback, on
    normalizer = message((1, b"identity"), (3, dummy_prefix), (4, 0), (5, 1))
    return listed + message((2, trainer), (3, normalizer))


def write_checkpoint(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Weights, configuration with `auto_map`, and tokenizer files; no Python code is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {text: i for i, (text, _, _) in enumerate(pieces())}
    config = {
        "architectures": ["PanguEmbeddedForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig",
            "AutoModel": "modeling_openpangu_dense.PanguEmbeddedModel",
            "AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM",
        },
        "bias": True, "attention_dropout": 0.0, "bos_token_id": 1, "pad_token_id": 0,
        "eos_token_id": ids["[unused10]"], "initializer_range": 0.02,
        "model_type": "PanguEmbedded", "torch_dtype": "float32", "transformers_version": "4.53.2",
        "use_cache": True, "vocab_size": 352, **SHAPE, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(config, seed=seed), folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.model").write_bytes(model_bytes())
    added = {str(ids[text]): {"content": text, "special": True} for text in SPECIAL}
    settings = {
        "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]},
        "bos_token": "<s>", "eos_token": "[unused10]", "pad_token": "<unk>", "unk_token": "<unk>",
        "tokenizer_class": "PanguTokenizer", "chat_template": TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False))
    return folder


def weights(config: dict[str, Any], *, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors under the published names, the rotation's frequencies among them."""
    torch.manual_seed(seed)
    keys = {"vocab_size": config["vocab_size"], **{key: config[key] for key in SHAPE}}
    model = LlamaForCausalLM(LlamaConfig(**keys, attention_bias=True, initializer_range=0.1))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if name.endswith("bias"):  # transformers begins with zeros, which would hide them
            tensor.normal_(std=0.5)
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()  # stored all the same
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        state[name] = config["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
    return state
