"""The doctor passes a sound recipe and catches each planted fault, by name."""

import importlib.util
import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from model_server import ModelServer
from tiny import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutelage.cli.app import main
from tutelage.doctor.examine import examine
from tutelage.doctor.findings import Finding, against, ok, unchecked, warn, worst
from tutelage.recipe.load import load
from tutelage.store import Store

RECIPE = """
name = "sound"
seed = 3
[models.teacher]
source = "{folder}/teacher"
[models.student]
source = "{folder}/student"
[models.other]
source = "{folder}/other"
[steps.prompts]
stage = "data"
sources = [{{ source = "{folder}/prompts.jsonl" }}]
part = "train"
holdout_share = 0.3
[steps.held-out]
stage = "data"
sources = [{{ source = "{folder}/prompts.jsonl" }}]
part = "holdout"
holdout_share = 0.3
[steps.chains]
stage = "synthesize"
teacher = "teacher"
prompts = "prompts"
mode = "reasoning"
max_think_tokens = 32
max_tokens = 32
[steps.answers]
stage = "synthesize"
teacher = "teacher"
prompts = "prompts"
mode = "fast"
max_tokens = 48
[steps.sft]
stage = "sft"
model = "student"
data = ["answers", "chains"]
[steps.rollouts]
stage = "rollout"
model = "sft"
prompts = "prompts"
mode = "fast"
max_tokens = 48
[steps.targets]
stage = "score"
teacher = "teacher"
rollouts = "rollouts"
[steps.distilled]
stage = "distill"
model = "sft"
targets = "targets"
[steps.scores]
stage = "evaluate"
models = ["sft", "distilled"]
teacher = "teacher"
prompts = "held-out"
max_tokens = 32
"""
THINGS = ["moss", "rain", "salt", "bread", "glass", "wool", "ink", "tin", "clay", "corn"]
FROM_STUDENT = ["steps.rollouts.model=student", "steps.distilled.model=student"]


