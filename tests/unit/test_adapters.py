"""Adapters by real PEFT over tiny models: what is trained, what is saved, what is refused."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stage_distill import Stage, some
from tiny import write_model
from torch import nn
from transformers import AutoModelForCausalLM

from tutelage import pipeline
from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import ModelError, RecipeError, TutelageError
from tutelage.core.progress import Reporter
from tutelage.estimate import estimate
from tutelage.models import adapters
from tutelage.models.adapters import base_fingerprint, load_trainee
from tutelage.models.load import backbone_and_head, load_directory
from tutelage.recipe.load import load
from tutelage.recipe.training import Lora, Sft
from tutelage.records import CONVERSATIONS, write_rows
from tutelage.stages import sft
from tutelage.store import Store
from tutelage.train import checkpoint, fused

LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, with an output layer that is large enough for a loss to fall while it is frozen."""
    folder = write_model(tmp_path_factory.mktemp("base") / "model", layers=2)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 10
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def settings(**more: Any) -> Sft:
    fixed = {
        "stage": "sft", "model": "m", "data": ["d"], "seed": 5, "lr": 1e-2, "batch_tokens": 64,
        "pack_tokens": 64, "checkpoint_minutes": 0, "lora": LORA,
    }  # fmt: skip
    return Sft.model_validate(fixed | more)


def train(folder: Path, base: Path, *, rows: int = 12, **more: Any) -> dict[str, float]:
    """The stage `sft` over a few conversations, in `folder/work`."""
    said = [("user", "what is {}?"), ("assistant", "water and roots")]
    data = [
        {
            "id": f"row-{n}", "source": "hand", "language": None, "mode": "fast", "complete": True,
            "messages": [{"role": r, "content": t.format(n), "thinking": None} for r, t in said],
            "answer": None, "task": None, "meta": None,
        }
        for n in range(rows)
    ]  # fmt: skip
    write_rows(folder / "data" / "conversations.parquet", data, CONVERSATIONS)
    inputs = {"model": outside(base), "data.0": Artifact(folder / "data", {})}
    return sft.run(settings(**more), inputs, work_in(folder))


def work_in(folder: Path) -> WorkDir:
    return WorkDir.open(folder / "work", reporter=Reporter(quiet=True), device="cpu")


def outside(path: Path) -> Artifact:
    return Artifact(path, {"stage": "external", "identity": {}})


def losses(folder: Path) -> list[float]:
    lines = (folder / "work" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None]).logits[0].float()


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_sft_with_adapters_lowers_the_loss_and_says_how_little_it_trained(
    tmp_path: Path, base: Path
) -> None:
    summary = train(tmp_path, base, epochs=8, lr=3e-2)
    assert losses(tmp_path)[-1] < 0.7 * losses(tmp_path)[0]
    # d 32, FFN 64, 2 KV heads of 8: q, k, v, o, gate, up, down of two layers at rank 4
    width = (32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64)
    assert summary["trained_parameters"] == 2 * 4 * width


def test_distilling_with_adapters_lowers_the_loss(tmp_path: Path, base: Path) -> None:
    stage = Stage(tmp_path / "stage", base)
    stage.store(some(12))
    summary = stage.run(epochs=6, lora=LORA)
    assert stage.metrics[-1]["loss"] < 0.9 * stage.metrics[0]["loss"]
    assert summary["trained_parameters"] > 0
    assert (stage.folder / "work" / "adapter" / "adapter_model.safetensors").exists()


def test_only_the_adapters_change_in_training(tmp_path: Path, base: Path) -> None:
    before = load_file(base / "model.safetensors")
    trainee = load_trainee(outside(base), settings(), work_in(tmp_path))
    trained = {name for name, p in trainee.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    seen: dict[str, torch.Tensor] = {}

    class Watch:
        """The stage's own saving, after a look at the weights below the adapters."""

        def __call__(self, loaded: Any, config: Any, work: Any) -> dict[str, int]:
            state = loaded.model.state_dict()
            seen.update({k.replace(".base_layer", ""): v.clone() for k, v in state.items()})
            return adapters.save_trainee(loaded, config, work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "save_trainee", Watch())
        train(tmp_path, base)
    for name, value in before.items():
        assert torch.equal(seen[name], value), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # in PEFT's own wrapper
def test_the_merged_model_is_the_adapter_over_its_base(tmp_path: Path, base: Path) -> None:
    train(tmp_path, base)
    work = tmp_path / "work"
    merged = AutoModelForCausalLM.from_pretrained(work / "model")
    plain = AutoModelForCausalLM.from_pretrained(base)
    start = logits(plain)
    adapted = peft.PeftModel.from_pretrained(plain, work / "adapter")
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-5)
    assert (logits(merged) - start).abs().max() > 1e-2
    assert set(merged.state_dict()) == set(AutoModelForCausalLM.from_pretrained(base).state_dict())


