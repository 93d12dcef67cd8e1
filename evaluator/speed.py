"""Functions that time a candidate and the baseline in turn on one machine.

A machine's disturbances come and go over seconds, and they only add time. So the two engines take turns: candidate,
baseline, baseline, candidate, …. Each engine's time is the mean of the fastest twentieth of its decode steps. Its
standard error comes from half-samples of the turns, in pairs of neighbours, since steps of one turn are not
independent.

The table has the standard deviation of the ratio in A/A runs, whose true ratio is 1, by the statistic of the steps:

                              H100, vLLM, 1.28B parameters      2 cores, transformers, 31M
                              single steps    means of a turn   single steps
    mean of all               4.0%            4.0%              4.7%
    median                    4.1%                              7.3%
    lower quartile            2.4%            1.7%              1.5%
    fastest fifth, mean       2.5%            1.3%              0.8%
    fastest twentieth, mean   4.0%            0.6%
    minimum                   4.6%            0.6%              1.0%

On the H100 these are ten runs of 40 turns of 24 steps, host-bound at 2 ms a step. On the cores they are twelve runs of
12 turns of 16 steps in float32, while other work ran.

The scheduler of vLLM runs a step ahead, so that the time between two steps says little. The vLLM engine therefore
reports the mean of a turn for each of its steps.

Half-samples are used because the bootstrap and the delete-one jackknife underestimate the error of a statistic so near
a minimum (Politis and Romano 1994, https://doi.org/10.1214/aos/1176325770).

A turn of a workload of kind batch or serve is a run of all its requests, and one sample. A run averages over its own
steps, so that more of the runs count, the fastest FASTEST_RUNS: over 12 turns of 12 requests on 2 cores the ratio in
A/A runs had a standard deviation of 0.9%, that of the minima 1.1%, of the medians 1.1% and of the means 1.5%.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from evaluator import batch
from evaluator.generation import Answer, Limits
from evaluator.measurement import Timing
from evaluator.workload import Workload

DISCARDED = 3  # the first steps after a switch, when caches are cold and threads asleep
FASTEST = 0.05  # the share of the steps that counts
FASTEST_RUNS = 0.25  # the share of the runs of all requests that counts
RESAMPLES = 400
SLOWER, AGAIN = 1.03, 2  # see time_in_turn
ROUND = 8  # turns of each engine and batch size, after which a timing may end
SURE = 3.0  # standard errors
LITTLE = 0.1  # of the variance of a time per token, which is not worth more turns; see `uncertain`
BYTES_SHARE = 0.5  # the share of reading weights in a decode step at batch 1; see predicted_time_ratio

Turns = Sequence[Sequence[float]]  # seconds of each step, one list for each turn
Both = tuple[Mapping[int, Turns], Mapping[int, Turns]]  # the turns of candidate and baseline, by batch size


class Timed(Protocol):
    """What is needed of an engine that is timed."""

    def decode_steps(self, batch_size: int, prompt_tokens: int, steps: int, seed: int) -> list[float]:
        """Return the seconds of each of `steps` decode steps; see `evaluator.backends.Engine`."""

    def generate(self, prompts: Sequence[Sequence[int]], limits: Limits | Sequence[Limits]) -> list[Answer]:
        """Return the answer to each prompt, with its times; see `evaluator.backends.Engine`."""


@runtime_checkable
class TimedServer(Protocol):
    """What is needed of a server that is timed."""

    def serve(self, size: int) -> list[float]:
        """Return the seconds in which `size` tokens were generated; see `evaluator.serve_bench.Timed`."""


@dataclasses.dataclass(frozen=True)
class Enough:
    """When a timing may end before it has taken all of its turns.

    Attributes:
        time_ratio_se: The standard error of the time ratio that is small enough; 0: all turns are taken; infinite: a
            round of them is.
        lost_above: The time ratio above which a candidate has lost; None: there is none.
    """

    time_ratio_se: float = 0.0
    lost_above: float | None = None

    def reached_by(self, timing: Timing) -> bool:
        """Whether the timing is exact enough, or the candidate has lost by three standard errors."""
        if 0.0 < timing.time_ratio_se <= self.time_ratio_se:
            return True
        lost = self.lost_above
        return lost is not None and timing.time_ratio - SURE * timing.time_ratio_se > lost


ALL_TURNS = Enough()


def time_in_turn(
    candidate: Timed | TimedServer,
    baseline: Timed | TimedServer,
    workload: Workload,
    progress: Callable[[int, int], None] | None = None,
    *,
    expected_base_ms: float | None = None,
    enough: Enough = ALL_TURNS,
    steady: Callable[[Callable[[], Both]], Both] = lambda take: take(),
) -> Timing:
    """Time both engines on the workload; one engine twice shows how far two timings of one model lie apart.

    Turns are taken in rounds of ROUND. After each round the timing ends if that is enough; at the latest it ends after
    the workload's turns. Batch sizes that are not `uncertain` are left out of later rounds.

    Args:
        candidate: The candidate's engine.
        baseline: The baseline's engine.
        workload: What is timed.
        progress: A function that is called with the turns done and all turns, of both engines together.
        expected_base_ms: The baseline's time per token when it was timed alone. A process can be slow for as long as
            all its turns last (one A/A run of ten on an H100: 13%). If the baseline is slower than SLOWER times this,
            beyond its error, all turns are taken again, at most AGAIN times, and count together; no more of them where
            the baseline stays as slow: more turns of that process would say the same.
        enough: When fewer turns are enough.
        steady: A function that calls what it is given, which takes all turns, and calls it again where the machine was
            not steady meanwhile; see `evaluator.gpu_watch.GpuWatch`.
    """

    def take() -> Both:
        return _collect(candidate, baseline, workload, progress, enough)

    timed, share = steady(take), share_of(workload)
    timing = estimate(*timed, share)
    for _ in range(AGAIN):
        slow = timing.base_time_per_token_ms
        if expected_base_ms is None or not surely_slower(slow, timing.base_time_per_token_ms_se, expected_base_ms):
            break
        again = steady(take)
        timed = _joined(timed[0], again[0]), _joined(timed[1], again[1])
        timing = estimate(*timed, share)
        if SLOWER * estimate(*again, share).base_time_per_token_ms > slow:
            break
    return timing


def surely_slower(ms: float, ms_se: float, expected_ms: float) -> bool:
    """Say whether a time per token is longer than expected by more than SLOWER allows, and by SURE standard errors."""
    return ms > SLOWER * expected_ms and ms - SURE * ms_se > expected_ms


def _collect(
    candidate: Timed | TimedServer,
    baseline: Timed | TimedServer,
    workload: Workload,
    progress: Callable[[int, int], None] | None,
    enough: Enough,
) -> Both:
    if enough == ALL_TURNS:
        return collect(candidate, baseline, workload, progress)
    (timed,) = _in_rounds([candidate], baseline, workload, enough, progress, baseline_first=False)
    return timed


def _in_rounds(
    candidates: Sequence[Timed | TimedServer],
    baseline: Timed | TimedServer,
    workload: Workload,
    enough: Enough,
    progress: Callable[[int, int], None] | None,
    *,
    baseline_first: bool,
) -> list[Both]:
    """Return the turns of each candidate and of the baseline beside it, until each has enough; see `turns_of`."""
    pairs: dict[int, Both] = {}  # by the candidate's number
    left, share, sizes = list(range(len(candidates))), share_of(workload), workload.sizes
    taken = 0  # turns
    for start in range(0, workload.turns, ROUND):
        part = dataclasses.replace(workload, turns=max(min(ROUND, workload.turns - start), 2))
        later = max(workload.turns - start - part.turns, 0) * (1 + len(left)) * len(sizes)

        def counted(done: int, of_part: int, taken: int = taken, later: int = later) -> None:
            if progress is not None:
                progress(taken + done, taken + of_part + later)

        running = [candidates[number] for number in left]
        together = [baseline, *running] if baseline_first else [*running, baseline]
        turns = collect_all(together, part, counted, first=start == 0, sizes=sizes)
        base = turns.pop(0 if baseline_first else -1)
        taken += part.turns * len(together) * len(sizes)
        for number, its in zip(left, turns, strict=True):
            before = pairs.get(number)
            pairs[number] = (its, base) if before is None else (_joined(before[0], its), _joined(before[1], base))
        left = [number for number in left if not enough.reached_by(estimate(*pairs[number], share))]
        if not left:
            break
        sizes = uncertain([pairs[number] for number in left], share)
    return [turns for _, turns in sorted(pairs.items())]


def uncertain(timed: Sequence[Both], share: float) -> tuple[int, ...]:
    """Return the batch sizes that more turns are worth: those that make up more than LITTLE of a timing's variance.

    The time per token is the mean over batch sizes, and a step of 32 sequences makes 32 tokens: its error counts for a
    thirty-second of that of a single sequence, and its turns take longer.

    Args:
        timed: The turns so far, of one candidate or several.
        share: See `estimate`.
    """
    worth = set()
    for candidate, baseline in timed:
        each = {size: estimate({size: candidate[size]}, {size: baseline[size]}, share) for size in candidate}
        variance = {
            size: timing.time_per_token_ms_se**2 + timing.base_time_per_token_ms_se**2 for size, timing in each.items()
        }
        worth |= {size for size, own in variance.items() if own >= LITTLE * sum(variance.values())}
    return tuple(size for size in timed[0][0] if size in worth)


def _joined(turns: Mapping[int, Turns], more: Mapping[int, Turns]) -> dict[int, Turns]:
    return {size: [*turns[size], *more.get(size, ())] for size in turns}


def collect(
    candidate: Timed | TimedServer,
    baseline: Timed | TimedServer,
    workload: Workload,
    progress: Callable[[int, int], None] | None = None,
) -> Both:
    """Return the raw step times of both engines, taken in turn: turns of seconds by batch size."""
    of_candidate, of_baseline = collect_all([candidate, baseline], workload, progress)
    return of_candidate, of_baseline


def collect_all(
    engines: Sequence[Timed | TimedServer],
    workload: Workload,
    progress: Callable[[int, int], None] | None = None,
    *,
    first: bool = True,
    sizes: Sequence[int] | None = None,
) -> list[dict[int, Turns]]:
    """Return the raw step times of several engines, taken in turn: turns of seconds by batch size.

    Every round of turns begins with the next engine: two engines go there and back.

    Args:
        engines: The engines; one of them twice is timed as two.
        workload: What is timed.
        progress: A function that is called with the turns done and all turns, of all engines together.
        first: Whether the engines are new: buffers are allocated and kernels chosen before anything counts.
        sizes: The batch sizes; None: all of the workload.
    """
    sizes = workload.sizes if sizes is None else sizes
    timed: list[dict[int, Turns]] = [{} for _ in engines]
    total, done = len(sizes) * workload.turns * len(engines), 0
    for batch_size in sizes:

        def turn(engine: Timed | TimedServer, batch_size: int = batch_size) -> list[float]:
            return _turn(engine, workload, batch_size)

        if first:
            for engine in engines:
                turn(engine)
        elif len(engines) > 2:
            turn(engines[-1])  # or the first one might follow itself, which no other does
        turns: list[list[list[float]]] = [[] for _ in engines]
        pairs = list(zip(engines, turns, strict=True))
        for index in range(workload.turns):
            head = index % len(pairs)  # there and back, the outer engines alone would be timed twice in a row, and warm
            for engine, samples in (*pairs[head:], *pairs[:head]):
                samples.append(turn(engine))
                done += 1
                if progress is not None:
                    progress(done, total)
        for by_size, samples in zip(timed, turns, strict=True):
            by_size[batch_size] = samples
    return timed


def _turn(engine: Timed | TimedServer, workload: Workload, batch_size: int) -> list[float]:
    """Return the seconds of each step of a turn, in which `batch_size` tokens are generated.

    A run of all requests is one such step: its mean over all tokens.
    """
    if isinstance(engine, TimedServer):
        return engine.serve(batch_size)
    if workload.kind == "batch":
        answers = engine.generate([one.prompt for one in workload.asked], [one.limits for one in workload.asked])
        return [batch_size * batch.seconds_per_token(answers)]
    steps = workload.decode_steps + DISCARDED
    return engine.decode_steps(batch_size, workload.prompt_tokens, steps, workload.seed)[DISCARDED:]


def share_of(workload: Workload) -> float:
    """Return the share of a workload's samples that counts, the fastest ones."""
    return FASTEST if workload.kind == "decode" else FASTEST_RUNS


