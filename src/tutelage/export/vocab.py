"""A model folder's tokenizer as the vocabulary of a GGUF.

Owns `tokenizer.json` (byte-level BPE, and BPE with byte fallback as Gemma and Llama 2 have it),
special ids and the names of llama.cpp's pre-tokenizers. Knows nothing of weights. The truth is the
file that the model was trained with: a pre-tokenizer is recognised by its structure, never by the
model's name. llama.cpp applies no Unicode normalisation: text that is not NFC may split otherwise
there than under Qwen's tokenizer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from tutelage.core.errors import ExportError
from tutelage.export.sentencepiece import read_pieces

Json = Mapping[str, Any]

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_REGEX = _WORDS + "{1,3}" + _REST
QWEN2_REGEX = _WORDS + _REST

# (steps of the pre-tokenizer, whole words skip the merges) -> llama.cpp's name for that splitting
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    (("bytes+gpt2",), False): "gpt-2",
    (("digits", "bytes+gpt2"), False): "smollm",
    ((f"split {LLAMA3_REGEX}", "bytes"), True): "llama-bpe",
    ((f"split {LLAMA3_REGEX}", "bytes"), False): "smaug-bpe",
    ((f"split {QWEN2_REGEX}", "bytes"), False): "qwen2",
}
SPACE = "▁"  # SentencePiece's visible space
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """What the runtime needs to split and join text.

    Fields:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE with byte fallback).
        special: "bos", "eos", "eot", "unk", "pad" -> id, where known.
        warnings: what may tokenize differently in the runtime, a sentence each.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    warnings: tuple[str, ...]


def read_vocabulary(model_dir: Path, *, size: int) -> Vocabulary:
    """The vocabulary of a model folder, padded with unused tokens to the embedding's `size` rows.

    Raises:
        ExportError: no tokenizer, or a kind GGUF has no place for; more tokens than rows; no eos.
    """
    settings = _read_json(model_dir / "tokenizer_config.json")
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        return _from_sentencepiece(model_dir, settings, size=size)
    content = _read_json(path)
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise ExportError(f"{path}: GGUF export needs a BPE tokenizer, not {model.get('type')}")
    added: list[Json] = content.get("added_tokens") or []
    tokens = _by_id(model["vocab"] | {token["content"]: token["id"] for token in added}, size, path)
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    special = _special_ids(model_dir, settings, ids)
    probe = Tokenizer.from_file(str(path)).encode("a").ids
    flags = (
        probe[:1] == [special.get("bos")],
        len(probe) > 1 and probe[-1:] == [special["eos"]],
    )
    if model.get("byte_fallback"):
        types = _types(tokens, added, unknown=special.get("unk"))
        texts = _spaced(tokens, added)
        scores = _scores(tokens, merges)
        prefix = _adds_space(content)
        return Vocabulary("llama", "default", texts, types, scores, (), special, *flags, prefix, ())
    pre, warnings = _pre_tokenizer(content)
    types = _types(tokens, added, unknown=None)
    joined = tuple(" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges)
    return Vocabulary("gpt2", pre, tokens, types, (), joined, special, *flags, False, warnings)


def fit_to_template(vocabulary: Vocabulary, chat_template: str) -> Vocabulary:
    """Let the runtime add a BOS only where the template writes one as well.

    llama.cpp adds it to whatever a template renders (and drops a second one). In training a chat
    has a BOS only where its template says so.
    """
    number = vocabulary.special.get("bos")
    text = vocabulary.tokens[number] if number is not None else ""
    written = "bos_token" in chat_template or (text and text in chat_template)
    return replace(vocabulary, add_bos=vocabulary.add_bos and bool(written))


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, *, chat_template: str) -> None:
    """The tokenizer's key-value pairs and the chat template."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
    else:
        writer.add_token_merges(vocabulary.merges)
    for kind, number in vocabulary.special.items():
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    writer.add_chat_template(chat_template)


def read_chat_template(model_dir: Path) -> str:
    """The folder's own chat template: `chat_template.jinja`, or the one in `tokenizer_config.json`.

    Raises:
        ExportError: there is none.
    """
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _read_json(model_dir / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several by name, transformers 4
        template = {item["name"]: item["template"] for item in template}.get("default")
    if not template:
        raise ExportError(f"{model_dir} has no chat template: give one, or add chat_template.jinja")
    return template


def _from_sentencepiece(model_dir: Path, settings: Json, *, size: int) -> Vocabulary:
    path = model_dir / "tokenizer.model"
    if not path.is_file():
        raise ExportError(f"{model_dir} has neither tokenizer.json nor tokenizer.model")
    model = read_pieces(path)
    listed: Json = settings.get("added_tokens_decoder") or {}
    added = [{**token, "id": int(number)} for number, token in listed.items()]
    names = {piece.text: number for number, piece in enumerate(model.pieces)}
    tokens = _by_id(names | {token["content"]: token["id"] for token in added}, size, path)
    special = _special_ids(model_dir, settings, {token: i for i, token in enumerate(tokens)})
    types = list(_types(tokens, added, unknown=special.get("unk")))
    scores = [0.0] * size
    for number, piece in enumerate(model.pieces):
        scores[number] = piece.score
        if types[number] == TokenType.NORMAL:
            types[number] = piece.kind
    return Vocabulary(
        "llama", "default", tokens, tuple(types), tuple(scores), (), special,
        settings.get("add_bos_token", True), settings.get("add_eos_token", False),
        settings.get("add_prefix_space", model.add_dummy_prefix), (),
    )  # fmt: skip


def _by_id(ids: Mapping[str, int], size: int, path: Path) -> tuple[str, ...]:
    if ids and max(ids.values()) >= size:
        raise ExportError(
            f"{path} has token id {max(ids.values())}, but the embedding has {size} rows: "
            "resize the embedding to the tokenizer first"
        )
    tokens = [f"[UNUSED_{i}]" for i in range(size)]
    for token, number in ids.items():
        tokens[number] = token
    return tuple(tokens)


def _types(tokens: Sequence[str], added: Sequence[Json], *, unknown: int | None) -> tuple[int, ...]:
    types = [
        TokenType.UNUSED if t == f"[UNUSED_{i}]" else TokenType.NORMAL for i, t in enumerate(tokens)
    ]
    if unknown is not None:  # SentencePiece only: byte-level BPE knows every byte
        types = [
            TokenType.BYTE if BYTE_PIECE.fullmatch(t) else k
            for t, k in zip(tokens, types, strict=True)
        ]
        types[unknown] = TokenType.UNKNOWN
    for token in added:
        if token["id"] != unknown:
            special = token.get("special", False)
            types[token["id"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    return tuple(int(kind) for kind in types)


def _spaced(tokens: Sequence[str], added: Sequence[Json]) -> tuple[str, ...]:
    """Added tokens that are matched after normalisation, as the raw text that leads to them."""
    texts = list(tokens)
    for token in added:
        if token.get("normalized") and not token.get("special"):
            texts[token["id"]] = token["content"].replace(SPACE, " ")
    return tuple(texts)


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> tuple[float, ...]:
    """SentencePiece joins the highest score first: here minus the rank of a token's first merge."""
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    return tuple(-float(rank.get(token, len(merges))) for token in tokens)


