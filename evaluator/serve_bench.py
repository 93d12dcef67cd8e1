"""Puts a load on a server by `vllm bench serve`, the reference of how a server is measured, and reads its result."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluator import keeper, last_words, served
from evaluator.errors import EngineCrashed, EngineTimeout
from evaluator.served import Served
from evaluator.server import HOST, Server, environment
from evaluator.workload import Workload
from readers import json_reader

PERCENTILES = "50,95,99"
RESULT, PROMPTS = "result.json", "prompts.jsonl"


def command(server: Server, workload: Workload, concurrency: int | None, directory: Path) -> list[str]:
    """Return the command that puts a load on a server.

    Args:
        server: The server.
        workload: A workload of kind serve.
        concurrency: The most requests at once; None: requests come at the workload's rate.
        directory: Where the result goes and, where the workload has texts, the prompts lie.
    """
    words = [sys.executable, "-P", "-m", "evaluator.vllm_command", "bench", "serve", "--backend", "openai"]
    words += ["--base-url", f"http://{HOST}:{server.port}", "--endpoint", "/v1/completions"]
    words += ["--model", str(server.path), "--served-model-name", server.name]
    words += ["--num-prompts", str(workload.requests), "--seed", str(workload.seed), "--temperature", "0"]
    words += ["--extra-body", json.dumps({"add_special_tokens": False})]  # prompts have theirs already
    words += ["--save-result", "--result-dir", str(directory), "--result-filename", RESULT, "--disable-tqdm"]
    words += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", PERCENTILES]
    if workload.ignore_eos:
        words.append("--ignore-eos")
    if concurrency is None:
        words += ["--request-rate", str(workload.request_rate)]
    else:
        words += ["--max-concurrency", str(concurrency)]
    if workload.goodput:
        limits = [f"{name.removesuffix('_ms')}:{value:g}" for name, value in workload.goodput.items()]
        words += ["--goodput", *limits]
    return [*words, *_dataset(workload, directory)]


def _dataset(workload: Workload, directory: Path) -> list[str]:
    if workload.texts:
        path = str(directory / PROMPTS)
        words = ["--dataset-name", "custom", "--dataset-path", path, "--custom-output-len", "-1"]
        return [*words, "--skip-chat-template", "--disable-shuffle"]
    (mean_in, share_in), (mean_out, share_out) = map(spread, (workload.input_tokens, workload.output_tokens))
    words = ["--dataset-name", "random", "--random-input-len", str(mean_in), "--random-output-len", str(mean_out)]
    share = str(share_in) if share_in == share_out else json.dumps({"input": share_in, "output": share_out})
    return [*words, "--random-range-ratio", share]


def spread(lengths: tuple[int, int]) -> tuple[int, float]:
    """Return the mean of two lengths, rounded down, and how far they lie from it as a share of it."""
    low, high = lengths
    mean = (low + high) // 2
    return mean, (high - low) / 2 / mean


def run(server: Server, workload: Workload, concurrency: int | None, timeout_s: float = 300.0) -> Served:
    """Put all requests on a server, once; it reads every prompt from the start.

    Args:
        server: The server.
        workload: A workload of kind serve.
        concurrency: The most requests at once; None: requests come at the workload's rate.
        timeout_s: The seconds that it may take.

    Raises:
        EngineTimeout: It took longer than allowed.
        EngineCrashed: A request failed, or the server or the client ended; the last lines are quoted.
    """
    with tempfile.TemporaryDirectory(prefix="optuna-search-serve-") as name:
        directory = Path(name)
        if workload.texts:
            (directory / PROMPTS).write_text(prompts(workload), encoding="utf-8")
        server.forget()
        log = directory / "client.log"
        words = command(server, workload, concurrency, directory)
        status = _run(words, log, timeout_s)
        load = f"{workload.request_rate:g} requests/s" if concurrency is None else f"{concurrency} requests at once"
        where = f"vllm bench serve, {server.path.name}, {load}:"
        if status is None:
            server.close()  # what it was asked still runs there
            raise EngineTimeout(
                f"{where} it took longer than {timeout_s:g} s and was killed; raise call_timeout_s, or lower "
                f"evaluation.workload.requests"
            )
        result = directory / RESULT
        if status or not result.is_file():
            told = (
                f"the server ended{last_words.of(server.log)}" if not server.alive else f"it failed{last_words.of(log)}"
            )
            raise EngineCrashed(f"{where} {told}; the server's log is {server.log}")
        try:
            rate = workload.request_rate if concurrency is None else None
            return served.of_result(json_reader.read(result, finite=False), concurrency, rate)
        except ValueError as error:
            raise EngineCrashed(f"{where} {error}{last_words.of(log)}; the server's log is {server.log}") from None


def prompts(workload: Workload) -> str:
    """Return the workload's texts as the lines of a file for `--dataset-name custom`."""
    pairs = zip(workload.texts, workload.asked, strict=True)
    lines = [json.dumps({"prompt": text, "output_tokens": one.limits.max_tokens}) for text, one in pairs]
    return "\n".join(lines) + "\n"


def _run(words: Sequence[str], log: Path, timeout_s: float) -> int | None:
    """Return the command's exit status; None where it took too long and was killed, as it is with this process."""
    with log.open("wb") as output:
        process = keeper.start(words, output, environment())
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        keeper.end(process)


class Timed:
    """A server as an engine that is timed; see `evaluator.speed`.

    Args:
        server: The server.
        workload: A workload of kind serve.
        timeout_s: The seconds that a run may take.
        progress: A function that is told what is being done.

    Attributes:
        runs: What the server did in each run, in their order.
    """

    def __init__(
        self,
        server: Server,
        workload: Workload,
        timeout_s: float = math.inf,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.server, self._workload, self._timeout_s = server, workload, timeout_s
        self._progress, self.runs = progress, list[Served]()

    @property
    def alive(self) -> bool:
        """Whether the server runs."""
        return self.server.alive

    def serve(self, size: int) -> list[float]:
        """Return the seconds in which `size` tokens were generated, from a run of all requests.

        Raises:
            EngineCrashed: The run failed.
        """
        concurrency = size if self._workload.request_rate is None else None
        if self._progress is not None:
            self._progress(f"timing, run {len(self.runs) + 1}")
        done = run(self.server, self._workload, concurrency, self._timeout_s)
        self.runs.append(done)
        return [size * done.seconds_per_token]

    def means(self) -> tuple[Served, ...]:
        """Return the mean of all runs under each load, in the order of the loads, without each load's first run.

        The first run warms the server up.
        """
        by_load: dict[Any, list[Served]] = {}
        for one in self.runs:
            by_load.setdefault(one.concurrency, []).append(one)
        return tuple(served.mean_of(runs[1:] or runs) for runs in by_load.values())
