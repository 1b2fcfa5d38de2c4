"""Messages to ids and masks, over template styles and tokenizer families built here."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tutelage.core.errors import DataError, ModelError
from tutelage.text.chat import (
    PREFIX,
    ChatFormat,
    Message,
    Mode,
    exported_template,
    mode_of,
)
from tutelage.text.markers import split_thinking
from tutelage.text.tokenizer import load_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it thinks.\n\nSo: 12 + 30 = 42.",
    "user assistant system model\n\n### User:\n### Assistant:\nYou are a helpful assistant.",
    "<think>\nFirst, add the tens.\n</think>\n\nThe answer is 42.",
    "你好，世界。今天天气很好。 Ünïcödé — naïve café 🙂🙂",
    "newlines that end a text become one token:\n\n",
] * 4

SPECIAL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<start_of_turn>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<end_of_turn>", "[INST]", "[/INST]"]

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
DATED = LLAMA3.replace("{{- system_message }}", '{{- "Today: " + date_string + system_message }}')
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""
QWEN3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and not ns.found %}
        {%- set ns.found = true %}
        {%- set ns.last_query = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set chain = '' %}
        {%- set content = message.content %}
        {%- if message.reasoning_content is string %}
            {%- set chain = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set chain = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or chain) %}
            {{- '<think>\\n' + chain.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
UNCLOSED = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
STYLES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "unclosed": UNCLOSED,
    "none": None,
}
WITHOUT_SYSTEM = ("gemma", "mistral")
END_OF_TURN = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
END_OF_TURN |= {"qwen3": "<|im_end|>", "mistral": "<eos>", "unclosed": "<eos>", "none": "<eos>"}


def byte_level(pattern: str | None, *, add_prefix_space: bool = False) -> Tokenizer:
    """GPT-2's splitting without a pattern; with one, the way Llama 3 and Qwen split."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=pattern is None)
    if pattern is None:
        tokenizer.pre_tokenizer = level
    else:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """As Llama 2: a space is put before every text, unknown characters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *SPECIAL, *bytes_], show_progress=False
    )
    lines = [line for text in CORPUS for line in text.split("\n") if line.isascii()]
    tokenizer.train_from_iterator(lines, trainer)
    after = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *after])
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in bytes_]
    return Tokenizer.from_str(json.dumps(spec))


def llama_like() -> Tokenizer:
    return byte_level(
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    )


def qwen_like() -> Tokenizer:
    """The markers are added tokens that are not special, and text is normalized to NFC."""
    tokenizer = llama_like()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(m, special=False) for m in ("<think>", "</think>")])
    return tokenizer


FAMILIES = {
    "gpt2": lambda: byte_level(None),
    "spaced": lambda: byte_level(None, add_prefix_space=True),
    "llama": llama_like,
    "qwen": qwen_like,
    "sentencepiece": sentencepiece_like,
}


@cache
def backend(family: str) -> str:
    return FAMILIES[family]().to_str()


@cache
def tokenizer_of(style: str, family: str = "gpt2") -> PreTrainedTokenizerFast:
    return dress(Tokenizer.from_str(backend(family)), STYLES[style])


def dress(tokenizer: Tokenizer, template: Any) -> PreTrainedTokenizerFast:
    dressed = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>"
    )
    dressed.chat_template = template
    return dressed


@cache
def chat_of(style: str, family: str = "gpt2") -> ChatFormat:
    return ChatFormat.from_tokenizer(tokenizer_of(style, family))


def write_exported(
    which: ChatFormat, messages: list[Message], mode: Mode | None, *, tokenize: bool
) -> Any:
    """What transformers makes of an exported template; no mode: nothing is opened."""
    tokenizer: Any = copy.deepcopy(which.tokenizer)
    tokenizer.chat_template = exported_template(which.template)
    return tokenizer.apply_chat_template(
        messages,
        tokenize=tokenize,
        return_dict=False,
        add_generation_prompt=mode is not None,
        **({"enable_thinking": True} if mode == "reasoning" else {}),
    )


def decoded(chat: ChatFormat, ids: Iterable[int]) -> str:
    return str(chat.tokenizer.decode(list(ids)))


def id_of(chat: ChatFormat, token: str) -> int:
    return chat.tokenizer.get_vocab()[token]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def answer(content: str, thinking: str | None = None) -> Message:
    return {"role": "assistant", "content": content, "thinking": thinking}


def conversation(style: str) -> list[Message]:
    system: Message = {"role": "system", "content": "Be kind."}
    turns = [
        user("What is 12 + 30?"),
        answer("It is 42.", "First, add the tens."),
        user("今天天气很好 🙂"),
        answer("Good to hear!"),
    ]
    return turns if style in WITHOUT_SYSTEM else [system, *turns]


EVERY = list(product(STYLES, FAMILIES))
every_format = pytest.mark.parametrize(("style", "family"), EVERY)
every_style = pytest.mark.parametrize("style", STYLES)
both_modes = pytest.mark.parametrize("mode", ["fast", "reasoning"])


def round_trip(chat: ChatFormat, text: str) -> str:
    """The text as the tokenizer gives it back: SentencePiece adds a space after each token."""
    return decoded(chat, chat.tokenizer.encode(text, add_special_tokens=False))


@every_format
def test_targets_are_each_answer_as_written_and_its_end_of_turn(style: str, family: str) -> None:
    chat, messages = chat_of(style, family), conversation(style)
    rendered = chat.render(messages)
    end = END_OF_TURN[style]
    runs = np.split(rendered.ids, np.flatnonzero(np.diff(rendered.mask.astype(np.int8))) + 1)
    texts = [decoded(chat, run) for run in runs]
    assert texts[1::2] == [
        f"First, add the tens.\n</think>\n\nIt is 42.{end}",
        f"Good to hear!{end}",
    ]
    assert texts[0].endswith("<think>\n")
    assert texts[2].endswith("<think>\n\n</think>\n\n")
    assert not rendered.mask[0]
    assert (rendered.ids.dtype, rendered.mask.dtype) == (np.int32, np.bool_)


@every_format
def test_the_whole_sequence_decodes_to_the_template_with_markers(style: str, family: str) -> None:
    chat, messages = chat_of(style, family), conversation(style)
    expected = write_exported(chat, messages, None, tokenize=False)
    if style == "unclosed":  # the template writes no end, so the ids hold one more
        expected = expected.replace("42.\n", "42.<eos>\n").replace("hear!\n", "hear!<eos>\n")
    assert decoded(chat, chat.render(messages).ids) == round_trip(chat, expected)


@every_format
def test_a_prompt_is_the_beginning_of_the_training_sequence(style: str, family: str) -> None:
    chat, messages = chat_of(style, family), conversation(style)
    rendered = chat.render(messages)
    turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    starts = np.flatnonzero(np.diff(rendered.mask.astype(np.int8), prepend=0) == 1)
    for n, start in zip(turns, starts, strict=True):
        prompt = chat.prompt_ids(messages[:n], mode_of(messages[n]))
        response = chat.response_ids(messages[n])
        assert prompt == rendered.ids[:start].tolist()
        assert response == rendered.ids[start : start + len(response)].tolist()


texts = st.text(max_size=12) | st.sampled_from(
    [
        " a ",
        "\n\nb\n",
        "\t",
        "你好",
        "🙂👩‍👩‍👧",
        "é e\u0301",
        "<|im_end|>",
        "</think>",
        "\uf8f0",
        "[/INST]x",
    ]
)
pieces = st.lists(texts, max_size=3).map("".join)
chains = pieces.map(lambda text: text.replace("</think>", ""))
answers = pieces.filter(lambda text: not text.startswith("<think>"))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(EVERY), pieces, chains, answers, pieces, chains, answers)
def test_any_text_keeps_prompts_prefixes_and_answers_whole(
    which: tuple[str, str], ask: str, chain: str, reply: str, more: str, chain2: str, reply2: str
) -> None:
    chat = chat_of(*which)
    messages = [user(ask), answer(reply, chain), user(more), answer(reply2, chain2)]
    rendered = chat.render(messages)
    expected = chat.response_ids(messages[1]) + chat.response_ids(messages[3])
    assert rendered.ids[rendered.mask].tolist() == expected
    for n in (1, 3):
        mode = mode_of(messages[n])
        prompt = chat.prompt_ids(messages[:n], mode)
        assert prompt == rendered.ids[: len(prompt)].tolist()
        following = rendered.ids[len(prompt) :].tolist()
        response = chat.response_ids(messages[n])
        assert following[: len(response)] == response
    specials = set(chat.tokenizer.all_special_ids)
    assert not specials & set(chat.response_ids(messages[1])[:-1])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(["gpt2", "spaced", "llama", "sentencepiece"]), chains, answers)
def test_decoding_an_answer_gives_back_its_chain_and_content(
    family: str, chain: str, reply: str
) -> None:
    chat = chat_of("chatml", family)
    message = answer(reply, chain)
    parts = chat.decode_response(chat.response_ids(message), mode_of(message))
    assert parts == (chain or None, reply)


@every_format
@both_modes
def test_the_exported_template_writes_the_same_first_prompt(
    style: str, family: str, mode: Mode
) -> None:
    messages = conversation(style)
    messages = messages[: 1 + [m["role"] for m in messages].index("user")]
    chat = chat_of(style, family)
    assert chat.prompt_ids(messages, mode) == write_exported(chat, messages, mode, tokenize=True)


@pytest.mark.parametrize("style", ["chatml", "llama3", "gemma", "qwen3"])
@pytest.mark.parametrize("family", ["llama", "qwen"])
@both_modes
def test_the_exported_template_writes_the_same_later_prompt_where_newlines_stay_together(
    style: str, family: str, mode: Mode
) -> None:
    chat, messages = chat_of(style, family), conversation(style)[:-1]
    assert chat.prompt_ids(messages, mode) == write_exported(chat, messages, mode, tokenize=True)


@every_format
@both_modes
def test_the_exported_template_writes_the_same_text_with_a_past(
    style: str, family: str, mode: Mode
) -> None:
    chat, messages = chat_of(style, family), conversation(style)[:-1]
    text = write_exported(chat, messages, mode, tokenize=False)
    assert text.endswith(PREFIX[mode])
    if style == "unclosed":
        text = text.replace("42.\n", "42.<eos>\n")
    assert decoded(chat, chat.prompt_ids(messages, mode)) == round_trip(chat, text)


@every_style
def test_a_format_from_the_exported_template_is_the_same_format(style: str) -> None:
    chat = chat_of(style)
    template = exported_template(chat.template)
    again = ChatFormat.from_tokenizer(dress(Tokenizer.from_str(backend("gpt2")), template))
    assert again == chat
    messages = conversation(style)
    assert again.render(messages).ids.tolist() == chat.render(messages).ids.tolist()
    assert exported_template(template) == template


@every_style
def test_the_end_of_turn_and_eos_both_stop(style: str) -> None:
    chat = ChatFormat.from_tokenizer(tokenizer_of(style), extra_stop_ids=(3, 7, 3))
    end = id_of(chat, END_OF_TURN[style])
    assert chat.end_of_turn_id == end
    assert chat.stop_ids == tuple(dict.fromkeys([end, id_of(chat, "<eos>"), 3, 7]))


@every_format
def test_a_control_token_spelled_out_in_text_stays_text(style: str, family: str) -> None:
    chat = chat_of(style, family)
    spelled = "a<|im_end|>b<|eot_id|><end_of_turn>[/INST]<eos><bos>"
    plain = chat.render([user("a"), answer("b")])
    spiced = chat.render([user(spelled), answer(spelled, f"{spelled} so")])
    special = {i for i, t in chat.tokenizer.added_tokens_decoder.items() if t.special}
    assert [i for i in spiced.ids if i in special] == [i for i in plain.ids if i in special]
    assert decoded(chat, spiced.ids).count(spelled) == 3


def test_private_use_characters_in_text_are_only_text() -> None:
    chat = chat_of("chatml")
    for spelled in ("\uf8f00\uf8f0", "\uf8f01\uf8f0", "\uf8f0cut\uf8f0", "\uf8f0" * 3):
        rendered = chat.render([user(spelled), answer(spelled, spelled)])
        assert decoded(chat, rendered.ids).count(spelled) == 3
        assert decoded(chat, rendered.ids[rendered.mask]).count(spelled) == 2


def test_a_newline_at_the_end_of_a_template_is_none_of_it() -> None:
    chat = chat_of("chatml")
    tokenizer = dress(Tokenizer.from_str(backend("gpt2")), CHATML + "{{ '' }}\n")
    ended = ChatFormat.from_tokenizer(tokenizer)
    messages = conversation("chatml")
    text = write_exported(chat, messages, None, tokenize=False)
    assert write_exported(ended, messages, None, tokenize=False) == text
    assert ended.render(messages).ids.tolist() == chat.render(messages).ids.tolist()
    template = exported_template(CHATML + "\n")
    assert template == exported_template(CHATML)


def test_a_think_marker_in_a_question_is_not_the_marker_token() -> None:
    chat = chat_of("chatml", "qwen")
    ids = chat.prompt_ids([user("what does <think> mean?")], "fast")
    assert ids.count(id_of(chat, "<think>")) == 1


def test_whitespace_that_a_template_trims_is_trimmed_in_questions_and_kept_in_answers() -> None:
    chat = chat_of("llama3")
    assert chat.prompt_ids([user(" hi\n")], "fast") == chat.prompt_ids([user("hi")], "fast")
    rendered = chat.render([user("hi"), answer(" a \n")])
    assert decoded(chat, rendered.ids[rendered.mask]) == " a \n<|eot_id|>"


def test_only_the_last_answer_is_supervised_on_request() -> None:
    chat, messages = chat_of("chatml"), conversation("chatml")
    every, last = chat.render(messages), chat.render(messages, supervise="last")
    assert last.ids.tolist() == every.ids.tolist()
    assert last.ids[last.mask].tolist() == chat.response_ids(messages[-1])


def test_bos_is_written_by_the_template_or_not_at_all() -> None:
    for style, count in (("chatml", 0), ("llama3", 1), ("mistral", 1)):
        chat = chat_of(style)
        assert chat.prompt_ids([user("a")], "fast").count(id_of(chat, "<bos>")) == count


def test_the_plain_default_opens_with_bos_where_the_tokenizer_would() -> None:
    from tokenizers.processors import TemplateProcessing

    plain = Tokenizer.from_str(backend("gpt2"))
    bos = plain.token_to_id("<bos>")
    plain.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    chat = ChatFormat.from_tokenizer(dress(plain, None))
    assert chat.prompt_ids([user("a")], "fast")[0] == bos
    assert bos not in chat_of("none").prompt_ids([user("a")], "fast")


def test_the_plain_default_reads_as_stated() -> None:
    chat = chat_of("none")
    assert decoded(chat, chat.render(conversation("none")[:3]).ids) == (
        "### System:\nBe kind.\n\n### User:\nWhat is 12 + 30?\n\n### Assistant:\n"
        "<think>\nFirst, add the tens.\n</think>\n\nIt is 42.<eos>"
    )


def test_a_template_that_writes_the_date_writes_always_the_same() -> None:
    chat = ChatFormat.from_tokenizer(dress(Tokenizer.from_str(backend("gpt2")), DATED))
    assert "Today: 26 Jul 2024" in decoded(chat, chat.prompt_ids([user("a")], "fast"))


def test_truncated_reasoning_is_all_chain() -> None:
    chat = chat_of("chatml")
    ids = chat.response_ids(answer("42.", "First, add the tens."))
    cut = ids[: len(chat.response_ids(answer("First, add"))) - 1]
    chain, content = chat.decode_response(cut, "reasoning")
    assert (chain, content) == ("First, add", "")


def test_eos_in_place_of_the_end_of_turn_is_dropped_too() -> None:
    chat = chat_of("chatml")
    ids = [*chat.response_ids(answer("42."))[:-1], id_of(chat, "<eos>")]
    assert chat.decode_response(ids, "fast") == (None, "42.")


def test_a_space_before_the_end_of_turn_is_part_of_the_answer_and_not_of_its_content() -> None:
    tokenizer = dress(Tokenizer.from_str(backend("gpt2")), MISTRAL.replace("+ eos", "+ ' ' + eos"))
    chat = ChatFormat.from_tokenizer(tokenizer)
    ids = chat.response_ids(answer("42."))
    assert decoded(chat, ids) == "42. <eos>"
    assert chat.decode_response(ids, "fast") == (None, "42.")


def test_the_fingerprint_follows_the_template() -> None:
    prints = {style: chat_of(style).fingerprint for style in STYLES}
    assert len(set(prints.values())) == len(STYLES)
    assert chat_of("chatml", "llama").fingerprint == prints["chatml"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("42", (None, "42")),
        (" 42\n", (None, " 42\n")),
        ("<think>\nwhy\n</think>\n\n42", ("why", "42")),
        (" \n<think>why</think>42", ("why", "42")),
        ("why\n</think>\n\n42", ("why", "42")),
        ("<think>\n\n</think>\n\n42", (None, "42")),
        ("", (None, "")),
    ],
)
def test_inline_thinking_is_split(text: str, parts: tuple[str | None, str]) -> None:
    assert split_thinking(text) == parts


@pytest.mark.parametrize(
    "text",
    [
        "<think>why",
        "</think>why<think>",
        "<think>a</think>b</think>c",
        "<think>a<think>b</think>c",
        "<think>a</think><think>b</think>c",
        "so <think>a</think>b",
    ],
)
def test_unbalanced_thinking_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="do not pair up"):
        split_thinking(text)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "must end with the assistant here, not with nothing"),
        ([user("a")], "must end with the assistant here, not with user"),
        ([user("a"), answer("b", "c</think>d")], "its thinking holds </think>"),
        ([user("a"), answer("<think>c</think>b")], "use split_thinking"),
        ([{"role": "tool", "content": "a"}, answer("b")], "message 0 .tool.: a role is one of"),
        ([{"role": "user", "content": ["a"]}, answer("b")], "content must be text, not list"),
        ([{**user("a"), "thinking": "b"}, answer("b")], "only an assistant thinks"),
    ],
)
def test_a_conversation_that_cannot_be_written_is_refused(messages: list[Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        chat_of("chatml").render(messages)


def test_a_prompt_must_end_with_the_user() -> None:
    with pytest.raises(DataError, match="must end with the user here, not with assistant"):
        chat_of("chatml").prompt_ids([user("a"), answer("b")], "fast")


@pytest.mark.parametrize("style", WITHOUT_SYSTEM)
def test_what_a_template_forbids_is_one_line_with_its_reason(style: str) -> None:
    system: Message = {"role": "system", "content": "a"}
    with pytest.raises(
        DataError, match=r"refuses the turns system, user, assistant: .*support"
    ) as e:
        chat_of(style).prompt_ids([system, user("b")], "fast")
    assert "\n" not in str(e.value)


def test_a_template_that_drops_a_message_is_refused() -> None:
    deaf = CHATML.replace("{{ '<|im_start|>' + m", "{% if message['role'] != 'system' %}{{ '' + m")
    deaf = deaf.replace("{% endfor %}", "{% endif %}{% endfor %}")
    chat = ChatFormat.from_tokenizer(dress(Tokenizer.from_str(backend("gpt2")), deaf))
    with pytest.raises(DataError, match=r"drops or rewrites message 0 .system."):
        chat.prompt_ids([{"role": "system", "content": "Be kind."}, user("a")], "fast")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for message in messages %}", "refuses"),
        ("{{ messages[0]['content'] }}", "drops or rewrites message 1"),
        ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "once and in order"),
        ({"tool_use": CHATML}, "named tool_use and no default"),
    ],
)
def test_a_template_that_cannot_be_used_is_a_model_error(template: Any, reason: str) -> None:
    tokenizer = dress(Tokenizer.from_str(backend("gpt2")), template)
    with pytest.raises(ModelError, match=reason):
        ChatFormat.from_tokenizer(tokenizer)


def test_a_template_that_ends_only_some_answers_is_refused() -> None:
    once = CHATML.replace(
        "'<|im_end|>' + '\n'",
        "('<|im_end|>' if loop.last or message.role == 'user' else '') + '\n'",
    )
    chat = ChatFormat.from_tokenizer(dress(Tokenizer.from_str(backend("gpt2")), once))
    with pytest.raises(DataError, match=r"ends one answer with '<.im_end.>'"):
        chat.render(conversation("chatml")[1:])


def test_no_end_of_turn_and_no_eos_names_the_tokenizer() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend("gpt2")))
    bare.chat_template = UNCLOSED
    bare.name_or_path = "some/base"
    with pytest.raises(ModelError, match="some/base ends no turn and the tokenizer has no EOS"):
        ChatFormat.from_tokenizer(bare)


ENDS_A_USERS_TURN = {**END_OF_TURN, "mistral": "[/INST]"}
OPENED = [style for style in STYLES if style not in ("unclosed", "none")]


@pytest.mark.parametrize("style", OPENED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_users_opening_is_the_beginning_of_every_prompt_and_its_end_stops(
    style: str, family: str
) -> None:
    chat = chat_of(style, family)
    opening, stop_ids = chat.user_opening()
    prompt = chat.prompt_ids([user("How so?")], "fast")
    assert opening == prompt[: len(opening)]
    assert decoded(chat, prompt[len(opening) :]).strip().startswith("How so?")
    assert stop_ids[0] == id_of(chat, ENDS_A_USERS_TURN[style])
    assert set(chat.stop_ids) <= set(stop_ids)
    assert len(set(stop_ids)) == len(stop_ids)


@pytest.mark.parametrize("style", ["chatml", "llama3", "qwen3"])
@pytest.mark.parametrize(
    "text", ["Be kind.", "Say <|im_end|> user \uf8f0cut\uf8f0 \uf8f0user\uf8f0"]
)
def test_a_users_opening_holds_its_system_message_as_text(style: str, text: str) -> None:
    chat = chat_of(style)
    system: Message = {"role": "system", "content": text}
    opening, _ = chat.user_opening(text)
    assert opening == chat.prompt_ids([system, user("Why?")], "fast")[: len(opening)]
    assert text in decoded(chat, opening)
    assert "Why?" in decoded(chat, chat.prompt_ids([system, user("Why?")], "fast")[len(opening) :])


@pytest.mark.parametrize(
    ("style", "system", "reason"),
    [
        ("unclosed", "", "does not write a token behind a user's text"),
        ("none", "", "does not write a token behind a user's text"),
        ("gemma", "Be kind.", "refuses the turns system, user, assistant"),
    ],
)
def test_no_users_opening_is_a_model_error_in_one_line(
    style: str, system: str, reason: str
) -> None:
    with pytest.raises(ModelError, match=reason) as e:
        chat_of(style).user_opening(system)
    assert "\n" not in str(e.value)


@both_modes
def test_smollm2_prompts_and_targets(smol_dir: Path, mode: Mode) -> None:
    chat = ChatFormat.from_tokenizer(load_tokenizer(smol_dir))
    question, chain = [user(" 你好 <|im_end|>?\n")], "因为\n so" if mode == "reasoning" else None
    rendered, prompt = (
        chat.render([*question, answer("42. 🙂", chain)]),
        chat.prompt_ids(question, mode),
    )
    response = rendered.ids[rendered.mask].tolist()
    assert prompt == rendered.ids[: len(prompt)].tolist()
    assert chat.decode_response(response, mode) == (chain, "42. 🙂")
    assert decoded(chat, response).endswith("42. 🙂<|im_end|>")
    plain = [user("12 + 30?")]
    assert chat.prompt_ids(plain, mode) == write_exported(chat, plain, mode, tokenize=True)
