"""Run the base model and a cut one side by side, layer after layer.

It yields what each projection of the cut model reads, and what its output lacks for the residual stream to be the base
model's.

Symbols: B windows of a batch, T tokens of a window, E hidden size of the base model, K and N widths of a projection.
The residual stream is r in the base model, r' in the cut one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from compressors.model.family import Family
from compressors.statistics.layerwise import Layers

GAIN = 1e-2  # share of the median gain² of an output norm, below which dimensions are corrected less

Told = Iterator[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]


@dataclasses.dataclass(frozen=True)
class Stays:
    """Stays says what a cut keeps of the base model.

    Attributes:
        layers: The numbers of the layers that are kept.
        dimensions: The kept dimensions of the residual stream, int64 [kept]; for a rotated stream (`methods.rotation`)
            the kept columns of its basis, [E, kept]; None: all.
        inputs: The kept inputs of a projection that lost some, by its name in the layer and by layer of the cut model.
        outputs: The same for its outputs.
    """

    layers: tuple[int, ...]
    dimensions: torch.Tensor | None
    inputs: Mapping[str, Sequence[torch.Tensor]]
    outputs: Mapping[str, Sequence[torch.Tensor]]


class Streams:
    """Streams carries the windows of one domain through both models.

    Args:
        base: The base model's layers.
        cut: The cut model's layers.
        family: The family of both.
        stays: What the cut keeps of the base model.
        home: The device that keeps what waits until a layer is refit.
    """

    def __init__(self, base: Layers, cut: Layers, family: Family, stays: Stays, home: str = "cpu") -> None:
        self.home = home
        self.base, self.cut, self.family, self.stays = base, cut, family, stays
        self.norm_of = family.output_norms
        self._inputs: list[dict[str, torch.Tensor]] = []  # of the base model's readers, [B, T, E]
        self._middle: list[torch.Tensor] = []  # r between attention and MLP
        self._last: list[tuple[torch.Tensor, torch.Tensor]] = []  # r' there, and the input of down
        self._layer = 0

    def advance_base(
        self, skipped: Sequence[int], layer: int, then: Sequence[int], readers: Sequence[str], *, look: bool = True
    ) -> None:
        """Run the base model through dropped layers, one kept layer, and the dropped layers after it.

        Args:
            skipped: The dropped layers before the kept one.
            layer: The kept layer.
            then: The dropped layers after it.
            readers: The projections among q and gate whose inputs `of_readers` will need.
            look: Whether to record what `of_writer` and `of_readers` compare with.
        """
        family = self.family
        for dropped in skipped:
            self.base.forward(dropped)
        self._layer, self._inputs, self._middle = layer, [], []
        if not look:
            self.base.forward(layer)
        for place, hidden in enumerate(self.base.hidden if look else ()):
            out, seen = self.base.run(layer, place, (*readers, family.o))
            added = self._added(self.base, layer, family.o, self._linear(self.base, layer, family.o, seen[family.o]))
            self._middle.append((hidden.to(added.device) + added).to(self.home))
            self._inputs.append({part: seen[part].to(self.home) for part in readers})
            self.base.hidden[place] = out.to(self.base.home)
        for dropped in then:
            self.base.forward(dropped)

    def of_writer(self, layer: int, part: str) -> Told:
        """Yield, per batch, what a fit of o or down in a layer of the cut model needs.

        Yields:
            (the input x' [B, T, K], the weight of each token [B, T, 1], [what its output lacks, [B, T, N]]).
        """
        family = self.family
        targets = self._middle if part == family.o else self.base.hidden
        for place, hidden in enumerate(self.cut.hidden):
            _, seen = self.cut.run(layer, place, (family.o,), until=part)
            x = seen[part]
            stream = hidden.to(x.device)
            if part == family.down:
                by_o = self._linear(self.cut, layer, family.o, seen[family.o])
                stream = stream + self._added(self.cut, layer, family.o, by_o)
                self._last.append((stream.to(self.home), x.to(self.home)))
            target = targets[place].to(x.device)
            weight = 1 / _root_mean_square(target).clamp_min(1e-15)
            put_out = self._linear(self.cut, layer, part, x)
            missing = self._kept(target).float() - stream.float() - self._added(self.cut, layer, part, put_out).float()
            if self.norm_of:
                # with the norm's own epsilon: else a token with almost no output would outweigh all others
                root = (_root_mean_square(put_out).square() + float(self.cut.model.config.rms_norm_eps)).sqrt()
                gain = self._gain(layer, part)
                missing = missing * root * gain / (gain.square() + GAIN * gain.square().median())
                weight = weight / root.square()
            yield x, weight, [missing]

    def of_readers(self, layer: int, parts: Sequence[str]) -> Told:
        """Yield the same for q, k and v, or for gate and up: what their outputs lack of the base model's."""
        for place in range(len(self.cut.hidden)):
            _, seen = self.cut.run(layer, place, until=parts[0])
            x = seen[parts[0]]
            of_base = self._inputs[place][parts[0]].to(x.device)
            weight = 1 / _root_mean_square(of_base).square().clamp_min(1e-30)
            missing = []
            for part in parts:
                wanted = self._linear(self.base, self._layer, part, of_base).float()
                if part in self.stays.outputs:
                    wanted = wanted.index_select(-1, self.stays.outputs[part][layer].to(wanted.device))
                missing.append(wanted - self._linear(self.cut, layer, part, x).float())
            yield x, weight, missing

    def advance_cut(self, layer: int, *, alike: bool = False) -> None:
        """Run the cut model through the same layer; `alike` says that both streams are equal, so none is computed."""
        if alike:
            self.cut.hidden = list(self.base.hidden)
        elif not self._last:
            self.cut.forward(layer)
        device = self.cut.model.device
        for place, (stream, x) in enumerate(self._last):  # kept by of_writer: only down has changed since then
            put_out = self._linear(self.cut, layer, self.family.down, x.to(device))
            added = self._added(self.cut, layer, self.family.down, put_out)
            self.cut.hidden[place] = (stream.to(device) + added).to(self.cut.home)
        self._inputs, self._middle, self._last = [], [], []

    def _kept(self, x: torch.Tensor) -> torch.Tensor:
        dimensions = self.stays.dimensions
        if dimensions is None:
            return x
        if dimensions.dim() == 2:
            return x.float() @ dimensions.to(x.device)
        return x.index_select(-1, dimensions.to(x.device))

    @torch.inference_mode()
    def _linear(self, layers: Layers, index: int, part: str, x: torch.Tensor) -> Any:
        return layers.modules[self.family.in_layer(index, part)](x)

    @torch.inference_mode()
    def _added(self, layers: Layers, index: int, part: str, put_out: torch.Tensor) -> Any:
        """Return what a projection's output adds to the stream."""
        norm = self.norm_of.get(part)
        return put_out if norm is None else layers.modules[self.family.in_layer(index, norm)](put_out)

    def _gain(self, layer: int, part: str) -> torch.Tensor:
        norm = self.cut.modules[self.family.in_layer(layer, self.norm_of[part])]
        gain: torch.Tensor = norm.weight.float() + self.family.norm_offset
        return gain


def _root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """Return the root mean square over the last axis: […, N] → float32 […, 1]."""
    root: torch.Tensor = x.float().square().mean(-1, keepdim=True).sqrt()
    return root
