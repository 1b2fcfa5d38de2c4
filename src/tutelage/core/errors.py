"""The error tree: what a user can mend, by where it went wrong.

    TutelageError            exit code 2, one line, no traceback
    ├── RecipeError          the recipe or an override is wrong
    ├── DataError            a source, a row or a conversation is wrong
    ├── ArtifactError        the store holds something missing, corrupt or unfit
    ├── ModelError           weights, tokenizer or template are wrong
    ├── EngineError          a sampler, scorer or training step cannot go on
    └── ExportError          an exported file or its runtime is wrong

Anything else that reaches the command line is a bug: it keeps its traceback and exits with 1.
"""


class TutelageError(Exception):
    """A fault the user can mend; the message says what, where and what to do, in one line."""


class RecipeError(TutelageError):
    """A recipe, a `--set` override or a step graph that cannot be."""


class DataError(TutelageError):
    """A source file, row or conversation that cannot be used."""


class ArtifactError(TutelageError):
    """A stored result that is missing, corrupt, or of the wrong kind."""


class ModelError(TutelageError):
    """Weights, a tokenizer or a chat template that cannot be used."""


class EngineError(TutelageError):
    """Generation, scoring or training that cannot go on."""


class ExportError(TutelageError):
    """A file for the edge that cannot be written or does not run."""
