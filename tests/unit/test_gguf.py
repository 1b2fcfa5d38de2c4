"""Export to GGUF: tiny random models of every family, read by transformers and by llama.cpp."""

import functools
import json
import random
import resource
import struct
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as bpe_models
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tutelage.core.errors import ExportError
from tutelage.export import vocab, weights
from tutelage.export.gguf import GgufInfo, GgufMetadata, tensor_bytes, write_gguf
from tutelage.export.parity import (
    RenderedPrompt,
    greedy_parity,
    runtime_parity,
    tokenization_parity,
    weights_parity,
)
from tutelage.export.runtime import EdgeRuntime, generate

METADATA = GgufMetadata(
    "Tiny", "Apache-2.0", ("Base", "Teacher"), languages=("en", "de"), provenance={"recipe": "r1"}
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = ["The", "sea,", "the", "sea!", "Größe", "12", "345", "你好", "def", "f(x):", "return", "x",
        "**", "2", "", "#", "don't", "🌊", ""]  # fmt: skip
IDS = [5, 17, 200, 3, 41, 250, 99, 8, 120, 64, 7, 33]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
PLAIN_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split_then_bytes(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), PLAIN_BYTES])


DIGITS_GPT2 = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
SPLITTERS = {
    "gpt-2": (GPT2, False),
    "smollm": (DIGITS_GPT2, False),
    "qwen2": (split_then_bytes(vocab.QWEN2_REGEX), False),
    "llama-bpe": (split_then_bytes(vocab.LLAMA3_REGEX), True),
    "smaug-bpe": (split_then_bytes(vocab.LLAMA3_REGEX), False),
}


def byte_tokenizer(name: str = "gpt-2") -> Tokenizer:
    splitter, ignore_merges = SPLITTERS[name]
    tokenizer = Tokenizer(bpe_models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = splitter  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(all_orders(), trainer)
    return tokenizer


def piece_tokenizer(*, prefix: bool = False) -> Tokenizer:
    """BPE over text with visible spaces, unknown characters as bytes, and a BOS.

    As Gemma has it, with runs of spaces as tokens of their own; with `prefix`, as Llama 2 has it,
    where every text begins with a space.
    """
    tokenizer = Tokenizer(bpe_models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    first: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    spaces = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    tokenizer.normalizer = spaces  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # type: ignore[assignment]
    special = ["<unk>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(vocab_size=340, special_tokens=special + pieces, show_progress=False)
    tokenizer.train_from_iterator([text for text in all_orders() if "🌊" not in text], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]  # bytes are plain vocabulary
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if not prefix:
        tokenizer.add_tokens([AddedToken("▁▁▁", special=False, normalized=True)])
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return tokenizer


def all_orders() -> list[str]:
    shuffler = random.Random(0)
    return [" ".join(shuffler.sample(TEXT, len(TEXT))) for _ in range(50)]


def save(
    model: Any, folder: Path, tokenizer: Tokenizer, *, template: str | None = CHATML, **roles: str
) -> Path:
    model.save_pretrained(folder)
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", **roles}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return folder


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return randomised(LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 300, **changes})))


