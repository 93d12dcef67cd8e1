"""The transformers engine runs eager PyTorch on a CPU, a CUDA GPU or MPS: slow, and exact where it matters.

It times in the checkpoint's own dtype. Quality is computed in that dtype on a GPU. On a CPU it is computed in float32
from a second copy: arithmetic in bfloat16 would add a KL of 0.001 to the weights' own. It reads safetensors alone and
runs no code of the checkpoint.
"""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluator import answering, backends, gpu_busy, hardware, nvml, static_batches
from evaluator.answering import Growth
from evaluator.backends import EngineSettings, Facts
from evaluator.errors import install
from evaluator.generation import Answer, Limits

FACTS = Facts(packages=("transformers", "torch"))
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking for a GPU does not open it, so that a forked engine still can
}


def preload() -> None:
    """Import torch, transformers and the model classes of the families that are common here."""
    for name in (
        "torch",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.models.exaone4.modeling_exaone4",
        "transformers.quantizers.quantizer_compressed_tensors",
        "evaluator.quality",
    ):
        importlib.import_module(name)
    if backends.installed("compressed_tensors"):
        importlib.import_module("compressed_tensors.compressors")


def unavailable() -> str | None:
    """Return why the engine cannot run on this machine, or None."""
    missing = [package for package in ("torch", "transformers") if not backends.installed(package)]
    return f"{' and '.join(missing)} can't be imported; {install()}" if missing else None


class Engine:
    """A model in memory; see `evaluator.backends.Engine`."""

    survives_errors = True

    def __init__(self, path: str, settings: EngineSettings) -> None:
        import torch

        self.path, self.settings, self.device = path, settings, _device(settings.device)
        if self.device == "cpu":
            torch.set_num_threads(settings.threads or hardware.physical_cores())
        self.model = self._load("auto")
        self._exact: Any = None
        self._source = torch.Generator(self.device).manual_seed(settings.seed)  # of answers without a seed
        # a compressed-tensors model unpacks its weights in its first forward pass
        self._next(torch.zeros((1, 1), dtype=torch.long, device=self.device), None)

    def _load(self, dtype: Any) -> Any:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.path, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
        return model.to(self.device).eval().requires_grad_(False)

    @property
    def exact(self) -> Any:
        """The model that quality is computed with; it is loaded on first use, which is after the timing."""
        import torch

        if self._exact is None:
            half = self.device == "cpu" and self.model.dtype != torch.float32
            self._exact = self._load(torch.float32) if half else self.model
        return self._exact

    def nll(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the negative log-likelihood of each token except the first, in nats."""
        from evaluator import quality

        return [quality.window_nll(self.exact, window).tolist() for window in windows]

    def decode_steps(self, batch_size: int, prompt_tokens: int, steps: int, seed: int) -> list[float]:
        """Time one forward pass for each step; the likeliest token is fed back, and EOS is ignored."""
        ids, cache = self._prefilled(batch_size, prompt_tokens, seed)
        seconds = []
        for _ in range(steps):
            self._synchronize()
            start = time.perf_counter()
            ids, cache = self._next(ids, cache)
            self._synchronize()
            seconds.append(time.perf_counter() - start)
        return seconds

    def generate(self, prompts: Sequence[Sequence[int]], limits: Limits | Sequence[Limits]) -> list[Answer]:
        """Generate in static batches, in the dtype that is timed; see `evaluator.static_batches`."""
        began = time.perf_counter()

        def clock() -> float:
            return time.perf_counter() - began

        asked = answering.asked(prompts, limits, self.settings.max_model_len)
        ends, decode = answering.end_ids(Path(self.path)), answering.decoder_of(Path(self.path))
        growing = [Growth(one.limits, ends, decode, clock()) for one in asked]
        most = self.settings.max_num_seqs or static_batches.TOGETHER
        together = static_batches.at_most_together(self.model.config, most)
        for batch in static_batches.batches(asked, together):
            static_batches.generate(
                self.model, [asked[i] for i in batch], [growing[i] for i in batch], clock, self._source
            )
        return [growth.answer() for growth in growing]

    def busy_ms(self, batch_size: int, prompt_tokens: int, steps: int, seed: int) -> float | None:
        """Return the GPU's busy milliseconds of a decode step; None on another device."""
        if self.device != "cuda":
            return None
        state = self._prefilled(batch_size, prompt_tokens, seed)

        def decode(count: int) -> None:
            nonlocal state
            for _ in range(count):
                state = self._next(*state)
            self._synchronize()

        decode(gpu_busy.SETTLED)
        return gpu_busy.busy_ms(lambda: decode(steps), steps)

    def bytes_per_s(self) -> float | None:
        """Return the bandwidth of the GPU's memory; None on another device."""
        return gpu_busy.bytes_per_s() if self.device == "cuda" else None

    def logits_sha256(self, tokens: Sequence[int]) -> str:
        """Return the sha256 of the raw logits, float32 [T, V]."""
        import torch

        with torch.inference_mode():
            ids = torch.tensor([list(tokens)], device=self.device)
            logits = self.exact(input_ids=ids, use_cache=False).logits[0]
        return hashlib.sha256(logits.float().cpu().contiguous().numpy().tobytes()).hexdigest()

    def facts(self) -> dict[str, str]:
        """Return what this engine is and runs on."""
        import torch
        import transformers

        found = {
            "backend": "transformers",
            "engine_version": f"transformers {transformers.__version__}",
            "transformers_version": transformers.__version__,
            "torch_version": torch.__version__,
            "device": torch.cuda.get_device_name()
            if self.device == "cuda"
            else f"{self.device} ({hardware.processor()})",
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }
        if self.device == "cpu":
            found["threads"] = str(torch.get_num_threads())
        gpu = nvml.address() if self.device == "cuda" else None
        if gpu is not None:
            found["gpu"] = gpu
        if getattr(self.model.config, "quantization_config", None) is not None:
            found["quantization_kernel"] = (
                "none: weights are dequantized, and the time is not that of a quantized kernel"
            )
        return found

    def _prefilled(self, batch_size: int, prompt_tokens: int, seed: int) -> tuple[Any, Any]:
        """Return (the next ids, the cache) after a prompt of random ids."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        vocabulary = int(self.model.config.vocab_size)
        ids = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator).to(self.device)
        return self._next(ids, None)

    def _next(self, ids: Any, cache: Any) -> tuple[Any, Any]:
        """Return (the likeliest next ids [batch, 1], the cache) after ids [batch, tokens]."""
        import torch

        with torch.inference_mode():
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].argmax(dim=-1, keepdim=True), out.past_key_values

    def _synchronize(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        elif self.device == "mps":
            torch.mps.synchronize()


def _device(asked: str) -> str:
    import torch

    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
