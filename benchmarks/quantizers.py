"""What each quantizer loses: PerfNorm and KL to the base model, on text like the calibration's and on another kind.

    python benchmarks/quantizers.py judge                         # the project's own, made in memory
    python benchmarks/quantizers.py judge W8A8-gptq-smoothquant   # of inputs that are smoothed before
    python benchmarks/quantizers.py judge --checkpoint DIR        # checkpoints that somebody wrote
    python benchmarks/quantizers.py write W4A16-gptq DIR          # one checkpoint; under /usr/bin/time -v
    python benchmarks/quantizers.py peer W4A16-gptq DIR           # the same by llmcompressor, in its own environment

Calibrated on windows of 60% of the embedded text's documents; judged on the other 40%, and on --other. Weights and
activations are float32 but for what the scheme rounds. A PerfNorm's standard error is that of the mean difference of
log-likelihood over windows. Records for README.md are made with the defaults.
"""

import argparse
import math
import time
from pathlib import Path

import torch

from evaluator import embedded_texts, quality, texts

MOST_REFERENCE_BYTES = 8 * 2**30
DEFAULT = ("W8A8-nearest", "FP8_DYNAMIC-nearest", "W4A16-nearest", "W4A16-mse", "W4A16-gptq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a directory; default: the embedded SmolLM2-135M")
    parser.add_argument("--calibrate", type=int, default=128, help="calibration windows")
    parser.add_argument("--window", type=int, default=256, help="tokens of a window")
    parser.add_argument("--group-size", type=int, default=64, help="of W4A16")
    commands = parser.add_subparsers(dest="command", required=True)
    judge = commands.add_parser("judge")
    judge.add_argument(
        "names", nargs="*", metavar="SCHEME-QUANTIZER[-smoothquant]", help=f"default: {' '.join(DEFAULT)}"
    )
    judge.add_argument("--checkpoint", type=Path, action="append", default=[], help="judge this instead")
    judge.add_argument("--tokens", type=int, default=16_384, help="of each judged text")
    judge.add_argument("--other", type=Path, action="append", help="text of another kind; default: docstrings")
    for name in ("write", "peer"):
        command = commands.add_parser(name)
        command.add_argument("name", metavar="SCHEME-QUANTIZER[-smoothquant]")
        command.add_argument("save", type=Path, metavar="DIR")
        command.add_argument("--smoothing-strength", type=float, default=0.5, help="of the peer's SmoothQuant")
    arguments = parser.parse_args()
    if arguments.model is None:
        arguments.model = embedded_model()
    {"judge": judge_all, "write": write, "peer": peer}[arguments.command](arguments)


def embedded_model() -> Path:
    from search import files
    from search.setup import sources

    return sources.resolve(sources.EMBEDDED, files.CACHE)


def documents(other: list[Path] | None = None) -> tuple[list, list, list]:
    """(calibration, judged: the same domain, judged: another domain)."""
    calibration, same = texts.split(embedded_texts.documents(), 0.6)
    return calibration, same, texts.read_documents(other) if other else embedded_texts.report_documents()