def randomised(model: Any) -> Any:
    """Norms and biases start as ones and zeros, behind which a wrong place would hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def qwen2() -> Any:
    torch.manual_seed(0)
    return randomised(Qwen2ForCausalLM(Qwen2Config(**SIZES, vocab_size=300)))


def qwen3() -> Any:
    torch.manual_seed(0)
    return randomised(Qwen3ForCausalLM(Qwen3Config(**SIZES, vocab_size=300, head_dim=32)))


def gemma3(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 7, "initializer_range": 0.1, **changes}
    config = Gemma3TextConfig(
        **sizes, vocab_size=350, head_dim=32, query_pre_attn_scalar=32, sliding_window=8
    )
    return randomised(Gemma3ForCausalLM(config))


def pangu() -> Any:
    """openPangu Embedded computes what a Llama with biases on q, k, v and o computes."""
    model = llama(attention_bias=True, rope_theta=16e6)
    model.config.architectures = ["PanguEmbeddedForCausalLM"]
    return model


FAMILIES = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-wide-heads": lambda: llama(head_dim=24),
    "llama-rope-llama3": lambda: llama(
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        }
    ),
    "llama-rope-linear": lambda: llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "pangu": pangu,
}  # fmt: skip
READABLE = ("llama", "llama-tied", "llama-biases", "qwen2", "qwen3", "gemma3")


@pytest.fixture(scope="session", autouse=True)
def quick_name_maps() -> Iterator[None]:
    """transformers builds the same name map for each submodule, 16 ms each: most of a tiny load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        yield


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Every family's model, saved and exported in f32."""
    made = {}
    for name, build in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        model = build()
        if name == "gemma3":
            roles = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
            save(model, folder, piece_tokenizer(), **roles)
        else:
            save(model, folder, byte_tokenizer())
        if name == "pangu":  # transformers writes the class it saved
            edit(folder / "config.json", architectures=["PanguEmbeddedForCausalLM"])
        write_gguf(folder, folder / "f32.gguf", kind="f32", metadata=METADATA)
        made[name] = (model, folder)
    return made


@pytest.fixture
def tiny(exported: dict[str, tuple[Any, Path]], tmp_path: Path) -> Path:
    """A copy of the tiny Llama's folder that a test may spoil."""
    return copy(exported["llama"][1], tmp_path)


@pytest.fixture(scope="session")
def runtime(exported: dict[str, tuple[Any, Path]]) -> Iterator[EdgeRuntime]:
    pytest.importorskip("xllamacpp")
    with EdgeRuntime(exported["llama"][1] / "f32.gguf", threads=1, context=256) as opened:
        yield opened


def export(folder: Path, kind: Any = "f32", **options: Any) -> GgufInfo:
    return write_gguf(folder, folder / "out.gguf", kind=kind, metadata=METADATA, **options)


def copy(folder: Path, to: Path) -> Path:
    for source in folder.iterdir():
        if source.suffix != ".gguf":
            (to / source.name).write_bytes(source.read_bytes())
    return to


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def logits(model: Any) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0].numpy()


def reload(model: Any, path: Path) -> Any:
    return type(model).from_pretrained(
        path.parent, gguf_file=path.name, config=model.config, dtype=torch.float32
    )


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def value(path: Path, key: str) -> Any:
    field = GGUFReader(path).get_field(key)
    return field.contents() if field else None


@pytest.mark.parametrize("name", READABLE)
def test_transformers_reads_the_same_logits_back(name: str, exported: Any) -> None:
    model, folder = exported[name]
    again = reload(model, folder / "f32.gguf")
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_the_same_distribution(name: str, exported: Any) -> None:
    pytest.importorskip("xllamacpp")
    model, folder = exported[name]
    with EdgeRuntime(folder / "f32.gguf", threads=1, context=256) as opened:
        parity = runtime_parity(model, opened, [IDS], num_positions=4)
    # llama.cpp keeps keys and values in f16, so an exact file measures about 1e-6
    assert parity.mean_forward_kl < 1e-4
    assert parity.num_tokens == 4


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 2e-2), ("bf16", 2e-1)])
def test_half_precision_files_stay_close(
    kind: str, tolerance: float, exported: Any, tmp_path: Path
) -> None:
    model, folder = exported["llama"]
    write_gguf(folder, tmp_path / "half.gguf", kind=kind, metadata=METADATA)  # type: ignore[arg-type]
    difference = np.abs(logits(reload(model, tmp_path / "half.gguf")) - logits(model))
    assert 0 < difference.max() < tolerance


@pytest.mark.parametrize(("kind", "levels"), [("q8_0", 127), ("q4_0", 8)])
def test_a_quantised_weight_moves_by_at_most_a_step(kind: Any, levels: int, tiny: Path) -> None:
    exact, rounded = tensors(export(tiny).path), tensors(export(tiny, kind).path)
    name = "blk.0.ffn_up.weight"
    blocks = np.array(exact[name].data).reshape(-1, 32)
    again = dequantize(rounded[name].data, rounded[name].tensor_type).reshape(-1, 32)
    step = np.abs(blocks).max(axis=1, keepdims=True) / levels
    assert np.all(np.abs(again - blocks) <= step * 1.001)
    assert np.abs(again - blocks).max() > 0


