"""Functions that find out whether other processes use the machine, which makes timings noisy."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

SAMPLE_S = 0.5  # how long processor time is counted
BUSY_SHARE = 0.25  # the share of the cores that others may use
BUSY_GPU = 10  # the utilization of the GPU, in percent, that others may cause


def others(device: str) -> str | None:
    """Return a warning where other processes load the processor or the GPU; None on a quiet machine.

    Call it while this process and its children are idle.

    Args:
        device: cpu, cuda or mps.
    """
    cores = os.cpu_count() or 1
    used, most = _cores_used()
    found = []
    if used > BUSY_SHARE * cores:
        found.append(f"other processes use {used:.1f} of {cores} cores" + ("" if most is None else f" (most: {most})"))
    if device == "cuda":
        gpu = _gpu_used()
        found += [] if gpu is None else [gpu]
    if not found:
        return None
    return f"{' and '.join(found)}: timings will be noisy; stop them, or raise evaluation.workload.turns"


# -- the processor -------------------------------------------------------------------------------------------


def _cores_used() -> tuple[float, str | None]:
    """Return how many cores others use, and the name of the process that uses most where it can be seen."""
    if not Path("/proc/self/stat").exists():  # macOS: the load of a minute, without this process
        return max(os.getloadavg()[0] - 1.0, 0.0), None
    hertz = os.sysconf("SC_CLK_TCK")
    before, began = _ticks(), time.monotonic()
    whole_before = _whole_ticks()
    time.sleep(SAMPLE_S)
    after, whole_after = _ticks(), _whole_ticks()
    unit = hertz * (time.monotonic() - began)
    spent = {pid: ticks - before.get(pid, (0, 0, ""))[0] for pid, (ticks, _, _) in after.items() if pid in before}
    own = _descendants(os.getpid(), after)
    strangers = {pid: ticks for pid, ticks in spent.items() if pid not in own}
    outside = whole_after - whole_before - sum(ticks for pid, ticks in spent.items() if pid in own)
    used = max(sum(strangers.values()), outside) / unit  # those of another container are in the machine's sum alone
    most = max(strangers, key=lambda pid: strangers[pid], default=None)
    if most is None or strangers[most] / unit < 0.1:
        return used, None
    return used, f"{after[most][2]}, pid {most}"


def _ticks() -> dict[int, tuple[int, int, str]]:
    """Return the processor time, the parent and the name of each process that can be seen."""
    found = {}
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        try:
            text = (place / "stat").read_text(errors="replace")
        except OSError:  # it has ended
            continue
        name = text[text.index("(") + 1 : text.rindex(")")]
        fields = text.rpartition(")")[2].split()
        found[int(place.name)] = (int(fields[11]) + int(fields[12]), int(fields[1]), name)
    return found


def _whole_ticks() -> int:
    """Return the time for which the machine's processors were busy."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
        )
    except (OSError, ValueError):
        return 0
    return user + nice + system + irq + softirq + steal


def _descendants(root: int, processes: Mapping[int, tuple[int, int, str]]) -> set[int]:
    """Return the process `root` and all that it has started."""
    found, size = {root}, 0
    while len(found) > size:
        size = len(found)
        found |= {pid for pid, (_, parent, _) in processes.items() if parent in found}
    return found


# -- the GPU -------------------------------------------------------------------------------------------------


def _gpu_used() -> str | None:
    """Return what others do on the first GPU that this process sees; None where nothing, or without nvidia-smi."""
    at = _first_gpu()
    own = _descendants(os.getpid(), _ticks()) if Path("/proc/self/stat").exists() else {os.getpid()}
    rows = _smi("--query-compute-apps=pid,process_name,used_memory", at)
    for pid, name, memory in (row for row in rows if len(row) == 3):
        # in a container this process may stand there under another pid: only those that can be seen here count
        if pid.isdigit() and int(pid) not in own and Path(f"/proc/{pid}").exists():
            return f"process {pid} ({name}) has {memory} of the GPU's memory"
    for row in _smi("--query-gpu=utilization.gpu", at):
        percent = row[0].removesuffix("%").strip()
        if percent.isdigit() and int(percent) > BUSY_GPU:
            return f"the GPU is {percent}% busy"
    return None


def _first_gpu() -> str:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    return f"GPU-{uuid}" if uuid is not None else visible or "0"


def _smi(query: str, at: str) -> list[list[str]]:
    try:
        ended = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader", "-i", at],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # there is none, or it can't be asked
        return []
    return [[cell.strip() for cell in line.split(",")] for line in ended.stdout.splitlines() if line.strip()]
