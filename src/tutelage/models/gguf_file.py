"""Reading a GGUF file as a transformers model and tokenizer, in plain floating point.

transformers does the work; what it leaves wrong is mended here, in one place.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tutelage.core.errors import ModelError
from tutelage.models.inspect import GgufHeader

DIGIT_SPLITTERS = frozenset({"smollm"})
"""GGUF pre-tokenizers that cut every digit off before the GPT-2 rule."""
GPT2_SPLITTERS = frozenset({"gpt-2"})


def read_gguf_model(path: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a GGUF file, dequantised to `dtype`, free of any mark of the quantisation.

    Raises ModelError when the file cannot be read or transformers does not know its architecture.
    """
    GgufHeader.read(path)  # for its clear errors
    try:
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ModelError(f"{path} cannot be read as a language model: {one_line(error)}") from error
    config = read.config
    # A model that came from GGUF refuses to be saved, even in fp32, while the first mark is on it;
    # the second is the title inside the file, which would stand in config.json as if a path.
    for mark in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, mark):
            delattr(config, mark)
    model = type(read)(config).to(dtype=dtype)  # type: ignore[arg-type]
    # Not `assign`: a tied head must stay the same tensor as the embedding.
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model.eval()


def read_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer and chat template of a GGUF file, splitting text as llama.cpp does.

    Raises ModelError when the file's pre-tokenizer has no known form here: a wrong one would give
    ids the model was not trained on, without any sign of it.
    """
    header = GgufHeader.read(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ModelError(f"{path} has no readable tokenizer: {one_line(error)}") from error
    tokenizer.model_max_length = header.whole("context_length")
    _mend_pre_tokenizer(tokenizer.backend_tokenizer, header)
    return tokenizer


def _mend_pre_tokenizer(backend: Tokenizer, header: GgufHeader) -> None:
    """Give the tokenizer the text splitter the file names.

    transformers 5.23 falls back to the GPT-2 rule on a name it does not know. For `smollm` that
    turned 8 of 15 probe texts ("\\n\\n1.", "  12", "x²") into other ids than llama.cpp's, which
    agree with the digit splitter on all 15.
    """
    if header.value("tokenizer.ggml.model") != "gpt2" or not _is_plain_gpt2(backend):
        return
    name = header.value("tokenizer.ggml.pre")
    if name in GPT2_SPLITTERS:
        return
    if name not in DIGIT_SPLITTERS:
        raise ModelError(
            f"{header.path} splits text by the rule {name!r}, which is not known here; "
            "use the model's original Hugging Face directory instead"
        )
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _is_plain_gpt2(backend: Tokenizer) -> bool:
    pre = backend.pre_tokenizer
    return isinstance(pre, pre_tokenizers.ByteLevel) and bool(pre.use_regex)


def one_line(error: BaseException) -> str:
    """The first line of an error's text, for a message that must stay on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