def test_norms_stay_f32_and_the_head_of_a_q4_0_file_is_q8_0(tiny: Path) -> None:
    types = {name: t.tensor_type.name for name, t in tensors(export(tiny, "q4_0").path).items()}
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.1.attn_k.weight"] == "Q4_0"


def test_tied_embeddings_are_stored_once(exported: Any) -> None:
    assert "output.weight" in tensors(exported["llama"][1] / "f32.gguf")
    assert "output.weight" not in tensors(exported["llama-tied"][1] / "f32.gguf")


def test_rows_that_do_not_fit_blocks_fall_back_to_f16_by_name(tmp_path: Path) -> None:
    folder = save(llama(intermediate_size=80), tmp_path, byte_tokenizer())
    info = export(folder, "q8_0")
    assert [text.split(":")[0] for text in info.fallbacks] == [
        "blk.0.ffn_down.weight", "blk.1.ffn_down.weight",
    ]  # fmt: skip
    assert tensors(info.path)["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert export(folder, "f16").fallbacks == ()


def test_shards_and_small_blocks_give_the_same_bytes(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export(tiny, "q8_0").path.read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tiny)
    (tiny / "model.safetensors").unlink()
    model.save_pretrained(tiny, max_shard_size="60KB")
    assert len(list(tiny.glob("model-*.safetensors"))) > 2
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1)
    assert export(tiny, "q8_0").path.read_bytes() == whole


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_read_exactly(dtype: torch.dtype, tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
    model.save_pretrained(tiny)
    stored = tensors(export(tiny).path)["blk.0.ffn_up.weight"].data
    expected = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert expected.dtype == dtype
    np.testing.assert_array_equal(stored, expected.float().detach().numpy())


def test_progress_adds_up_to_the_bytes_promised(tiny: Path) -> None:
    counts: list[int] = []
    info = export(tiny, "q8_0", on_bytes=counts.append)
    assert sum(counts) == tensor_bytes(tiny, kind="q8_0")
    assert info.bytes == info.path.stat().st_size > sum(counts)


def test_the_file_names_its_origin(exported: Any) -> None:
    path = exported["llama"][1] / "f32.gguf"
    assert value(path, "general.name") == "Tiny"
    assert value(path, "general.license") == "Apache-2.0"
    assert value(path, "general.base_model.count") == 2
    assert value(path, "general.base_model.1.name") == "Teacher"
    assert value(path, "tutelage.recipe") == "r1"
    assert value(path, "tokenizer.chat_template") == CHATML


def test_a_full_disk_leaves_no_file(tiny: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(ExportError, match=r"out\.gguf cannot be written"):
            export(tiny)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in tiny.iterdir() if "out.gguf" in path.name]


def test_a_failed_export_keeps_the_file_of_the_last_one(tiny: Path) -> None:
    before = export(tiny).path.read_bytes()
    spoil(tiny, "model.norm.weight", float("nan"))
    with pytest.raises(ExportError, match=r"model\.norm\.weight holds NaN"):
        export(tiny)
    assert (tiny / "out.gguf").read_bytes() == before


def test_a_weight_past_the_largest_f16_is_an_error_in_f16_only(tiny: Path) -> None:
    spoil(tiny, "model.embed_tokens.weight", 1e5)
    with pytest.raises(ExportError, match="bf16"):
        export(tiny, "f16")
    export(tiny, "bf16")


def spoil(folder: Path, name: str, number: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = number
    model.save_pretrained(folder)


def test_an_unknown_architecture_is_named_with_the_known_ones(tiny: Path) -> None:
    edit(tiny / "config.json", architectures=["FooForCausalLM"])
    with pytest.raises(ExportError, match=r"FooForCausalLM.*LlamaForCausalLM.*PanguEmbedded"):
        export(tiny)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope scaling yarn"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"num_hidden_layers": 3}, r"no tensor model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"no place for tensor model\.layers\.1"),
        ({"rms_norm_eps": None}, "no rms_norm_eps"),
    ],
)
def test_a_setting_that_gguf_would_drop_is_an_error(
    changes: dict[str, Any], message: str, tiny: Path
) -> None:
    edit(tiny / "config.json", **changes)
    with pytest.raises(ExportError, match=message):
        export(tiny)


