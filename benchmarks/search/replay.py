"""Replay searches on a table of plans that were all screened and timed: who finds the best plan in how many trials?

    PYTHONPATH=. python3 benchmarks/search/replay.py TABLE.json [--samplers tpe forecast …] [--seeds 20] [--trials 100]
        [--weight-speed 0.5] [--out RESULTS.json]

The trials are those of `run`: its objective, its samplers, its pruner, its forecast from the tables that were measured.
Only the bench is replaced by one that looks numbers up, and adds the seconds that they took to a clock. A time is given
the error that a measured one has. The regret is the best Score of the table less the true Score of the plan that
`export` would write.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import random
import shutil
import statistics
import tempfile
import types
import warnings

import optuna
from optuna.trial import TrialState

from benchmarks.hollow import hollow
from compressors.model import checkpoint, family
from compressors.plan import CompressionPlan
from evaluator import measure, quality
from evaluator.measurement import Measurement, Timing
from evaluator.speed_table import SpeedTable
from evaluator.workload import Workload
from search.config import compose
from search.setup.machine import Machine
from search.setup.setting import BaseModel, Setting, StudyTexts
from search.stages.damage_table import DamageTable
from search.stages.forecast import Forecast
from search.study import rungs, samplers, space
from search.study.forecast_sampler import NOTHING_LEFT
from search.study.objective import Objective, TrialFailed
from search.study.taught import taught

WITHIN = 0.005  # of the best plan, in Score: as good as found
MARKS = (10, 20, 50, 100)  # trials after which the regret is told
BASELINE = Measurement(
    perplexity=1.0, nll_nats_per_token=0.0, nll_nats_per_token_se=0.0, tokens=1, shard_nll=(), time_per_token_ms=1.0,
    time_per_token_ms_se=0.0, base_time_per_token_ms=1.0, base_time_per_token_ms_se=0.0, time_ratio=1.0,
    time_ratio_se=0.0, timing_samples=1, tokens_per_sec=1e3, model_size_mb=1.0, total_parameters=1, number_of_layers=1,
    number_of_heads=1, hidden_dim=1, backend="vllm", engine_version="replay", transformers_version="", torch_version="",
    device="", dtype="", workload=Workload(), text_digest="", logits_sha256="", weights_sha256="",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A plan of the table: its losses by shard, its true time ratio, the seconds of its screen."""

    nll: tuple[float, ...]
    time_ratio: float
    screen_s: float