def time_all(
    candidates: Sequence[Timed | TimedServer],
    baseline: Timed | TimedServer,
    workload: Workload,
    time_ratio_se: float,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[int, Timing]]:
    """Time several candidates in turn with the baseline, and return each one's timing by batch size; see `turns_of`."""
    return [
        {size: estimate({size: turns[size]}, {size: base[size]}, share_of(workload)) for size in turns}
        for turns, base in turns_of(candidates, baseline, workload, time_ratio_se, progress)
    ]


def turns_of(
    candidates: Sequence[Timed | TimedServer],
    baseline: Timed | TimedServer,
    workload: Workload,
    time_ratio_se: float,
    progress: Callable[[int, int], None] | None = None,
) -> list[Both]:
    """Return the turns of each candidate and of the baseline beside it, for `estimate`.

    Turns are taken in rounds of ROUND. A candidate takes part until its time per token, over all batch sizes, has the
    standard error that is wanted, or the workload's turns are taken. Batch sizes that are not `uncertain` are left out
    of later rounds.

    Args:
        candidates: The candidates' engines.
        baseline: The baseline's engine.
        workload: What is timed.
        time_ratio_se: The standard error of the time ratio that is small enough.
        progress: A function that is called after each turn, with the turns done and all that may be taken: those of a
            candidate whose timing has ended count no longer.
    """
    return _in_rounds(candidates, baseline, workload, Enough(time_ratio_se), progress, baseline_first=True)


