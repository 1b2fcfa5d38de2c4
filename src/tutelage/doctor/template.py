"""Chat templates: there is one, it does what it should, and both models have the same."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from tutelage.core.errors import ModelError
from tutelage.doctor.case import Case
from tutelage.doctor.findings import Finding, against, ok, unchecked, warn
from tutelage.text.chat import ChatFormat, exported_template
from tutelage.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODES = ("fast", "reasoning")


@dataclass(frozen=True)
class Voice:
    """How a model from outside writes conversations."""

    name: str
    directory: Path
    tokenizer: "PreTrainedTokenizerBase"
    chat: ChatFormat | None
    problem: str = ""
    """Why there is no `chat`."""
    question: tuple[dict[str, str], ...] = ({"role": "user", "content": "Is it so?"},)

    def render(
        self, messages: Sequence[dict[str, str]], *, opens: bool = False, template: str = "",
        **more: Any,
    ) -> str:  # fmt: skip
        """The conversation as text by the model's own template, or by another one."""
        assert self.chat is not None
        return str(
            self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=template or self.chat.template,
                tokenize=False,
                add_generation_prompt=opens,
                **more,
            )
        )

    @property
    def eos(self) -> int | None:
        """The tokenizer's EOS token."""
        found = self.tokenizer.eos_token_id
        return found if isinstance(found, int) else None

    def text(self, token: int | None) -> str:
        """A token as text."""
        return "none" if token is None else str(self.tokenizer.decode([token]))


def voices(case: Case) -> Iterator[Voice]:
    """Each model that is here and from which a tokenizer comes, once; twins by content too."""
    if "voices" not in case.kept:
        case.kept["voices"] = list(_voices(case))
    yield from case.kept["voices"]


def _voices(case: Case) -> Iterator[Voice]:
    seen = set()
    for name, node in case.nodes.items():
        if node.produces != "model" or case.root(name) != name:
            continue
        directory = case.directory(name)
        if directory is None or case.identity(name) in seen:
            continue
        seen.add(case.identity(name))
        tokenizer = load_tokenizer(directory)
        plain = name.partition(":")[0]
        try:
            yield Voice(plain, directory, tokenizer, ChatFormat.from_tokenizer(tokenizer))
        except ModelError as error:
            yield Voice(plain, directory, tokenizer, None, str(error))


def check(case: Case) -> list[Finding]:
    """Every check of this file."""
    found = []
    for voice in voices(case):
        found.append(_works(voice))
        if voice.chat is not None:
            found += [_opening(voice), _preface(voice), _exported(voice)]
    return found + list(_alike(case))


def _works(voice: Voice) -> Finding:
    name = f"chat template of {voice.name}"
    if voice.chat is None:
        return against(name, voice.problem, "mend chat_template, or take a chat model")
    if voice.tokenizer.chat_template is None:
        return warn(
            name, "there is none (a base model?): questions are written as `### User:`",
            "take the instruct model, or expect that it learns the format from nothing",
        )  # fmt: skip
    return ok(name, "writes a question and its answer")


def _opening(voice: Voice) -> Finding:
    """What opens an answer when it is asked for is what stood before it in training."""
    name = f"generation prompt of {voice.name}"
    plain, opened = voice.render(voice.question), voice.render(voice.question, opens=True)
    whole = voice.render([*voice.question, {"role": "assistant", "content": "Yes."}])
    if opened == plain:
        return warn(
            name, "add_generation_prompt adds nothing: other tools let this model go on with the "
            "question; what is trained and exported here opens its answers",
            "nothing here; elsewhere use the exported template",
        )  # fmt: skip
    if not whole.startswith(opened) and not opened.startswith(whole.partition("Yes.")[0]):
        return against(
            name, f"an answer is asked for with {opened[len(plain):][:60]!r}, but written behind "
            f"{whole[len(plain):].partition('Yes.')[0][:60]!r}",
            "mend the template: what opens an answer must be what stands before one",
        )  # fmt: skip
    return ok(name, "is how an answer begins in training too")


def _preface(voice: Voice) -> Finding:
    """A default system prompt is part of every prompt, and of nobody's data."""
    name = f"system prompt of {voice.name}"
    first = voice.render(voice.question)
    try:
        later = voice.render(
            [*voice.question, {"role": "assistant", "content": "Yes."}, *voice.question]
        )
    except TemplateError as error:
        return unchecked(name, f"the template refuses a second question: {error}")
    head = first.partition("Is it so?")[0]
    between = later.partition("Yes.")[2].partition("Is it so?")[0]
    common = 0
    while common < min(len(head), len(between)) and head[-1 - common] == between[-1 - common]:
        common += 1
    extra = head[: len(head) - common].removeprefix(str(voice.tokenizer.bos_token or "")).strip()
    if len(extra) < 12:
        return ok(name, "none by default")
    shown = " ".join(extra.split())
    return ok(
        name, f"the template writes one where a row has none, and trains with it: {shown[:90]!r}"
    )


def _exported(voice: Voice) -> Finding:
    """The template that goes with the trained model gives the ids it was trained on."""
    name = f"exported template of {voice.name}"
    assert voice.chat is not None
    if "strftime_now" in voice.chat.template:
        return unchecked(name, "the template writes the date, which is fixed in training")
    exported = exported_template(voice.chat.template)
    for mode in MODES:
        text = voice.render(
            voice.question, opens=True, template=exported, enable_thinking=mode == "reasoning"
        )
        theirs = voice.tokenizer.encode(text, add_special_tokens=False)
        if theirs != voice.chat.prompt_ids(list(voice.question), mode):  # type: ignore[arg-type]
            return against(
                name, f"it gives other ids in {mode} mode than training: {text[-80:]!r}",
                "report it: the exported model would be asked in a way it never learnt",
            )  # fmt: skip
    return ok(name, "gives the ids of training, in both modes")


def _alike(case: Case) -> Iterator[Finding]:
    """Student and teacher of one tokenizer may still have been brought up on other templates."""
    by_root = {voice.name: voice for voice in voices(case)}
    seen = set()
    for pair in case.taught():
        roots = tuple(case.root(n).partition(":")[0] for n in (pair.student, pair.teacher))
        if roots in seen or roots[0] not in by_root or roots[1] not in by_root:
            continue
        seen.add(roots)
        student, teacher = (by_root[root] for root in roots)
        if student is teacher or student.chat is None or teacher.chat is None:
            continue
        name = "same template"
        if student.eos != teacher.eos:
            yield warn(
                name, f"EOS of {student.name} is {student.text(student.eos)}, "
                f"of {teacher.name} {teacher.text(teacher.eos)}",
                "give both the same: the teacher's targets say where an answer ends",
            )  # fmt: skip
        elif student.chat.fingerprint != teacher.chat.fingerprint:
            yield warn(
                name, f"{student.name} and {teacher.name} have other chat templates: the teacher "
                "reads the student's prompts, which are written in a way it was not taught",
                "copy the teacher's chat_template to the student before sft",
            )  # fmt: skip
        else:
            yield ok(name, f"{student.name} and {teacher.name} write conversations alike")
