"""The bundled model exported for real, and run by llama.cpp: bars on memory, parity and answers."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutelage.export.gguf import GgufMetadata, write_gguf
from tutelage.export.parity import (
    RenderedPrompt,
    greedy_parity,
    runtime_parity,
    tokenization_parity,
    weights_parity,
)
from tutelage.export.runtime import EdgeRuntime
from tutelage.text.chat import ChatFormat, Message, exported_template

pytestmark = pytest.mark.slow
pytest.importorskip("xllamacpp")

METADATA = GgufMetadata("SmolLM2 135M Instruct", "Apache-2.0")
PROMPTS = {
    "English": "What is the capital of France?",
    "Chinese": "你好！请用三句话介绍一下杭州的西湖，包括 2 个景点。",
    "German": "Erkläre kurz, warum der Himmel über Köln blau ist – größer als 1.234,5 m²?",
    "code": "Fix:\n\n```python\ndef f(x):\n    if x  ==  10:\n\t\treturn x**2 # don't\n\n\n```\r\n",
    "emoji": "👩🏽\u200d🚀🌊 in words: 🇫🇷❤️\u200d🔥  👍 ½ x² \u00a0…",
}
ANSWERS = {
    "Explain why the sky is blue in two sentences.": "The sky is blue because air molecules "
    "scatter short wavelengths of sunlight more strongly than long ones. This is called Rayleigh "
    "scattering.",
    "Write a Python function that reverses a list.": "```python\ndef reverse(items):\n"
    "    return items[::-1]\n```\nIt returns a new list and leaves the old one alone.",
    "List three healthy breakfasts.": "1. Oatmeal with berries and nuts.\n2. Greek yoghurt with "
    "fruit.\n3. Scrambled eggs on whole-grain toast.",
}

# Run apart, so that the peak is its own (getrusage would also count the parent's).
MEASURE = """
import json, sys
from pathlib import Path
from tutelage.export.gguf import GgufMetadata, write_gguf
metadata = GgufMetadata("m", "Apache-2.0")
write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), kind="q8_0", metadata=metadata)
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps({"megabytes": peak, "torch": "torch" in sys.modules}))
"""
LEFT_OPEN = """
import sys
from pathlib import Path
from tutelage.export.runtime import EdgeRuntime
runtime = EdgeRuntime(Path(sys.argv[1]), threads=1)
print(runtime.complete("The sea", max_tokens=4).text)
"""


@pytest.fixture(scope="module")
def model(smol_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smol_dir).eval()


@pytest.fixture(scope="module")
def chat(smol_dir: Path) -> ChatFormat:
    return ChatFormat.from_tokenizer(AutoTokenizer.from_pretrained(smol_dir))


@pytest.fixture(scope="module")
def files(
    smol_dir: Path, chat: ChatFormat, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """As trained models are exported (f16, q8_0), and with the model's own template (plain)."""
    folder = tmp_path_factory.mktemp("gguf")
    made = {kind: folder / f"{kind}.gguf" for kind in ("f16", "q8_0", "plain")}
    template = exported_template(chat.template)
    write_gguf(smol_dir, made["f16"], kind="f16", chat_template=template, metadata=METADATA)
    write_gguf(smol_dir, made["q8_0"], kind="q8_0", chat_template=template, metadata=METADATA)
    write_gguf(smol_dir, made["plain"], kind="f16", metadata=METADATA)
    return made


@pytest.fixture(scope="module")
def plain(files: dict[str, Path]) -> Iterator[EdgeRuntime]:
    with EdgeRuntime(files["plain"], threads=1) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def sequences(chat: ChatFormat) -> list[list[int]]:
    return [
        in_own_template(
            chat, {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        )
        for question, answer in ANSWERS.items()
    ]


def in_own_template(chat: ChatFormat, *messages: Message) -> list[int]:
    tokenizer: Any = chat.tokenizer
    prompt = messages[-1]["role"] == "user"
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    return tokenizer(text)["input_ids"]


def test_the_file_answers_a_chat_as_the_model_does(plain: EdgeRuntime) -> None:
    answer = plain.chat([{"role": "user", "content": PROMPTS["English"]}], max_tokens=24)
    assert answer.text == "The capital of France is Paris."
    assert answer.finish_reason == "stop"
    assert answer.tokens_per_second > 1


def test_raw_text_is_continued(plain: EdgeRuntime) -> None:
    answer = plain.complete("1, 2, 3, 4, 5, 6,", max_tokens=8)
    assert answer.text.startswith(" 7, 8")
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("thinking", [False, True])
def test_the_runtime_renders_and_splits_prompts_as_in_training(
    thinking: bool, chat: ChatFormat, files: dict[str, Path]
) -> None:
    first: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "12 + 345?"},
        {"role": "assistant", "content": "357", "thinking": "12 + 345\n= 357"},
    ]
    conversations: list[list[Message]] = []
    for text in PROMPTS.values():
        question: Message = {"role": "user", "content": text}
        conversations += [[question], [*first, question]]
    mode = "reasoning" if thinking else "fast"
    prompts = [
        RenderedPrompt(messages, chat.prompt_ids(messages, mode), thinking)
        for messages in conversations
    ]
    with EdgeRuntime(files["q8_0"], threads=1) as runtime:
        parity = tokenization_parity(runtime, prompts)
    assert parity.first_difference is None
    assert parity.agreement == 1.0


@pytest.mark.parametrize(("kind", "bar"), [("f16", 1e-4), ("q8_0", 0.005)])
def test_weights_stay_within_their_bar(
    kind: str, bar: float, model: Any, files: dict[str, Path], sequences: list[list[int]]
) -> None:
    parity = weights_parity(model, files[kind], sequences)
    assert 0 < parity.mean_forward_kl < bar
    assert parity.argmax_agreement > 0.95


def test_the_runtimes_own_arithmetic_stays_within_its_bar(
    model: Any, plain: EdgeRuntime, sequences: list[list[int]]
) -> None:
    parity = runtime_parity(model, plain, sequences, num_positions=12)
    assert parity.mean_forward_kl < 1e-4
    assert parity.argmax_agreement == 1.0


def test_greedy_answers_of_an_f16_file_are_the_models(
    model: Any, plain: EdgeRuntime, chat: ChatFormat
) -> None:
    prompts = [in_own_template(chat, {"role": "user", "content": q}) for q in ANSWERS]
    share = greedy_parity(model, plain, prompts, max_tokens=24, stop_ids=chat.stop_ids)
    assert share > 0.9


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_export_needs_little_memory_and_no_torch(smol_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(smol_dir), str(tmp_path / "m.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    cost = json.loads(done.stdout)
    assert cost["megabytes"] < 300  # 106 measured; the weights are 540
    assert not cost["torch"]
    assert done.stderr == ""


def test_a_runtime_left_open_ends_quietly_with_the_process(files: dict[str, Path]) -> None:
    command = [sys.executable, "-c", LEFT_OPEN, str(files["q8_0"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) >= 1
