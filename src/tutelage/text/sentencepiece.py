"""The pieces of a SentencePiece `tokenizer.model`, read without its library.

Owns the few fields of that protobuf message that decide how text becomes pieces. Models with a
tokenizer of their own code (openPangu) ship this file and no `tokenizer.json`.
Source: sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.core.errors import ModelError

# Field numbers of the message and of its parts.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_KIND = 1, 2, 3
TRAINER_MODEL_TYPE = 3
CHARACTER_MAP, DUMMY_PREFIX, EXTRA_SPACES = 2, 3, 4  # of the normalizer
BPE = 2  # TrainerSpec.ModelType; 1 is the default, unigram
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of piece
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf wire types


@dataclass(frozen=True)
class Piece:
    """One piece; `kind` is 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class PieceModel:
    """All pieces by id, and what is done to text before it is cut."""

    pieces: tuple[Piece, ...]
    add_dummy_prefix: bool
    """Whether text gets a space in front."""
    removes_extra_spaces: bool
    """Whether runs of spaces become one, and those at either end none."""
    character_map: bytes
    """Precompiled replacements of characters; empty for none."""


def read_pieces(path: Path) -> PieceModel:
    """Read a BPE `tokenizer.model`. GGUF's token types have the same numbers as its kinds of piece.

    Raises:
        ModelError: the file is missing, cut short, or not a BPE model.
    """
    pieces: list[Piece] = []
    model_type = 1
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(path.read_bytes()):
            if not isinstance(value, bytes):
                continue
            known = number in (PIECES, TRAINER, NORMALIZER)
            part: dict[int, Any] = dict(_fields(value)) if known else {}
            if number == PIECES:
                text, score = part[PIECE_TEXT], part.get(PIECE_SCORE, b"\0\0\0\0")
                kind = part.get(PIECE_KIND, NORMAL)
                pieces.append(Piece(text.decode("utf-8"), struct.unpack("<f", score)[0], kind))
            elif number == TRAINER:
                model_type = part.get(TRAINER_MODEL_TYPE, 1)
            elif number == NORMALIZER:
                normalizer = part
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}; fetch it again") from error
    except (IndexError, KeyError, ValueError, AttributeError, TypeError, struct.error) as error:
        raise ModelError(f"{path} is no SentencePiece model, or is cut short") from error
    if model_type != BPE:
        raise ModelError(f"{path}: only a BPE SentencePiece model can be taken over")
    return PieceModel(
        tuple(pieces),
        add_dummy_prefix=bool(normalizer.get(DUMMY_PREFIX, 1)),
        removes_extra_spaces=bool(normalizer.get(EXTRA_SPACES, 1)),
        character_map=bytes(normalizer.get(CHARACTER_MAP, b"")),
    )


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message, in order; fixed-width numbers stay bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(wire)
        if wire == BYTES:
            size, position = _varint(message, position)
        if size is None or position + size > len(message):
            raise ValueError(f"wire type {wire} at byte {position}")
        yield number, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A little-endian base-128 number and the position after it."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position += 1
        shift += 7
        if byte < 0x80:
            return value, position
