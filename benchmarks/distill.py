"""Distill a cut model and judge it before and after: tokens per second, share of the device's peak rate, KL, PerfNorm.

    python benchmarks/distill.py MODEL --text DIRECTORY [--layers 10] [--ffn 768] [--repair none] [--tokens 300000]
    python benchmarks/distill.py --random-1.2b --tokenizer MODEL --layers 28 --tokens 2000000 --device cuda

DIRECTORY holds calibration_*.txt, which it is cut, repaired and trained on (its last tenth is held out), and
search_*.txt, on which it is judged. --random-1.2b: EXAONE-4.0-1.2B's dimensions with random weights (MODEL, where
`gpu/random_model.py` has written it), trained on random tokens, to time it, and not judged. FLOP are counted as
`Distilled` says: 6·N of the student and 2·N of the teacher per token.
"""

import argparse
import dataclasses
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import transformers

from compressors import build
from compressors.distillation.distill import Distillation, distill
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import family_of
from compressors.plan import CompressionPlan
from compressors.statistics import activations, second_moments
from evaluator import quality, score, texts

SHARD = 4  # windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, nargs="?")
    parser.add_argument("--random-1.2b", dest="random", action="store_true")
    parser.add_argument("--tokenizer", type=pathlib.Path, help="of the random model")
    parser.add_argument("--text", type=pathlib.Path)
    parser.add_argument("--layers", type=int, help="that stay: `drop_from: kl`; of the random model all but the middle")
    parser.add_argument("--ffn", type=int, help="channels that stay: `importance: flap`")
    parser.add_argument("--repair", default="stream", help="none, ridge or stream; the random model gets none")
    parser.add_argument("--fitted", type=int, default=64, help="windows of each text that the cut is chosen by")
    parser.add_argument("--judged", type=int, default=16, help="windows of each search text")
    parser.add_argument("--work", type=pathlib.Path, help="where the state is kept; a temporary directory if not said")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, kind in (
        ("tokens", int),
        ("batch-tokens", int),
        ("window", int),
        ("learning-rate", float),
        ("weight-ce", float),
        ("temperature", float),
        ("evaluate-every", int),
        ("held-out-windows", int),
        ("micro-batch", int),
        ("chunk", int),
        ("dtype", str),
    ):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--not-compiled", dest="compiled", action="store_const", const=False)
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction)
    arguments = parser.parse_args()
    if not (arguments.tokenizer or arguments.model if arguments.random else arguments.model and arguments.text):
        parser.error("name MODEL and --text, or --random-1.2b and --tokenizer or MODEL")
    fields = Distillation.__dataclass_fields__
    asked = {name: value for name, value in vars(arguments).items() if name in fields and value is not None}
    settings = Distillation(**{"tokens": 2_000_000 if arguments.random else 300_000, **asked})
    with tempfile.TemporaryDirectory() as scratch:
        run(arguments, settings, pathlib.Path(scratch))


