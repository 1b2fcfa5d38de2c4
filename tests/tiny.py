"""A real but tiny language model and a recipe over it, for tests of the whole pipeline."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = ["How do plants drink water through their roots?", "Write <think> and </think> around it."]


def write_model(folder: Path, *, layers: int = 3, seed: int = 0, vocab: int = 320) -> Path:
    """A random Llama of d 32 with a byte-level tokenizer of `vocab` ids and a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT * vocab, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>",
        chat_template=CHATML,
    )  # fmt: skip
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True,
    )  # fmt: skip
    ids = fast.get_vocab()
    config.bos_token_id, config.eos_token_id = ids["<|im_start|>"], ids["<|im_end|>"]
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


RECIPE = """
name = "tiny"
seed = 3
[models.teacher]
source = "{teacher}"
[models.student]
source = "{teacher}"
drop_layers = 1
[steps.prompts]
stage = "data"
sources = [{{ source = "bundled:prompts", limit = 60 }}]
part = "train"
limit = 8
[steps.held-out]
stage = "data"
sources = [{{ source = "bundled:prompts" }}]
part = "holdout"
limit = 4
[steps.reasoning-answers]
stage = "synthesize"
teacher = "teacher"
prompts = "prompts"
mode = "reasoning"
max_think_tokens = 6
max_tokens = 6
shard_rows = 4
[steps.fast-answers]
stage = "synthesize"
teacher = "teacher"
prompts = "prompts"
mode = "fast"
max_tokens = 8
shard_rows = 4
[steps.sft-reasoning]
stage = "sft"
model = "student"
data = "reasoning-answers"
lr = 1e-3
batch_tokens = 256
pack_tokens = 256
checkpoint_minutes = 0
[steps.sft-fast]
stage = "sft"
model = "sft-reasoning"
data = ["fast-answers", "reasoning-answers"]
mixture = [0.8, 0.2]
lr = 1e-3
batch_tokens = 256
pack_tokens = 256
checkpoint_minutes = 0
[steps.rollouts]
stage = "rollout"
model = "sft-fast"
prompts = "prompts"
mode = "fast"
max_tokens = 8
shard_rows = 4
[steps.targets]
stage = "score"
teacher = "teacher"
rollouts = "rollouts"
tau = 0.02
shard_rows = 4
[steps.distilled]
stage = "distill"
model = "sft-fast"
targets = "targets"
lr = 1e-3
batch_tokens = 256
pack_tokens = 256
checkpoint_minutes = 0
[steps.scores]
stage = "evaluate"
models = ["student", "sft-fast", "distilled"]
teacher = "teacher"
prompts = "held-out"
max_tokens = 6
bootstrap = 50
[steps.page]
stage = "report"
steps = ["scores"]
"""


def write_recipe(folder: Path) -> Path:
    """The tiny model and its recipe in `folder`; returns the recipe's path."""
    teacher = write_model(folder / "teacher")
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(teacher=teacher))
    return path