def test_a_tied_output_layer_stays_tied_and_as_it_was(tmp_path: Path, base: Path) -> None:
    train(tmp_path, base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "model")
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    assert torch.equal(
        merged.lm_head.weight, load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    )


def test_training_makes_a_gradient_of_the_hidden_states_only(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = []
    sweep = fused._sweep

    def watched(*given: Any) -> Any:
        wanted.append(given[-1].wanted)
        return sweep(*given)

    monkeypatch.setattr(fused, "_sweep", watched)
    train(tmp_path, base)
    assert set(wanted) == {(True, False, False)}


def test_dropout_is_drawn_from_the_seed(tmp_path: Path, base: Path) -> None:
    lora = LORA | {"dropout": 0.3}
    for name in "ab":
        train(tmp_path / name, base, lora=lora)
        torch.rand(7)  # what else drew numbers in this process must not count
    train(tmp_path / "c", base, lora=lora, seed=6)
    train(tmp_path / "d", base)
    for part in ("model", "adapter"):
        assert digests(tmp_path / "a/work" / part) == digests(tmp_path / "b/work" / part)
    assert len({losses(tmp_path / name)[-1] for name in "acd"}) == 3


def test_a_killed_training_goes_on_to_the_same_bits(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = LORA | {"dropout": 0.2}
    train(tmp_path / "whole", base, lora=lora, epochs=2)
    save, count = checkpoint.save, iter(range(100))

    def killed(*given: Any, **named: Any) -> None:
        save(*given, **named)
        if next(count) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", base, lora=lora, epochs=2)
    kept = next((tmp_path / "killed").rglob("step-*/weights.safetensors"))
    assert all(".lora_" in name for name in load_file(kept))
    train(tmp_path / "killed", base, lora=lora, epochs=2)
    for part in ("model", "adapter"):
        one, other = (digests(tmp_path / run / "work" / part) for run in ("whole", "killed"))
        assert one == other


def test_a_later_part_of_a_schedule_begins_adapters_and_moments_anew(
    tmp_path: Path, base: Path
) -> None:
    train(tmp_path / "first", base, schedule=(0.0, 0.5))
    assert not (tmp_path / "first" / "work/moments.safetensors").exists()
    first = tmp_path / "first" / "work/model"
    train(tmp_path / "second", first, schedule=(0.5, 1.0))
    named = json.loads((tmp_path / "second" / "work/adapter/adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == base_fingerprint(first, memo=tmp_path / "memo")
    assert losses(tmp_path / "second")[-1] < losses(tmp_path / "first")[0]


def test_recomputed_activations_give_the_same_losses(tmp_path: Path, base: Path) -> None:
    lora = LORA | {"dropout": 0.2}
    train(tmp_path / "kept", base, lora=lora)
    train(tmp_path / "again", base, lora=lora, gradient_checkpointing=True)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "kept"), rel=1e-5)


def test_an_average_is_of_the_adapters(tmp_path: Path, base: Path) -> None:
    train(tmp_path / "last", base)
    train(tmp_path / "mean", base, ema=0.9)
    name = "work/adapter/adapter_model.safetensors"
    last, mean = (load_file(tmp_path / run / name) for run in ("last", "mean"))
    kinds = {key.split(".")[-2] for key in last if not torch.equal(last[key], mean[key])}
    assert kinds == {"lora_A", "lora_B"}
    assert losses(tmp_path / "last") == losses(tmp_path / "mean")


def test_bfloat16_is_for_the_products_and_the_adapter_stays_in_float32(
    tmp_path: Path, base: Path
) -> None:
    train(tmp_path, base, precision="bfloat16", epochs=8)
    assert losses(tmp_path)[-1] < 0.9 * losses(tmp_path)[0]
    stored = load_file(tmp_path / "work/adapter/adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}


@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj", "v_proj", "k_proj", "up_proj"], "o_proj"]
)
def test_named_targets_are_the_layers_that_change(
    tmp_path: Path, base: Path, targets: list[str] | str
) -> None:
    train(tmp_path, base, lora=LORA | {"targets": targets})
    settings = json.loads((tmp_path / "work/adapter/adapter_config.json").read_text())
    assert settings["target_modules"] == sorted([targets] if isinstance(targets, str) else targets)
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "work/model/model.safetensors")
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == ({targets} if isinstance(targets, str) else set(targets))


def test_an_unknown_target_is_told_with_the_known_ones(tmp_path: Path, base: Path) -> None:
    with pytest.raises(RecipeError, match=r"'qproj'.*did you mean 'q_proj'\? known: down_proj, "):
        train(tmp_path, base, lora=LORA | {"targets": ["k_proj", "qproj"]})


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_the_output_layer_and_the_embedding_are_no_targets(
    tmp_path: Path, base: Path, name: str
) -> None:
    with pytest.raises(RecipeError, match=f"no linear layer '{name}' before its output"):
        train(tmp_path, base, lora={"targets": [name]})


def test_without_peft_the_line_names_the_extra(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ModelError, match=r"tutelage\[lora\]"):
        train(tmp_path, base)


def test_without_bitsandbytes_the_line_names_the_extra(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"tutelage\[qlora\]"):
        train(tmp_path, base, lora=LORA | {"quantize": "nf4"})


@pytest.mark.parametrize(("kind", "near"), [("nf4", 1e-5), ("int8", 0.05)])
def test_a_quantised_base_is_trained_and_saved_as_it_was_read(
    tmp_path: Path, base: Path, kind: str, near: float
) -> None:
    pytest.importorskip("bitsandbytes")
    seen = []

    def watched(loaded: Any, config: Any, work: Any) -> dict[str, int]:
        seen.append(logits(loaded.model))
        return adapters.save_trainee(loaded, config, work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "save_trainee", watched)
        few = LORA | {"quantize": kind, "targets": ["q_proj", "down_proj"]}
        train(tmp_path, base, epochs=8, lora=few)
    assert losses(tmp_path)[-1] < 0.9 * losses(tmp_path)[0]
    saved = load_directory(tmp_path / "work/model", device="cpu").model
    assert all(type(m) is nn.Linear for m in saved.modules() if isinstance(m, nn.Linear))
    assert (logits(saved) - seen[0]).abs().max() < near * seen[0].abs().max()
    changed = load_file(tmp_path / "work/model/model.safetensors")
    unlike = [k for k, v in load_file(base / "model.safetensors").items() if "up_proj" in k
              and torch.equal(v, changed[k])]  # fmt: skip
    assert not unlike  # layers that are no target were read in few bits too


class Given:
    """A base and an adapter of some training over it, and what reading it again says."""

    def __init__(self, folder: Path, base: Path) -> None:
        train(folder, base)
        self.base, self.adapter, self.memo = base, folder / "work/adapter", folder / "memo.json"
        self.model = folder / "work/model"

    def applied(self, base: Path | None = None) -> nn.Module:
        loaded = load_directory(base or self.base, device="cpu", dtype="float32")
        known = base_fingerprint(loaded.directory, memo=self.memo)
        adapters.apply(loaded, self.adapter, base=known)
        return loaded.model

    def edit(self, **values: Any) -> None:
        path = self.adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def given(tmp_path: Path, base: Path) -> Given:
    return Given(tmp_path, base)


def test_a_stored_adapter_over_its_base_is_the_merged_model(given: Given) -> None:
    saved = load_directory(given.model, device="cpu").model
    applied = given.applied()
    for name, value in saved.state_dict().items():
        assert torch.equal(applied.state_dict()[name], value), name
    backbone_and_head(applied)


def test_a_copy_of_the_base_elsewhere_is_the_same_base(given: Given, tmp_path: Path) -> None:
    given.applied(shutil.copytree(given.base, tmp_path / "copy"))


def test_an_adapter_for_another_base_is_told_as_such(given: Given, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", layers=2, seed=1)
    with pytest.raises(ModelError, match="is an adapter for another base: its weights are"):
        given.applied(other)


def test_an_outside_adapter_that_does_not_fit_is_told_by_its_shapes(
    given: Given, tmp_path: Path
) -> None:
    given.edit(base_model_name_or_path="someone/model")
    given.applied()  # named by a place, so only the shapes can tell
    with pytest.raises(ModelError, match="does not fit.*it is for another base"):
        given.applied(write_model(tmp_path / "other", layers=3))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("use_dora", True), ("modules_to_save", ["lm_head"]), ("bias", "all"),
     ("init_lora_weights", "pissa"), ("megatron_config", {"a": 1}), ("something_new", 3)],
)  # fmt: skip
def test_what_is_more_than_plain_lora_is_refused_by_name(
    given: Given, setting: str, value: Any
) -> None:
    given.edit(**{setting: value})
    with pytest.raises(ModelError, match=f"{setting} = .* is more than plain LoRA"):
        given.applied()


