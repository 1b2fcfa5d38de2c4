"""openPangu-Embedded checkpoints: read without their code, trained, saved as plain Llama."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pangu_like import LIBRARY_IDS, SPECIAL, pieces, weights, write_checkpoint
from safetensors.torch import load_file, save_file
from tiny import write_model
from torch import Tensor

from tutelage import pipeline
from tutelage.core.errors import DataError, ModelError
from tutelage.core.progress import Reporter
from tutelage.models import source
from tutelage.models.inspect import describe
from tutelage.models.load import load_model, load_tokenizer
from tutelage.recipe.load import load
from tutelage.recipe.tables import ModelSource
from tutelage.store import Store
from tutelage.text.chat import ChatFormat, exported_template
from tutelage.text.markers import PANGU_MARKERS, split_thinking

CPU = torch.device("cpu")
IDS_T = torch.tensor([5, 290, 17, 300, 281, 12, 259, 3])
ID_OF = {text: i for i, (text, _, _) in enumerate(pieces())}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "openPangu-tiny")


def fetched(checkpoint: Path) -> Path:
    return source.fetch(ModelSource(source=str(checkpoint)))


def logits(directory: Path) -> Tensor:
    model = load_model(directory, dtype="float32", device=CPU).eval()
    with torch.no_grad():
        return model(input_ids=IDS_T[None]).logits[0]


def by_hand(state: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """Logits [T, V] of a Llama with biases on q, k, v and o, written from its formulas."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    length, width = len(IDS_T), config["hidden_size"] // heads

    def norm(x_TD: Tensor, name: str) -> Tensor:
        scale = (x_TD.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt()
        return x_TD * scale * state[name]

    def linear(x_TD: Tensor, name: str) -> Tensor:
        out = x_TD @ state[f"{name}.weight"].T
        return out + state[f"{name}.bias"] if f"{name}.bias" in state else out

    frequency = config["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
    angle = torch.outer(torch.arange(length).double(), frequency)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def rotate(x_THd: Tensor) -> Tensor:  # dimensions i and i + d/2 are one complex number
        first, second = x_THd.double().chunk(2, dim=-1)
        turned = torch.complex(first, second) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    x_TD = state["model.embed_tokens.weight"][IDS_T]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        h_TD = norm(x_TD, f"{at}.input_layernorm.weight")
        q = rotate(linear(h_TD, f"{at}.self_attn.q_proj").view(length, heads, width))
        k = rotate(linear(h_TD, f"{at}.self_attn.k_proj").view(length, kv_heads, width))
        v = linear(h_TD, f"{at}.self_attn.v_proj").view(length, kv_heads, width).double()
        out = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, group].T / math.sqrt(width)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            out.append(scores.softmax(-1) @ v[:, group])
        x_TD = x_TD + linear(torch.cat(out, -1).float(), f"{at}.self_attn.o_proj")
        h_TD = norm(x_TD, f"{at}.post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(linear(h_TD, f"{at}.mlp.gate_proj"))
        x_TD = x_TD + linear(gate * linear(h_TD, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    return norm(x_TD, "model.norm.weight") @ state["model.embed_tokens.weight"].T


def test_logits_are_those_of_a_forward_written_by_hand(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    expected = by_hand(load_file(checkpoint / "model.safetensors"), config)
    assert (logits(fetched(checkpoint)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("module", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_every_bias_is_loaded(checkpoint: Path, module: str) -> None:
    before = logits(fetched(checkpoint))
    state = load_file(checkpoint / "model.safetensors")
    state[f"model.layers.1.self_attn.{module}.bias"].neg_()
    save_file(state, checkpoint / "model.safetensors", {"format": "pt"})
    assert (logits(fetched(checkpoint)) - before).abs().max() > 1e-3


def test_weights_are_linked_and_not_copied(checkpoint: Path) -> None:
    plain = fetched(checkpoint)
    assert (plain / "model.safetensors").resolve() == checkpoint / "model.safetensors"
    config = json.loads((plain / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["attention_bias"] is True
    assert "auto_map" not in config
    assert not list(plain.glob("*.py"))


def test_a_plan_knows_the_model_before_it_is_made_plain(checkpoint: Path, tmp_path: Path) -> None:
    asked, memo = ModelSource(source=str(checkpoint)), tmp_path / "memo.json"
    before = source.locate(asked, memo=memo)
    config = json.loads((checkpoint / "config.json").read_text())
    state = weights(config, seed=0)
    # Neither the head that is the embedding again, nor the rotation's frequencies.
    counted = [v for k, v in state.items() if k != "lm_head.weight" and "inv_freq" not in k]
    assert before.path is None
    assert before.facts is not None
    assert before.facts.parameters == sum(tensor.numel() for tensor in counted)
    assert (before.facts.layers, before.facts.heads, before.facts.kv_heads) == (3, 6, 3)
    assert before.facts.tie_embeddings
    assert before.facts.tokenizer_digest is None
    plain = fetched(checkpoint)
    after = source.locate(asked, memo=memo)
    assert after.path == plain
    assert after.identity == before.identity
    assert after.facts is not None
    assert after.facts.tokenizer_digest is not None
    assert after.facts.parameters == before.facts.parameters


def test_a_copy_is_not_read_through_links_to_the_first(checkpoint: Path, tmp_path: Path) -> None:
    fetched(checkpoint)
    copy = write_checkpoint(tmp_path / "copy")
    asked = [ModelSource(source=str(folder)) for folder in (checkpoint, copy)]
    first, second = (source.locate(one, memo=tmp_path / "memo.json") for one in asked)
    assert first.identity == second.identity
    write_checkpoint(checkpoint, seed=9)  # the first changes in place
    plain = fetched(copy)
    assert (plain / "model.safetensors").resolve() == copy / "model.safetensors"


def test_a_served_teacher_needs_configuration_and_tokenizer_only(
    checkpoint: Path, tmp_path: Path
) -> None:
    asked = ModelSource(source="served:pangu", tokenizer=str(checkpoint))
    (checkpoint / "model.safetensors").unlink()
    assert source.locate(asked, memo=tmp_path / "memo.json").path is None
    plain = source.fetch(asked)
    found = source.locate(asked, memo=tmp_path / "memo.json")
    assert found.path == plain
    assert found.facts is not None
    assert found.facts.vocab_size == 352
    assert load_tokenizer(plain).encode("a") == [1, ID_OF["a"]]


@pytest.mark.parametrize(
    ("key", "value"), [("param_sink_number", 128), ("num_nextn_predict_layers", 1)]
)
def test_a_later_model_of_the_same_name_is_refused(tmp_path: Path, key: str, value: int) -> None:
    checkpoint = write_checkpoint(tmp_path / "R", **{key: value})
    with pytest.raises(ModelError, match=f"not of openPangu-Embedded's architecture.*{key}"):
        fetched(checkpoint)


def test_what_the_config_leaves_out_is_what_its_class_takes(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "short")
    config = json.loads((checkpoint / "config.json").read_text())
    for key in ("rope_theta", "eos_token_id", "bias", "rms_norm_eps"):
        del config[key]
    (checkpoint / "config.json").write_text(json.dumps(config))
    model = load_model(fetched(checkpoint), dtype="float32", device=CPU)
    assert model.config.rope_parameters["rope_theta"] == 16_000_000.0
    assert (model.config.eos_token_id, model.config.rms_norm_eps) == (45_892, 1e-5)
    assert model.config.attention_bias is True


def test_ids_are_those_of_the_sentencepiece_library(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(fetched(checkpoint))
    for text, ids in LIBRARY_IDS.items():
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a") == [1, ID_OF["a"]]  # its class puts <s> before a text
    mixed = tokenizer.encode("a[unused9]b</s>", add_special_tokens=False)
    assert mixed == [ID_OF[text] for text in ("a", "[unused9]", "b", "</s>")]
    assert [tokenizer.convert_tokens_to_ids(text) for text in SPECIAL] == [
        ID_OF[text] for text in SPECIAL
    ]


def test_a_damaged_tokenizer_names_its_file(checkpoint: Path) -> None:
    whole = (checkpoint / "tokenizer.model").read_bytes()
    (checkpoint / "tokenizer.model").write_bytes(whole[:-3])
    with pytest.raises(ModelError, match="tokenizer.model is no SentencePiece model, or is cut"):
        fetched(checkpoint)


def test_the_chat_format_has_openpangus_turns_and_markers(checkpoint: Path) -> None:
    chat = ChatFormat.from_tokenizer(load_tokenizer(fetched(checkpoint)))
    decode = chat.tokenizer.decode
    asked = [{"role": "user", "content": "so"}]
    opening = "<s>[unused9]系统：[unused10][unused9]用户：so[unused10][unused9]助手：[unused16]"
    assert chat.markers == PANGU_MARKERS
    assert decode(chat.prompt_ids(asked, "reasoning")) == opening  # type: ignore[arg-type]
    assert decode(chat.prompt_ids(asked, "fast")) == opening + "[unused17]"  # type: ignore[arg-type]
    answer: Any = {"role": "assistant", "content": " yes\n", "thinking": "\nhm "}
    ids = chat.response_ids(answer)
    assert decode(ids) == "\nhm [unused17] yes\n[unused10]"
    assert ids[-1] == chat.end_of_turn_id == ID_OF["[unused10]"]
    assert ids[len(chat.chain_ids("\nhm ")) - 1] == ID_OF["[unused17]"]
    assert chat.decode_response(ids, "reasoning") == ("\nhm ", " yes\n")
    rendered = chat.render([*asked, answer])  # type: ignore[list-item]
    assert rendered.ids.tolist() == chat.prompt_ids(asked, "reasoning") + ids  # type: ignore[arg-type]


def test_a_marker_in_somebodys_text_stays_text(checkpoint: Path) -> None:
    chat = ChatFormat.from_tokenizer(load_tokenizer(fetched(checkpoint)))
    ids = chat.prompt_ids([{"role": "user", "content": "a [unused17] b"}], "reasoning")
    assert ID_OF["[unused17]"] not in ids
    bad: Any = {"role": "assistant", "content": "b", "thinking": "a [unused17]"}
    with pytest.raises(DataError, match=r"its thinking holds \[unused17\]"):
        chat.response_ids(bad)
    assert split_thinking("[unused16]a[unused17]b", PANGU_MARKERS) == ("a", "b")


def test_the_exported_template_writes_what_the_chat_format_trains(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(fetched(checkpoint))
    chat = ChatFormat.from_tokenizer(tokenizer)
    exported = exported_template(chat.template)
    turns: Any = [
        {"role": "user", "content": "so"},
        {"role": "assistant", "content": "yes", "thinking": "hm"},
        {"role": "user", "content": "and"},
    ]
    for mode in ("fast", "reasoning"):
        text = tokenizer.apply_chat_template(
            turns, chat_template=exported, tokenize=False, add_generation_prompt=True,
            enable_thinking=mode == "reasoning",
        )  # fmt: skip
        assert text == tokenizer.decode(chat.prompt_ids(turns, mode))
    assert exported_template(exported) == exported
    tokenizer.chat_template = exported
    assert ChatFormat.from_tokenizer(tokenizer).fingerprint == chat.fingerprint


def test_chat_formats_of_other_models_keep_their_fingerprints(tmp_path: Path) -> None:
    """As they were before markers became a property of the template; artifacts hold them."""
    tiny = ChatFormat.from_tokenizer(load_tokenizer(write_model(tmp_path / "tiny")))
    assert tiny.fingerprint == "2c6d1a72eb855a5c7cd81936016e19bec7778f6ba99ad3afd854e864582c529c"


def test_the_bundled_models_chat_format_keeps_its_fingerprint(smol_dir: Path) -> None:
    smol = ChatFormat.from_tokenizer(load_tokenizer(smol_dir))
    assert smol.fingerprint == "29f819a95a5e176fba7f82b6f33a3f45b6f30f23c1db941ad568f9a4532567de"


def test_the_edge_runtime_gets_the_same_ids(checkpoint: Path, tmp_path: Path) -> None:
    """Of the plain form's GGUF, by llama.cpp: digits are tokens there, and no bytes."""
    pytest.importorskip("xllamacpp")
    from tutelage.export.gguf import GgufMetadata, write_gguf
    from tutelage.export.runtime import EdgeRuntime

    metadata = GgufMetadata("Tiny", "Apache-2.0")
    out = tmp_path / "tiny.gguf"
    write_gguf(fetched(checkpoint), out, kind="f16", metadata=metadata)
    with EdgeRuntime(out, threads=1, context=256) as opened:
        for text, ids in LIBRARY_IDS.items():
            assert [i for i in opened.tokenize(text) if i != 1] == ids, repr(text)


RECIPE = """
name = "pangu"
seed = 3
[models.teacher]
source = "{teacher}"
[models.student]
source = "{student}"
[steps.prompts]
stage = "data"
sources = [{{ source = "bundled:prompts", limit = 20 }}]
part = "train"
limit = 4
[steps.answers]
stage = "synthesize"
teacher = "teacher"
prompts = "prompts"
mode = "reasoning"
max_think_tokens = 6
max_tokens = 6
[steps.sft]
stage = "sft"
model = "student"
data = "answers"
lr = 1e-3
batch_tokens = 2048
pack_tokens = 512
[steps.rollouts]
stage = "rollout"
model = "sft"
prompts = "prompts"
mode = "fast"
max_tokens = 6
[steps.targets]
stage = "score"
teacher = "teacher"
rollouts = "rollouts"
tau = 0.02
[steps.distilled]
stage = "distill"
model = "sft"
targets = "targets"
lr = 1e-3
batch_tokens = 2048
pack_tokens = 512
"""


def test_a_student_is_trained_and_saved_as_plain_llama(tmp_path: Path) -> None:
    teacher = write_checkpoint(tmp_path / "teacher", seed=1, max_position_embeddings=2048)
    student = write_checkpoint(tmp_path / "student", seed=2, max_position_embeddings=2048)
    recipe = tmp_path / "pangu.toml"
    recipe.write_text(RECIPE.format(teacher=teacher, student=student))
    result = pipeline.run(
        load(recipe, ["runtime.device=cpu"]), Store(tmp_path / "store"),
        reporter=Reporter(quiet=True),
    )  # fmt: skip
    distilled = result.artifacts["distilled"].path / "model"
    config = json.loads((distilled / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["attention_bias"] is True
    assert "auto_map" not in config
    assert config["rope_parameters"]["rope_theta"] == 4000000.0
    trained = load_file(distilled / "model.safetensors")
    before = load_file(student / "model.safetensors")
    bias = "model.layers.1.self_attn.o_proj.bias"
    assert not torch.equal(trained[bias], before[bias])
    # What was saved computes what the formulas say of it, and is a model like any other.
    assert (logits(distilled) - by_hand(trained, config | {"rope_theta": 4e6})).abs().max() < 1e-5
    again = ChatFormat.from_tokenizer(load_tokenizer(distilled))
    assert (
        again.fingerprint == ChatFormat.from_tokenizer(load_tokenizer(fetched(student))).fingerprint
    )
    assert describe(distilled).tokenizer_digest == describe(fetched(teacher)).tokenizer_digest
