"""Time per token of a candidate and of the baseline, timed in turn on one machine.

A machine's disturbances come and go over seconds, and only ever add time. So the two engines take turns (candidate,
baseline, baseline, candidate, …), what counts is each engine's fastest twentieth of its decode steps, and the
standard error comes from half-samples of the turns, in pairs of neighbours, since steps of one turn are not
independent.

The spread (standard deviation) of the ratio in A/A runs, whose true ratio is 1, by what is made of the step times:

                              H100, vLLM, 1.28B parameters      2 cores, transformers, 31M
                              single steps    means of a turn   single steps
    mean of all               4.0%            4.0%              4.7%
    median                    4.1%                              7.3%
    lower quartile            2.4%            1.7%              1.5%
    fastest fifth, mean       2.5%            1.3%              0.8%
    fastest twentieth, mean   4.0%            0.6%
    minimum                   4.6%            0.6%              1.0%

(H100: ten runs of 40 turns of 24 steps, host-bound at 2 ms a step. Cores: twelve runs of 12 turns of 16 steps, in
float32, with other work beside them.) vLLM schedules a step ahead, so that the time between two of its steps says
little; what a turn took says all, and the vLLM engine reports a turn's mean for each of its steps. Half-samples, since
the bootstrap and the delete-one jackknife are too small for what is so near a minimum (Politis and Romano 1994,
https://doi.org/10.1214/aos/1176325770).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evaluator.measurement import Timing, Workload

DISCARDED = 3  # first steps after a switch: caches are cold, threads asleep
FASTEST = 0.05  # share of the steps that counts
RESAMPLES = 400
SLOWER, AGAIN = 1.03, 2  # see time_in_turn
BYTES_SHARE = 0.5  # of a decode step at batch 1; see predicted_time_ratio

Turns = Sequence[Sequence[float]]  # seconds of each step, a list a turn


class Timed(Protocol):
    def decode_steps(self, batch_size: int, prompt_tokens: int, steps: int, seed: int) -> list[float]: ...


def time_in_turn(
    candidate: Timed,
    baseline: Timed,
    workload: Workload,
    progress: Callable[[int, int], None] | None = None,
    *,
    expected_base_ms: float | None = None,
) -> Timing:
    """Time both engines on the workload. The same engine twice measures how far two timings of one model lie apart.

    progress: called with (turns done, turns in all) of both engines.
    expected_base_ms: the baseline's time per token when it was measured alone. A process can be slow for as long as all
        its turns last (one A/A run of ten on an H100: 13%). So where the baseline is slower than SLOWER allows, all
        turns are taken again, AGAIN times at most, and count together.
    """
    timed = collect(candidate, baseline, workload, progress)
    for _ in range(AGAIN):
        timing = estimate(*timed)
        if expected_base_ms is None or timing.base_time_per_token_ms <= SLOWER * expected_base_ms:
            return timing
        again = collect(candidate, baseline, workload, progress)
        timed = tuple(  # type: ignore[assignment]
            {size: [*turns[size], *more[size]] for size in turns} for turns, more in zip(timed, again, strict=True)
        )
    return estimate(*timed)


def collect(
    candidate: Timed, baseline: Timed, workload: Workload, progress: Callable[[int, int], None] | None = None
) -> tuple[dict[int, Turns], dict[int, Turns]]:
    """The raw step times of both engines, in turn: batch size → turns of seconds."""
    timed_candidate: dict[int, Turns] = {}
    timed_baseline: dict[int, Turns] = {}
    total, done = len(workload.batch_sizes) * workload.turns * 2, 0
    for batch_size in workload.batch_sizes:
        steps = workload.decode_steps + DISCARDED

        def turn(engine: Timed, batch_size: int = batch_size, steps: int = steps) -> list[float]:
            return engine.decode_steps(batch_size, workload.prompt_tokens, steps, workload.seed)[DISCARDED:]

        for engine in (candidate, baseline):
            turn(engine)  # first use: buffers are allocated, kernels are chosen
        of_candidate: list[list[float]] = []
        of_baseline: list[list[float]] = []
        for index in range(workload.turns):
            both = [(candidate, of_candidate), (baseline, of_baseline)]
            for engine, samples in both if index % 2 == 0 else reversed(both):
                samples.append(turn(engine))
                done += 1
                if progress is not None:
                    progress(done, total)
        timed_candidate[batch_size] = of_candidate
        timed_baseline[batch_size] = of_baseline
    return timed_candidate, timed_baseline


def estimate(candidate: Mapping[int, Turns], baseline: Mapping[int, Turns]) -> Timing:
    """Batch size → turns of step times in seconds, turn i of both engines being neighbours. See the module's text.

    A step of batch size b makes b tokens; over several batch sizes the time per token is the mean.
    """
    random = np.random.default_rng(0)
    point = np.zeros((2, 1))  # (engine, ·) seconds per token
    resampled = np.zeros((2, RESAMPLES))
    count = 0
    for batch_size, turns in candidate.items():
        pairs = np.stack([np.asarray(turns, float), np.asarray(baseline[batch_size], float)])  # (engine, turn, step)
        n = pairs.shape[1]
        weight = 1.0 / batch_size / len(candidate)
        point += weight * _fastest(pairs[:, None])
        resampled += weight * _fastest(pairs[:, _halves(random, n)])
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
    """RESAMPLES random halves of n turns: (sample, n / 2), without replacement.

    What is estimated scatters over half of the data, drawn from it, as it does over all of it, drawn anew.
    """
    halves: NDArray[np.int64] = random.random((RESAMPLES, n)).argsort(axis=1)[:, : max(n // 2, 1)]
    return halves


def _fastest(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the fastest FASTEST of all steps: (engine, sample, turn, step) → (engine, sample)."""
    flat = np.sort(seconds.reshape(*seconds.shape[:2], -1), axis=-1)
    kept = max(round(FASTEST * flat.shape[-1]), 1)
    mean: NDArray[np.float64] = flat[..., :kept].mean(axis=-1)
    return mean


def predicted_time_ratio(candidate_bytes: int, base_bytes: int, layers: int, base_layers: int) -> float:
    """Time per token over the base model's, guessed before there is an engine.

    Half of a step at batch 1 is reading weights (`*_bytes`: those that a decode step reads), half is a fixed cost per
    layer: kernel launches and the host. On an H100 with 1.28B parameters in bfloat16 in vLLM, 28 of 30 layers ran at
    0.937 (predicted 0.94), a FFN of 3072 in place of 4096 at 0.930 (0.93), INT8 W8A8 at 0.957 (0.79: quantizing the
    activations costs what the bytes save there; a GPU with less bandwidth gains more). It grows with bytes and layers,
    and orders plans of one precision.
    """
    return BYTES_SHARE * candidate_bytes / base_bytes + (1.0 - BYTES_SHARE) * layers / base_layers