def test_another_kind_of_adapter_and_no_adapter_are_told_apart(given: Given) -> None:
    given.edit(peft_type="IA3")
    with pytest.raises(ModelError, match="holds no LoRA"):
        given.applied()
    (given.adapter / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="holds no adapter: there is no adapter_config.json"):
        given.applied()


def test_an_adapter_of_the_output_layer_is_refused(given: Given) -> None:
    given.edit(target_modules=["lm_head"])
    save_file({}, given.adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="adapts lm_head"):
        given.applied()


def test_damaged_weights_of_an_adapter_are_told(given: Given) -> None:
    (given.adapter / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="adapter_model.safetensors is damaged"):
        given.applied()


def test_one_target_may_be_given_without_a_list() -> None:
    assert Lora.model_validate({"targets": "q_proj"}).targets == ("q_proj",)
    assert Lora.model_validate({"targets": "all-linear"}).targets == "all-linear"


RECIPE = """
name = "adapted"
[models.plain]
source = "base"
[models.adapted]
source = "{source}"
adapter = "given"
[steps.rows]
stage = "data"
sources = [{{ source = "bundled:prompts" }}]
limit = 2
[steps.answers]
stage = "rollout"
model = "adapted"
prompts = "rows"
mode = "fast"
max_tokens = 3
"""


