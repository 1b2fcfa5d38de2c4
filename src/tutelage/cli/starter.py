"""The starter recipe that `tutelage init` writes: the whole pipeline, with comments to edit by."""

from pathlib import Path

from tutelage.core.errors import RecipeError
from tutelage.core.files import write_text

STARTER = """\
# A Tutelage recipe. Look at it with `tutelage plan {name}`, run it with `tutelage run {name}`.
# Every [steps.*] table is a step; the names of other steps in it are its inputs. Steps that are
# finished are never made again, and any value can be tried with --set steps.distilled.lr=2e-5.

name = "{stem}"
seed = 17                       # of every step that does not set its own

[runtime]                       # where and how fast; never part of a result's identity
device = "auto"                 # auto, cpu, cuda, npu or mps

[models.teacher]
source = "bundled:smollm2-135m-instruct"    # or a Hub id "Qwen/Qwen3-8B", or a directory

# The teacher may run elsewhere: in vLLM, or behind a server (docs/engines.md).
# [engines.teacher]
# kind = "server"
# url = "http://gpu-box:8000"

[models.student]                # must share the teacher's tokenizer
source = "bundled:smollm2-135m-instruct"
drop_layers = 8                 # depth-pruned start; leave out for a model that is small already

# Prompts. Yours: sources = [{{ source = "my.jsonl", columns = {{ prompt = "question" }} }}]
# A file has one object a line, with "messages" or "prompt" (and "response", "thinking").
[steps.prompts]
stage = "data"
sources = [{{ source = "bundled:prompts" }}]
part = "train"                  # the other side of the split is "holdout"
holdout_share = 0.1
limit = 64

[steps.held-out]
stage = "data"
sources = [{{ source = "bundled:prompts" }}]
part = "holdout"
holdout_share = 0.1
limit = 16

# The teacher answers in both modes. Answers of your own are a data step, too.
[steps.reasoning-answers]
stage = "synthesize"
teacher = "teacher"
prompts = "prompts"
mode = "reasoning"
elicit = "Think about it step by step first."   # drop it for a teacher that thinks by itself
max_think_tokens = 64
max_tokens = 64

[steps.fast-answers]
stage = "synthesize"
teacher = "teacher"
prompts = "prompts"
mode = "fast"
max_tokens = 64

# The curriculum: reasoning first, then fast answers with some reasoning replayed.
[steps.sft-reasoning]
stage = "sft"
model = "student"
data = "reasoning-answers"
lr = 2e-4                       # for a pruned model; 1e-5 for a healthy one
batch_tokens = 1024
pack_tokens = 512

[steps.sft-fast]
stage = "sft"
model = "sft-reasoning"
data = ["fast-answers", "reasoning-answers"]
mixture = [0.8, 0.2]
lr = 2e-4
batch_tokens = 1024
pack_tokens = 512

# The student answers once, the teacher reads those answers once, the student trains from disk.
[steps.rollouts]
stage = "rollout"
model = "sft-fast"
prompts = "prompts"
mode = "fast"
max_tokens = 64

[steps.targets]
stage = "score"
teacher = "teacher"
rollouts = "rollouts"
tau = 0.02                      # smaller keeps more of the teacher, and more bytes

[steps.distilled]
stage = "distill"
model = "sft-fast"
targets = "targets"
divergence = "forward_kl"       # forward_kl, reverse_kl, jsd, skew or policy_gradient
lam = 0.9                       # weight of distillation against cross-entropy
lr = 2e-4
batch_tokens = 1024
pack_tokens = 512

[steps.scores]
stage = "evaluate"
models = ["student", "sft-reasoning", "sft-fast", "distilled"]
teacher = "teacher"
prompts = "held-out"
max_tokens = 64

[steps.edge]
stage = "export"
model = "distilled"
prompts = "held-out"
formats = ["f16", "q8_0"]

[steps.page]
stage = "report"
title = "{stem}"
steps = ["scores", "edge"]
"""


def write_starter(path: Path, *, force: bool) -> None:
    """Write the starter recipe. Raises RecipeError when the file is there already."""
    if path.exists() and not force:
        raise RecipeError(f"{path} is there already; take another name, or --force to replace it")
    stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in path.stem).strip("._-")
    write_text(path, STARTER.format(name=path, stem=stem or "recipe"))
