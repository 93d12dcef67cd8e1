"""Collect activation statistics of the base model on calibration text, in one pass.

They say which layers, heads, channels and dimensions do the most. Symbols: L layers, H query heads, D head_dim, E
hidden size, F FFN width, T tokens of a window, N windows. Knows no study; texts come in as token ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from compressors.device import compute_dtype
from compressors.errors import CheckpointError
from compressors.model import cached_tensors
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family, family_of

NORM = "norm_mean_square."
FIELDS = ("block_influence", "ffn_activity", "head_activity", "hidden_activity")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Calibration holds the activation statistics of a model.

    Attributes:
        block_influence: [L], 1 − cos(x, y) of a layer's input x and output y, the mean over tokens; a small value means
            that the layer does little. ShortGPT, https://arxiv.org/abs/2403.03853.
        ffn_activity: [L, F], the mean over a window's tokens of |input of down_proj|, then the L2 norm over windows.
            Minitron, https://arxiv.org/abs/2407.14679, section 2.2.
        head_activity: [L, H], the same of the L2 norm of a head's slice of the input of o_proj.
        hidden_activity: [E], the mean |x| of the residual stream after each layer, divided by its mean over dimensions,
            then summed over layers.
        norm_mean_square: The module name of each norm over the residual width → [E], the mean over tokens of its
            squared input.
    """

    block_influence: torch.Tensor
    ffn_activity: torch.Tensor
    head_activity: torch.Tensor
    hidden_activity: torch.Tensor
    norm_mean_square: dict[str, torch.Tensor]

    def save(self, path: Path) -> None:
        """Write the statistics as safetensors, whole or not at all.

        Raises:
            MachineError: When the file can't be written.
        """
        tensors = {NORM + name: value for name, value in self.norm_mean_square.items()}
        tensors |= {field: getattr(self, field) for field in FIELDS}
        cached_tensors.keep(path, tensors, f"calibration {path}:")

    def of_layers(self, family: Family, layers: Sequence[int]) -> Calibration:
        """Return the statistics of these layers, numbered as they are in the model that has them alone."""
        index = list(layers)
        norms = {family.final_norm: self.norm_mean_square[family.final_norm]}
        for new, old in enumerate(layers):
            for norm in family.block_norms:
                norms[family.in_layer(new, norm)] = self.norm_mean_square[family.in_layer(old, norm)]
        return dataclasses.replace(
            self,
            block_influence=self.block_influence[index],
            ffn_activity=self.ffn_activity[index],
            head_activity=self.head_activity[index],
            norm_mean_square=norms,
        )

    @classmethod
    def load(cls, path: Path, base: Checkpoint) -> Calibration:
        """Read what `save` wrote of the model `base`.

        Raises:
            OSError, ValueError, SafetensorError: When the file is missing, damaged, or of another model.
        """
        family, config = family_of(base), base.config
        layers, hidden = int(config["num_hidden_layers"]), int(config["hidden_size"])
        shapes: dict[str, list[int]] = {NORM + name: [hidden] for name in family.residual_norms(layers)}
        shapes |= {
            "block_influence": [layers],
            "ffn_activity": [layers, int(config["intermediate_size"])],
            "head_activity": [layers, int(config["num_attention_heads"])],
            "hidden_activity": [hidden],
        }
        tensors = cached_tensors.read_all(path, {name: (shape, torch.float32) for name, shape in shapes.items()})
        norms = {name.removeprefix(NORM): tensors.pop(name) for name in list(tensors) if name.startswith(NORM)}
        return cls(**tensors, norm_mean_square=norms)


