"""The model families that export knows, one row of the table each: from Hugging Face to GGUF.

Owns what differs between architectures: which tensors there must be, how their rows are stored,
and the key-value metadata the runtime computes with. Knows nothing of tokenizers, of number formats
or of output files. A setting of `config.json` that the runtime would silently ignore is an
ExportError here.

Source: llama.cpp's model definitions (src/models), and tensor names from `gguf.TensorNameMap`.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map

from tutelage.core.errors import ExportError

Config = Mapping[str, Any]

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
FFN_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
GEMMA3_PERIOD = 6  # llama.cpp: five layers with a sliding window, then a full one
GEMMA3_LOCAL_THETA = 10_000.0  # its rope base in the sliding layers is fixed


@dataclass(frozen=True)
class Family:
    """How one architecture of transformers becomes one of llama.cpp.

    Fields:
        weights: what each layer must hold, besides `q k v o gate up down`.
        biases: modules that must have a bias; optional_biases: those that may.
        pairs_heads: query and key rows are interleaved for a rotation of neighbours (2i, 2i + 1)
            instead of halves (i, i + d/2).
        norm_shift: added to every norm weight (Gemma scales by 1 + weight).
        activation: the only one the runtime computes for it.
    """

    arch: MODEL_ARCH
    weights: tuple[str, ...] = NORMS
    biases: tuple[str, ...] = ()
    optional_biases: tuple[str, ...] = ()
    pairs_heads: bool = False
    norm_shift: float = 0.0
    activation: str = "silu"
    own_metadata: Callable[[GGUFWriter, Config], None] = lambda writer, config: None


def _gemma3_metadata(writer: GGUFWriter, config: Config) -> None:
    layers = need(config, "num_hidden_layers")
    period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    kinds = config.get("layer_types") or [
        "full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)
    ]
    fixed = [
        "full_attention" if (i + 1) % GEMMA3_PERIOD == 0 else "sliding_attention"
        for i in range(layers)
    ]
    if list(kinds) != fixed:
        raise ExportError(
            "config.json: llama.cpp runs Gemma 3 only with a full-attention layer after every five "
            "sliding ones; these layer_types differ (were layers dropped?)"
        )
    head_dim = need(config, "head_dim")
    scalar = config.get("query_pre_attn_scalar", 256)
    _refuse_unless(scalar == head_dim, f"query_pre_attn_scalar = {scalar} with head_dim {head_dim}")
    _refuse_unless(not config.get("use_bidirectional_attention"), "use_bidirectional_attention")
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        _refuse_unless(config.get(key) is None, key)
    writer.add_sliding_window(need(config, "sliding_window"))


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        MODEL_ARCH.LLAMA, optional_biases=(*ATTENTION, *MLP), pairs_heads=True
    ),
    "Qwen2ForCausalLM": Family(MODEL_ARCH.QWEN2, biases=ATTENTION[:3]),
    "Qwen3ForCausalLM": Family(MODEL_ARCH.QWEN3, weights=(*NORMS, *HEAD_NORMS)),
    "Gemma3ForCausalLM": Family(
        MODEL_ARCH.GEMMA3,
        weights=(*NORMS, *HEAD_NORMS, *FFN_NORMS),
        norm_shift=1.0,
        activation="gelu_pytorch_tanh",
        own_metadata=_gemma3_metadata,
    ),
    "PanguEmbeddedForCausalLM": Family(MODEL_ARCH.PANGU_EMBED, biases=ATTENTION),
}


@dataclass(frozen=True)
class Model:
    """A model folder's family and configuration, with the rope settings read out."""

    family: Family
    config: Config
    rope: Mapping[str, Any]

    @property
    def arch_name(self) -> str:
        """The architecture's name in a GGUF."""
        return MODEL_ARCH_NAMES[self.family.arch]

    @property
    def head_dim(self) -> int:
        """Numbers in one attention head."""
        default = need(self.config, "hidden_size") // need(self.config, "num_attention_heads")
        return self.config.get("head_dim") or default


def read_model(model_dir: Path) -> Model:
    """The family and the settings of a model folder, from its `config.json`.

    Raises:
        ExportError: no such file, an architecture not in FAMILIES, or settings its runtime lacks.
    """
    path = model_dir / "config.json"
    if not path.is_file():
        raise ExportError(f"{path} is missing: export needs a Hugging Face model folder")
    config = json.loads(path.read_text(encoding="utf-8"))
    name = (config.get("architectures") or ["none"])[0]
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ExportError(f"{path}: GGUF export does not know {name}; it knows {known}")
    family = FAMILIES[name]
    activation = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    _refuse_unless(activation == family.activation, f"hidden_act = {activation}")
    if family.arch is not MODEL_ARCH.GEMMA3:
        kinds = set(config.get("layer_types") or ["full_attention"])
        _refuse_unless(kinds == {"full_attention"}, f"layer_types with {', '.join(sorted(kinds))}")
    return Model(family, config, _read_rope(config))