def _adds_space(content: Json) -> bool:
    steps = _steps(content.get("normalizer"), "normalizers")
    steps += _steps(content.get("pre_tokenizer"), "pretokenizers")
    return any(
        step["type"] == "Prepend" or step.get("prepend_scheme") in ("always", "first")
        for step in steps
    )


def _pre_tokenizer(content: Json) -> tuple[str, tuple[str, ...]]:
    steps = tuple(_describe(step) for step in _steps(content.get("pre_tokenizer"), "pretokenizers"))
    known = PRE_TOKENIZERS.get((steps, bool(content["model"].get("ignore_merges"))))
    if known:
        return known, ()
    return "default", (
        f"unknown pre-tokenizer ({'; '.join(steps) or 'none'}): the runtime will use its default, "
        "and may split text otherwise than in training",
    )


def _steps(node: Json | None, children: str) -> list[Json]:
    if not node:
        return []
    return list(node[children]) if node["type"] == "Sequence" else [node]


def _describe(step: Json) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            return "bytes+gpt2" if regex else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {
            "type": "Split",
            "pattern": {"Regex": regex},
            "behavior": "Isolated",
            "invert": False,
        }:
            return f"split {regex}"
    return json.dumps(step, ensure_ascii=False)


def _special_ids(model_dir: Path, settings: Json, ids: Mapping[str, int]) -> dict[str, int]:
    """Ids by role: the tokenizer's own, then the model's. `eot` is a second end of an answer."""
    config = _read_json(model_dir / "config.json")
    special: dict[str, int] = {}
    for kind in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{kind}_token")
        text = token["content"] if isinstance(token, Mapping) else token
        number = ids.get(text) if text else config.get(f"{kind}_token_id")
        if isinstance(number, list):
            number = number[0]
        if number is not None:
            special[kind] = number
    if "eos" not in special:
        raise ExportError(f"{model_dir} names no eos_token: the runtime would never stop")
    ends = _read_json(model_dir / "generation_config.json").get("eos_token_id")
    others = [end for end in ends if end != special["eos"]] if isinstance(ends, list) else []
    return special | ({"eot": others[0]} if others else {})


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