@dataclass
class Ward:
    """A recipe with its models in a folder of its own, to be broken."""

    folder: Path
    overrides: list[str]

    @property
    def student(self) -> Path:
        return self.folder / "student"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    def set(self, *overrides: str) -> None:
        self.overrides += overrides

    def edit(self, file: Path, change: Callable[[Any], None]) -> None:
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    def template(self, old: str, new: str) -> None:
        for path in (self.student / "chat_template.jinja",):
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new))

    def add(self, text: str) -> None:
        path = self.folder / "recipe.toml"
        path.write_text(path.read_text() + text)

    def reshape(self, change: Callable[[Any], None], source: str = "student") -> None:
        model = AutoModelForCausalLM.from_pretrained(self.folder / source)
        with torch.no_grad():
            change(model)
        model.save_pretrained(self.student)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three random models of one tokenizer that has think markers, and a recipe over them."""
    folder = tmp_path_factory.mktemp("sound")
    tokenizer = AutoTokenizer.from_pretrained(write_model(folder / "tokenizer"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    for seed, name in enumerate(("teacher", "student", "other")):
        path = write_model(folder / name, seed=seed)
        tokenizer.save_pretrained(path)  # the ids of the special ones vary from call to call
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():  # or every random model says its last token again
            for weights in model.model.layers.parameters():
                weights.mul_(6)
        model.save_pretrained(path)
        for file in ("config.json", "generation_config.json"):
            content = json.loads((path / file).read_text())
            content["eos_token_id"] = tokenizer.eos_token_id
            content["bos_token_id"] = tokenizer.bos_token_id
            (path / file).write_text(json.dumps(content))
    rows = [
        {"prompt": f"Tell me of {one} and {two}."} for one in THINGS for two in THINGS if one < two
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def ward(sound: Path, tmp_path: Path) -> Ward:
    folder = tmp_path / "ward"
    shutil.copytree(sound, folder)
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder))
    return Ward(folder, [])


def examined(
    ward: Ward, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, dict[str, Any]]:
    """(exit code, what `--json` said) of the command line itself."""
    sets = [word for override in ward.overrides for word in ("--set", override)]
    words = ["doctor", ward.folder / "recipe.toml", "--json", "--store", ward.folder / "store"]
    monkeypatch.setattr("sys.argv", ["tutelage", *map(str, words), *sets, *more])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert "Traceback" not in said.err, said.err
    assert said.out, said.err
    return int(stop.value.code or 0), json.loads(said.out)


def findings(said: dict[str, Any], check: str) -> list[dict[str, str]]:
    return [finding for finding in said["findings"] if finding["check"].startswith(check)]


def eos_changed(ward: Ward) -> None:
    for file in ("config.json", "generation_config.json"):
        ward.edit(ward.student / file, lambda config: config.update(eos_token_id=7))


def eos_of_one_file(ward: Ward) -> None:
    ward.edit(ward.student / "config.json", lambda config: config.update(eos_token_id=7))


def end_of_turn_no_stop(ward: Ward) -> None:
    start = AutoTokenizer.from_pretrained(ward.student).convert_tokens_to_ids("<|im_start|>")
    ward.edit(
        ward.student / "tokenizer_config.json",
        lambda config: config.update(eos_token="<|im_start|>"),
    )
    for file in ("config.json", "generation_config.json"):
        ward.edit(ward.student / file, lambda config: config.update(eos_token_id=start))


def end_of_turn_spelled(ward: Ward) -> None:
    ward.template("<|im_end|>", "<|finished|>")


def no_generation_prompt(ward: Ward) -> None:
    ward.template("{% if add_generation_prompt %}", "{% if false %}")


def other_generation_prompt(ward: Ward) -> None:
    ward.template("'<|im_start|>assistant\n'", "'<|im_start|>model\n'")


def broken_template(ward: Ward) -> None:
    ward.template("message['content']", "''")


def other_template(ward: Ward) -> None:
    ward.template("'\n' + message['content']", "'\n\n' + message['content']")
    ward.template("assistant\n'", "assistant\n\n'")


def other_tokenizer(ward: Ward) -> None:
    shutil.rmtree(ward.student)
    write_model(ward.student, vocab=300)


def padded_vocabulary(ward: Ward) -> None:
    ward.reshape(lambda model: model.resize_token_embeddings(384))


def teacher_is_student(ward: Ward) -> None:
    ward.set(f"models.student.source={ward.teacher}", *FROM_STUDENT)


def nearly_the_teacher(ward: Ward) -> None:
    ward.reshape(lambda model: model.model.norm.weight.mul_(1.0001), source="teacher")
    ward.set(*FROM_STUDENT)


def two_teachers(ward: Ward) -> None:
    ward.set("steps.answers.teacher=other", "steps.chains.teacher=other")


def one_of_two_teachers(ward: Ward) -> None:
    ward.set("steps.answers.teacher=other")


def looping_student(ward: Ward) -> None:
    def loop(model: Any) -> None:  # every token is followed by itself
        model.model.embed_tokens.weight.mul_(2000)

    ward.reshape(loop)
    ward.set(*FROM_STUDENT)


def far_from_teacher(ward: Ward) -> None:
    ward.reshape(lambda model: model.model.norm.weight.mul_(300))
    shutil.copytree(ward.student, ward.teacher, dirs_exist_ok=True)
    ward.reshape(lambda model: model.model.embed_tokens.weight.mul_(-1), source="other")
    ward.set(*FROM_STUDENT)


def no_room_for_an_answer(ward: Ward) -> None:
    ward.set("steps.rollouts.max_tokens=2")


def held_out_is_trained_on(ward: Ward) -> None:
    ward.set("steps.held-out.part=train")


def prompts_longer_than_context(ward: Ward) -> None:
    for folder in (ward.student, ward.teacher):
        ward.edit(folder / "config.json", lambda config: config.update(max_position_embeddings=10))


def answers_longer_than_context(ward: Ward) -> None:
    ward.set("steps.rollouts.max_tokens=500")


def learnt_by_heart(ward: Ward) -> None:
    ward.set("steps.sft.epochs=40")


def rollouts_far_longer(ward: Ward) -> None:
    ward.set("steps.rollouts.max_tokens=400")


def think_half_a_token(ward: Ward) -> None:
    _forget(ward, "</think>")


def think_in_pieces(ward: Ward) -> None:
    _forget(ward, "<think>", "</think>")


def _forget(ward: Ward, *tokens: str) -> None:
    def drop(spec: Any) -> None:
        added = [token for token in spec["added_tokens"] if token["content"] not in tokens]
        spec["added_tokens"] = added

    def unlist(config: Any) -> None:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            if isinstance(config.get(key), list):
                config[key] = [token for token in config[key] if token not in tokens]
        decoder = config.get("added_tokens_decoder", {})
        config["added_tokens_decoder"] = {
            i: token for i, token in decoder.items() if token["content"] not in tokens
        }

    for folder in (ward.student, ward.teacher):
        ward.edit(folder / "tokenizer.json", drop)
        ward.edit(folder / "tokenizer_config.json", unlist)


def server_down(ward: Ward) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ward.add(f'[engines.teacher]\nkind = "server"\nurl = "http://127.0.0.1:{port}"\n')


def vllm_not_installed(ward: Ward) -> None:
    ward.add('[engines.teacher]\nkind = "vllm"\n')


def ray_not_installed(ward: Ward) -> None:
    ward.set("runtime.executor=ray")


def lm_eval_not_installed(ward: Ward) -> None:
    ward.set('steps.scores.tasks=["gsm8k"]')


def no_bubblewrap(ward: Ward) -> None:
    ward.set("steps.answers.verifier=code")


def nothing(ward: Ward) -> None:
    """The fault is the machine's: it is injected where the machine is asked."""


