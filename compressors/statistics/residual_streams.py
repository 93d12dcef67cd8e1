"""The base model and a cut one, side by side, layer after layer: what each projection of the cut model reads, and what
it would have to put out for the residual stream to be the base model's.

Symbols: B windows of a batch, T tokens of a window, E hidden size of the base model, K and N widths of a projection; r
the residual stream of the base model, r' of the cut one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from compressors.model.family import Family
from compressors.statistics.layerwise import Layers

GAIN = 1e-2  # of the median gain² of an output norm: dimensions of much less are corrected less

Told = Iterator[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]


@dataclasses.dataclass(frozen=True)
class Stays:
    """What a cut left of the base model.

    layers: their numbers. dimensions: of the residual stream, int64 [kept], or where it was turned
    (`methods.rotation`), the basis of what stays, [E, kept]; None: all. inputs, outputs: of a projection that lost
    some, those that stay, by its part and by layer of the cut model.
    """

    layers: tuple[int, ...]
    dimensions: torch.Tensor | None
    inputs: Mapping[str, Sequence[torch.Tensor]]
    outputs: Mapping[str, Sequence[torch.Tensor]]


class Streams:
    """The windows of one domain on their way through both models; everything that waits does so in main memory."""

    def __init__(self, base: Layers, cut: Layers, family: Family, stays: Stays) -> None:
        self.base, self.cut, self.family, self.stays = base, cut, family, stays
        self.norm_of = family.output_norms
        self._inputs: list[dict[str, torch.Tensor]] = []  # of the base model's readers, [B, T, E]
        self._middle: list[torch.Tensor] = []  # r between attention and MLP
        self._last: list[tuple[torch.Tensor, torch.Tensor]] = []  # r' there, and the input of down
        self._layer = 0

    def advance_base(
        self, skipped: Sequence[int], layer: int, then: Sequence[int], readers: Sequence[str], *, look: bool = True
    ) -> None:
        """Through layers that were dropped, one that stays, with a look at it, and the dropped ones behind it.

        readers: of q and gate, those whose inputs `of_readers` will want.
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
            self._middle.append((hidden.to(added.device) + added).cpu())
            self._inputs.append({part: seen[part].cpu() for part in readers})
            self.base.hidden[place] = out.cpu()
        for dropped in then:
            self.base.forward(dropped)

    def of_writer(self, layer: int, part: str) -> Told:
        """Batch by batch: the input x' [B, T, K] of o or down in a layer of the cut model, the weight [B, T, 1] of each
        token, and [what is missing in its output, B, T, N].
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
                self._last.append((stream.cpu(), x.cpu()))
            target = targets[place].to(x.device)
            weight = 1 / _root_mean_square(target).clamp_min(1e-15)
            put_out = self._linear(self.cut, layer, part, x)
            missing = self._kept(target).float() - stream.float() - self._added(self.cut, layer, part, put_out).float()
            if self.norm_of:
                # with the norm's own epsilon: a token whose output is next to nothing would count for all others
                root = (_root_mean_square(put_out).square() + float(self.cut.model.config.rms_norm_eps)).sqrt()
                gain = self._gain(layer, part)
                missing = missing * root * gain / (gain.square() + GAIN * gain.square().median())
                weight = weight / root.square()
            yield x, weight, [missing]

    def of_readers(self, layer: int, parts: Sequence[str]) -> Told:
        """The same of q, k and v, or of gate and up: what is missing of the base model's outputs."""
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
        """Through the same layer of the cut model. alike: the streams are the same there."""
        if alike:
            self.cut.hidden = list(self.base.hidden)
        elif not self._last:
            self.cut.forward(layer)
        device = self.cut.model.device
        for place, (stream, x) in enumerate(self._last):  # of_writer has been there: only down has changed since
            put_out = self._linear(self.cut, layer, self.family.down, x.to(device))
            added = self._added(self.cut, layer, self.family.down, put_out)
            self.cut.hidden[place] = (stream.to(device) + added).cpu()
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
        """What a projection's output adds to the stream."""
        norm = self.norm_of.get(part)
        return put_out if norm is None else layers.modules[self.family.in_layer(index, norm)](put_out)

    def _gain(self, layer: int, part: str) -> torch.Tensor:
        norm = self.cut.modules[self.family.in_layer(layer, self.norm_of[part])]
        gain: torch.Tensor = norm.weight.float() + self.family.norm_offset
        return gain


def _root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """[…, N] → float32 […, 1]."""
    made: torch.Tensor = x.float().square().mean(-1, keepdim=True).sqrt()
    return made
