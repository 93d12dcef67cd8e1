"""What a server did with a run of requests, in numbers of `vllm bench serve`, and what follows from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

LIMITS = ("ttft_ms", "tpot_ms", "e2el_ms")  # what a goodput can limit


@dataclasses.dataclass(frozen=True)
class Quantiles:
    """The mean and three percentiles of a time over the requests of a run, in milliseconds."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclasses.dataclass(frozen=True)
class Served:
    """A run of requests, or the mean of several runs of the same requests.

    Attributes:
        concurrency: The most requests that ran at once; None where they came at a rate.
        request_rate: The requests that came in a second; None where each came when there was room for it.
        requests: The number of requests.
        seconds: The seconds from the first request to the last answer.
        input_tokens: The tokens of all prompts.
        output_tokens: The tokens of all answers.
        tokens_per_s: The output tokens in a second.
        requests_per_s: The requests that were answered in a second.
        goodput_per_s: Those of them that kept the limits; None where no limits are named.
        ttft_ms: The time to the first token.
        tpot_ms: The time per output token after the first, the mean over an answer.
        itl_ms: The time between two tokens.
        e2el_ms: The time from a request to its last token.
        runs: The number of runs.
    """

    concurrency: int | None
    request_rate: float | None
    requests: int
    seconds: float
    input_tokens: int
    output_tokens: int
    tokens_per_s: float
    requests_per_s: float
    goodput_per_s: float | None
    ttft_ms: Quantiles
    tpot_ms: Quantiles
    itl_ms: Quantiles
    e2el_ms: Quantiles
    runs: int = 1

    @property
    def load(self) -> str:
        """The load in words."""
        if self.request_rate is not None:
            return f"{self.request_rate:g} requests/s"
        return f"{self.concurrency} at once"

    @property
    def seconds_per_token(self) -> float:
        """The seconds of the run over the generated tokens.

        Where requests come at a rate, the rate decides how long a run takes, whatever the model. The mean time of a
        request over the mean tokens of its answer takes its place, the normalized latency of Kwon et al. 2023
        (https://arxiv.org/abs/2309.06180).
        """
        if self.request_rate is None:
            return self.seconds / self.output_tokens
        return self.e2el_ms.mean / 1e3 * self.requests / self.output_tokens


def of_result(values: Mapping[str, Any], concurrency: int | None, request_rate: float | None) -> Served:
    """Return the run in a result of `vllm bench serve`.

    Args:
        values: The JSON object that `--save-result` wrote.
        concurrency: The most requests that were to run at once.
        request_rate: The requests that were to come in a second.

    Raises:
        ValueError: Requests failed, a number is missing or no positive number, or no token was generated.
    """
    failed, completed = _number(values, "failed"), _number(values, "completed")
    if failed or not completed:
        raise ValueError(f"{failed:g} of {failed + completed:g} requests failed")
    if _number(values, "total_output_tokens") < 1:
        raise ValueError("no token was generated")
    good = values.get("request_goodput")
    return Served(
        concurrency=concurrency,
        request_rate=request_rate,
        requests=int(completed),
        seconds=_number(values, "duration"),
        input_tokens=int(_number(values, "total_input_tokens")),
        output_tokens=int(_number(values, "total_output_tokens")),
        tokens_per_s=_number(values, "output_throughput"),
        requests_per_s=_number(values, "request_throughput"),
        goodput_per_s=None if good is None else _number(values, "request_goodput"),
        ttft_ms=_quantiles(values, "ttft"),
        tpot_ms=_quantiles(values, "tpot"),
        itl_ms=_quantiles(values, "itl"),
        e2el_ms=_quantiles(values, "e2el"),
    )


def _quantiles(values: Mapping[str, Any], name: str) -> Quantiles:
    return Quantiles(*(_number(values, f"{which}_{name}_ms") for which in ("mean", "p50", "p95", "p99")))


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"its {name} is {value!r}")
    return float(value)


def from_dict(values: Mapping[str, Any]) -> Served:
    """Return the run in JSON values, as `dataclasses.asdict` gives them."""
    times = {name: Quantiles(**values[name]) for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms")}
    return Served(**{**values, **times})


def mean_of(runs: Sequence[Served]) -> Served:
    """Return the mean of each number over runs under one load.

    Raises:
        ValueError: There is no run, or two have another load.
    """
    if len({(run.concurrency, run.request_rate) for run in runs}) != 1:
        raise ValueError("served: only runs under one load have a mean")
    good = [run.goodput_per_s for run in runs if run.goodput_per_s is not None]
    return Served(
        concurrency=runs[0].concurrency,
        request_rate=runs[0].request_rate,
        requests=runs[0].requests,
        seconds=_mean([run.seconds for run in runs]),
        input_tokens=round(_mean([run.input_tokens for run in runs])),
        output_tokens=round(_mean([run.output_tokens for run in runs])),
        tokens_per_s=_mean([run.tokens_per_s for run in runs]),
        requests_per_s=_mean([run.requests_per_s for run in runs]),
        goodput_per_s=_mean(good) if good else None,
        ttft_ms=_mean_quantiles([run.ttft_ms for run in runs]),
        tpot_ms=_mean_quantiles([run.tpot_ms for run in runs]),
        itl_ms=_mean_quantiles([run.itl_ms for run in runs]),
        e2el_ms=_mean_quantiles([run.e2el_ms for run in runs]),
        runs=sum(run.runs for run in runs),
    )


def _mean_quantiles(each: Sequence[Quantiles]) -> Quantiles:
    return Quantiles(*map(_mean, zip(*(dataclasses.astuple(one) for one in each), strict=True)))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
