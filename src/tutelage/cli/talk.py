"""Talking to a model on the terminal, in either mode, as its tokens come."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from transformers import GenerationConfig, PreTrainedModel, TextStreamer

from tutelage.models.device import pick_device
from tutelage.models.load import load_model, load_tokenizer
from tutelage.text.chat import ChatFormat, Message, Mode

HELP = "/fast or /reasoning sets how it answers, /new starts afresh, /quit (or Ctrl-D) leaves"


@dataclass
class Talk:
    """A conversation under way."""

    model: PreTrainedModel
    chat: ChatFormat
    mode: Mode
    max_tokens: int
    temperature: float
    messages: list[Message] = field(default_factory=list)
    console: Console = field(default_factory=Console)

    @classmethod
    def open(
        cls, directory: Path, *, mode: Mode, max_tokens: int, temperature: float, seed: int,
        device: str,
    ) -> "Talk":  # fmt: skip
        """Load a model's directory. Raises ModelError, EngineError."""
        torch.manual_seed(seed)
        model = load_model(directory, dtype="auto", device=pick_device(device)).eval()
        chat = ChatFormat.from_tokenizer(load_tokenizer(directory))
        return cls(model, chat, mode, max_tokens, temperature)

    def answer(self, text: str) -> str:
        """Answer one message, printing as it comes; it stays in the conversation."""
        self.messages.append({"role": "user", "content": text})
        prompt = torch.tensor(
            [self.chat.prompt_ids(self.messages, self.mode)], device=self.model.device
        )
        settings = GenerationConfig(
            max_new_tokens=self.max_tokens, do_sample=self.temperature > 0,
            temperature=self.temperature or None, top_k=0, top_p=1.0,
            eos_token_id=list(self.chat.stop_ids), pad_token_id=self.chat.end_of_turn_id,
        )  # fmt: skip
        streamer = TextStreamer(
            self.chat.tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,  # type: ignore[arg-type]
        )
        output = self.model.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), generation_config=settings,
            streamer=streamer,
        )  # fmt: skip
        ids = output[0, prompt.shape[1] :].tolist()
        thinking, content = self.chat.decode_response(ids, self.mode)
        self.messages.append({"role": "assistant", "content": content, "thinking": thinking})
        if ids and ids[-1] not in self.chat.stop_ids:
            self.console.print(f"[dim](cut at {self.max_tokens} tokens: --max-tokens)")
        return content

    def loop(self) -> None:
        """Read messages until the user leaves."""
        self.console.print(f"[dim]{self.mode} mode; {HELP}")
        while True:
            try:
                text = self.console.input("[bold cyan]> [/]").strip()
            except EOFError:
                return
            if text in ("/quit", "/exit"):
                return
            if text == "/new":
                self.messages.clear()
            elif text == "/fast":
                self.mode = "fast"
            elif text == "/reasoning":
                self.mode = "reasoning"
            elif text.startswith("/"):
                self.console.print(f"[dim]{HELP}")
            elif text:
                self.answer(text)
