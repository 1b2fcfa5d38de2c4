"""The pieces of a SentencePiece `tokenizer.model`, with the errors of an export."""

from pathlib import Path

from tutelage.core.errors import ExportError, ModelError
from tutelage.text import sentencepiece
from tutelage.text.sentencepiece import PieceModel


def read_pieces(path: Path) -> PieceModel:
    """As `text.sentencepiece.read_pieces`. Raises ExportError where it raises ModelError."""
    try:
        return sentencepiece.read_pieces(path)
    except ModelError as error:
        raise ExportError(f"GGUF export: {error}") from error
