"""A tokenizer: as files, and as a codec for pieces of a text.

Owns `tokenizer.json` and the rules by which text becomes ids and back. Knows nothing of messages
(`chat.py`) or models. Only `load_tokenizer` imports transformers, which takes seconds; `tutelage
plan` needs digests in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "tokenizer.json"


@dataclass(frozen=True)
class TextCodec:
    """Text to ids and back, for texts that are put together from pieces.

    A text comes as the pieces it is to be cut into: no token spans two of them.
    """

    tokenizer: PreTrainedTokenizerBase
    added_ids: Mapping[str, int]  # of every added token, special or not
    control: re.Pattern[str]  # finds the first character of each control token in a text
    is_positional: bool  # whether a text has other ids at a start than behind other text

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, control_text: str) -> TextCodec:
        """Control tokens are the special ones and any other added token found in `control_text`.

        All else that was added (such as Gemma's runs of spaces) is ordinary vocabulary.
        """
        added = tokenizer.added_tokens_decoder
        control = [
            token.content
            for token in added.values()
            if token.content.strip() and (token.special or token.content in control_text)
        ]

        def ids(text: str) -> list[int]:
            return _encode(tokenizer, text)

        return cls(
            tokenizer=tokenizer,
            added_ids={token.content: i for i, token in added.items()},
            control=_first_character_of(control),
            is_positional=ids("\na") != ids("\n") + ids("a"),
        )

    @property
    def name(self) -> str:
        """What to call the tokenizer in a message."""
        return self.tokenizer.name_or_path or type(self.tokenizer).__name__

    def defused(self, text: str, cut: str) -> str:
        """The text with `cut` inside each control token that is spelled out in it."""
        return self.control.sub(lambda found: found[0] + cut, text)

    def encode(self, pieces: Sequence[str]) -> list[int]:
        """Ids of a text; control tokens are parsed, and nothing (BOS, EOS) is added."""
        return _encode(self.tokenizer, pieces[0]) + self.encode_after_text(pieces[1:])

    def encode_after_text(self, pieces: Sequence[str]) -> list[int]:
        """Ids of a text that follows another, such as a response: its prompt ends on a newline.

        SentencePiece begins a text with a space that nobody wrote, so each piece is encoded behind
        a newline (or a letter, where the newline would become one token with it), which is then
        dropped.
        """
        return [i for piece in pieces for i in self._encode_one_after_text(piece)]

    def _encode_one_after_text(self, piece: str) -> list[int]:
        for lead in ("\n", "a") if self.is_positional else ():
            lead_ids = _encode(self.tokenizer, lead)
            ids = _encode(self.tokenizer, lead + piece)
            if ids[: len(lead_ids)] == lead_ids:
                return ids[len(lead_ids) :]
        return _encode(self.tokenizer, piece)

    def decode_after_text(self, ids: Sequence[int]) -> str:
        """Text of ids from `encode_after_text`: decoded as a start, it would lose a first space."""
        lead_ids = _encode(self.tokenizer, "\n") if self.is_positional else []
        lead, text = (
            str(self.tokenizer.decode(all_ids, clean_up_tokenization_spaces=False))
            for all_ids in (lead_ids, [*lead_ids, *ids])
        )
        return text.removeprefix(lead)


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The Hugging Face tokenizer in a model directory; runs no code from it and asks no network.

    Raises: ModelError where the directory holds no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    if not Path(directory).is_dir():
        raise ModelError(f"no tokenizer at {directory}: there is no such directory")
    try:
        return AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers raises a dozen kinds, down to bare Exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"no tokenizer can be loaded from {directory}: {reason}") from error


def tokenizer_digest(directory: str | Path) -> str:
    """sha256 (hex) of what gives ids their meaning: vocabulary, merges and added tokens.

    Neither formatting, nor the order of keys, nor the two spellings of a merge ("a b", ["a", "b"])
    change it. Normalizer and splitting rules are left out: they decide which ids a text gets, not
    what an id means. 49,152 tokens take about 0.1 s.

    Raises: ModelError where `tokenizer.json` is missing or is not one.
    """
    spec = _read(directory)
    model = spec["model"]
    pairs = (
        merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ())
    )
    canonical = [
        model.get("type"),
        *_vocabulary(model),
        list(chain.from_iterable(pairs)),
        sorted([token["id"], token["content"], token["special"]] for token in spec["added_tokens"]),
    ]
    text = json.dumps(canonical, separators=(",", ":"))  # ASCII: hashes alike everywhere
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def vocab_size(directory: str | Path) -> int:
    """Number of ids, added tokens included: the highest plus one. Embeddings may be padded beyond.

    Raises: ModelError as `tokenizer_digest`.
    """
    spec = _read(directory)
    vocab = spec["model"]["vocab"]
    ids: Iterable[int] = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    return 1 + max((*ids, *(token["id"] for token in spec["added_tokens"])), default=-1)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)


def _first_character_of(tokens: Sequence[str]) -> re.Pattern[str]:
    # A character is looked up in a set before any token is tried: Gemma has 6,400 added tokens.
    # A token of one character cannot be cut, and no chat format has one.
    tokens = [token for token in tokens if len(token) > 1]
    if not tokens:
        return re.compile("(?!)")
    firsts = "".join(re.escape(character) for character in sorted({token[0] for token in tokens}))
    return re.compile(f"(?=[{firsts}])(?={'|'.join(map(re.escape, tokens))}).", re.DOTALL)


def _vocabulary(model: dict[str, Any]) -> tuple[list[Any], list[int]]:
    """(Tokens by id, their ids); a Unigram model lists [piece, score] by id, so no ids there."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        return sorted(vocab, key=vocab.__getitem__), sorted(vocab.values())
    return vocab, []


def _read(directory: str | Path) -> dict[str, Any]:
    path = Path(directory) / FILE
    try:
        spec = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(
            f"no {FILE} in {directory}: save the tokenizer there with save_pretrained"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}; fetch it again") from error
    if not (isinstance(spec, dict) and "vocab" in (spec.get("model") or {})):
        raise ModelError(f"{path} is not a tokenizer: it holds no vocabulary")
    return {**spec, "added_tokens": spec.get("added_tokens") or []}