def estimate(candidate: Mapping[int, Turns], baseline: Mapping[int, Turns], share: float = FASTEST) -> Timing:
    """Return the timing of step times in seconds, given as turns by batch size; see the module's text.

    Turn i of both engines are neighbours. A step of batch size b generates b tokens; over several batch sizes the time
    per token is the mean. `share` is the share of the steps that counts, the fastest ones; see `share_of`.
    """
    random = np.random.default_rng(0)
    point = np.zeros((2, 1))  # (engine, ·) seconds per token
    resampled = np.zeros((2, RESAMPLES))
    count = 0
    for batch_size, turns in candidate.items():
        pairs = np.stack([np.asarray(turns, float), np.asarray(baseline[batch_size], float)])  # (engine, turn, step)
        n = pairs.shape[1]
        weight = 1.0 / batch_size / len(candidate)
        point += weight * _fastest(pairs[:, None], share)
        resampled += weight * _as_of_halves(_fastest(pairs[:, _halves(random, n)], share), n)
        count += pairs[0].size
    (time,), (base_time,) = point.tolist()
    errors = resampled.std(axis=1, ddof=1)
    return Timing(
        time_per_token_ms=1e3 * time,
        time_per_token_ms_se=1e3 * float(errors[0]),
        base_time_per_token_ms=1e3 * base_time,
        base_time_per_token_ms_se=1e3 * float(errors[1]),
        time_ratio=time / base_time,
        time_ratio_se=float((resampled[0] / resampled[1]).std(ddof=1)),
        samples=count,
    )


