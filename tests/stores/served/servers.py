"""Servers that answer in the words of vLLM and of llama-cpp-python, from any function of token ids to logits."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusechat.chats.vocabulary import token_bytes
from tests.serving import serve, url

Logits = Callable[[list[int]], Tensor]  # T ids -> [T, V]
Answer = dict[str, Any]


class Server(ABC):
    """Counts what it is asked. spoil: changes an answer; status: of the n-th completion, 200 or an error's."""

    def __init__(self, tokenizer: Any, logits: Logits) -> None:
        self.tokenizer, self.logits = tokenizer, logits
        self.asked: list[Answer] = []
        self.keys: set[str | None] = set()
        self.spoil: Callable[[Answer], Any] = lambda answer: answer
        self.status: Callable[[int], int] = lambda n: 200
        self.models: Any = {"object": "list", "data": [{"id": "big", "object": "model", "max_model_len": 513}]}
        self.server = serve(self.take)
        self.url = f"{url(self.server)}/v1"

    def take(self, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        self.keys.add(headers["Authorization"])
        if path == "/v1/models":
            return (200, self.models) if self.models else (404, {"detail": "Not Found"})
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        self.asked.append(json.loads(body))
        if (status := self.status(len(self.asked))) != 200:
            return status, {"error": {"message": "no", "code": status}}
        return 200, self.spoil(self.completion(self.asked[-1]))

    @abstractmethod
    def completion(self, body: Answer) -> Answer:
        """What it answers to a request that it takes."""

    def greedy(self, ids: list[int], most: int, stops: list[int]) -> list[int]:
        made: list[int] = []
        while len(made) < most and not (made and made[-1] in stops):
            made.append(int(self.logits(ids + made)[-1].argmax()))
        return made[:-1] if made and made[-1] in stops else made


class VLLM(Server):
    """Token ids in; prompt_logprobs with ranks and texts, the token itself always among them."""

    def completion(self, body: Answer) -> Answer:
        ids = body["prompt"]
        assert isinstance(ids, list) and all(isinstance(token, int) for token in ids)
        made = self.greedy(ids, body["max_tokens"], body.get("stop_token_ids", []))
        choice: Answer = {"index": 0, "text": self.tokenizer.decode(made, skip_special_tokens=True), "logprobs": None}
        choice |= {"finish_reason": "length", "stop_reason": None, "prompt_logprobs": None, "prompt_token_ids": None}
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = self.listed(ids, body["prompt_logprobs"])
        if body.get("return_token_ids"):
            choice |= {"prompt_token_ids": ids, "token_ids": made}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(made), "total_tokens": len(ids) + len(made)}
        return {
            "id": "cmpl-1",
            "object": "text_completion",
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
        }

    def listed(self, ids: list[int], k: int) -> list[Any]:
        logprobs = self.logits(ids).float().log_softmax(-1)
        rows: list[Any] = [None]
        for row, gold in zip(logprobs[:-1], ids[1:], strict=True):
            best = row.topk(k).indices.tolist()
            ranks = {token: n for n, token in enumerate(best, 1)}
            ranks.setdefault(gold, int((row >= row[gold]).sum()))
            rows.append(
                {
                    str(token): {
                        "logprob": max(float(row[token]), -9999.0),
                        "rank": rank,
                        "decoded_token": self.tokenizer.decode([token]),
                    }
                    for token, rank in ranks.items()
                }
            )
        return rows


class LlamaCpp(Server):
    """Texts in and out, as llama-cpp-python 0.3.36 has them: see `fusechat.stores.served.by_text`."""

    adds_bos = False

    def completion(self, body: Answer) -> Answer:
        bos, pieces = self.tokenizer.bos_token_id, token_bytes(self.tokenizer)
        text = lambda token: (pieces[token] or b"").decode(errors="ignore")
        ids = [bos] * self.adds_bos + self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
        made = self.greedy(ids, body["max_tokens"], [self.tokenizer.eos_token_id])
        choice: Answer = {"index": 0, "text": self.tokenizer.decode(made), "logprobs": None, "finish_reason": "length"}
        if body.get("logprobs") is not None:
            logprobs = self.logits(ids).float().log_softmax(-1)
            listed = (ids[1:] if ids[0] == bos else ids) + made
            tokens, values, tops = [], [], []
            for token, row in zip(listed, logprobs, strict=False):
                if token != bos:
                    best = row.topk(min(body["logprobs"], row.numel()))
                    top = {text(i): float(value) for value, i in zip(best.values, best.indices.tolist(), strict=True)}
                    tokens.append(text(token))
                    values.append(float(row[token]))
                    tops.append(top | {text(token): float(row[token])})
            choice["logprobs"] = {
                "tokens": tokens,
                "token_logprobs": [None, *values[1:]],
                "text_offset": [0] * len(tokens),
            }
            choice["logprobs"]["top_logprobs"] = [None, *tops[1:]]
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(made), "total_tokens": len(ids) + len(made)}
        return {"id": "cmpl-1", "object": "text_completion", "model": "big", "choices": [choice], "usage": usage}


def of_model(path: Any) -> Logits:
    """Logits of a model's directory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path).eval()

    @torch.no_grad()
    def logits(ids: list[int]) -> Tensor:
        return model(torch.tensor([ids])).logits[0]

    return logits