def map_names(model: Model, names: Iterable[str]) -> dict[str, str]:
    """GGUF name -> stored name, in the order of the file: embedding, layers, last norm, head.

    With tied embeddings there is no `output.weight`: the runtime then reads the embedding.

    Raises:
        ExportError: a tensor the architecture needs is missing, or it has no place for one.
    """
    stored = {name for name in names if not name.endswith("rotary_emb.inv_freq")}
    wanted = _expected(model, stored)
    if model.config.get("tie_word_embeddings"):
        stored.discard("lm_head.weight")
    if missing := [name for name in wanted if name not in stored]:
        raise ExportError(f"the model has no tensor {missing[0]} ({len(missing)} missing in all)")
    if extra := sorted(stored - set(wanted)):
        raise ExportError(
            f"{model.arch_name} has no place for tensor {extra[0]} ({len(extra)} such in all)"
        )
    table = get_tensor_name_map(model.family.arch, need(model.config, "num_hidden_layers"))
    parts = [name.rpartition(".") for name in wanted]  # module, ".", weight or bias
    return {f"{table[module]}.{kind}": f"{module}.{kind}" for module, _, kind in parts}


def convert_rows(model: Model, name: str, rows_RC: np.ndarray) -> np.ndarray:
    """Rows of stored tensor `name` as the runtime wants them; R is a multiple of `row_multiple`."""
    if model.family.norm_shift and name.endswith("norm.weight"):
        return rows_RC + np.float32(model.family.norm_shift)
    if row_multiple(model, name) > 1:
        halves = rows_RC.reshape(-1, 2, model.head_dim // 2, rows_RC.shape[1])
        return halves.swapaxes(1, 2).reshape(rows_RC.shape)
    return rows_RC


def row_multiple(model: Model, name: str) -> int:
    """How many rows of stored tensor `name` must be converted together."""
    turned = re.search(r"self_attn\.[qk]_proj\.(weight|bias)$", name)
    return model.head_dim if model.family.pairs_heads and turned else 1


def extra_tensors(model: Model) -> dict[str, np.ndarray]:
    """Float32 vectors the runtime wants that no checkpoint holds: the factors of Llama 3's rope.

    Frequency i is divided by its factor: 1 for short wavelengths, `factor` for long ones, and in
    between the frequency is a linear blend of both. Source: Llama 3.1's `rope_scaling`, as
    transformers computes it (`modeling_rope_utils`, type "llama3").
    """
    if model.rope["rope_type"] != "llama3":
        return {}
    rope, dim = model.rope, model.head_dim
    frequency = rope["rope_theta"] ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors = 1.0 / ((1.0 - blend) / rope["factor"] + blend)
    return {"rope_freqs.weight": factors.astype(np.float32)}


def write_metadata(writer: GGUFWriter, model: Model, *, vocab_size: int) -> None:
    """The architecture's key-value pairs: sizes, heads, rope and norms."""
    config = model.config
    heads = need(config, "num_attention_heads")
    writer.add_vocab_size(vocab_size)
    writer.add_context_length(need(config, "max_position_embeddings"))
    writer.add_embedding_length(need(config, "hidden_size"))
    writer.add_block_count(need(config, "num_hidden_layers"))
    writer.add_feed_forward_length(need(config, "intermediate_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(need(config, "rms_norm_eps"))
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(float(model.rope["rope_theta"]))
    if model.rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(model.rope["factor"]))
    model.family.own_metadata(writer, config)


def need(config: Config, key: str) -> Any:
    """A setting that has no safe default."""
    if config.get(key) is None:
        raise ExportError(f"config.json has no {key}: save the model again with save_pretrained")
    return config[key]


def _expected(model: Model, stored: set[str]) -> list[str]:
    family, config = model.family, model.config
    layer = [f"{module}.weight" for module in (*family.weights[:1], *ATTENTION)]
    layer += [f"{module}.weight" for module in (*family.weights[1:], *MLP)]
    layer += [f"{module}.bias" for module in family.biases]
    names = ["model.embed_tokens.weight"]
    for index in range(need(config, "num_hidden_layers")):
        optional = [f"model.layers.{index}.{module}.bias" for module in family.optional_biases]
        names += [f"model.layers.{index}.{part}" for part in layer]
        names += [name for name in optional if name in stored]
    names.append("model.norm.weight")
    tied = config.get("tie_word_embeddings")
    if tied is False or (tied is None and "lm_head.weight" in stored):
        names.append("lm_head.weight")
    return names


def _read_rope(config: Config) -> dict[str, Any]:
    """Rope settings of transformers 5 (`rope_parameters`) and 4 (`rope_theta`, `rope_scaling`)."""
    rope = config.get("rope_parameters")
    if rope is None:
        rope = {"rope_theta": need(config, "rope_theta"), **(config.get("rope_scaling") or {})}
        local = config.get("rope_local_base_freq", GEMMA3_LOCAL_THETA)
    else:
        local = rope.get("sliding_attention", {}).get("rope_theta", GEMMA3_LOCAL_THETA)
        rope = rope.get("full_attention", rope)
    _refuse_unless(local == GEMMA3_LOCAL_THETA, f"a local rope base of {local}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    _refuse_unless(kind in ("default", "linear", "llama3"), f"rope scaling {kind}")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    _refuse_unless(partial == 1.0, f"partial_rotary_factor = {partial}")
    return {**rope, "rope_type": kind}


def _refuse_unless(condition: bool, setting: str) -> None:
    if not condition:
        raise ExportError(f"config.json sets {setting}, which GGUF export does not carry over")
