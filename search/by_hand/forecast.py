"""Forecast a study: measure the tables that are missing, and show what any plan of the space could score."""

from __future__ import annotations

from evaluator.score import score_of
from search.say import Say
from search.setup.setting import Setting
from search.show.forecast_view import ForecastView
from search.stages.bench import Bench
from search.stages.forecast import Forecast
from search.stages.step_times import StepTimes, step_times
from search.study import outlook


def forecast(setting: Setting, say: Say) -> ForecastView:
    """Measure what is missing, and return the forecast.

    Args:
        setting: What the study shares.
        say: Told what is done.

    Raises:
        EvaluationError: The base model or its engine is broken.
        StudyStopped: The base model can't be measured.
    """
    with Bench.of(setting) as bench:
        baseline = bench.begin(say, forecast=True)
        made = Forecast.known(setting)
        times = StepTimes() if made.speed is None else step_times(setting, bench.engines, say)
        say("forecast: plans of the space")
        return outlook.view(made, score_of(baseline, baseline, setting.formula).score, times)
