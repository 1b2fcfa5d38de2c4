"""Tokenizer files: loading, digests and sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tutelage.core.errors import ModelError
from tutelage.text.tokenizer import TextCodec, load_tokenizer, tokenizer_digest, vocab_size


@pytest.fixture
def spec() -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the thing that thinks, thinks"] * 3, trainer)
    tokenizer.add_tokens(["<think>"])
    return json.loads(tokenizer.to_str())


def save(directory: Path, spec: Any, **layout: Any) -> Path:
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(spec, **layout), encoding="utf-8")
    return directory


def respell_merges(spec: dict[str, Any]) -> None:
    merges = spec["model"]["merges"]
    assert isinstance(merges[0], list)
    spec["model"]["merges"] = [" ".join(pair) for pair in merges]


def reorder_keys(spec: dict[str, Any]) -> None:
    spec["model"]["vocab"] = dict(reversed(spec["model"]["vocab"].items()))


def change_splitting(spec: dict[str, Any]) -> None:
    spec["pre_tokenizer"] = None


@pytest.mark.parametrize("change", [respell_merges, reorder_keys, change_splitting])
def test_a_digest_ignores_what_gives_ids_no_meaning(
    tmp_path: Path, spec: dict[str, Any], change: Callable[[dict[str, Any]], None]
) -> None:
    before = tokenizer_digest(save(tmp_path / "a", spec))
    change(spec)
    assert tokenizer_digest(save(tmp_path / "b", spec, indent=2)) == before


def swap_two_ids(spec: dict[str, Any]) -> None:
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def drop_a_merge(spec: dict[str, Any]) -> None:
    spec["model"]["merges"].pop()


def rename_an_added_token(spec: dict[str, Any]) -> None:
    spec["added_tokens"][-1]["content"] = "<thought>"


def make_an_added_token_special(spec: dict[str, Any]) -> None:
    spec["added_tokens"][-1]["special"] = True


def leave_a_hole_in_the_ids(spec: dict[str, Any]) -> None:
    vocab = spec["model"]["vocab"]
    vocab[max(vocab, key=vocab.__getitem__)] += 1


@pytest.mark.parametrize(
    "change",
    [
        swap_two_ids,
        drop_a_merge,
        rename_an_added_token,
        make_an_added_token_special,
        leave_a_hole_in_the_ids,
    ],
)
def test_a_digest_follows_every_change_of_meaning(
    tmp_path: Path, spec: dict[str, Any], change: Callable[[dict[str, Any]], None]
) -> None:
    before = tokenizer_digest(save(tmp_path / "a", spec))
    change(spec)
    assert tokenizer_digest(save(tmp_path / "b", spec)) != before


def test_the_size_counts_added_tokens(tmp_path: Path, spec: dict[str, Any]) -> None:
    directory = save(tmp_path / "a", spec)
    assert vocab_size(directory) == len(spec["model"]["vocab"]) + 1
    spec["added_tokens"].pop()
    assert vocab_size(save(tmp_path / "b", spec)) == len(spec["model"]["vocab"])


def test_a_unigram_vocabulary_is_a_list_in_order_of_ids(tmp_path: Path) -> None:
    pieces = [["<unk>", 0.0], ["a", -1.5], ["b", -2.0]]
    spec = {"model": {"type": "Unigram", "vocab": pieces}, "added_tokens": []}
    directory = save(tmp_path / "a", spec)
    assert vocab_size(directory) == 3
    spec["model"] = {"type": "Unigram", "vocab": [pieces[0], pieces[2], pieces[1]]}
    assert tokenizer_digest(save(tmp_path / "b", spec)) != tokenizer_digest(directory)


def test_a_digest_imports_neither_torch_nor_transformers(
    tmp_path: Path, spec: dict[str, Any]
) -> None:
    directory = save(tmp_path / "a", spec)
    code = (
        "import sys; from tutelage.text.tokenizer import tokenizer_digest as d\n"
        "print(d(sys.argv[1]), 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [tokenizer_digest(directory), "False", "False"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no tokenizer.json in"), ("{", "cannot be read"), ("[]", "not a tokenizer")],
)
def test_a_missing_or_broken_file_is_named(
    tmp_path: Path, content: str | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=reason) as error:
        tokenizer_digest(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_directory_without_a_tokenizer_cannot_be_loaded(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="no tokenizer") as error:
        load_tokenizer(tmp_path / name)
    assert "\n" not in str(error.value)


def test_what_was_saved_loads_with_the_same_ids(tmp_path: Path, spec: dict[str, Any]) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="<eos>"
    )
    tokenizer.save_pretrained(tmp_path)
    text = "the <think> thing<eos>"
    assert load_tokenizer(tmp_path).encode(text) == tokenizer.encode(text)
    assert vocab_size(tmp_path) == len(tokenizer)


def test_only_control_tokens_are_cut(spec: dict[str, Any]) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="<eos>"
    )
    tokenizer.add_tokens(["<<eos>", "\n\n\n"])
    codec = TextCodec.of(tokenizer, control_text="a <think> template\n\n\n")
    assert codec.defused("<eos><think>\n\n\n<eo", "|") == "<|eos><|think>\n\n\n<eo"
    codec = TextCodec.of(tokenizer, control_text="<<eos>")
    assert codec.defused("<<eos><think>", "|") == "<|<|eos><think>"
    pieces = codec.defused("a<<eos>b", "|").split("|")
    assert tokenizer.decode(codec.encode(pieces)) == "a<<eos>b"
    assert tokenizer.eos_token_id not in codec.encode(pieces)


def test_smollm2_has_49152_ids(smol_dir: Path) -> None:
    assert vocab_size(smol_dir) == 49_152
    assert len(load_tokenizer(smol_dir)) == 49_152
