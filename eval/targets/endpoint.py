"""A model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from plumbline.eval.targets.target import reply_of
from plumbline.eval.tasks import Prompt, Reply, digest


class EndpointTarget:
    """An OpenAI-compatible chat endpoint. Each question has its own time-out, and is tried `tries` times."""

    gives_logp = False

    def __init__(
        self, name: str, url: str, model: str, *, key: str = "", timeout_s: float = 60, tries: int = 2, parallel: int = 4
    ) -> None:  # fmt: skip
        self.name, self.url, self.model, self.key = name, url.rstrip("/"), model, key
        self.timeout_s, self.tries, self.parallel = timeout_s, tries, parallel
        self.fingerprint = digest("endpoint", self.url, model)

    def check(self) -> None:
        """Asks one short question; ValueError with the reason if no answer comes, before hundreds of them time out."""
        prompts: list[Prompt] = [[{"role": "user", "content": "Hello"}]]
        (reply,) = self.reply(prompts, max_new_tokens=8, temperature=0.0, seed=0)
        if reply.error:
            raise ValueError(f"target {self.name!r} does not answer: {reply.error}; start the server or mend the URL")

    def reply(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float, seed: int) -> list[Reply]:
        def one(prompt: Prompt) -> Reply:
            body: dict[str, Any] = {
                "model": self.model, "max_tokens": max_new_tokens, "temperature": temperature, "seed": seed,
            }  # fmt: skip
            kind = "completions" if isinstance(prompt, str) else "chat/completions"
            body |= {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
            return self._ask(kind, body)

        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(one, prompts))

    def _ask(self, kind: str, body: dict[str, Any]) -> Reply:
        import urllib.error
        import urllib.request

        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url}/{kind}", json.dumps(body).encode(), headers)
        error = ""
        for _ in range(self.tries):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                    choice = json.load(answer)["choices"][0]
                reply = reply_of(choice.get("message", {"content": choice.get("text")}), "the endpoint's answer")
                return reply if reply.error else replace(reply, finished=choice.get("finish_reason") != "length")
            except urllib.error.HTTPError as problem:
                error = f"HTTP {problem.code} from {self.url}"
                if problem.code < 500 and problem.code != 429:  # asking again would not help
                    break
            except TimeoutError:
                error = f"time-out after {self.timeout_s:g} s"
            except OSError as problem:  # refused, unknown host, reset
                error = f"{self.url} cannot be reached: {problem}"
            except (ValueError, KeyError, IndexError, TypeError) as problem:
                error = f"not an OpenAI-style answer ({type(problem).__name__}: {problem})"
        return Reply(error=error)

    def logp(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        raise NotImplementedError

    def close(self) -> None:
        pass
