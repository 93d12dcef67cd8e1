"""Quality in memory, shard by shard, before anything is written and any engine starts."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compressors import cached
from compressors.device import compute_dtype, release
from compressors.methods import precision
from compressors.model.checkpoint import Checkpoint
from compressors.plan import CompressionPlan, is_cut
from compressors.typed_json import typed
from evaluator import quality, texts
from evaluator.errors import NotFinite
from evaluator.measurement import Measurement
from search.say import Say
from search.setup import keys
from search.setup.machine import require_memory
from search.setup.setting import Setting
from search.setup.texts import Shard
from search.stages import build

FEW = 4  # shards of a cheap screen
TRAINED_BYTES = 18  # of a weight that is trained: four numbers in float32, and a copy in 16 bits


@dataclasses.dataclass(frozen=True)
class Screen:
    """Quality in memory, one entry a shard: mean NLL and KL in nats per token, top-1 agreement with the base model."""

    nll: tuple[float, ...]
    kl: tuple[float | None, ...]
    agreement: tuple[float | None, ...]

    @classmethod
    def of(cls, shards: Sequence[quality.ShardQuality]) -> Screen:
        """Gather the quality of shards."""
        return cls(
            nll=tuple(shard.nll for shard in shards),
            kl=tuple(shard.kl for shard in shards),
            agreement=tuple(shard.agreement for shard in shards),
        )

    @classmethod
    def read(cls, path: Path, shards: int) -> Screen | None:
        """Read a screen that was kept, and has so many shards; a damaged one is removed.

        Returns:
            The screen, or None where there is none.
        """

        def whole(path: Path) -> Screen:
            screen = typed(cls, cached.read_json(path), "screen")
            if {len(screen.nll), len(screen.kl), len(screen.agreement)} != {shards}:
                raise ValueError(f"it has {len(screen.nll)} shards of {shards}")
            return screen

        return cached.known(path, whole)

    def write(self, path: Path) -> None:
        """Keep the screen in a JSON file; raises NotFinite for one of a plan that breaks the model."""
        for index, nll in enumerate(self.nll):
            require_finite(index, nll)
        cached.keep_json(path, dataclasses.asdict(self), digest=False)

    def lost(self, base: Sequence[float]) -> list[float]:
        """Return what each shard loses against the base model's NLL on it, in nats per token."""
        return [nll - own for nll, own in zip(self.nll, base, strict=False)]

    def shards(self) -> Iterator[quality.ShardQuality]:
        """Return the quality of each shard in turn."""
        for nll, kl, agreement in zip(self.nll, self.kl, self.agreement, strict=True):
            yield quality.ShardQuality(nll=nll, tokens=0, kl=kl, agreement=agreement)


def require_finite(shard: int, nll: float) -> None:
    """Raise NotFinite where a plan's loss on a shard, in nats per token, is NaN or infinite."""
    if not math.isfinite(nll):
        raise NotFinite(f"screen: the loss on shard {shard} is {nll}; this plan breaks the model")


def path_of(setting: Setting, plan: CompressionPlan) -> Path:
    """Return the file that keeps the plan's screen."""
    return setting.outputs / "screens" / f"{keys.measurement_key(setting, plan)}.json"


