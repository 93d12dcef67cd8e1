"""Run a model's layers one at a time over all windows, as closed-form methods need, in the memory of one layer.

Between two layers the hidden states of all windows stay on the GPU where they take a small part of it, else in main
memory. It works on the stock transformers model of any
family: the keyword arguments of each layer are recorded from a whole forward pass.

Symbols: B windows of a batch, T tokens of a window, E hidden size, K input width of a Linear.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from compressors.device import home
from compressors.errors import CheckpointError
from compressors.model.family import Family

Called = dict[tuple[int, int], list[dict[str, Any]]]  # (windows of a batch, tokens) → keyword arguments of each layer
Inputs = Callable[[torch.Tensor], None]  # is called with the input of a module, [B, T, K]


class _Reached(Exception):
    """_Reached ends a forward pass whose rest is not needed."""


class Layers:
    """Layers carries windows of one length through the layers of `model`.

    Attributes:
        hidden: The inputs [B, T, E] of the next layer, a tensor per batch, in the memory of `home`.
        home: The device that keeps what waits.
    """

    def __init__(
        self, model: Any, family: Family, windows: Sequence[Sequence[int]], batch: int = 4, called: Called | None = None
    ) -> None:
        """Embed the windows.

        Args:
            model: A stock transformers model.
            family: Its family.
            windows: The windows of token ids, all of one length.
            batch: The number of windows that run at once.
            called: The keyword arguments of the layers as recorded by another `Layers` of the same model; shared and
                extended.

        Raises:
            CheckpointError: When the windows differ in length.
        """
        lengths = {len(window) for window in windows}
        if len(lengths) != 1:
            raise CheckpointError(f"calibration: windows of {sorted(lengths)} tokens; all must have the same length")
        self.model, self.family, self.batch = model, family, batch
        self.windows = [list(map(list, windows[start : start + batch])) for start in range(0, len(windows), batch)]
        self.modules = dict(model.named_modules())
        self.count = int(model.config.num_hidden_layers)
        self.called: Called = {} if called is None else called
        width = int(model.config.hidden_size) * model.dtype.itemsize
        self.home = home(str(model.device), sum(map(len, windows)) * width)
        self.hidden: list[torch.Tensor] = list(self._embedded())

    def layer(self, index: int) -> Any:
        """Return the module of a layer."""
        return self.modules[self.family.layer(index)]

    def forward(self, index: int, watch: Mapping[str, Inputs] | None = None, keep: bool = True) -> None:
        """Run layer `index` on `hidden`, and replace `hidden` by its output if `keep`.

        Args:
            index: The number of the layer.
            watch: The name of a module within the layer (`family.o`) → a function that is called with its input, per
                batch.
            keep: Whether the output becomes the next layer's input.
        """
        for place in range(len(self.hidden)):
            out, seen = self.run(index, place, tuple(watch or ()))
            for part, told in (watch or {}).items():
                told(seen[part])
            if keep:
                self.hidden[place] = out.to(self.home)

    @torch.inference_mode()
    def run(
        self, index: int, place: int, watched: Sequence[str] = (), until: str | None = None
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """Run layer `index` on one batch of `hidden`.

        Args:
            index: The number of the layer.
            place: The number of the batch.
            watched: The modules within the layer whose inputs are wanted.
            until: A module at whose input the layer stops; it is watched too.

        Returns:
            (the output [B, T, E], or None with `until`; the inputs [B, T, K] by watched module).
        """
        hidden = self.hidden[place]
        keywords = self._keywords(len(hidden), hidden.shape[1])[index]
        seen: dict[str, torch.Tensor] = {}

        def watch(part: str) -> Any:
            def hook(module: Any, args: Any) -> None:
                seen[part] = args[0]
                if part == until:
                    raise _Reached

            return self.modules[f"{self.family.layer(index)}.{part}"].register_forward_pre_hook(hook)

        hooks = [watch(part) for part in dict.fromkeys((*watched, *(() if until is None else (until,))))]
        out = None
        try:
            with contextlib.suppress(_Reached):
                out = self.layer(index)(hidden.to(self.model.device), **keywords)
        finally:
            for hook in hooks:
                hook.remove()
        return out[0] if isinstance(out, tuple) else out, seen

    def _ids(self, windows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(windows, device=self.model.device)

    @torch.inference_mode()
    def _embedded(self) -> Iterator[torch.Tensor]:
        """Yield the input of the first layer, per batch."""
        inputs: list[torch.Tensor] = []

        def stop(module: Any, args: Any, kwargs: Any) -> None:
            inputs.append((args[0] if args else kwargs["hidden_states"]).to(self.home))
            raise _Reached

        for windows in self.windows:
            hook = self.layer(0).register_forward_pre_hook(stop, with_kwargs=True)
            try:
                with contextlib.suppress(_Reached):
                    self.model(input_ids=self._ids(windows), use_cache=False, logits_to_keep=1)
            finally:
                hook.remove()
            yield inputs.pop()

    @torch.inference_mode()
    def _keywords(self, size: int, tokens: int) -> list[dict[str, Any]]:
        """Return each layer's keyword arguments for batches of this size: masks, positions, rotations."""
        if (size, tokens) not in self.called:
            recorded: list[dict[str, Any]] = []

            def record(module: Any, args: Any, kwargs: Any) -> None:
                recorded.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

            hooks = [
                self.layer(index).register_forward_pre_hook(record, with_kwargs=True) for index in range(self.count)
            ]
            try:
                windows = next(windows for windows in self.windows if len(windows) == size)
                self.model(input_ids=self._ids(windows), use_cache=False, logits_to_keep=1)
            finally:
                for hook in hooks:
                    hook.remove()
            self.called[size, tokens] = recorded
        return self.called[size, tokens]
