"""Models on disk and in memory: facts, digests, loading, saving, pruning, GGUF, sources."""

import json
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tutelage.core import hashes
from tutelage.core.errors import EngineError, ModelError
from tutelage.models import device, inspect, load, prune, source
from tutelage.models.convert import is_converted
from tutelage.recipe.tables import ModelSource

CPU = torch.device("cpu")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIALS = ["<|end|>", "<|start|>"]
VOCABULARY = [*SPECIALS, *BYTES, "ĊĊ"]
TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"


def tiny(layers: int = 4, **settings: object) -> PreTrainedModel:
    """A random Llama, d 32; the weights follow from the seed."""
    torch.manual_seed(3)
    config = LlamaConfig(
        **{
            "vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 128, "tie_word_embeddings": True, "bos_token_id": 1,
            "eos_token_id": 0, "initializer_range": 0.3, **settings,
        }  # type: ignore[arg-type]
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(VOCABULARY)}, [("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    made.chat_template = TEMPLATE
    return made


def saved(folder: Path, model: PreTrainedModel | None = None, *, dtype: str = "float32") -> Path:
    load.save_model(model or tiny(), tokenizer(), folder, dtype=dtype)
    return folder


def reload(folder: Path, *, dtype: str = "float32") -> PreTrainedModel:
    return load.load_model(folder, dtype=dtype, device=CPU)


@torch.no_grad()
def logits(model: PreTrainedModel, length: int = 9) -> torch.Tensor:
    ids = torch.arange(length)[None] * 7 % model.config.vocab_size
    return model(input_ids=ids, use_cache=False).logits[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model; read-only by agreement."""
    return saved(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# --- facts and digests ----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_facts_read_from_headers_are_those_of_the_model_in_memory(
    tmp_path: Path, tied: bool
) -> None:
    model = tiny(tie_word_embeddings=tied)
    facts = inspect.describe(saved(tmp_path, model, dtype="bfloat16"))
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert (facts.layers, facts.hidden_size, facts.intermediate_size) == (4, 32, 48)
    assert (facts.heads, facts.kv_heads, facts.vocab_size) == (4, 2, len(VOCABULARY))
    assert (facts.architecture, facts.tie_embeddings) == ("LlamaForCausalLM", tied)
    assert (facts.dtype, facts.bytes) == ("bfloat16", (tmp_path / inspect.SINGLE).stat().st_size)


def test_shards_count_together_and_a_missing_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "SHARD_SIZE", "20KB")
    model = tiny()
    saved(tmp_path, model)
    shards = inspect.weight_files(tmp_path)
    assert len(shards) > 1
    assert inspect.describe(tmp_path).parameters == sum(p.numel() for p in model.parameters())
    assert torch.equal(logits(reload(tmp_path)), logits(model))
    shards[1].unlink()
    with pytest.raises(ModelError, match=shards[1].name):
        inspect.describe(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_weights_cut_short_are_refused_by_their_header(copy: Path, keep: int) -> None:
    weights = copy / inspect.SINGLE
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match="cut short or damaged"):
        inspect.describe(copy)


def test_pickled_weights_are_refused_with_the_way_out(copy: Path) -> None:
    (copy / inspect.SINGLE).rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin.*convert them to safetensors"):
        reload(copy)


def test_a_directory_without_config_or_at_all_is_said_so(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        inspect.describe(copy)
    with pytest.raises(ModelError, match="no such model directory"):
        inspect.describe(copy / "absent")


def test_a_model_of_another_shape_is_refused_by_the_missing_setting(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["num_hidden_layers"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="'num_hidden_layers'"):
        inspect.describe(copy)


def test_the_digest_follows_contents_and_nothing_else(copy: Path, tmp_path: Path) -> None:
    memo = tmp_path / "memo.json"
    before = inspect.content_digest(copy, cache=memo)
    (copy / "README.md").write_text("a picture of a model")
    moved = copy.rename(tmp_path / "moved")
    assert inspect.content_digest(moved, cache=memo) == before
    weights = moved / inspect.SINGLE
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert inspect.content_digest(moved, cache=memo) != before


def test_an_unchanged_file_is_hashed_once(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memo = tmp_path / "memo.json"
    before = inspect.content_digest(copy, cache=memo)
    hashed: list[str] = []
    real = hashes.sha256_file
    monkeypatch.setattr(hashes, "sha256_file", lambda f: hashed.append(f.name) or real(f))
    assert inspect.content_digest(copy, cache=memo) == before
    assert hashed == []
    os.utime(copy / "config.json", ns=(1, 1))
    assert inspect.content_digest(copy, cache=memo) == before
    assert hashed == ["config.json"]
    memo.write_text("{ damaged")
    assert inspect.content_digest(copy, cache=memo) == before


# --- loading and saving ---------------------------------------------------------------------------


def test_a_saved_model_comes_back_bit_for_bit_with_its_head_tied(folder: Path) -> None:
    model = reload(folder)
    assert torch.equal(logits(model), logits(tiny()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(folder / inspect.SINGLE)


def test_saving_in_a_lower_precision_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = tiny()
    load.save_weights(model, tmp_path, dtype="bfloat16")
    assert model.dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert reload(tmp_path, dtype="auto").dtype == torch.bfloat16
    rounded = {name: weight.bfloat16().float() for name, weight in model.state_dict().items()}
    model.load_state_dict(rounded)
    assert torch.equal(logits(reload(tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("drop", "add", "problem"),
    [("model.norm.weight", "", "lacks weights"), ("", "model.extra.weight", "does not have")],
)
def test_weights_that_do_not_fit_the_architecture_are_an_error(
    copy: Path, drop: str, add: str, problem: str
) -> None:
    weights = load_file(copy / inspect.SINGLE)
    weights.pop(drop, None)
    if add:
        weights[add] = torch.zeros(2)
    save_file(weights, copy / inspect.SINGLE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{problem}.*{drop or add}"):
        reload(copy)


def test_code_inside_a_model_needs_the_recipe_s_word(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="trust_remote_code = true"):
        reload(copy)


def test_a_trained_student_keeps_its_tokenizer_files_byte_for_byte(
    folder: Path, tmp_path: Path
) -> None:
    loaded = load.Loaded(reload(folder), load.load_tokenizer(folder), folder, CPU)
    with torch.no_grad():
        loaded.model.model.norm.weight.mul_(2)
    load.save_student(loaded, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert load.load_tokenizer(tmp_path).chat_template == TEMPLATE
    assert inspect.describe(tmp_path).tokenizer_digest == inspect.describe(folder).tokenizer_digest
    assert torch.equal(logits(reload(tmp_path)), logits(loaded.model))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 8}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 0.5}),
    ],
)
def test_backbone_and_head_give_the_model_s_own_logits(
    kind: str, settings: dict[str, object]
) -> None:
    model = tiny() if kind == "llama" else other(kind, **settings)
    load.check_head(model)
    backbone, weight, bias, softcap = load.backbone_and_head(model)
    with torch.no_grad():
        hidden = backbone(input_ids=torch.arange(9)[None] * 7, use_cache=False).last_hidden_state[0]
        ours = torch.nn.functional.linear(hidden, weight, bias)
        ours = softcap * torch.tanh(ours / softcap) if softcap else ours
    assert softcap == settings.get("final_logit_softcapping")
    torch.testing.assert_close(ours, logits(model))


def test_an_architecture_that_scales_its_logits_is_refused() -> None:
    config = GraniteConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, logits_scaling=8.0,
    )  # fmt: skip
    with pytest.raises(ModelError, match="changes its logits after the output layer"):
        load.check_head(AutoModelForCausalLM.from_config(config))


def other(kind: str, **settings: object) -> PreTrainedModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, **settings,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_device_the_machine_lacks_is_an_error_and_never_the_cpu_instead() -> None:
    assert device.pick_device("cpu") == CPU
    found = torch.accelerator.current_accelerator(check_available=True)
    assert device.pick_device("auto") == (found or CPU)
    with pytest.raises(EngineError, match="no device 'tpu' on this machine"):
        device.pick_device("tpu")


def test_a_device_of_a_package_of_its_own_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "DEVICE_MODULES", {"npu": "a_package_nobody_has"})
    with pytest.raises(EngineError, match="a_package_nobody_has"):
        device.pick_device("npu")


# --- pruning --------------------------------------------------------------------------------------


def with_idle_layers(*idle: int, layers: int = 6) -> PreTrainedModel:
    """A model some of whose layers add exactly nothing."""
    model = tiny(layers)
    with torch.no_grad():
        for index in idle:
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
    return model


def batches() -> list[torch.Tensor]:
    return [torch.arange(24).reshape(2, 12) * 5 % 64, torch.arange(7)[None]]


def test_block_influence_is_one_minus_the_mean_cosine_of_input_and_output() -> None:
    model = with_idle_layers(2)
    scores = prune.block_influence(model, batches())
    assert abs(scores[2]) < 1e-6
    cosines = []
    for ids in batches():
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        cosines.append(torch.cosine_similarity(states[1], states[2], dim=-1).flatten())
    assert scores[1] == pytest.approx(1 - float(torch.cat(cosines).mean()), abs=1e-6)


def test_layers_that_do_nothing_go_first_and_change_no_logit() -> None:
    model = with_idle_layers(1, 4)
    pruned = prune.prune_least_influential(model, 2, batches())
    assert pruned.keep == (0, 2, 3, 5)
    assert len(pruned.influence) == 6
    assert torch.equal(logits(pruned.model), logits(model))


def test_pruning_shares_weights_and_leaves_the_original_whole() -> None:
    model = tiny()
    before = logits(model)
    pruned = prune.prune_layers(model, (0, 3))
    assert pruned.model.layers[1].mlp.up_proj.weight is model.model.layers[3].mlp.up_proj.weight
    assert pruned.lm_head.weight is model.model.embed_tokens.weight
    assert (pruned.config.num_hidden_layers, model.config.num_hidden_layers) == (2, 4)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(pruned), before)


def test_a_pruned_model_decodes_with_its_cache_as_without() -> None:
    pruned = prune.prune_layers(tiny(), (1, 3))
    ids = torch.arange(5)[None]
    with torch.no_grad():
        first = pruned(input_ids=ids[:, :4], use_cache=True)
        step = pruned(input_ids=ids[:, 4:], past_key_values=first.past_key_values)
        whole = pruned(input_ids=ids, use_cache=False)
    torch.testing.assert_close(step.logits[0, -1], whole.logits[0, -1])


def test_a_pruned_model_of_mixed_layer_types_reloads_as_it_was(tmp_path: Path) -> None:
    model = other("gemma2", head_dim=8, sliding_window=3)
    pruned = prune.prune_layers(model, (1, 2, 3))
    kinds = model.config.layer_types
    assert pruned.config.layer_types == kinds[1:]
    load.save_weights(pruned, tmp_path, dtype="float32")
    assert torch.equal(logits(reload(tmp_path)), logits(pruned))


def test_of_equal_layers_the_deeper_goes() -> None:
    assert prune.keep_from_influence([0.5, 0.1, 0.1, 0.1, 0.2], 2) == (0, 1, 4)
    assert prune.keep_from_influence([0.5, 0.1], 0) == (0, 1)


@pytest.mark.parametrize("drop", [4, 9, -1])
def test_dropping_every_layer_is_refused_before_anything_is_measured(drop: int) -> None:
    with pytest.raises(ModelError, match="choose between 0 and 3"):
        prune.prune_least_influential(tiny(), drop, [])


@pytest.mark.parametrize(
    ("keep", "problem"),
    [
        ((), "empty"), ((0, 4), "names layer 4"), ((-1, 0), "names layer -1"),
        ((0, 1, 1), "layer 1 twice"), ((2, 1), "rising order"),
    ],
)  # fmt: skip
def test_a_wrong_choice_of_layers_says_which_is_wrong(keep: tuple[int, ...], problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        prune.prune_layers(tiny(), keep)


def test_influence_without_tokens_or_with_broken_weights_is_an_error() -> None:
    with pytest.raises(ModelError, match="no calibration tokens"):
        prune.block_influence(tiny(), [])
    broken = tiny()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        prune.block_influence(broken, batches())


# --- GGUF -----------------------------------------------------------------------------------------


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Query and key rows in the order GGUF keeps rotary pairs: (0, half), (1, half + 1), ..."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, -1)


def write_gguf(path: Path, model: PreTrainedModel, *, splitter: str = "smollm") -> Path:
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3, 3] + [1] * (len(VOCABULARY) - 2))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {
        "token_embd": state["model.embed_tokens.weight"], "output_norm": state["model.norm.weight"]
    }  # fmt: skip
    for layer in range(config.num_hidden_layers):
        for ours, theirs in parts.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in heads:
                weight = interleaved(weight, heads[theirs])
            tensors[f"blk.{layer}.{theirs}"] = weight
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_converts_to_the_model_and_the_splitter_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path / "cache"))
    model = tiny(2)
    path = write_gguf(tmp_path / "tiny.gguf", model)
    wanted, memo = ModelSource(source=str(path)), tmp_path / "memo.json"
    before = source.locate(wanted, memo=memo)
    assert before.path is None
    directory = source.fetch(wanted)
    after = source.locate(wanted, memo=memo)
    assert (after.path, after.identity) == (directory, before.identity)
    torch.testing.assert_close(logits(reload(directory)), logits(model))
    converted = load.load_tokenizer(directory)
    assert converted.chat_template == TEMPLATE
    assert converted.model_max_length == 128
    # The digit is cut off first, so the two line breaks before it are one token, as in llama.cpp.
    assert converted.convert_ids_to_tokens(converted.encode("\n\n1")) == ["ĊĊ", "1"]
    header, facts = inspect.describe(path), inspect.describe(directory)
    assert facts.tokenizer_digest
    for name in ("layers", "heads", "kv_heads", "vocab_size", "tie_embeddings", "parameters"):
        assert getattr(header, name) == getattr(facts, name)
    assert torch.equal(logits(reload(path)), logits(reload(directory)))


def test_a_gguf_tokenizer_of_an_unknown_splitter_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "odd.gguf", tiny(1), splitter="my-own-rule")
    with pytest.raises(ModelError, match="'my-own-rule'"):
        load.load_tokenizer(path)


def test_a_file_that_is_no_gguf_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "junk.gguf"
    path.write_bytes(b"not a model" * 100)
    for read in (reload, load.load_tokenizer, inspect.describe):
        with pytest.raises(ModelError, match=r"junk\.gguf") as caught:
            read(path)
        assert "\n" not in str(caught.value)
    assert not is_converted(tmp_path, gguf_sha256="")


# --- where a model comes from ---------------------------------------------------------------------


def hub_snapshot(cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model as the Hub's client keeps it, without the Hub."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = cache / "models--owner--tiny"
    commit = "a" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(folder, repository / "snapshots" / commit))


def test_the_same_model_is_the_same_from_a_directory_and_from_the_hub_s_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub_snapshot(tmp_path / "hub", folder, monkeypatch)
    memo = tmp_path / "memo.json"
    here = source.locate(ModelSource(source=str(folder)), memo=memo)
    hub = source.locate(ModelSource(source="owner/tiny"), memo=memo)
    assert (here.path, hub.path) == (folder, snapshot)
    assert here.identity == hub.identity
    assert here.facts == hub.facts
    assert source.fetch(ModelSource(source="owner/tiny")) == snapshot
    artifact = hub.as_artifact({"stage": "external", **hub.identity})
    loaded = load.load_for_training(artifact, device="cpu")
    assert torch.equal(logits(loaded.model), logits(tiny()))


def test_a_hub_download_cut_short_does_not_pass_for_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub_snapshot(tmp_path / "hub", folder, monkeypatch)
    (snapshot / inspect.SINGLE).unlink()
    found = source.locate(ModelSource(source="owner/tiny"), memo=tmp_path / "memo.json")
    assert (found.path, found.facts) == (None, None)
    with pytest.raises(ModelError, match="not on this machine"):
        found.as_artifact({"stage": "external", **found.identity})
    with pytest.raises(ModelError, match="no whole set of safetensors weights"):
        source.fetch(ModelSource(source="owner/tiny"))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/dir", "just-a-word", "a/b/c"])
def test_a_source_of_no_known_kind_lists_the_kinds(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"bundled:NAME.*directory.*\.gguf.*owner/name"):
        source.locate(ModelSource(source=name), memo=tmp_path / "memo.json")


def test_a_model_never_fetched_and_no_network_is_one_clear_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_snapshot(tmp_path / "hub", folder, monkeypatch)
    with pytest.raises(ModelError, match="the Hub cannot be reached"):
        source.fetch(ModelSource(source="owner/other"))


def test_a_missing_gguf_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such GGUF file"):
        source.fetch(ModelSource(source=str(tmp_path / "absent.gguf")))


def test_leave_to_run_code_is_part_of_a_model_s_identity(folder: Path, tmp_path: Path) -> None:
    memo = tmp_path / "memo.json"
    plain = source.locate(ModelSource(source=str(folder)), memo=memo)
    trusted = source.locate(
        ModelSource(source=str(folder), revision="abc", trust_remote_code=True), memo=memo
    )
    assert plain.identity != trusted.identity