def _halves(random: np.random.Generator, n: int) -> NDArray[np.int64]:
    """Return RESAMPLES random halves of n turns, without replacement: (sample, n / 2), of an odd n the smaller half.

    An estimate scatters over halves drawn from the data as it does over whole new data.
    """
    halves: NDArray[np.int64] = random.random((RESAMPLES, n)).argsort(axis=1)[:, : max(n // 2, 1)]
    return halves


def _as_of_halves(estimates: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Return estimates over m = n // 2 of n turns, (engine, sample), with the scatter of those over n / 2.

    A mean's variance over m of n is (n − m) / m times that over whole new data.
    """
    excess = np.sqrt((n // 2) / (n - n // 2)) - 1.0 if n > 1 else 0.0
    scattered: NDArray[np.float64] = estimates + excess * (estimates - estimates.mean(axis=1, keepdims=True))
    return scattered


def _fastest(seconds: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Return the mean of the fastest share of all steps: (engine, sample, turn, step) → (engine, sample)."""
    flat = np.sort(seconds.reshape(*seconds.shape[:2], -1), axis=-1)
    kept = max(round(share * flat.shape[-1]), 1)
    mean: NDArray[np.float64] = flat[..., :kept].mean(axis=-1)
    return mean


def predicted_time_ratio(candidate_bytes: int, base_bytes: int, layers: int, base_layers: int) -> float:
    """Predict the time per token over the base model's, before there is an engine.

    Half of a step at batch 1 is reading weights, half is a fixed cost of each layer: kernel launches and the host. The
    prediction grows with bytes and layers, and orders plans of one precision.

    It was compared with 1.28B parameters in bfloat16 in vLLM on an H100. There, 28 of 30 layers ran at 0.937 (predicted
    0.94), and an FFN of 3072 instead of 4096 at 0.930 (0.93). INT8 W8A8 ran at 0.957 (0.79): quantizing the activations
    costs there what the bytes save. A GPU with less bandwidth gains more.

    Args:
        candidate_bytes: The bytes that a decode step of the candidate reads.
        base_bytes: The same of the base model.
        layers: The candidate's number of layers.
        base_layers: The base model's number of layers.
    """
    return BYTES_SHARE * candidate_bytes / base_bytes + (1.0 - BYTES_SHARE) * layers / base_layers