def tokenizer(model: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def calibration_windows(arguments: argparse.Namespace) -> list[list[int]]:
    return texts.windows(tokenizer(arguments.model), documents()[0], arguments.window, arguments.calibrate)


# -- the project's own ---------------------------------------------------------------------------------------


def second_moments(model: torch.nn.Module, groups: list[tuple[str, ...]], windows: list[list[int]]) -> dict:
    """Module name → E[x xᵀ] [K, K] of its input; projections of a group share their input."""
    found: dict[str, torch.Tensor] = {}

    def hook_of(name: str):
        def hook(module, args):
            x = args[0].flatten(0, -2).float()
            found.setdefault(name, torch.zeros(x.shape[1], x.shape[1])).addmm_(x.T, x)

        return hook

    hooks = [model.get_submodule(parts[0]).register_forward_pre_hook(hook_of(parts[0])) for parts in groups]
    with torch.inference_mode():
        for window in windows:
            model(input_ids=torch.tensor([window]), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    tokens = sum(map(len, windows))
    return {part: found[parts[0]] / tokens for parts in groups for part in parts}


class Own:
    def __init__(self, arguments: argparse.Namespace) -> None:
        from compressors.model import family
        from compressors.model.checkpoint import Checkpoint

        self.arguments = arguments
        self.base = Checkpoint.read(arguments.model)
        self.family = family.family_of(self.base)
        self.moments: dict[str, torch.Tensor] = {}

    def model(self):
        return self.base.to_model("cpu", torch.float32)

    def made(self, name: str, how: str):
        """how: "quantize" or "simulate"."""
        from compressors.methods import precision, smoothing

        scheme, quantizer, *smooth = name.split("-")
        if (quantizer != "nearest" or smooth) and not self.moments:
            began = time.perf_counter()
            groups = precision.fused_groups(self.base, self.family)
            self.moments = second_moments(self.model(), groups, calibration_windows(self.arguments))
            print(f"second moments: {time.perf_counter() - began:.0f} s", flush=True)
        base, moments = self.base, self.moments.__getitem__ if self.moments else None
        if smooth:
            base, moments = smoothing.smooth(base, self.family, moments)
        return getattr(precision, how)(
            base,
            self.family,
            scheme,
            quantizer=quantizer,
            group_size=self.arguments.group_size if scheme == "W4A16" else 0,
            moments=moments,
        )


def write(arguments: argparse.Namespace) -> None:
    began = time.perf_counter()
    Own(arguments).made(arguments.name, "quantize").write(arguments.save)
    print(f"{arguments.name} in {arguments.save}: {time.perf_counter() - began:.0f} s in all")


def judge_all(arguments: argparse.Namespace) -> None:
    own = Own(arguments)
    count = math.ceil(arguments.tokens / arguments.window)
    judged = [
        texts.windows(tokenizer(arguments.model), part, arguments.window, count)
        for part in documents(arguments.other)[1:]
    ]
    base = own.model()
    references = [
        quality.Reference.of(base, [[window] for window in windows], MOST_REFERENCE_BYTES // 2) for windows in judged
    ]
    del base
    print("| | PerfNorm | KL | PerfNorm, other domain | KL, other domain | seconds |\n|---|---|---|---|---|---|")
    for name in arguments.checkpoint or arguments.names or DEFAULT:
        began = time.perf_counter()
        if isinstance(name, Path):
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        else:
            model = own.made(name, "simulate").to_model("cpu", torch.float32)
        seconds = time.perf_counter() - began
        columns = [cell for pair in zip(judged, references, strict=True) for cell in measured(model, *pair)]
        print(f"| {name} | {' | '.join(columns)} | {seconds:.0f} |", flush=True)
        del model


def measured(model, windows: list[list[int]], reference: quality.Reference) -> tuple[str, str]:
    found = [quality.shard_quality(model, [window], reference, index) for index, window in enumerate(windows)]
    gains = torch.tensor([base - one.nll for base, one in zip(reference.nll, found, strict=True)])
    kl = torch.tensor([one.kl for one in found])
    root = math.sqrt(len(windows))
    perf_norm = math.exp(gains.mean())
    return f"{perf_norm:.3f} ± {perf_norm * gains.std() / root:.3f}", f"{kl.mean():.4f} ± {kl.std() / root:.4f}"


# -- the peer ------------------------------------------------------------------------------------------------


def peer(arguments: argparse.Namespace) -> None:
    """By llmcompressor with its own defaults, on the same windows: run it where that is installed.

    --smoothing-strength is its SmoothQuant's; its examples for W8A8 take 0.8, its default is 0.5.
    """
    from compressed_tensors.quantization import preset_name_to_scheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import AutoModelForCausalLM

    scheme, quantizer, *smooth = arguments.name.split("-")
    began = time.perf_counter()
    preset = preset_name_to_scheme(scheme, ["Linear"])
    if scheme == "W4A16":
        preset.weights.group_size = arguments.group_size
    modifier = {"nearest": QuantizationModifier, "gptq": GPTQModifier}[quantizer]
    recipe = [modifier(config_groups={"group_0": preset}, ignore=["lm_head"])]
    if smooth:
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        recipe.insert(0, SmoothQuantModifier(smoothing_strength=arguments.smoothing_strength))
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    text = {}
    if quantizer == "gptq" or smooth:
        windows = calibration_windows(arguments)
        rows = {"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]}
        text = {
            "dataset": Dataset.from_dict(rows),
            "max_seq_length": arguments.window,
            "num_calibration_samples": len(windows),
        }
    oneshot(model=model, recipe=recipe, **text)
    model.save_pretrained(arguments.save, save_compressed=True)
    tokenizer(arguments.model).save_pretrained(arguments.save)
    print(f"{arguments.name} in {arguments.save}: {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