def test_a_gemma_with_dropped_layers_is_refused(exported: Any, tmp_path: Path) -> None:
    copy(exported["gemma3"][1], tmp_path)
    kinds = json.loads((tmp_path / "config.json").read_text())["layer_types"]
    edit(tmp_path / "config.json", layer_types=[*kinds[1:], kinds[0]])
    with pytest.raises(ExportError, match="layer_types differ"):
        export(tmp_path)


def test_a_weights_file_cut_short_is_an_error(tiny: Path) -> None:
    path = tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExportError, match="cut short"):
        export(tiny)


def test_a_chat_template_must_come_from_somewhere(tiny: Path) -> None:
    (tiny / "chat_template.jinja").unlink()
    with pytest.raises(ExportError, match="no chat template"):
        export(tiny)
    info = export(tiny, chat_template="{{ messages[0]['content'] }}")
    assert value(info.path, "tokenizer.chat_template") == "{{ messages[0]['content'] }}"


def test_rows_past_the_tokenizer_become_unused_tokens(exported: Any) -> None:
    path = exported["gemma3"][1] / "f32.gguf"
    texts, types = (value(path, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    assert len(texts) == len(types) == value(path, "gemma3.vocab_size") == 350
    assert types[:5] == [2, 3, 3, 3, 3]  # unknown, then control
    assert types[5] == 6  # a byte
    last = texts.index("   ")  # three spaces, written as three ▁ in the tokenizer
    assert types[last] == 4  # user defined
    assert types[last + 1 :] == [5] * (349 - last)
    assert texts[-1] == "[UNUSED_349]"


def test_more_tokens_than_rows_are_an_error(tmp_path: Path) -> None:
    folder = save(llama(vocab_size=290), tmp_path, byte_tokenizer())
    with pytest.raises(ExportError, match="resize the embedding"):
        export(folder)


def test_special_ids_come_from_the_tokenizer_and_a_second_end_is_eot(tiny: Path) -> None:
    (tiny / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    path = export(tiny).path
    ids = {kind: value(path, f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "eot")}
    assert ids == {"bos": 1, "eos": 2, "eot": 0}


def test_an_unknown_pre_tokenizer_is_recorded(tiny: Path) -> None:
    content = json.loads((tiny / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tiny / "tokenizer.json").write_text(json.dumps(content))
    info = export(tiny)
    assert value(info.path, "tokenizer.ggml.pre") == "default"
    assert "unknown pre-tokenizer" in info.warnings[0]


def test_only_bpe_tokenizers_are_taken(tiny: Path) -> None:
    content = json.loads((tiny / "tokenizer.json").read_text())
    content["model"]["type"] = "Unigram"
    (tiny / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match="needs a BPE tokenizer, not Unigram"):
        export(tiny)


def random_texts(num: int) -> list[str]:
    """Letters, marks, digits, spaces and symbols of many scripts, in runs as in real text."""
    chooser = random.Random(1)
    pools = ["abc XYZ", "äÖß é", "0123456789", " \t\n\r", "  ", "你好，世界", "\n\n", "的1二",
             ".,!?-'\"()[]{}#*/", "'s'll'RE", "\u00a0\u3000", "привет", "नमस्ते", "العربية",
             "x²½Ⅷ", "🌊🏄\u200d♀️👍🏽"]  # fmt: skip
    texts = []
    for _ in range(num):
        runs = chooser.choices(pools, k=chooser.randint(1, 8))
        text = "".join("".join(chooser.choices(run, k=chooser.randint(1, 4))) for run in runs)
        texts.append(unicodedata.normalize("NFC", text))
    return texts


@pytest.mark.parametrize("name", SPLITTERS)
def test_the_runtime_splits_text_as_the_tokenizer_does(name: str, tiny: Path) -> None:
    pytest.importorskip("xllamacpp")
    tokenizer = byte_tokenizer(name)
    tokenizer.save(str(tiny / "tokenizer.json"))
    info = export(tiny)
    assert value(info.path, "tokenizer.ggml.pre") == name
    assert info.warnings == ()
    with EdgeRuntime(info.path, threads=1, context=256) as opened:
        for text in random_texts(150):
            assert list(opened.tokenize(text)) == tokenizer.encode(text).ids, repr(text)


@pytest.mark.parametrize("prefix", [False, True])
def test_the_runtime_splits_pieces_as_the_tokenizer_does(
    prefix: bool, exported: Any, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    copy(exported["gemma3"][1], tmp_path)
    tokenizer = piece_tokenizer(prefix=prefix)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    info = export(tmp_path)
    # this template writes no BOS, so the runtime must not add the one that plain encoding adds
    with EdgeRuntime(info.path, threads=1, context=256) as opened:
        for text in random_texts(150):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert list(opened.tokenize(text)) == ids, repr(text)


def test_a_bos_is_added_where_the_template_writes_one(exported: Any, tmp_path: Path) -> None:
    _, folder = exported["gemma3"]
    out = tmp_path / "bos.gguf"
    write_gguf(folder, out, kind="f16", metadata=METADATA, chat_template="{{ bos_token }}" + CHATML)
    assert value(out, "tokenizer.ggml.add_bos_token") is True
    assert value(folder / "f32.gguf", "tokenizer.ggml.add_bos_token") is False


def message(*fields: tuple[int, bytes | int | float]) -> bytes:
    """A protobuf message by hand: bytes with their length, integers as varints, floats in four."""
    parts = []
    for number, field in fields:
        if isinstance(field, bytes):
            parts.append(bytes([number << 3 | 2, len(field)]) + field)
        elif isinstance(field, int):
            parts.append(bytes([number << 3, field]))
        else:
            parts.append(bytes([number << 3 | 5]) + struct.pack("<f", field))
    return b"".join(parts)


def test_a_sentencepiece_model_is_read_where_there_is_no_tokenizer_json(tiny: Path) -> None:
    pieces = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("<0x41>", 0.0, 6),
        ("▁a", -1.5, 1),
    ]
    model = b"".join(
        message((1, message((1, text.encode()), (2, score), (3, kind))))
        for text, score, kind in pieces
    )
    bpe = message((2, message((3, 2))))
    no_prefix = message((3, message((3, 0))))
    (tiny / "tokenizer.json").unlink()
    (tiny / "tokenizer.model").write_bytes(model + bpe + no_prefix)
    edit(
        tiny / "tokenizer_config.json",
        bos_token="<s>", eos_token="[turn]", unk_token="<unk>", pad_token=None,
        added_tokens_decoder={"5": {"content": "[turn]", "special": True}},
    )  # fmt: skip
    read = vocab.read_vocabulary(tiny, size=7)
    assert read.tokens == ("<unk>", "<s>", "</s>", "<0x41>", "▁a", "[turn]", "[UNUSED_6]")
    assert read.types == (2, 3, 3, 6, 1, 3, 5)
    assert read.scores[4] == -1.5
    assert (read.special["eos"], read.add_bos, read.add_space_prefix) == (5, True, False)

    (tiny / "tokenizer.model").write_bytes(model + bpe[:-1])
    with pytest.raises(ExportError, match="cut short"):
        vocab.read_vocabulary(tiny, size=7)
    (tiny / "tokenizer.model").write_bytes(model)
    with pytest.raises(ExportError, match="BPE SentencePiece"):
        vocab.read_vocabulary(tiny, size=7)


def test_parity_is_zero_for_an_exact_file_and_the_closed_form_for_another(
    exported: Any, tmp_path: Path
) -> None:
    model, folder = exported["llama-tied"]
    exact = weights_parity(model, folder / "f32.gguf", [IDS, IDS[:5]])
    assert exact.mean_forward_kl == pytest.approx(0.0, abs=1e-9)
    assert (exact.argmax_agreement, exact.num_tokens) == (1.0, 17)

    write_gguf(folder, tmp_path / "q.gguf", kind="q4_0", metadata=METADATA)
    p = torch.from_numpy(logits(model)).double().softmax(-1)
    q = torch.from_numpy(logits(reload(model, tmp_path / "q.gguf"))).double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    rounded = weights_parity(model, tmp_path / "q.gguf", [IDS])
    assert rounded.mean_forward_kl == pytest.approx(float(kl.mean()), rel=1e-6)
    assert rounded.p99_forward_kl == pytest.approx(float(kl.quantile(0.99)), rel=1e-6)
    assert rounded.mean_forward_kl > 1e-4


def test_a_family_that_transformers_cannot_read_is_sent_to_the_runtime(exported: Any) -> None:
    model, folder = exported["pangu"]
    model.config.model_type = "PanguEmbedded"
    with pytest.raises(ExportError, match="runtime_parity"):
        weights_parity(model, folder / "f32.gguf", [IDS])


def test_the_runtime_answers_greedily_as_the_model_does(
    exported: Any, runtime: EdgeRuntime
) -> None:
    model, _ = exported["llama"]
    share = greedy_parity(model, runtime, [IDS, IDS[:4]], max_tokens=12, stop_ids=(2,))
    assert share == 1.0
    assert greedy_parity(llama(rope_theta=20.0), runtime, [IDS], max_tokens=12, stop_ids=(2,)) < 1.0


def test_an_answer_is_counted_in_tokens(exported: Any, runtime: EdgeRuntime) -> None:
    model, _ = exported["llama"]
    answer = runtime.complete(IDS, max_tokens=1)
    assert answer.token_ids == (int(logits(model)[-1].argmax()),)
    assert (answer.prompt_tokens, answer.finish_reason) == (len(IDS), "length")
    assert (
        runtime.complete("The sea", max_tokens=9).text
        == runtime.complete("The sea", max_tokens=9).text
    )


def test_a_prompt_rendered_otherwise_than_in_training_is_shown(
    exported: Any, runtime: EdgeRuntime
) -> None:
    tokenizer = Tokenizer.from_file(str(exported["llama"][1] / "tokenizer.json"))
    messages = [{"role": "user", "content": "Größe 你好?"}]
    ids = tokenizer.encode("<|im_start|>user\nGröße 你好?<|im_end|>\n<|im_start|>assistant\n").ids
    right = RenderedPrompt(messages, ids)
    wrong = RenderedPrompt(messages, [*ids[:3], 0, *ids[4:]])
    assert tokenization_parity(runtime, [right]).first_difference is None
    parity = tokenization_parity(runtime, [right, wrong])
    assert parity.agreement == 0.5
    assert parity.first_difference is not None
    assert parity.first_difference.startswith("token 3:")


def test_the_mode_of_an_answer_reaches_the_template(tiny: Path) -> None:
    pytest.importorskip("xllamacpp")
    template = "{% if enable_thinking %}think{% else %}fast{% endif %}{{ messages[0]['content'] }}"
    info = export(tiny, chat_template=template)
    with EdgeRuntime(info.path, threads=1, context=256) as opened:
        assert opened.render([{"role": "user", "content": "!"}]) == "fast!"
        assert opened.render([{"role": "user", "content": "!"}], thinking=True) == "think!"


def test_a_prompt_longer_than_the_context_is_an_error(runtime: EdgeRuntime) -> None:
    with pytest.raises(ExportError, match="exceeds the available context"):
        runtime.complete([5] * 400, max_tokens=1)


def test_a_damaged_file_does_not_load(tiny: Path) -> None:
    pytest.importorskip("xllamacpp")
    path = export(tiny).path
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ExportError, match="cannot load"):
        generate(path, "The sea", max_tokens=1)


def test_a_missing_runtime_names_the_extra(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ExportError, match=r'pip install "tutelage\[edge\]"'):
        generate(tiny / "out.gguf", "The sea", max_tokens=1)