class Screener:
    """Scores plans in memory against the base model, whose log-probabilities are computed when first wanted."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._reference: quality.Reference | None = None
        self._on_unseen: quality.Reference | None = None

    def base_nll(self, say: Say) -> tuple[float, ...]:
        """Return the base model's mean NLL on each shard, in nats per token, computed as that of every plan is."""
        setting = self._setting
        key = keys.measurement_key(setting, setting.model.identity)
        shards = len(setting.texts.shards)

        def read(path: Path) -> tuple[float, ...]:
            nll = typed(tuple[float, ...], cached.read_json(path)["nll"], "nll")
            if len(nll) != shards:
                raise ValueError(f"it has {len(nll)} shards of {shards}")
            return nll

        return cached.kept(
            setting.outputs / "screens" / f"base-{key}.json",
            read,
            lambda path: cached.keep_json(path, {"nll": list(self._base(say).nll)}, digest=False),
            lambda: say("screen: waiting for another process that computes the base model's"),
        )

    def shards(self, plan: CompressionPlan, say: Say) -> Iterator[quality.ShardQuality]:
        """Return the quality of each shard in turn, from a model of the plan in memory."""
        reference = self._base(say)
        with _model(self._setting, plan, say) as model:
            for index, shard in enumerate(self._setting.texts.shards):
                yield quality.shard_quality(model, shard, reference, index)

    def screen(self, plan: CompressionPlan, say: Say) -> Screen:
        """Return the plan's quality on all shards, kept under its key: the numbers that a trial of this plan has."""
        path = path_of(self._setting, plan)
        known = Screen.read(path, len(self._setting.texts.shards))
        if known is None:
            say("quality in memory")
            known = Screen.of(list(self.shards(plan, say)))
            known.write(path)
        return known

    def cheap(self, plan: CompressionPlan, say: Say) -> Screen:
        """Return the plan's quality on the first FEW shards, with a quick repair (`search.stages.build`); kept too."""
        first = self._setting.texts.shards[:FEW]
        path = self._cheap_path(plan)
        known = Screen.read(path, len(first))
        if known is None:
            base = self._base(say)
            with _model(self._setting, plan, say, quick=True) as model:
                known = _on(model, first, base)
            known.write(path)
        return known

    def unseen(self, plan: CompressionPlan, say: Say) -> Screen:
        """Return the cheap screen's model on text that the base model wrote and no fit saw; `cheap` is known then."""
        shards = self._setting.texts.unseen()
        if not shards:
            return Screen((), (), ())
        path = self._cheap_path(plan)
        named = texts.text_digest([window for shard in shards for window in shard])
        own = path.with_name(f"unseen-{named}-{path.name}")
        known = Screen.read(own, len(shards))
        if known is None:
            first = self._setting.texts.shards[:FEW]
            base, reference = self._base(say), self._unseen_base(shards, say)
            with _model(self._setting, plan, say, quick=True) as model:
                if Screen.read(path, len(first)) is None:
                    _on(model, first, base).write(path)
                known = _on(model, shards, reference)
            known.write(own)
        return known

    def _cheap_path(self, plan: CompressionPlan) -> Path:
        full = path_of(self._setting, plan)
        tokens = f"{build.TOKENS}-" if plan.repair == "stream" else ""
        return full.with_name(f"cheap-{tokens}{full.name}")

    def screen_of(self, model: Any, say: Say) -> Screen:
        """Return the quality of a stock transformers model on the setting's device that no plan made."""
        return _on(model, self._setting.texts.shards, self._base(say))

    def _unseen_base(self, shards: Sequence[Shard], say: Say) -> quality.Reference:
        if self._on_unseen is None:
            with _model(self._setting, self._setting.model.identity, say) as model:
                self._on_unseen = quality.Reference.of(model, shards, max_bytes=self._kept // 2)
        return self._on_unseen

    @property
    def _kept(self) -> int:
        """The bytes of log-probabilities that are kept."""
        return int(self._setting.file.evaluation.kl_max_mb * 1e6)

    def _base(self, say: Say) -> quality.Reference:
        if self._reference is None:
            say("screen: the base model")
            setting = self._setting
            with _model(setting, setting.model.identity, say) as model:
                self._reference = quality.Reference.of(model, setting.texts.shards, max_bytes=self._kept)
            if not all(map(math.isfinite, self._reference.nll)):
                raise NotFinite(
                    f"model {setting.model.path}: its loss on the search text is NaN: the weights are broken"
                )
        return self._reference


def _on(model: Any, shards: Sequence[Shard], reference: quality.Reference) -> Screen:
    """Return a model's quality on shards, against the base model's on the same."""
    return Screen.of([quality.shard_quality(model, shard, reference, index) for index, shard in enumerate(shards)])


def with_screen(measured: Measurement, screen: Screen) -> Measurement:
    """Return the measurement with the screen's KL and agreement."""
    return dataclasses.replace(
        measured, kl_nats_per_token=mean_known(screen.kl), top1_agreement=mean_known(screen.agreement)
    )


@contextlib.contextmanager
def _model(setting: Setting, plan: CompressionPlan, say: Say, *, quick: bool = False) -> Iterator[Any]:
    device, base = setting.machine.device, setting.model.checkpoint
    simulated = build.checkpoint_of(setting, plan, say, simulate=True, quick=quick)
    on_cpu = device == "cpu"
    need = simulated.total_parameters * 4 if on_cpu else simulated.size_bytes
    whole = base.total_parameters * 4 if on_cpu else base.size_bytes
    if plan.repair == "stream":  # for a while the base model and the cut one are in memory too
        need = 2 * need + whole
    elif plan.repair == "distill":  # or the base model, and float32 weights with their gradients and AdamW's moments
        need = max(need, whole + _trained(setting, plan, simulated) * TRAINED_BYTES)
    require_memory(need, device, "screening this plan")
    model = simulated.to_model(device, dtype=compute_dtype(device))
    try:
        yield model
    finally:
        del model
        release(device)


def _trained(setting: Setting, plan: CompressionPlan, simulated: Checkpoint) -> int:
    """Return how many weights a distillation trains: all of a cut model; of one that is rounded alone what stays."""
    total = simulated.total_parameters
    if is_cut(plan, setting.model.identity):
        return total
    rounded = precision.linears(simulated, setting.model.family)
    return total - sum(math.prod(simulated.tensors[f"{module}.weight"].shape) for module in rounded)


def mean_known(values: tuple[float | None, ...]) -> float | None:
    """Return the mean over the shards that the reference covers."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
