r"""A tokenizer of its own for a new model: trained on text, as few ids as its data asks for.

Owns the kinds (`characters`, `words`, `bpe`), the tokens every one of them has and their chat
template. What a conversation becomes is `chat.py`'s affair; that the markers of a fast answer,
`<think>\n\n</think>\n\n`, cost four tokens is seen to here. The same text gives the same bytes.
"""

import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tutelage.core.errors import DataError, RecipeError
from tutelage.core.files import write_json
from tutelage.text.markers import END_THINK, THINK
from tutelage.text.tokenizer import FILE

Kind = Literal["characters", "words", "bpe"]

END, PAD, UNKNOWN = "<|end|>", "<|pad|>", "<unk>"
SPECIAL = (END, PAD, "<|system|>", "<|user|>", "<|assistant|>")
MARKERS = (THINK, END_THINK, "\n\n")
"""Added, but not special: text that is to be seen when an answer is decoded."""
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""One token opens a turn and one ends an answer: no BOS, no newline, nothing to learn by heart."""

CHARACTER = r"[\s\S]"
WORD = rf" ?[\p{{L}}\p{{M}}]{{1,32}}|\p{{N}}{{1,32}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]|{CHARACTER}"
"""A word or a sign takes the space before it along; a number never does, so that 7 is one id
wherever it stands. Longer runs are cut: the search for known parts is quadratic in their length."""
FILLERS = string.digits + " " + string.ascii_letters + string.punctuation
"""What fills the room that the data leaves, in this order: prompts may hold what the data lacks."""
BYTES = 256
MIN_FREQUENCY = 2
"""A pair seen once is no rule: merging it would learn the data's words by heart."""


def texts_of(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Everything said or thought in rows of conversations."""
    for row in rows:
        for message in row["messages"]:
            yield from (text for text in (message["content"], message["thinking"]) if text)


def train_tokenizer(texts: Iterable[str], *, kind: Kind, vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` ids that decodes every text of the data to itself.

    - `characters`: one id a character of the data, then digits and ASCII while there is room.
    - `words`: one id a word, sign or number, the most frequent first; any other falls apart into
      the longest parts that are known, down to its characters.
    - `bpe`: byte pairs (GPT-2's splitting), so no text is unknown to it.

    In the first two a character that neither the data nor ASCII holds is `<unk>`; in `words` it
    takes its word with it. Raises RecipeError where `vocab_size` has no room for every character
    or byte, DataError where there is no text.
    """
    room = vocab_size - len(SPECIAL) - len(MARKERS)
    tokenizer = _TRAINERS[kind](_checked(texts), room)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKERS])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json`, chat template included, for transformers."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / FILE))
    unknown = {"unk_token": UNKNOWN} if tokenizer.token_to_id(UNKNOWN) is not None else {}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD,
        **unknown, "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE,
    }  # fmt: skip
    write_json(directory / "tokenizer_config.json", settings)


def _characters(texts: Iterable[str], room: int) -> Tokenizer:
    seen = {character for text in texts for character in text}
    known = _known_characters(seen, room)
    vocabulary = _numbered([UNKNOWN, *known, *FILLERS], room)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    return _split_by(tokenizer, CHARACTER)


def _words(texts: Iterable[str], room: int) -> Tokenizer:
    splitter = pre_tokenizers.Split(Regex(WORD), "isolated")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    known = _known_characters({character for word in counts for character in word}, room)
    words = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = _numbered([UNKNOWN, *known, *string.digits, *words, *FILLERS], room)
    # WordPiece without its "##": the word where it is known, else its longest known parts
    model = models.WordPiece(vocabulary, unk_token=UNKNOWN, continuing_subword_prefix="")
    return _split_by(Tokenizer(model), WORD)


def _bpe(texts: Iterable[str], room: int) -> Tokenizer:
    _check_room(BYTES, room, "every byte")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=room, min_frequency=MIN_FREQUENCY, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


_TRAINERS: Mapping[Kind, Callable[[Iterable[str], int], Tokenizer]] = {
    "characters": _characters, "words": _words, "bpe": _bpe,
}  # fmt: skip


def _checked(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = False
        yield text
    if empty:
        raise DataError("there is no text to train a tokenizer on: every message is empty")


def _known_characters(seen: set[str], room: int) -> list[str]:
    """What there must be an id for; the newline is one of the markers of a reasoning answer."""
    known = sorted({*seen, "\n"})
    _check_room(1 + len(known), room, f"the data's {len(known)} characters")
    return known


def _check_room(needed: int, room: int, what: str) -> None:
    if needed > room:
        others = len(SPECIAL) + len(MARKERS)
        raise RecipeError(
            f"vocab_size = {room + others} has no room for {what} and the tokens of the chat "
            f"format: give it {needed + others} or more"
        )


def _numbered(tokens: Iterable[str], room: int) -> dict[str, int]:
    return {token: i for i, token in enumerate([*dict.fromkeys(tokens)][:room])}


def _split_by(tokenizer: Tokenizer, pattern: str) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return tokenizer