FAULTS: dict[Callable[[Ward], None], tuple[str, str, int]] = {
    eos_changed: ("eos of student", "against", 3),
    eos_of_one_file: ("eos of student", "warn", 0),
    end_of_turn_no_stop: ("end of turn of student", "against", 3),
    end_of_turn_spelled: ("end of turn of student", "against", 3),
    no_generation_prompt: ("generation prompt of student", "warn", 0),
    other_generation_prompt: ("generation prompt of student", "against", 3),
    broken_template: ("chat template of student", "against", 3),
    other_template: ("same template", "warn", 0),
    other_tokenizer: ("vocabulary", "against", 3),
    padded_vocabulary: ("vocabulary", "against", 3),
    teacher_is_student: ("two models for student", "against", 3),
    nearly_the_teacher: ("something to learn", "warn", 0),
    far_from_teacher: ("something to learn", "warn", 0),
    two_teachers: ("one teacher", "against", 3),
    one_of_two_teachers: ("one teacher", "warn", 0),
    looping_student: ("loops in rollouts", "against", 3),
    no_room_for_an_answer: ("answers of rollouts", "against", 3),
    held_out_is_trained_on: ("contamination of held-out", "against", 3),
    prompts_longer_than_context: ("context of rollouts", "against", 3),
    answers_longer_than_context: ("context of rollouts", "against", 3),
    learnt_by_heart: ("fresh prompts for rollouts", "warn", 0),
    rollouts_far_longer: ("length of rollouts", "warn", 0),
    think_half_a_token: ("think markers of student", "against", 3),
    think_in_pieces: ("think markers of student", "warn", 0),
    server_down: ("engine of teacher", "against", 3),
    vllm_not_installed: ("engine of teacher", "against", 3),
    ray_not_installed: ("ray", "against", 3),
    lm_eval_not_installed: ("lm_eval", "against", 3),
    no_bubblewrap: ("sandbox", "against", 3),
}
RUNS_MODELS = ("something to learn", "loops in", "answers of", "two models")
HIDDEN = {"vllm_not_installed": "vllm", "ray_not_installed": "ray",
          "lm_eval_not_installed": "lm_eval"}  # fmt: skip


