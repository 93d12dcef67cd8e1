"""Defines the analysis of a model: what it is made of, what could be cut from it, and what each layer does."""

from __future__ import annotations

import dataclasses
from typing import Any

from compressors.model.structure import LayerStructure, Part, Structure
from compressors.possible_cuts import Cut

SIZES = (
    *("num_attention_heads", "num_key_value_heads", "heads_per_group", "head_dim"),
    *("hidden_size", "intermediate_size", "vocab_size"),
)


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Analysis holds the structure of a model and what could be cut from it.

    Attributes:
        model: The directory of the model.
        structure: Its parts, its layers and its sizes.
        cuts: The possible cuts; none where `structure.uncuttable` says why.
        kernel_alignment: Whether cuts that vLLM's GPU kernels can't run count as infeasible.
        block_influence: The importance of each layer [0, 2]; None where it was not measured.
        drop_order: The layers in the order in which they would be dropped; None without importance.
    """

    model: str
    structure: Structure
    cuts: tuple[Cut, ...]
    kernel_alignment: bool = False
    block_influence: tuple[float, ...] | None = None
    drop_order: tuple[int, ...] | None = None

    def share(self, part: Part) -> float:
        """Return the part's share of the model's bytes, 0 to 1."""
        return part.bytes / self.structure.bytes if self.structure.bytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values. Sizes are bytes, shares are parts of the model's bytes."""
        structure = self.structure
        return {
            "model": self.model,
            "model_type": structure.model_type,
            "dtype": structure.dtype,
            "quantization": structure.quantization,
            "parameters": structure.parameters,
            "bytes": structure.bytes,
            "decode_bytes": structure.decode_bytes,
            "num_hidden_layers": len(structure.layers),
            **{name: getattr(structure, name) for name in SIZES},
            "tied": structure.tied,
            "parts": [self._part(part) for part in structure.parts],
            "layers": [self._layer(place, layer) for place, layer in enumerate(structure.layers)],
            "drop_order": None if self.drop_order is None else list(self.drop_order),
            "kernel_alignment": self.kernel_alignment,
            "cuts": [
                {
                    **{field.name: getattr(cut, field.name) for field in dataclasses.fields(cut)},
                    "plan": cut.plan.to_dict(),
                }
                for cut in self.cuts
            ],
            "uncuttable": structure.uncuttable,
        }

    def _layer(self, place: int, layer: LayerStructure) -> dict[str, Any]:
        whole = layer.total
        influence = {} if self.block_influence is None else {"block_influence": self.block_influence[place]}
        return {
            "index": layer.index,
            "parameters": whole.parameters,
            "bytes": whole.bytes,
            "share": self.share(whole),
            "parts": [self._part(part) for part in whole.parts],
            **influence,
        }

    def _part(self, part: Part) -> dict[str, Any]:
        weights = [
            {
                **self._sums(weight),
                "shape": None if weight.shape is None else list(weight.shape),
                "dtype": weight.dtype,
            }
            for weight in part.parts
        ]
        return {**self._sums(part), "parts": weights}

    def _sums(self, part: Part) -> dict[str, Any]:
        return {
            "name": part.name,
            "parameters": part.parameters,
            "bytes": part.bytes,
            "share": self.share(part),
            "count": part.count,
        }