def calibrate(
    base: Checkpoint,
    windows: Sequence[Sequence[int]],
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Run the base model over `windows` and return its statistics, summed in float32, on the CPU.

    Args:
        base: The model.
        windows: N windows of T token ids.
        device: The device to run it on.
        progress: A function that is called with (windows done, windows in all) after each window.

    Raises:
        CheckpointError: Without text, for token ids beyond the vocabulary, or when activations are not finite.
    """
    if not windows:
        raise CheckpointError("calibration: no text; give at least one window of token ids")
    family = family_of(base)
    largest, vocabulary = max(map(max, windows)), int(base.config["vocab_size"])
    if largest >= vocabulary:
        raise CheckpointError(
            f"calibration: the text holds token {largest}, and the model has {vocabulary}; use the model's own "
            "tokenizer"
        )
    model = base.to_model(device, dtype=compute_dtype(device))
    sums = _Sums(int(base.config["num_hidden_layers"]), int(base.config["num_attention_heads"]))
    hooks = sums.attach(dict(model.named_modules()), family)
    try:
        with torch.inference_mode():
            for done, window in enumerate(windows, start=1):
                model(input_ids=torch.tensor([list(window)], device=device), use_cache=False, logits_to_keep=1)
                if progress is not None:
                    progress(done, len(windows))
    finally:
        for hook in hooks:
            hook.remove()
    means = sums.means(tokens=sum(map(len, windows)))
    if not all(torch.isfinite(getattr(means, field)).all() for field in FIELDS):
        raise CheckpointError(
            "calibration: the base model's activations are NaN or infinite; its weights are broken, copy them again"
        )
    return means


class _Sums:
    """_Sums holds what forward hooks add up, by (kind, layer or module name); float32 on the model's device."""

    def __init__(self, layers: int, heads: int) -> None:
        self.layers, self.heads = layers, heads
        self.by_key: dict[tuple[str, Any], torch.Tensor] = {}

    def add(self, kind: str, key: Any, value: torch.Tensor) -> None:
        total = self.by_key.get((kind, key))
        self.by_key[kind, key] = value if total is None else total + value

    def attach(self, modules: dict[str, Any], family: Family) -> list[Any]:
        hooks = []
        for index in range(self.layers):
            hooks.append(modules[family.layer(index)].register_forward_hook(self._on_layer(index), with_kwargs=True))
            hooks.append(modules[family.in_layer(index, family.down)].register_forward_pre_hook(self._on_down(index)))
            hooks.append(modules[family.in_layer(index, family.o)].register_forward_pre_hook(self._on_o(index)))
        for name in family.residual_norms(self.layers):
            hooks.append(modules[name].register_forward_pre_hook(self._on_norm(name)))
        return hooks

    def _on_layer(self, index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            x = (args[0] if args else kwargs["hidden_states"])[0].float()  # (T, E)
            y = (output[0] if isinstance(output, tuple) else output)[0].float()  # (T, E)
            self.add("influence", index, (1 - torch.cosine_similarity(x, y, dim=-1)).sum())
            self.add("hidden", index, y.abs().sum(0))

        return hook

    def _on_down(self, index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            self.add("ffn", index, args[0][0].float().abs().mean(0).square())  # (T, F) → (F)

        return hook

    def _on_o(self, index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            by_head = args[0][0].float().unflatten(-1, (self.heads, -1))  # (T, H, D)
            self.add("head", index, by_head.norm(dim=-1).mean(0).square())  # (H)

        return hook

    def _on_norm(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            self.add("norm", name, args[0].float().flatten(0, -2).square().sum(0))  # (T, E) → (E)

        return hook

    def means(self, tokens: int) -> Calibration:
        def stacked(kind: str) -> torch.Tensor:
            return torch.stack([self.by_key[kind, index] for index in range(self.layers)]).cpu()

        hidden = stacked("hidden")  # (L, E)
        return Calibration(
            block_influence=stacked("influence") / tokens,
            ffn_activity=stacked("ffn").sqrt(),
            head_activity=stacked("head").sqrt(),
            hidden_activity=(hidden / hidden.mean(1, keepdim=True)).sum(0),
            norm_mean_square={
                key: (value / tokens).cpu() for (kind, key), value in self.by_key.items() if kind == "norm"
            },
        )
