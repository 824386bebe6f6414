"""A llama-server on this machine: started on files of an export, asked, and ended."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from molora_fed.serving.addresses import find_free_port

__all__ = ["Server", "find_binary", "serving"]

VARIABLE = "MOLORA_LLAMA_SERVER"
"""Environment variable with the path of a llama-server binary."""
_EXACT = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
_START_SECONDS = 120.0


def find_binary() -> Path | None:
    """The binary that the environment names; None if it names none."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None


class Server:
    """A running server.

    Args:
        client: Connected to it.
    """

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def ask(
        self, tokens: Sequence[int], lora: Sequence[Mapping[str, Any]] | None, count: int
    ) -> dict[int, float]:
        """Log-probabilities of the likeliest next tokens, nats, by id.

        Args:
            tokens: The prompt.
            lora: The request's adapters and scales; None leaves the field out.
            count: How many.
        """
        answer = self._post(
            "/completion",
            {
                "prompt": list(tokens),
                **({} if lora is None else {"lora": list(lora)}),
                "n_predict": 1,
                "n_probs": count,
                "temperature": 0.0,
                "cache_prompt": False,
            },
        )
        (first,) = answer["completion_probabilities"]
        return {one["id"]: one["logprob"] for one in first["top_logprobs"]}

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._post("/tokenize", {"content": text, "add_special": True})["tokens"]

    def list_adapters(self) -> list[dict[str, Any]]:
        """The adapters it has loaded."""
        answer = self._client.get("/lora-adapters")
        answer.raise_for_status()
        return answer.json()

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        answer = self._client.post(path, json=body)
        answer.raise_for_status()
        return answer.json()


@contextlib.contextmanager
def serving(binary: Path, arguments: Sequence[str], folder: Path) -> Iterator[Server]:
    """A server while the block runs, with all its numbers in float32.

    Args:
        binary: llama-server.
        arguments: As in the README of an export, after the command's name.
        folder: Where it is started; its log is written beside it.
    """
    port = find_free_port()
    command = [str(binary), *arguments, *_EXACT, "--threads", "1", "--ctx-size", "512"]
    command += ["--port", str(port), "--parallel", "1", "--no-warmup"]
    log = folder.with_name(f"{folder.name}.log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                _await_health(client, process, log)
                yield Server(client)
        finally:
            process.terminate()
            process.wait(30)


def _await_health(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health").status_code == httpx.codes.OK:
                return
        time.sleep(0.05)  # a server that starts gives no other sign
    tail = log.read_text(encoding="utf-8", errors="replace")[-1500:]
    raise RuntimeError(f"llama-server did not start: {tail}")