@pytest.fixture(scope="session")
def healthy(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the doctor says of the sound recipe."""
    folder = tmp_path_factory.mktemp("healthy")
    (folder / "recipe.toml").write_text(RECIPE.format(folder=sound))
    found = examine(load(folder / "recipe.toml"), Store(folder / "store"))
    return {"findings": [asdict(finding) for finding in found]}


def test_a_sound_recipe_passes(healthy: dict[str, Any]) -> None:
    bad = [f for f in healthy["findings"] if f["verdict"] == "against"]
    assert not bad
    # Random models never end an answer; there is nothing else to warn of.
    warned = [f["check"] for f in healthy["findings"] if f["verdict"] == "warn"]
    assert warned == ["answers of rollouts"]
    assert not [f for f in healthy["findings"] if f["verdict"] == "not checked"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught(
    fault: Callable[[Ward], None], ward: Ward, healthy: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    check, verdict, exit_code = FAULTS[fault]
    fault(ward)
    if missing := HIDDEN.get(fault.__name__):
        real = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec",
            lambda name, *rest: None if name == missing else real(name, *rest),
        )  # fmt: skip
    if fault is no_bubblewrap:
        monkeypatch.setenv("PATH", "")
    quick = () if check.startswith(RUNS_MODELS) else ("--quick",)
    code, said = examined(ward, monkeypatch, capsys, *quick)
    caught = [finding for finding in findings(said, check) if finding["verdict"] == verdict]
    assert caught, said["findings"]
    assert all(finding["do"] for finding in caught)
    assert code == exit_code, said["findings"]
    assert not [f for f in findings(healthy, check) if f["verdict"] == verdict]


def test_too_little_disk_is_caught(
    ward: Ward, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fake disk: a full one is an injected fault."""
    monkeypatch.setattr(psutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    code, said = examined(ward, monkeypatch, capsys, "--quick")
    assert code == 3
    assert findings(said, "disk of the store")[0]["verdict"] == "against"


@pytest.mark.parametrize(
    ("total", "available", "verdict", "exit_code"),
    [(1000, 500, "against", 3), (10**9, 1000, "warn", 0)],
)
def test_too_little_memory_is_caught(
    total: int, available: int, verdict: str, exit_code: int, ward: Ward,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A fake memory: a small one is an injected fault."""
    small = SimpleNamespace(total=total, available=available)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: small)
    code, said = examined(ward, monkeypatch, capsys, "--quick", "--set", "runtime.device=cpu")
    assert code == exit_code
    assert findings(said, "memory")[0]["verdict"] == verdict


def test_a_formula_with_other_signs_is_another_question(
    ward: Ward, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for name, sign in (("same", "+"), ("other", "-")):
        exam = ward.folder / f"{name}.jsonl"
        rows = [{"prompt": f"What is {i} + {i} * 3?"} for i in range(20)]
        (ward.folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        rows = [{"prompt": f"WHAT IS {i} {sign} {i} * 3?!"} for i in range(20)]
        exam.write_text("\n".join(map(json.dumps, rows)))
        ward.set(f"steps.held-out.sources=[{{source='{exam}'}}]", "steps.held-out.part=all")
        _, told = examined(ward, monkeypatch, capsys, "--quick")
        said[name] = findings(told, "contamination of held-out")[0]["verdict"]
    assert said == {"same": "against", "other": "ok"}


def test_a_teacher_behind_a_server_that_cannot_read_is_told_by_the_plan(
    ward: Ward, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ward.add('[engines.teacher]\nkind = "server"\napi = "llama.cpp"\nurl = "http://127.0.0.1:9"\n')
    words = ["doctor", str(ward.folder / "recipe.toml"), "--quick"]
    monkeypatch.setattr("sys.argv", ["tutelage", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "it cannot read" in capsys.readouterr().err


def test_a_teacher_behind_a_server_is_asked(
    ward: Ward, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ModelServer(ward.teacher)
    try:
        ward.add(f'[engines.teacher]\nkind = "server"\nurl = "{server.url}"\n')
        code, said = examined(ward, monkeypatch, capsys)
    finally:
        server.close()
    assert findings(said, "engine of teacher")[0]["verdict"] == "ok"
    assert findings(said, "something to learn")[0]["text"].startswith("log q - log p")
    assert code == 0


def test_quick_runs_no_model(
    ward: Ward, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tutelage.doctor.sampling._loaded", lambda *given: pytest.fail("loaded"))
    code, said = examined(ward, monkeypatch, capsys, "--quick")
    assert code == 0
    assert findings(said, "something to learn")[0]["verdict"] == "not checked"


def test_a_pruned_student_is_cut_before_it_is_asked(
    ward: Ward, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ward.set(f"models.student.source={ward.teacher}", "models.student.drop_layers=1")
    code, said = examined(ward, monkeypatch, capsys)
    assert code == 0
    [finding] = findings(said, "something to learn")
    assert "of student: sft is not made yet" in finding["text"]
    assert "token at 100%" not in finding["text"]


def test_rows_that_cannot_be_had_are_told(
    ward: Ward, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (ward.folder / "prompts.jsonl").write_text("{\n")
    code, said = examined(ward, monkeypatch, capsys, "--quick")
    assert code == 3
    assert findings(said, "rows of prompts")[0]["verdict"] == "against"


def test_finished_rollouts_are_looked_at(
    ward: Ward, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ward.set("steps.rollouts.max_tokens=2", *FROM_STUDENT)
    sets = [word for override in ward.overrides for word in ("--set", override)]
    words = ["run", ward.folder / "recipe.toml", "--until", "rollouts", *sets]
    monkeypatch.setattr(
        "sys.argv", ["tutelage", *map(str, words), "--store", str(ward.folder / "store")]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    capsys.readouterr()
    code, said = examined(ward, monkeypatch, capsys, "--quick")
    assert code == 3
    assert findings(said, "finished rollouts")[0]["verdict"] == "against"


def test_a_wrong_recipe_is_the_users_error(
    ward: Ward, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tutelage", "doctor", str(ward.folder / "none.toml")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "no such recipe" in capsys.readouterr().err


def test_without_a_recipe_the_machine_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tutelage", "doctor", "--json", "--store", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    said = json.loads(capsys.readouterr().out)
    told = {finding["check"] for finding in said["findings"]}
    extras = {"extra tasks", "extra data", "extra edge", "extra evals", "extra ray", "extra vllm"}
    assert told >= {"python", "torch", "cores", "memory", "disk", "bubblewrap", "store", *extras}


def test_every_extra_of_the_package_is_told_of() -> None:
    import tomllib

    from tutelage.doctor.machine import EXTRAS

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"dev"}


def test_the_table_shows_what_to_do(
    ward: Ward, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two_teachers(ward)
    words = ["doctor", ward.folder / "recipe.toml", "--quick", "--store", ward.folder / "store"]
    sets = [word for override in ward.overrides for word in ("--set", override)]
    monkeypatch.setattr("sys.argv", ["tutelage", *map(str, words), *sets])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 3
    shown = capsys.readouterr().out
    assert "against" in shown
    assert "do: let teacher write the sft answers" in " ".join(shown.split())


def test_the_worst_verdict_counts() -> None:
    good, bad = ok("a", "fine"), against("b", "bad", "stop")
    assert worst([]) == worst([good]) == "ok"
    assert worst([good, unchecked("c", "why")]) == "not checked"
    assert worst([good, warn("d", "hm", "look"), bad]) == "against"
    assert Finding("a", "ok", "fine").do == ""