class Table:
    """A table that `collect.py` wrote, and the setting that it was collected in."""

    def __init__(self, path: pathlib.Path, scratch: pathlib.Path, words: list[str]) -> None:
        held = json.loads(path.read_text())
        studies = pathlib.Path(__file__).parent / "studies"
        model = scratch / "model"
        hollow(model, held["config"])
        (model / "tokenizer.json").write_text("{}")  # nothing is read
        file = compose.load(held["study"], [f"model.source={model}", f"outputs={scratch / 'outputs'}", *words], studies)
        own = checkpoint.Checkpoint.read(model)
        its_family, identity = family.family_of(own), CompressionPlan.identity(own.config)
        shards = tuple(((index,),) for index in range(len(held["base_nll"])))  # never read
        moments = lessons = types.SimpleNamespace(digest="replay", windows=(), domains=())
        self.base_nll = tuple(held["base_nll"])
        self.tables_s = float(held["damage_s"] + held["speed_s"] if "speed_s" in held else held["tables_s"])
        self.speed, self.damage = SpeedTable.from_dict(held["speed"]), DamageTable.from_dict(held["damage"])
        self.rows = {
            space.plan_of(row["params"], file.space, identity): Row(
                tuple(row["nll"]), row["time_ratio"], row["screen_s"]
            )
            for row in held["plans"]
            if row["nll"] is not None and row["time_ratio"] is not None
        }
        self.setting = Listed(
            listed=frozenset(self.rows),
            file=file,
            model=BaseModel(model, own, "replay", its_family, identity),
            texts=StudyTexts(shards, calibration_windows=(), moments=moments, distillation=lessons, digest="replay"),
            machine=Machine("vllm", "cuda", held["device"], "replay", capability=(9, 0)),
        )

    def forecast(self, setting: Setting) -> Forecast:
        return Forecast(setting, self.speed, self.damage)

    def score(self, plan: CompressionPlan) -> float:
        """Return the plan's true Score."""
        formula, row = self.setting.formula, self.rows[plan]
        lost = statistics.fmean(row.nll) - statistics.fmean(self.base_nll)
        return formula.weight_perf * quality.perplexity(-lost) + formula.weight_speed * (1.0 - row.time_ratio)

    @property
    def best(self) -> float:
        return max(map(self.score, self.rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed(Setting):
    """A setting in which the plans of the table alone are feasible."""

    listed: frozenset[CompressionPlan]

    def infeasible(self, plan: CompressionPlan) -> str | None:
        return None if plan in self.listed else "the table does not have it"


class Clock:
    seconds = 0.0


class TableBench:
    """Looks up what a bench would build, screen and measure."""

    def __init__(self, table: Table, setting: Setting, clock: Clock, noise: random.Random, measured_s: float) -> None:
        self.setting = setting
        self._table, self._clock, self._noise, self._measured_s = table, clock, noise, measured_s
        self._built: CompressionPlan | None = None

    def base_nll(self, say) -> tuple[float, ...]:
        return self._table.base_nll

    def shards(self, plan: CompressionPlan, say):
        row = self._table.rows[plan]
        self._clock.seconds += row.screen_s
        for nll in row.nll:
            yield quality.ShardQuality(nll=nll, tokens=1)

    def build(self, plan: CompressionPlan, say) -> tuple[pathlib.Path, str]:
        self._built = plan
        return self._table.setting.model.path, "replay"

    def measure(self, path, weights_sha256, baseline: Measurement, say, then=None, **how) -> Measurement:
        self._clock.seconds += self._measured_s
        row = self._table.rows[self._built]
        error = self._table.setting.file.evaluation.score_se / self._table.setting.formula.weight_speed or 0.006
        ratio = row.time_ratio + self._noise.gauss(0.0, error)
        timing = Timing(ratio, error, 1.0, 0.0, ratio, error, samples=1)
        return of_losses(baseline, row.nll, timing)


def of_losses(like: Measurement, nll: tuple[float, ...], timing: Timing) -> Measurement:
    mean = statistics.fmean(nll)
    return measure.with_timing(
        dataclasses.replace(like, shard_nll=nll, nll_nats_per_token=mean, perplexity=quality.perplexity(mean)), timing
    )


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to search.

    Attributes:
        sampler: The name of a sampler of the study file, or nsga2.
        tables: Whether the forecast's tables are made first, and used.
        pruned: Whether weak trials are pruned, and timings end early.
        uncut: Whether the first trials cut nothing, as those of `run`.
    """

    sampler: str
    tables: bool = False
    pruned: bool = True
    uncut: bool = True


WAYS = {
    "random, all measured": Way("random", pruned=False, uncut=False),
    "random": Way("random"),
    "tpe": Way("tpe"),
    "gp": Way("gp"),
    "nsga2": Way("nsga2", uncut=False),
    "tpe with tables": Way("tpe", tables=True),
    "forecast": Way("forecast", tables=True),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """What is known after a trial: the seconds so far, and the regret of what would be exported."""

    seconds: float
    regret: float


def replay(table: Table, way: Way, seed: int, trials: int, arguments: argparse.Namespace) -> list[Step]:
    """Run a study, and return a step for each trial; after its end nothing changes."""
    clock, noise = Clock(), random.Random(seed)
    clock.seconds = arguments.baseline_s + (table.tables_s - arguments.baseline_s if way.tables else 0.0)
    file = table.setting.file
    name = "none" if not way.pruned else file.pruner.name
    file = file.model_copy(update={"seed": seed, "pruner": file.pruner.model_copy(update={"name": name}),
                                   "sampler": file.sampler.model_copy(update={"name": way.sampler})})  # fmt: skip
    setting = dataclasses.replace(table.setting, file=file)
    bench = TableBench(table, setting, clock, noise, arguments.measured_s if way.pruned else arguments.all_turns_s)
    baseline = of_losses(BASELINE, table.base_nll, measure.UNTIMED)
    study = optuna.create_study(direction="maximize")
    shards = len(table.base_nll)
    known = table.forecast(setting) if way.tables else Forecast(setting, None, None)
    steps: list[Step] = []
    nsga2 = optuna.samplers.NSGAIISampler(seed=seed, population_size=20)
    if way.uncut and way.sampler != "forecast":
        for params in space.uncut(file.space, setting.model.identity):
            study.enqueue_trial(params)
    shutil.rmtree(setting.outputs, ignore_errors=True)
    while len(steps) < trials:
        forecast = taught(known, study.get_trials(deepcopy=False))
        study.sampler = nsga2 if way.sampler == "nsga2" else samplers.sampler(
            file.sampler, seed, 0, len(steps), forecast if way.tables else None)  # fmt: skip
        study.pruner = rungs.ShardsAlone(samplers.pruner(file.pruner, shards), shards)
        trial = study.ask()
        objective = Objective(bench, baseline, lambda text: None, forecast=forecast)
        value, state = None, TrialState.COMPLETE
        try:
            value = objective(trial)
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except TrialFailed:
            state = TrialState.FAIL
        study.tell(trial, value, None if state == TrialState.COMPLETE else state)
        complete = [each for each in study.get_trials(deepcopy=False) if each.state == TrialState.COMPLETE]
        regret = math.inf
        if complete:
            best = max(complete, key=lambda each: each.value)
            regret = table.best - table.score(CompressionPlan.from_dict(best.user_attrs["plan"]))
        steps.append(Step(clock.seconds, regret))
        if NOTHING_LEFT in study.get_trials(deepcopy=False)[-1].system_attrs:
            break
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=pathlib.Path)
    parser.add_argument("words", nargs="*", help="KEY=VALUE for the study file")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--weight-speed", type=float, default=0.5)
    parser.add_argument("--baseline-s", type=float, default=60.0, help="seconds of the baseline, which every way needs")
    parser.add_argument(
        "--measured-s", type=float, default=12.0, help="seconds of build, engine and a timing ended early"
    )
    parser.add_argument("--all-turns-s", type=float, default=25.0, help="the same with all turns")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_intermixed_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    weight = arguments.weight_speed
    words = [*arguments.words, f"score.weight_speed={weight}", f"score.weight_perf={1 - weight}"]
    found = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if pathlib.Path("/dev/shm").is_dir() else None) as scratch:
        table = Table(arguments.table, pathlib.Path(scratch), words)
        within = sum(table.best - table.score(plan) <= WITHIN for plan in table.rows)
        print(f"{len(table.rows)} plans, best {table.best:.4f}, {within} within {WITHIN} of it; the base model has "
              f"{1 - weight:g}")  # fmt: skip
        heads = "".join(f"{f'regret after {mark}':>22s}" for mark in MARKS)
        print(f"{'':22s}{heads}{f'seconds to {WITHIN}':>24s}")
        for name in arguments.ways:
            runs = [replay(table, WAYS[name], seed, arguments.trials, arguments) for seed in range(arguments.seeds)]
            found[name] = [[(round(step.seconds, 1), round(step.regret, 5)) for step in run] for run in runs]
            print(line(name, runs), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(found))


def line(name: str, runs: list[list[Step]]) -> str:
    """Return means over the seeds with standard errors: the regret after MARKS trials, the seconds until WITHIN."""
    cells = [mean_of([run[min(mark, len(run)) - 1].regret for run in runs], 4) for mark in MARKS]
    reached = [next((step.seconds for step in run if step.regret <= WITHIN), None) for run in runs]
    in_time = [seconds for seconds in reached if seconds is not None]
    told = f"{mean_of(in_time, 0)} ({len(in_time)} of {len(runs)})" if in_time else "never"
    return f"{name:22s}" + "".join(f"{cell:>22s}" for cell in cells) + f"{told:>24s}"


def mean_of(values: list[float], digits: int) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}"


if __name__ == "__main__":
    main()