@pytest.fixture
def recipe(tmp_path: Path, base: Path) -> Path:
    """A recipe over `base` and an adapter beside it, by relative paths."""
    found = Given(tmp_path / "training", base)
    shutil.copytree(found.adapter, tmp_path / "given")
    shutil.copytree(base, tmp_path / "base")
    write_model(tmp_path / "other", layers=2, seed=1)
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.format(source="base"))
    return path


def made(path: Path) -> Artifact:
    store, reporter = Store(path.parent / "store"), Reporter(quiet=True)
    done = pipeline.run(load(path), store, reporter=reporter, until="adapted")
    return done.artifacts["adapted"]


def test_a_model_with_an_adapter_is_a_whole_one_in_a_recipe(recipe: Path) -> None:
    adapted = made(recipe)
    assert adapted.stage == "merge"
    merged = load_file(adapted.path / "model" / "model.safetensors")
    trained = load_file(recipe.parent / "training" / "work/model/model.safetensors")
    assert all(torch.equal(merged[name], value) for name, value in trained.items())


def test_another_adapter_in_its_place_is_another_model(recipe: Path) -> None:
    first = made(recipe)
    weights = recipe.parent / "given" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: 2 * value for name, value in tensors.items()}, weights)
    assert made(recipe).fingerprint != first.fingerprint


def test_a_recipe_with_an_adapter_for_another_base_fails_in_one_line(recipe: Path) -> None:
    recipe.write_text(RECIPE.format(source="other"))
    with pytest.raises(TutelageError, match=r"given is an adapter for another base: .*[^\n]$"):
        made(recipe)


def test_a_directory_without_an_adapter_is_told_before_anything_runs(recipe: Path) -> None:
    (recipe.parent / "given" / "adapter_model.safetensors").unlink()
    with pytest.raises(TutelageError, match=r"there is no adapter_model\.safetensors in it"):
        pipeline.plan(load(recipe), Store(recipe.parent / "store"))


TUNED = """
[steps.tuned]
stage = "sft"
model = "plain"
data = "rows"
"""


def test_a_plan_counts_optimizer_states_of_the_adapters_only(recipe: Path) -> None:
    found = {}
    for lora in ("", "lora = { rank = 8 }"):
        recipe.write_text(RECIPE.format(source="base") + TUNED + lora)
        store = Store(recipe.parent / "store")
        found[bool(lora)] = estimate(pipeline.plan(load(recipe), store), store)["tuned"]
    weights = sum(
        value.numel() * 4 for value in load_file(recipe.parent / "base/model.safetensors").values()
    )
    adapters_bytes = 8 * 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3) * 4
    assert found[False].memory_bytes == 5 * weights
    assert found[True].memory_bytes == weights + 5 * adapters_bytes
    assert found[True].disk_bytes == weights + adapters_bytes


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lora = { rnak = 8 }", "steps.tuned.lora.rnak: unknown key; did you mean 'rank'?"),
        ("lora = { rank = 0 }", "steps.tuned.lora.rank: Input should be greater than 0, got 0"),
        ('lora = { quantize = "fp4" }', "steps.tuned.lora.quantize: Input should be 'none', 'nf4'"),
    ],
)
def test_what_is_wrong_in_the_table_is_told_with_its_place(
    recipe: Path, line: str, said: str
) -> None:
    recipe.write_text(RECIPE.format(source="base") + TUNED + line)
    with pytest.raises(RecipeError) as caught:
        load(recipe)
    assert said in str(caught.value)


@pytest.mark.parametrize("more", ["drop_layers = 1", 'tokenizer = "base"'])
def test_only_a_whole_model_takes_an_adapter(recipe: Path, more: str) -> None:
    source = "served:far" if "tokenizer" in more else "base"
    text = RECIPE.format(source=source).replace('adapter = "given"', f'adapter = "given"\n{more}')
    recipe.write_text(text)
    with pytest.raises(RecipeError, match="merged into a whole model from outside"):
        load(recipe)
