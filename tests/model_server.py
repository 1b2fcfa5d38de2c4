"""A fake of three model servers: the HTTP of each API in a thread, over a real tiny model.

What it answers is computed by the model; what a test injects through `fault` is the fault.
"""

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Reply = tuple[int, Any, Mapping[str, str]]
"""Status; a JSON value, or bytes as they are; headers."""
Fault = Callable[[str, Any, int], Reply | None]
"""(route, body, number of requests to this route so far, this one included) -> instead of it."""
Edit = Callable[[str, Any], Any]
"""(route, the right answer) -> what is sent."""
CONTEXT = 200


class ModelServer:
    """Listens on a free port of the loopback address until it is closed."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.models = ["tiny"]
        self.fault: Fault = lambda route, body, count: None
        self.edit: Edit = lambda route, answer: answer
        self.requests: list[tuple[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.old_llamacpp = False  # one that leaves the token that ends an answer out
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or a kept connection answers after 40 ms

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                raw = self.rfile.read(length)
                if len(raw) < length:  # who asked was cancelled
                    self.close_connection = True
                    return
                self._answer(json.loads(raw))

            def _answer(self, body: Any) -> None:
                status, content, headers = outer._reply(self.path, body, dict(self.headers))
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": len(raw), **headers}.items():
                        self.send_header(name, str(value))
                    self.end_headers()
                    self.wfile.write(raw)
                except OSError:  # who asked has gone away: that is what some tests are about
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Stop listening; done twice it is harmless."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def count(self, route: str) -> int:
        """Requests to this route so far."""
        return sum(asked == route for asked, _ in self.requests)

    def bodies(self, route: str) -> list[Any]:
        """What was sent to this route."""
        return [body for asked, body in self.requests if asked == route]

    def _reply(self, route: str, body: Any, headers: Mapping[str, str]) -> Reply:
        with self._lock:
            self.requests.append((route, body))
            self.headers.append(headers)
            count = self.count(route)
        if instead := self.fault(route, body, count):
            return instead
        answers: dict[str, Callable[[Any], Any]] = {
            "/v1/models": lambda body: {
                "data": [{"id": name, "max_model_len": CONTEXT} for name in self.models]
            },
            "/detokenize": self._detokenize,
            "/tokenize": lambda body: {"tokens": self.tokenizer(body["content"])["input_ids"]},
            "/v1/completions": self._vllm,
            "/generate": self._sglang,
            "/completion": self._llamacpp,
        }
        if route not in answers:
            return 404, {"error": {"message": f"no route {route}"}}, {}
        return 200, self.edit(route, answers[route](body)), {}

    def logp(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities of the token after each of `ids`, [T, V]."""
        with torch.inference_mode():
            logits_TV = self.model(input_ids=torch.tensor([ids])).logits[0]
        return logits_TV.double().log_softmax(-1).numpy()

    def _decode(self, ids: list[int], count: int, temperature: float, seed: int, stop: set[int]):  # noqa: ANN202
        rng, made, logps = np.random.default_rng(seed), [], []
        while len(made) < count and not (made and made[-1] in stop):
            logp_V = self.logp([*ids, *made])[-1]
            noise_V = rng.gumbel(size=len(logp_V)) * temperature
            made.append(int((logp_V + noise_V).argmax()))
            logps.append(float(logp_V[made[-1]]))
        return made, logps, "stop" if made[-1] in stop else "length"

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _detokenize(self, body: Any) -> Any:
        text = self._text(body["tokens"])
        return {"prompt": text, "content": text}

    def _vllm(self, body: Any) -> Any:
        prompt = body["prompt"]
        stop = set(body.get("stop_token_ids", []))
        made, logps, end = self._decode(
            prompt, body["max_tokens"], body["temperature"], body["seed"], stop
        )
        choice = {
            "finish_reason": end, "token_ids": made, "prompt_token_ids": prompt,
            "logprobs": {"token_logprobs": logps}, "prompt_logprobs": None,
        }  # fmt: skip
        if "prompt_logprobs" in body:
            rows = zip(self.logp(prompt)[:-1], prompt[1:], strict=True)
            choice["prompt_logprobs"] = [None, *(
                {str(i): {"logprob": float(row[i])}
                 for i in {*_top(row, body["prompt_logprobs"]), label}}
                for row, label in rows
            )]  # fmt: skip
        return {"choices": [choice]}

    def _sglang(self, body: Any) -> Any:
        ids, asked = body["input_ids"], body["sampling_params"]
        temperature = asked.get("temperature", 1.0)
        made, logps, end = self._decode(
            ids, asked["max_new_tokens"], temperature, asked.get("sampling_seed", 0),
            set(asked.get("stop_token_ids", [])),
        )  # fmt: skip
        tempered = [logp / (temperature or 0.5) for logp in logps]
        about: dict[str, Any] = {
            "finish_reason": {"type": end, "matched": made[-1]},
            "output_token_logprobs": [[x, i, None] for x, i in zip(tempered, made, strict=True)],
        }
        if (first := body.get("logprob_start_len", -1)) >= 0:
            text = body.get("return_text_in_logprobs", False)
            rows = self.logp(ids)[:-1]
            labels = [None, *(float(row[i]) for row, i in zip(rows, ids[1:], strict=True))]
            about["input_token_logprobs"] = [
                [None if place == first else labels[place], ids[place],
                 self._text([ids[place]]) if text else None]
                for place in range(first, len(ids))
            ]  # fmt: skip
            if top := body.get("top_logprobs_num", 0):
                about["input_top_logprobs"] = [None] + [
                    [[float(row[i]), i, None] for i in _top(row, top)] for row in rows[first:]
                ]
        return {"text": "", "output_ids": made, "meta_info": about}

    def _llamacpp(self, body: Any) -> Any:
        prompt, pushed = body["prompt"], dict(map(tuple, body.get("logit_bias", [])))
        eos = self.tokenizer.eos_token_id
        made, logps, end = self._decode(
            prompt, body["n_predict"], body["temperature"], body["seed"], {eos}
        )
        if pushed:
            made, logps, end = [*pushed][:1], [0.0], "length"
        rows = self.logp([*prompt, *made])[len(prompt) - 1 :]
        tops = [
            [{"id": i, "logprob": float(row[i])} for i in _top(row, body["n_probs"])]
            for row in rows[: len(made)]
        ]
        reports = [
            {"id": token, "logprob": logp, "top_logprobs": top}
            for n, (token, logp, top) in enumerate(zip(made, logps, tops, strict=True))
            if not self._text(made[: n + 1]).endswith("\ufffd")
        ]
        if self.old_llamacpp and end == "stop":
            made, reports = made[:-1], reports[:-1]
        return {
            "tokens": made, "completion_probabilities": reports, "tokens_evaluated": len(prompt),
            "truncated": False, "stop_type": "eos" if end == "stop" else "limit",
        }  # fmt: skip


def _top(row: np.ndarray, count: int) -> list[int]:
    return np.argsort(-row, kind="stable")[:count].tolist()
