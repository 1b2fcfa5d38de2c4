r"""Messages become token ids and loss masks here, and nowhere else.

Owns the two modes of an answer, how a chat template is rendered and which tokens
are targets. How text becomes ids is `tokenizer.TextCodec`; batches, losses and engines are unknown.

An assistant's turn, in any template, by mode (the bar parts prompt from response):

    fast        header <think>\n\n</think>\n\n | answer end-of-turn
    reasoning   header <think>\n | chain \n</think>\n\n answer end-of-turn

openPangu's template has markers of its own, without white space (`PANGU_MARKERS`); which ones hold
is a property of the template (`markers.py`). What is left of the bar is never a target. The
template is rendered with each answer replaced by a *slot*, so the text between two slots is the
template's own; an answer is encoded by itself and put in between. So a prompt is, id for id, the
beginning of the training sequence, and an answer has the same ids in both. A control token spelled
out in somebody's text (`<|im_end|>`) is cut after its first character before encoding: it stays
text.

The template alone decides about BOS, as in transformers: no BOS is added that it did not write.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict, cast

import numpy as np
from jinja2.exceptions import TemplateError

from tutelage.core.errors import DataError, ModelError
from tutelage.text.markers import TAGS, THINK, Markers, Mode, markers_of
from tutelage.text.tokenizer import TextCodec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("system", "user", "assistant")
_MARK = "\uf8f0"  # private use: stands in rendered text for what is not the template's

# An opening's last white space may be one token with what follows (" Why"), and two newlines may be
# one token only at a text's end: what these have in common is what stands before any text.
_FIRST_TEXTS = ("Why?", "a", "7", "(", "中")

# Llama 3 and others write today's date into the prompt, but a clock may not decide about ids: while
# rendering here the date is the one Llama 3 falls back to.
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"

# For a model that was never given a template: it needs an EOS token and nothing else.
_PLAIN = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Assistant:\\n' }}{% endif %}"
)

# An exported template is _BEFORE, the original, _AFTER: the same slots, in Jinja that transformers
# and llama.cpp both run. What a template does to answers by itself (Qwen3 drops past chains and
# writes an empty one before the last answer) is undone, as `_header` does here.
_BEFORE = """\
{#- Every answer stands behind think markers; enable_thinking=true opens a reasoning one. -#}
{%- set tutelage = namespace(messages=[], answers=[]) -%}
{%- set tutelage.slot = {'role': 'assistant', 'content': '\uf8f0answer\uf8f0'} -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' and message['content'] is string
       and not message['tool_calls'] -%}
{%- set tutelage.answers = tutelage.answers + [message] -%}
{%- set tutelage.messages = tutelage.messages + [tutelage.slot] -%}
{%- else -%}
{%- set tutelage.messages = tutelage.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set tutelage_opens = add_generation_prompt -%}
{%- if tutelage_opens -%}
{%- set tutelage.messages = tutelage.messages + [tutelage.slot] -%}
{%- endif -%}
{%- set messages = tutelage.messages -%}
{%- set add_generation_prompt = false -%}
{%- set tutelage_text %}
"""
_AFTER = """\
{{ '' }}{% endset -%}
{%- for part in tutelage_text.split('\uf8f0answer\uf8f0') -%}
{%- if loop.last -%}
{%- if not tutelage_opens -%}{{- part -}}{%- endif -%}
{%- else -%}
{%- set header = part -%}
{%- if part.rstrip().endswith('@C@') -%}
{%- set header = part.rstrip()[:-@LC@] -%}
{%- if header.rstrip().endswith('@O@') -%}{%- set header = header.rstrip()[:-@LO@] -%}{%- endif -%}
{%- endif -%}
{{- header -}}
{%- if loop.index0 < tutelage.answers | length -%}
{%- set answer = tutelage.answers[loop.index0] -%}
{%- if not answer['content'].startswith('@O@') -%}
{{- '@REASONING@' + (answer['reasoning_content'] or answer['thinking'] or '') -}}
{{- '@END_OF_CHAIN@' -}}
{%- endif -%}
{{- answer['content'] -}}
{%- elif enable_thinking is defined and enable_thinking -%}
{{- '@REASONING@' -}}
{%- else -%}
{{- '@FAST@' -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}"""


PREFIX: Mapping[Mode, str] = {mode: TAGS.prefix(mode) for mode in ("fast", "reasoning")}
"""What opens an answer of all models but openPangu."""


class Message(TypedDict):
    """One turn. `thinking` is the chain of an assistant's answer; null, empty or absent is fast."""

    role: str
    content: str
    thinking: NotRequired[str | None]


@dataclass(frozen=True, eq=False)
class Rendered:
    """A conversation as ids; `mask[i]` is True where token i is a target. Both are [tokens]."""

    ids: np.ndarray  # int32
    mask: np.ndarray  # bool


def mode_of(message: Message) -> Mode:
    """The mode of an assistant's message: reasoning where it has a chain, else fast."""
    return "reasoning" if message.get("thinking") else "fast"


def exported_template(template: str | None) -> str:
    """The Jinja template to ship with a trained model; None exports the plain default, without BOS.

    `add_generation_prompt=True` opens a fast answer, and `enable_thinking=True` with it a reasoning
    one; past answers get their markers and chain (`reasoning_content` or `thinking`) back, as
    `ChatFormat` trains. Exporting twice changes nothing. A template that writes the date writes
    today's there, where `ChatFormat` writes always the same. llama.cpp's server passes
    `enable_thinking=true` by itself unless it was started with `--reasoning off`.
    """
    original = _original(_PLAIN if template is None else template)
    return _BEFORE + original + _after(markers_of(original))


@dataclass(frozen=True)
class ChatFormat:
    """How one tokenizer writes conversations; made by `from_tokenizer`."""

    tokenizer: PreTrainedTokenizerBase = field(repr=False, compare=False)
    template: str = field(
        repr=False
    )  # the original, even of a tokenizer that holds an exported one
    end_of_turn_id: int
    stop_ids: tuple[int, ...]  # end of turn, EOS, then those asked for; each once
    fingerprint: str  # sha256 of template and markers
    markers: Markers
    _codec: TextCodec = field(repr=False, compare=False)
    _end_of_turn: str = field(repr=False)
    _closing: str | None = field(repr=False)  # what the template writes between an answer and
    # the end of turn: mostly ""; None where it does not write the end of turn at all

    @classmethod
    def from_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, *, extra_stop_ids: Iterable[int] = ()
    ) -> ChatFormat:
        """Take the tokenizer's template, or the plain default, and see how it ends an answer.

        The end of turn is the first added token behind a last answer, or EOS where there is none.
        `extra_stop_ids` are further ids to stop at, such as those of a generation config.

        Raises: ModelError where the template fails on one question and answer, or where there is
        neither an end-of-turn nor an EOS token.
        """
        template = _template_of(tokenizer)
        markers = markers_of(template)
        shown = template + markers.opening + markers.closing
        codec = TextCodec.of(tokenizer, control_text=shown)
        if markers is not TAGS and not {markers.opening, markers.closing} <= set(codec.added_ids):
            raise ModelError(
                f"the chat template of {codec.name} is openPangu's, but its tokenizer has no "
                f"tokens {markers.opening} and {markers.closing}: keep files of one model together"
            )
        try:
            parts, _ = _lay_out(codec, template, [_turn("user", "Hi"), _ANSWER])
        except DataError as error:
            raise ModelError(str(error)) from error
        closing, end_of_turn = _end_of_turn(codec, parts[1])
        end_of_turn_id = codec.added_ids[end_of_turn]
        eos = () if tokenizer.eos_token is None else (codec.added_ids[str(tokenizer.eos_token)],)
        identity = json.dumps(
            [template, markers.prefix("fast"), markers.prefix("reasoning"), markers.end_of_chain]
        )
        return cls(
            tokenizer=tokenizer,
            template=template,
            end_of_turn_id=end_of_turn_id,
            stop_ids=tuple(dict.fromkeys((end_of_turn_id, *eos, *extra_stop_ids))),
            fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
            markers=markers,
            _codec=codec,
            _end_of_turn=end_of_turn,
            _closing=closing,
        )

    def prompt_ids(self, messages: Sequence[Message], mode: Mode) -> list[int]:
        """Ids of a conversation that ends with the user, up to where an answer of `mode` begins.

        They are the beginning of `render([*messages, answer]).ids` for every answer of that mode.

        Raises: DataError where the conversation, or the template with it, will not do.
        """
        _check(messages, self.markers, last="user")
        answers = [m for m in messages if m["role"] == "assistant"]
        segments = self._segments([*messages, _ANSWER], [*map(mode_of, answers), mode])
        ids: list[int] = []
        for segment, answer in zip(segments, answers, strict=False):
            ids += segment + self.response_ids(answer)
        return ids + segments[len(answers)]

    def render(
        self, messages: Sequence[Message], *, supervise: Literal["all", "last"] = "all"
    ) -> Rendered:
        """Ids and loss mask of a conversation that ends with the assistant.

        Targets are `response_ids` of every answer, or of the last one only.

        Raises: DataError as `prompt_ids`.
        """
        _check(messages, self.markers, last="assistant")
        answers = [m for m in messages if m["role"] == "assistant"]
        segments = self._segments(messages, [mode_of(m) for m in answers])
        ids: list[int] = []
        mask: list[bool] = []
        for n, (segment, answer) in enumerate(zip(segments, answers, strict=False), start=1):
            response = self.response_ids(answer)
            is_target = supervise == "all" or n == len(answers)
            ids += segment + response
            mask += [False] * len(segment) + [is_target] * len(response)
        ids += segments[-1]
        mask += [False] * len(segments[-1])
        return Rendered(ids=np.array(ids, dtype=np.int32), mask=np.array(mask, dtype=np.bool_))

    def response_ids(self, message: Message) -> list[int]:
        """Ids of one answer as supervised: its chain if any, its content and the end of turn.

        Raises: DataError where the message is not an answer that can be written.
        """
        _check([message], self.markers, last="assistant")
        chain, content = message.get("thinking") or "", message["content"]
        cut = _cut_mark([chain, content])
        text = self._codec.defused(content, cut) + (self._closing or "")
        if chain:
            text = self._codec.defused(chain, cut) + self.markers.end_of_chain + text
        # a prefix is no start of a text, so every response is text that follows text
        return [*self._codec.encode_after_text(text.split(cut)), self.end_of_turn_id]

    def chain_ids(self, chain: str) -> list[int]:
        """Ids of a chain and the marker that closes it; an answer goes on from there."""
        cut = _cut_mark([chain])
        text = self._codec.defused(chain, cut) + self.markers.end_of_chain
        return self._codec.encode_after_text(text.split(cut))

    def opening_ids(self, text: str) -> list[int]:
        """Ids of text with which an answer begins and after which it goes on; no end of turn."""
        cut = _cut_mark([text])
        return self._codec.encode_after_text(self._codec.defused(text, cut).split(cut))

    def decode_response(self, ids: Sequence[int], mode: Mode) -> tuple[str | None, str]:
        """(chain, content) of response ids; the inverse of `response_ids` for text that decodes.

        One stop token at the end is dropped. In reasoning, all is chain until the marker closes it,
        and content loses the marker's white space and no more. In fast, all is content.
        """
        ended = bool(ids) and ids[-1] in self.stop_ids
        text = self._codec.decode_after_text(ids[:-1] if ended else ids)
        text = text.removesuffix(self._closing or "") if ended else text
        if mode == "fast":
            return None, text
        chain, _, content = text.partition(self.markers.closing)
        chain = chain.removesuffix(self.markers.inside)
        return chain or None, content.removeprefix(self.markers.after)

    def user_opening(self, system: str = "") -> tuple[list[int], tuple[int, ...]]:
        """(Ids with which every first user's turn opens, ids that end that turn).

        A model goes on from there with a question of its own (arXiv 2406.08464). A system message
        may stand before. What ends the turn is the first added token behind it, or a stop id.

        Raises: ModelError where the template refuses the system message, writes nothing before a
        user's text, or no token behind it.
        """
        text = f"{_mark([system])}user{_mark([system])}"
        lead = [_turn("system", system)] if system else []
        try:
            parts, _ = _lay_out(self._codec, self.template, [*lead, _turn("user", text), _ANSWER])
            prompts = [self.prompt_ids([*lead, _turn("user", t)], "fast") for t in _FIRST_TEXTS]
        except DataError as error:
            raise ModelError(str(error)) from error
        columns = zip(*prompts, strict=False)
        ids = [column[0] for column in takewhile(lambda c: len(set(c)) == 1, columns)]
        end = _first_added_token(self._codec, parts[0].partition(text)[2])
        if not ids or end is None:
            wanted = "a token behind" if ids else "anything before"
            raise ModelError(
                f"the chat template of {self._codec.name} does not write {wanted} a user's text, "
                "so its model cannot be asked for one: take a chat model whose template does"
            )
        return ids, tuple(dict.fromkeys((self._codec.added_ids[end[0]], *self.stop_ids)))

    def _segments(self, messages: Sequence[Message], modes: Sequence[Mode]) -> list[list[int]]:
        """Ids before each answer, its prefix included, and after the last: one list more."""
        parts, cut = _lay_out(self._codec, self.template, messages)
        texts = [
            part + self.markers.prefix(mode) for part, mode in zip(parts, modes, strict=False)
        ] + parts[-1:]
        return [
            self._codec.encode(texts[0].split(cut)),
            *(self._ids_after_turn(text, cut) for text in texts[1:]),
        ]

    def _ids_after_turn(self, text: str, cut: str) -> list[int]:
        """Ids of template text behind an answer, from the end of turn on, which is left out."""
        rest = text
        if self._closing is not None:
            ended = self._closing + self._end_of_turn
            if not text.startswith(ended):
                raise DataError(
                    f"the chat template of {self._codec.name} ends one answer with {ended!r} and "
                    f"another with {text[:30]!r}: use a template that does always the same"
                )
            rest = text.removeprefix(ended)
        # Encoded behind the token it follows: some tokens eat the white space after them, and
        # SentencePiece begins a text, but not what follows a token, with a space.
        return self._codec.encode((self._end_of_turn + rest).split(cut))[1:]


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


_ANSWER = _turn("assistant", "")


def _check(messages: Sequence[Message], markers: Markers, *, last: str) -> None:
    if not messages or messages[-1]["role"] != last:
        found = messages[-1]["role"] if messages else "nothing"
        raise DataError(f"a conversation must end with the {last} here, not with {found}")
    for n, message in enumerate(messages):
        role, content, chain = message["role"], message["content"], message.get("thinking")
        where = f"message {n} ({role})"
        if role not in _ROLES:
            raise DataError(f"{where}: a role is one of {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"{where}: content must be text, not {type(content).__name__}")
        if chain and role != "assistant":
            raise DataError(f"{where}: only an assistant thinks; remove its thinking")
        if chain and markers.closing in chain:
            end = markers.closing
            raise DataError(f"{where}: its thinking holds {end}, which would end it early")
        if role == "assistant" and content.startswith((THINK, markers.opening)):
            start = THINK if content.startswith(THINK) else markers.opening
            raise DataError(f"{where}: content begins with {start}; use split_thinking first")


def _after(markers: Markers) -> str:
    """The end of an exported template with these markers (O, C) and their lengths (LO, LC)."""
    parts = {
        "FAST": markers.prefix("fast"),
        "REASONING": markers.prefix("reasoning"),
        "END_OF_CHAIN": markers.end_of_chain,
        "O": markers.opening,
        "C": markers.closing,
        "LO": str(len(markers.opening)),
        "LC": str(len(markers.closing)),
    }
    return re.sub("@([A-Z_]+)@", lambda name: parts[name[1]].replace("\n", "\\n"), _AFTER)


def _original(template: str) -> str:
    # Jinja drops one newline at the end of a file, and text follows it in an exported template
    after = _after(markers_of(template))
    if template.startswith(_BEFORE) and template.endswith(after):
        template = template[len(_BEFORE) : -len(after)]
    return template.removesuffix("\n")


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise ModelError(
                f"{tokenizer.name_or_path} has chat templates named {', '.join(template)} and no "
                "default: keep the one to use as its chat_template"
            )
        template = template["default"]
    if template is not None:
        return _original(template)
    # Base models such as Llama 3 and Gemma need their BOS, and nobody else writes it here
    start = tokenizer.encode("a")[0]
    writes_bos = tokenizer.bos_token_id is not None and start == tokenizer.bos_token_id
    return ("{{ bos_token }}" if writes_bos else "") + _PLAIN


def _mark(texts: Iterable[str]) -> str:
    mark = _MARK
    while any(mark in text for text in texts):
        mark += _MARK
    return mark


def _cut_mark(texts: Sequence[str]) -> str:
    return f"{_mark(texts)}cut{_mark(texts)}"


def _lay_out(codec: TextCodec, template: str, messages: Sequence[Message]) -> tuple[list[str], str]:
    """(The template's text around each answer, the mark at which it must be cut for encoding)."""
    contents = [m["content"] for m in messages]
    mark, cut = _mark(contents), _cut_mark(contents)
    rows = [_turn(m["role"], codec.defused(m["content"], cut)) for m in messages]
    slots = [n for n, row in enumerate(rows) if row["role"] == "assistant"]
    for n in slots:
        rows[n] = _turn("assistant", f"{mark}{n}{mark}")
    text = _apply(codec, template, rows)
    for n, row in enumerate(rows):
        if row["content"].strip() not in text:
            raise DataError(
                f"the chat template of {codec.name} drops or rewrites message {n} "
                f"({row['role']}): leave that role out or change the template"
            )
    pieces = re.split(f"{mark}(\\d+){mark}", text)
    if pieces[1::2] != [str(n) for n in slots]:
        raise DataError(
            f"the chat template of {codec.name} does not write each answer once and in order"
        )
    markers = markers_of(template)
    return [*(_header(piece, markers) for piece in pieces[:-1:2]), pieces[-1]], cut


def _apply(codec: TextCodec, template: str, rows: list[Message]) -> str:
    dated = _FIXED_DATE + template if "strftime_now" in template else template
    try:
        return str(
            codec.tokenizer.apply_chat_template(
                cast(list[dict[str, str]], rows),
                chat_template=dated,
                tokenize=False,
                add_generation_prompt=False,
            )
        )
    except TemplateError as error:
        roles = ", ".join(row["role"] for row in rows)
        reason = " ".join(str(error).split())
        raise DataError(
            f"the chat template of {codec.name} refuses the turns {roles}: {reason}"
        ) from error


def _header(text: str, markers: Markers) -> str:
    """Text before an answer without the think block a template writes there itself (Qwen3)."""
    stripped = text.rstrip()
    if not stripped.endswith(markers.closing):
        return text
    header = stripped.removesuffix(markers.closing)
    opened = header.rstrip()
    return opened.removesuffix(markers.opening) if opened.endswith(markers.opening) else header


def _end_of_turn(codec: TextCodec, after: str) -> tuple[str | None, str]:
    """(Text before the end of turn, or None where the template writes none; the token)."""
    if found := _first_added_token(codec, after):
        return after[: found.start()], found[0]
    if codec.tokenizer.eos_token is None:
        raise ModelError(
            f"the chat template of {codec.name} ends no turn and the tokenizer has no EOS token: "
            "set eos_token in tokenizer_config.json"
        )
    return None, str(codec.tokenizer.eos_token)


def _first_added_token(codec: TextCodec, text: str) -> re.Match[str] | None:
    longest_first = sorted((t for t in codec.added_ids if t.strip()), key=len, reverse=True)
    return re.search("|".join(map(re.escape, longest_first)), text) if longest_first else None
