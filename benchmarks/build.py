"""How long a depth-cut checkpoint takes to build, against a plain copy of the same bytes on the same disk.

    PYTHONPATH=. python benchmarks/build.py MODEL [--keep-layers N] [--repeats N] [--work DIRECTORY]

Both are written through to the disk (fsync) each time, in turn; the model's own file is in the page cache for both.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import statistics
import time

from compressors import build
from compressors.model import family
from compressors.model.checkpoint import Checkpoint
from compressors.model.model_directory import WEIGHTS
from compressors.plan import CompressionPlan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--keep-layers", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("outputs/benchmark"))
    arguments = parser.parse_args()
    base = Checkpoint.read(arguments.model)
    own = CompressionPlan.identity(base.config)
    keep = arguments.keep_layers or own.num_hidden_layers - 1
    plan = dataclasses.replace(own, num_hidden_layers=keep, drop_from="top")
    arguments.work.mkdir(parents=True, exist_ok=True)
    made, copy = arguments.work / "made", arguments.work / "copy"
    built, copied = [], []
    for number in range(arguments.repeats + 1):
        started = time.monotonic()
        build.apply(plan, base, family.family_of(base), None).write(made)
        through(made / WEIGHTS)
        built.append(time.monotonic() - started)
        started = time.monotonic()
        shutil.copyfile(made / WEIGHTS, copy)
        through(copy)
        copied.append(time.monotonic() - started)
        copy.unlink()
        if number:  # the first reads the model from the disk
            print(f"build {built[-1]:.2f} s, copy {copied[-1]:.2f} s", flush=True)
    size = (made / WEIGHTS).stat().st_size
    shutil.rmtree(made)
    ratios = [b / c for b, c in zip(built[1:], copied[1:], strict=True)]
    print(
        f"{size / 1e9:.2f} GB, {keep} of {own.num_hidden_layers} layers: {statistics.median(built[1:]):.2f} s against "
        f"{statistics.median(copied[1:]):.2f} s, ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


def through(path: pathlib.Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