def run(arguments: argparse.Namespace, settings: Distillation, scratch: pathlib.Path) -> None:
    if arguments.random:
        there = arguments.model or scratch / "model"
        if arguments.model is None:
            script = pathlib.Path(__file__).parent / "gpu" / "random_model.py"
            subprocess.run([sys.executable, script, there, "--tokenizer", arguments.tokenizer], check=True)
        teacher = Checkpoint.read(there)
        training = {"random": random_windows(settings.window, max(settings.tokens // settings.window, 1), seed=0)}
        held_out = random_windows(settings.window, settings.held_out_windows, seed=1)
        judged = {}
    else:
        teacher = Checkpoint.read(arguments.model)
        training, held_out, judged = read_texts(arguments, settings)
    windows = [window for those in training.values() for window in those]
    student = cut(teacher, arguments, training, scratch)
    print(
        f"teacher {teacher.total_parameters:,} parameters, student {student.total_parameters:,}; {len(windows)} "
        f"windows of {settings.window} tokens, {len(held_out)} held out"
    )
    dtype = settings.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    rate = matrix_rate(arguments.device, getattr(torch, dtype))
    print(f"matrix products: {rate / 1e12:.3f} TFLOP/s in {dtype} on {device_name(arguments.device)}")
    before = {name: judge(student, teacher, shards, arguments.device) for name, shards in judged.items()}

    if arguments.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    found = distill(
        student, teacher, windows, held_out, settings, arguments.device, arguments.work or scratch / "work", show
    )
    print(file=sys.stderr)
    for evaluation in found.evaluations:
        print(f"  {evaluation.tokens:>10,} tokens: held-out KL {evaluation.held_out_kl:.4f}")
    print(
        f"{found.tokens:,} tokens ({found.epochs:.2f} epochs, {found.updates} updates, {found.skipped} skipped) in "
        f"{found.seconds:.1f} s, ended: {found.stopped}; held-out KL {found.kl_before:.4f} → {found.kl_best:.4f}"
    )
    print(
        f"{found.tokens_per_second:,.0f} tokens/s, {found.flops_per_second / 1e12:.3f} TFLOP/s: "
        f"{100 * found.flops_per_second / rate:.1f}% of the matrix rate (micro-batch {found.micro_batch}, computed "
        f"twice: {found.gradient_checkpointing}, compiled: {found.compiled}, {found.dtype})"
    )
    if arguments.device.startswith("cuda"):
        print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    for name, shards in judged.items():
        print(f"{name:12} before {before[name]}")
        print(f"{name:12} after  {judge(found.checkpoint, teacher, shards, arguments.device)}")


def random_windows(length: int, count: int, seed: int) -> list[list[int]]:
    return torch.randint(3, 102400, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def read_texts(arguments: argparse.Namespace, settings: Distillation):
    """({text: training windows}, held-out windows, {search text: shards of windows})."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)

    def every_window(documents):
        stream = []
        for document in documents:
            stream += tokenizer.encode(document.text + "\n\n", add_special_tokens=False, verbose=False)
        length = settings.window
        return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]

    training, held_out, judged = {}, [], {}
    for file in sorted(arguments.text.glob("calibration_*.txt")):
        documents = texts.read_documents([file])
        split = round(0.9 * len(documents))
        training[file.stem] = every_window(documents[:split])
        held_out.append(every_window(documents[split:]))
    share = settings.held_out_windows // len(held_out)
    held_out = [window for each in held_out for window in each[:share]]
    for file in sorted(arguments.text.glob("search_*.txt")):
        taken = texts.windows(tokenizer, texts.read_documents([file]), settings.window, arguments.judged)
        judged[file.stem] = [taken[start : start + SHARD] for start in range(0, len(taken), SHARD)]
    return training, held_out, judged


def cut(teacher: Checkpoint, arguments: argparse.Namespace, training, scratch: pathlib.Path) -> Checkpoint:
    own = CompressionPlan.identity(teacher.config)
    plan = dataclasses.replace(own, intermediate_size=arguments.ffn or own.intermediate_size)
    if arguments.layers:
        going = own.num_hidden_layers - arguments.layers
        middle = ",".join(str(arguments.layers // 2 + layer) for layer in range(going))
        plan = dataclasses.replace(
            plan, num_hidden_layers=arguments.layers, drop_from=middle if arguments.random else "kl"
        )
    if not arguments.random:
        plan = dataclasses.replace(plan, importance="flap", repair=arguments.repair)
    fitted = {name: those[: arguments.fitted] for name, those in training.items()}
    moment = None
    if build.needs_moments(plan):
        moment = second_moments.collect(teacher, fitted, scratch / "moments", arguments.device)
    statistics = None
    if build.needs_calibration(plan, own):
        statistics = activations.calibrate(teacher, [w for those in fitted.values() for w in those], arguments.device)
    made = build.apply(plan, teacher, family_of(teacher), statistics, moments=moment, device=arguments.device)
    made.write(scratch / "student")  # a repair's tensors are worked out as they are read
    return Checkpoint.read(scratch / "student")


def judge(checkpoint: Checkpoint, teacher: Checkpoint, shards, device: str) -> str:
    """KL and PerfNorm on the shards, each with its standard error, of the weights as they would be written."""
    reference = quality.Reference.of(teacher.to_model(device, torch.float32), shards, 8 << 30)
    model = checkpoint.to_model(device, torch.float32)
    found = [quality.shard_quality(model, shard, reference, index) for index, shard in enumerate(shards)]
    kl = [one.kl for one in found]
    gain = [base - one.nll for base, one in zip(reference.nll, found, strict=True)]
    perf_norm = float(torch.tensor(statistics.fmean(gain)).exp())
    return (
        f"KL {statistics.fmean(kl):.4f} ± {score.standard_error(kl):.4f}, PerfNorm {perf_norm:.4f} ± "
        f"{perf_norm * score.standard_error(gain):.4f}"
    )


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the median of some after a warm-up."""
    size = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for turn in range(30 if device.startswith("cuda") else 5):
        began = time.perf_counter()
        a @ b
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        if turn >= 2:
            seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"


def show(now) -> None:
    rate = f"{now.tokens_per_second:,.0f} tokens/s" if now.tokens_per_second else ""
    kl = f"held-out KL {now.held_out_kl:.4f}" if now.held_out_kl is not None else ""
    loss = f"loss {now.loss:.4f}" if now.loss is not None else ""
    left = f"{now.seconds_left:.0f} s left" if now.seconds_left is not None else ""
    line = f"{now.stage} {now.tokens:,} of {now.total_tokens:,} tokens  {rate}  {loss}  {kl}  {left}"
    print(f"\r{line:<120}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
