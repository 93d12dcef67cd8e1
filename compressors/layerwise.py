"""A model's layers one at a time over all windows: what closed-form methods need, in the memory of one layer.

Hidden states of all windows stay in main memory between two layers. Works on the stock transformers model of any family
here: what a layer is called with beside its input is recorded from a whole forward pass.

Symbols: B windows of a batch, T tokens of a window, E hidden size, K input width of a Linear.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from compressors.errors import CheckpointError
from compressors.family import Family

Inputs = Callable[[torch.Tensor], None]  # told the input of a module, [B, T, K]


class _Reached(Exception):
    """The layers begin: the rest of the forward pass is of no interest."""


class Layers:
    """Windows on their way through the layers of `model`; all of them have the same length.

    hidden: the input of the next layer, a tensor [B, T, E] for each batch, in main memory.
    """

    def __init__(
        self, model: Any, family: Family, windows: Sequence[Sequence[int]], batch: int = 4, hidden: Any = None
    ) -> None:
        lengths = {len(window) for window in windows}
        if len(lengths) != 1:
            raise CheckpointError(f"calibration: windows of {sorted(lengths)} tokens; all must have the same length")
        self.model, self.family, self.batch = model, family, batch
        self.windows = [list(map(list, windows[start : start + batch])) for start in range(0, len(windows), batch)]
        self._modules = dict(model.named_modules())
        self.count = int(model.config.num_hidden_layers)
        self._called: dict[int, list[dict[str, Any]]] = {}  # batch size → keyword arguments of each layer
        self.hidden: list[torch.Tensor] = list(self._embedded()) if hidden is None else hidden

    def layer(self, index: int) -> Any:
        return self._modules[self.family.layer(index)]

    @torch.inference_mode()
    def forward(self, index: int, watch: Mapping[str, Inputs] | None = None, keep: bool = True) -> None:
        """Run layer `index` on `hidden`, and put its output there if `keep`.

        watch: by the name of a module in the layer (`family.o`), what is told its input, batch by batch.
        """
        layer = self.layer(index)
        keywords = {size: self._keywords(size)[index] for size in {len(hidden) for hidden in self.hidden}}
        hooks = [self._watch(f"{self.family.layer(index)}.{part}", told) for part, told in (watch or {}).items()]
        try:
            for place, hidden in enumerate(self.hidden):
                out = layer(hidden.to(self.model.device), **keywords[len(hidden)])
                if keep:
                    self.hidden[place] = (out[0] if isinstance(out, tuple) else out).cpu()
        finally:
            for hook in hooks:
                hook.remove()

    def _watch(self, name: str, told: Inputs) -> Any:
        return self._modules[name].register_forward_pre_hook(lambda module, args: told(args[0]))

    def _ids(self, windows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(windows, device=self.model.device)

    @torch.inference_mode()
    def _embedded(self) -> Iterator[torch.Tensor]:
        """The input of the first layer."""
        found: list[torch.Tensor] = []

        def stop(module: Any, args: Any, kwargs: Any) -> None:
            found.append((args[0] if args else kwargs["hidden_states"]).cpu())
            raise _Reached

        for windows in self.windows:
            hook = self.layer(0).register_forward_pre_hook(stop, with_kwargs=True)
            try:
                with contextlib.suppress(_Reached):
                    self.model(input_ids=self._ids(windows), use_cache=False, logits_to_keep=1)
            finally:
                hook.remove()
            yield found.pop()

    @torch.inference_mode()
    def _keywords(self, size: int) -> list[dict[str, Any]]:
        """What each layer is called with beside its input, for batches of this size: masks, positions, rotations."""
        if size not in self._called:
            found: list[dict[str, Any]] = []

            def record(module: Any, args: Any, kwargs: Any) -> None:
                found.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

            hooks = [
                self.layer(index).register_forward_pre_hook(record, with_kwargs=True) for index in range(self.count)
            ]
            try:
                windows = next(windows for windows in self.windows if len(windows) == size)
                self.model(input_ids=self._ids(windows), use_cache=False, logits_to_keep=1)
            finally:
                for hook in hooks:
                    hook.remove()
            self._called[size] = found
        return self._called[size]
