"""Server runs `vllm serve` on a checkpoint, with the settings that people serve models with.

An engine of `evaluator.backends` starts in seconds and leaves out what a served token does not need. A server compiles,
schedules, streams and talks HTTP. It listens on 127.0.0.1 alone and ends with this process, whatever ends that; see
`evaluator.keeper`.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluator import keeper, last_words
from evaluator.closing import ClosingUnheld
from evaluator.errors import EngineCrashed, EngineOutOfMemory, EngineTimeout
from evaluator.forkserver import OUT_OF_MEMORY

HOST = "127.0.0.1"
TRIES = 3  # ports: another program may take one before the server does
PORT_TAKEN = ("address already in use", "eaddrinuse")
LOOK_S = 0.5
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_PROXY": HOST,
    "no_proxy": HOST,
    "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache, or a second run of the same requests would skip its prefill
}
FIXED = {"load_format": "safetensors"}  # no pickles
NEVER = ("trust_remote_code", "host", "port", "api_key")


def environment() -> dict[str, str]:
    """Return the environment of a server and of its client, which can import what this process can."""
    here = [entry or str(Path.cwd()) for entry in sys.path]
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(here)}


def command(path: Path, name: str, port: int, arguments: Mapping[str, Any]) -> list[str]:
    """Return the command that serves a checkpoint.

    Args:
        path: The checkpoint's directory.
        name: The name that requests call the model by.
        port: The port.
        arguments: Arguments of `vllm serve` by their names in Python; None leaves one to vLLM, false is `--no-NAME`.
    """
    words = [sys.executable, "-P", "-m", "evaluator.vllm_command", "serve", str(path), "--host", HOST]
    words += ["--port", str(port), "--served-model-name", name]
    for argument, value in {**FIXED, **arguments}.items():
        option = argument.replace("_", "-")
        if value is None or argument in NEVER:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", value if isinstance(value, str) else json.dumps(value)]
    return words


class Server(ClosingUnheld):
    """A started server. Use it with `with`, or close it.

    Args:
        path: The checkpoint directory, with its tokenizer.
        log: The file for the server's output; it is emptied at the start.
        arguments: Arguments of `vllm serve`; see `command`.
        timeout_s: The seconds that the start may take.

    Attributes:
        name: The name that requests call the model by, which no other server has.
        port: The port that it listens on.
        seconds: The seconds until it was ready.

    Raises:
        EngineTimeout: The start took longer than allowed.
        EngineOutOfMemory: The server found too little memory.
        EngineCrashed: The server ended.
    """

    def __init__(
        self, path: str | Path, log: str | Path, arguments: Mapping[str, Any] | None = None, timeout_s: float = 300.0
    ) -> None:
        self.path, self.log = Path(path).resolve(), Path(log).resolve()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.name = f"served-{secrets.token_hex(8)}"
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        started = time.monotonic()
        for left in reversed(range(TRIES)):
            self.port = _free_port()
            self._start(command(self.path, self.name, self.port, arguments or {}))
            try:
                self._wait()
                break
            except EngineCrashed:
                if not left or not any(words in self._text().lower() for words in PORT_TAKEN):
                    raise
        self.seconds = time.monotonic() - started

    @property
    def alive(self) -> bool:
        """Whether the server runs."""
        return self._keeper.poll() is None

    def forget(self) -> None:
        """Let the server forget the prompts that it has read, so that it reads the next ones from the start.

        Raises:
            EngineCrashed: The server ended or does not do it.
        """
        status, _ = self._asked("POST", "/reset_prefix_cache")
        if status != 200:
            raise EngineCrashed(
                f"vllm serve, {self.path.name}: it does not empty its prefix cache (HTTP {status}), so that its second "
                f"run would be faster than its first; its log is {self.log}{last_words.of(self.log)}"
            )

    def close(self) -> None:
        """Kill the server and what it started. A second call does nothing."""
        keeper.end(self._keeper)

    # -- the process -----------------------------------------------------------------------------------------

    def _start(self, words: list[str]) -> None:
        with self.log.open("wb") as log:
            self._keeper = keeper.start(words, log, environment())

    def _wait(self) -> None:
        try:
            while not self._ready():
                if not self.alive:
                    raise self._ended()
                if time.monotonic() > self._deadline:
                    raise EngineTimeout(
                        f"vllm serve, {self.path.name}: it was not ready after {self._timeout_s:g} s and was killed; "
                        f"raise start_timeout_s{last_words.of(self.log)}"
                    )
                time.sleep(LOOK_S)
        except BaseException:
            self.close()
            raise

    def _ready(self) -> bool:
        """Whether the server is ready; another one that has its port doesn't know its name."""
        try:
            if self._asked("GET", "/health")[0] != 200:
                return False
            status, text = self._asked("GET", "/v1/models")
        except EngineCrashed:
            return False
        return status == 200 and self.name in text

    def _asked(self, method: str, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10.0)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read(1 << 20).decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise EngineCrashed(
                f"vllm serve, {self.path.name}: it does not answer ({type(error).__name__}); its log is "
                f"{self.log}{last_words.of(self.log)}"
            ) from None
        finally:
            connection.close()

    def _ended(self) -> EngineCrashed:
        text = self._text().lower()
        where = f"vllm serve, {self.path.name}: start:"
        if any(words in text for words in OUT_OF_MEMORY):
            return EngineOutOfMemory(
                f"{where} it found too little memory; lower gpu_memory_utilization or max_model_len, or free memory"
                f"{last_words.of(self.log)}"
            )
        return EngineCrashed(f"{where} it ended; its log is {self.log}{last_words.of(self.log)}")

    def _text(self) -> str:
        try:
            return self.log.read_bytes()[-8000:].decode(errors="replace")
        except OSError:
            return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
