"""openPangu-Embedded checkpoints as what they are: Llama with biases on q, k, v and o.

Published with Python code of their own, which is never run: `write_plain` writes the same weights
(by links) under a Llama configuration and a tokenizer without code, once, and everything else here
sees plain Llama. Sources: config.json and modular_openpangu_dense.py of openPangu-Embedded-1B and
-7B. The module imports torch only where it reads a tokenizer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.core.errors import ModelError
from tutelage.core.files import write_json
from tutelage.core.fingerprint import fingerprint
from tutelage.models.inspect import INDEX, PANGU, read_config, weight_files
from tutelage.text.pangu_tokenizer import write_tokenizer

PLAIN = 1
"""Rises when the same checkpoint gives another plain form."""
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 153_376, "hidden_size": 4096, "intermediate_size": 12_800,
    "num_hidden_layers": 34, "num_attention_heads": 32, "num_key_value_heads": 8,
    "hidden_act": "silu", "max_position_embeddings": 32_768, "initializer_range": 0.02,
    "rms_norm_eps": 1e-5, "use_cache": True, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 45_892, "tie_word_embeddings": False, "rope_theta": 16_000_000.0,
}  # fmt: skip
"""What its configuration class takes where config.json is silent; Llama's are others."""
PASSED = ("attention_dropout", "head_dim", "torch_dtype", "dtype")
"""Keys that mean the same to Llama."""
MEANINGLESS = (
    "architectures", "auto_map", "model_type", "bias", "transformers_version", "_name_or_path",
    "_attn_implementation",
)  # fmt: skip
"""Keys that are translated, or that say nothing of what is computed."""


def is_pangu(directory: Path) -> bool:
    """Whether `directory` holds a checkpoint that calls itself PanguEmbedded."""
    config = directory / "config.json"
    return config.is_file() and read_config(directory).get("model_type") == PANGU


def plain_identity(content: str) -> str:
    """sha256 that stands for the plain form of a checkpoint with this digest of its content."""
    return fingerprint({"pangu": content, "plain": PLAIN})


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of the same model as LlamaForCausalLM.

    Raises ModelError on a key that is not known here: later openPangu models keep the name and
    compute something else (attention sinks, more norms, partial rotation).
    """
    known = {*DEFAULTS, *PASSED, *MEANINGLESS}
    strange = sorted(
        key for key, value in config.items() if key not in known and value not in (None, False)
    )
    if strange:
        raise ModelError(
            f"this {PANGU} checkpoint is not of openPangu-Embedded's architecture: its "
            f"config.json sets {', '.join(strange[:4])}, which Llama with biases has not"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: config.get(key, default) for key, default in DEFAULTS.items()},
        **{key: config[key] for key in PASSED if config.get(key) is not None},
        "attention_bias": bool(config.get("bias", True)),
        "mlp_bias": False,
    }


def write_plain(source: Path, directory: Path) -> None:
    """Fill `directory` with the plain form of the checkpoint in `source`; weights are links.

    Without weights (a tokenizer for a served model) configuration and tokenizer are written alone.
    Raises ModelError.
    """
    config = llama_config(read_config(source))
    write_json(directory / "config.json", config)
    if any(source.glob("*.safetensors")):
        for file in [*weight_files(source), source / INDEX]:
            if file.exists():
                (directory / file.name).symlink_to(file.resolve())
    generation = source / "generation_config.json"
    if generation.exists():
        (directory / generation.name).write_bytes(generation.read_bytes())
    write_tokenizer(source, directory, max_length=config["max_position_embeddings"])
