"""Writes the base model's numbers in a line."""

from __future__ import annotations

from evaluator.measurement import Measurement

NOISY = 0.05  # the standard error of SpeedNorm from which on a timing says little
PREDICTED = "predicted"  # in place of times, where nothing was timed


def numbers(baseline: Measurement, *, decimals: int = 2, rate: bool = False) -> str:
    """Return perplexity, speed, size and the accuracies of tasks.

    Args:
        baseline: The base model's measurement.
        decimals: The number of decimals of the time per token.
        rate: Whether tokens per second are added.
    """
    speed = f"{baseline.time_per_token_ms:.{decimals}f} ms per token"
    if rate:
        speed += f", {baseline.tokens_per_sec:.1f} tokens per second"
    if not baseline.timed:
        speed = f"speed {PREDICTED} from weight bytes"
    tasks = [f"accuracy of {name} {task.value:.3f} ± {task.se:.3f}" for name, task in baseline.tasks.items()]
    return ", ".join([f"perplexity {baseline.perplexity:.3f}", speed, f"{baseline.model_size_mb:.1f} MB", *tasks])


def noise_floor(baseline: Measurement) -> str | None:
    """Return the error of timing the base model against itself; None where that was not done."""
    if not baseline.timed or not baseline.time_ratio_se:
        return None
    return f"noise floor: SpeedNorm 0 ± {baseline.time_ratio_se:.3f}, the base model timed against itself"


def noisy(speed_norm_se: float | None, what: str) -> str | None:
    """Return a warning where the standard error of a SpeedNorm is too large; `what` names the model."""
    if speed_norm_se is None or speed_norm_se <= NOISY:
        return None
    return (
        f"{what}: the standard error of SpeedNorm is {speed_norm_se:.3f}, above {NOISY:g}: the machine is busy or the "
        "timing too short; stop other programs, or raise evaluation.workload.turns"
    )


def of_gpu(measured: Measurement, what: str) -> list[str]:
    """Return the warnings about the GPU during a timing: throttled, or shared with others; `what` names the model."""
    return [] if measured.gpu is None else [f"{what}: {text}" for text in measured.gpu.warnings]
