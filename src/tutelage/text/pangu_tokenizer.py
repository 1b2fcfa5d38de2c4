"""openPangu's tokenizer without its code: from `tokenizer.model` to a `tokenizer.json`.

The published class (tokenization_openpangu.PanguTokenizer) cuts a text at its special tokens and
gives the rest to SentencePiece. The same is built here of the parts of `tokenizers`. Three things
of it are not as in Llama's tokenizer: nothing is put before a text (the file says so), many ASCII
characters exist as byte pieces only though longer pieces hold them, and special tokens stand in the
middle of the ids. Tokens are the same; `tests/unit/test_pangu.py` holds ids of the library itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.core.errors import ModelError
from tutelage.core.files import write_json
from tutelage.text.sentencepiece import BYTE, NORMAL, USER_DEFINED, PieceModel, read_pieces

SPACE = "\u2581"
PIECES_FILE = "tokenizer.model"
SETTINGS_FILE = "tokenizer_config.json"
UNREACHABLE = 0.001
"""Share of the pieces that may stay unused, as they hold a character outside ASCII that is no piece
itself: such a character is three bytes at once here, and SentencePiece still merges it."""
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def write_tokenizer(source: Path, directory: Path, *, max_length: int) -> None:
    """Write the tokenizer of an openPangu checkpoint as files that need no code.

    Its template gets the BOS that the published examples put before it by another way.
    Raises ModelError when a file is missing, damaged, or of another kind.
    """
    from transformers import PreTrainedTokenizerFast

    settings = read_settings(source)
    texts = {role: _text(settings[role]) for role in ROLES if settings.get(role)}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_build(read_pieces(source / PIECES_FILE), settings, texts),
        **texts, chat_template=_template(source, settings, texts), model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.save_pretrained(directory)
    path = directory / SETTINGS_FILE
    # A name that every version of transformers has.
    named = read_settings(directory) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(path, {key: value for key, value in named.items() if key != "is_local"})


def read_settings(source: Path) -> dict[str, Any]:
    """`tokenizer_config.json`. Raises ModelError when it is missing or damaged."""
    path = source / SETTINGS_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}; fetch it again") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path} is not a JSON object; fetch it again")
    return settings


def _build(model: PieceModel, settings: Mapping[str, Any], texts: Mapping[str, str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, models, processors

    special = _special(settings)
    tokens = _tokens(model, special)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ModelError(f"{PIECES_FILE} holds a piece twice; fetch it again")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab, merges=_merges(model, vocab), unk_token=texts.get("unk_token"),
            fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    tokenizer.normalizer = _normalizer(model)
    tokenizer.decoder = _decoder(model)
    tokenizer.add_special_tokens(
        [AddedToken(special[i], normalized=False) for i in sorted(special)]
    )
    # Found before anything is merged. With a prefix they may not cut the text before it is put.
    tokenizer.add_tokens(
        [
            AddedToken(piece.text, normalized=not model.add_dummy_prefix, special=False)
            for i, piece in enumerate(model.pieces)
            if piece.kind == USER_DEFINED and i not in special
        ]
    )
    bos = texts.get("bos_token")
    if bos and settings.get("add_bos_token", True) in (True, "true", "True"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocab[bos])]
        )
    return tokenizer


def _special(settings: Mapping[str, Any]) -> dict[int, str]:
    added = settings.get("added_tokens_decoder") or {}
    return {int(i): _text(token) for i, token in added.items()}


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _tokens(model: PieceModel, special: Mapping[int, str]) -> list[str]:
    """Token of each id. An ASCII byte piece becomes its character where no other piece is it.

    SentencePiece merges characters whether or not they are pieces, and only what is left over falls
    back to bytes. BPE here merges tokens only, so the characters must be tokens: of the same id.
    """
    texts = {piece.text for piece in model.pieces if piece.kind != BYTE}
    tokens = []
    for piece in model.pieces:
        code = int(piece.text[3:5], 16) if piece.kind == BYTE else 128
        character = SPACE if code == 32 else chr(code)
        tokens.append(character if code < 128 and character not in texts else piece.text)
    tokens += [f"[gap{i}]" for i in range(len(tokens), 1 + max(special, default=-1))]
    for i, token in special.items():
        tokens[i] = token
    return tokens


def _merges(model: PieceModel, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together of two others, the piece of the best score first."""
    usable = {piece.text for piece in model.pieces if piece.kind == NORMAL and piece.text in vocab}
    parts = usable | {token for token in vocab if len(token) == 1}
    lost = [text for text in usable if not parts.issuperset(text)]
    if len(lost) > UNREACHABLE * len(usable):
        raise ModelError(
            f"{len(lost)} pieces of {PIECES_FILE} hold characters that are no pieces, such as "
            f"{lost[0]!r}: tokenizer.json has no form for that"
        )
    ordered = sorted(usable, key=lambda text: (-model.pieces[vocab[text]].score, vocab[text]))
    return [
        (text[:cut], text[cut:])
        for text in ordered
        for cut in range(1, len(text))
        if text[:cut] in parts and text[cut:] in parts
    ]


def _normalizer(model: PieceModel) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if model.character_map:
        steps.append(normalizers.Precompiled(model.character_map))
    if model.removes_extra_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(model: PieceModel) -> Any:
    from tokenizers import decoders

    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _template(source: Path, settings: Mapping[str, Any], texts: Mapping[str, str]) -> str | None:
    """The chat template, which writes the BOS itself.

    The published examples render without it and encode with it; here the template alone decides.
    """
    path = source / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.exists() else settings.get("chat_template")
    bos = texts.get("bos_token")
    if not isinstance(template, str) or not bos or "bos_token" in template or bos in template:
        return template if isinstance(template, str) else None
    return "{{ bos_token }}" + template
