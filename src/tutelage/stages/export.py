"""Stage `export`: GGUF files, each compared with the evaluated model and run before it counts."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import ExportError
from tutelage.core.files import write_json
from tutelage.export.gguf import GgufMetadata, tensor_bytes, write_gguf
from tutelage.export.parity import weights_parity
from tutelage.export.runtime import EdgeRuntime
from tutelage.models.load import Loaded, load_for_inference
from tutelage.recipe.tables import Export
from tutelage.records import prompt_messages, read_rows
from tutelage.text.chat import ChatFormat, exported_template


def run(config: Export, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, float]:
    """Write, compare and run each format; `export.json` tells what was seen.

    Raises ExportError when a file is further than `max_kl` from the model, or does not run.
    """
    prompts = list(read_rows(inputs["prompts"].shards()))[: config.questions]
    loaded = load_for_inference(inputs["model"], device=work.device)
    chat = ChatFormat.from_tokenizer(loaded.tokenizer)
    metadata = GgufMetadata(
        name=f"tutelage-{inputs['model'].fingerprint[:12]}", licence="",
        provenance={"artifact": inputs["model"].fingerprint},
    )  # fmt: skip
    begun, entries = time.monotonic(), []
    for kind in config.formats:
        started = time.monotonic()
        path = work.path / f"{kind}.gguf"
        with work.reporter.bar(
            tensor_bytes(loaded.directory, kind=kind), f"writing {kind}", unit="bytes"
        ) as bar:
            info = write_gguf(
                loaded.directory, path, kind=kind, metadata=metadata, on_bytes=bar.advance,
                chat_template=exported_template(chat.template),
            )  # fmt: skip
        seconds = round(time.monotonic() - started, 2)
        entry = _checked(config, loaded, chat, path, prompts)
        entries.append(
            {
                "format": kind, "file": path.name, "bytes": info.bytes, "seconds": seconds,
                "fallbacks": list(info.fallbacks), "warnings": list(info.warnings), **entry,
            }
        )  # fmt: skip
        work.reporter.say(
            f"  {kind}: {info.bytes / 1e6:,.0f} MB, KL to the model {entry['kl']['mean']:.2g} "
            f"nats, {entry['tokens_per_second']:,.0f} tokens/s in llama.cpp"
        )
        for answer in entry["answers"][:1]:
            work.reporter.say(f"    Q: {_line(answer['prompt'])}\n    A: {_line(answer['answer'])}")
        _gate(config, kind, entry["kl"]["mean"])
    model_bytes = sum(p.stat().st_size for p in loaded.directory.glob("*.safetensors"))
    write_json(work.path / "export.json", {"files": entries, "model_bytes": model_bytes})
    decoded = sum(answer["tokens"] for entry in entries for answer in entry["answers"])
    work.commit("export", seconds=time.monotonic() - begun, tokens={"student_decoded": decoded})
    return {f"kl.{entry['format']}": entry["kl"]["mean"] for entry in entries}


def _checked(
    config: Export, loaded: Loaded, chat: ChatFormat, path: Path,
    prompts: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """What the file's weights and its runtime do: KL, agreement, first answers, speed."""
    answers, speeds, sequences = [], [], []
    with EdgeRuntime(path) as runtime:
        for row in prompts:
            messages = prompt_messages(row)
            done = runtime.chat(messages, max_tokens=config.max_tokens)
            _, text = chat.decode_response(done.token_ids, "fast")
            answers.append(
                {"prompt": messages[-1]["content"], "answer": text, "tokens": len(done.token_ids)}
            )
            speeds.append(done.tokens_per_second)
            sequences.append([*chat.prompt_ids(messages, "fast"), *done.token_ids])
    parity = weights_parity(loaded.model, path, sequences)
    return {
        "kl": {"mean": parity.mean_forward_kl, "p99": parity.p99_forward_kl},
        "agreement": parity.argmax_agreement,
        "positions": parity.num_tokens,
        "tokens_per_second": sorted(speeds)[len(speeds) // 2],
        "answers": answers,
    }


def _gate(config: Export, kind: str, kl: float) -> None:
    if config.max_kl and kl > config.max_kl:
        raise ExportError(
            f"{kind} is {kl:.3g} nats a token from the model, over max_kl = {config.max_kl}; "
            "take a wider format or raise max_kl"
        )


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 110 else line[:107] + "..."
