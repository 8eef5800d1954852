"""What the benchmarks share: alternating timing, peak memory in a fresh process, and the record of where it ran."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers


def environment() -> dict:
    """Device, versions, threads and load."""
    cpu = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [line.split(":")[1].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def alternate(
    steps: dict[str, Callable[[], object]], repeats: int, warmup: int = 1, clock: str = "wall", rehearse: bool = False
) -> dict[str, list[float]]:
    """Seconds of each step, measured in turn: A B C A B C …, so that a change of the machine's speed meets all.

    Args:
        clock: a row of CLOCKS; "cpu" for a machine on which others work too, where one thread is measured.
        rehearse: each step runs once more before its clock starts: where it takes milliseconds, what the step before
            it has left in the caches would count.
    """
    now = CLOCKS[clock]
    samples = {name: [] for name in steps}
    for turn in range(warmup + repeats):
        for name, step in steps.items():
            if rehearse:
                step()
            start = now()
            step()
            if turn >= warmup:
                samples[name].append(now() - start)
    return samples


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    """The median of each list of samples."""
    return {name: statistics.median(values) for name, values in samples.items() if values}


def peak_memory(script: str, *arguments: str) -> float:
    """GiB that `script` with these arguments needed at its peak, in a process of its own.

    The script prints its own peak with `print_peak_memory`.
    """
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def print_peak_memory() -> None:
    """Prints this process's peak of resident memory in GiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held when it forked
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        print(int(line.split()[1]) / 2**20)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def write_result(path: Path, config: dict, samples: dict, **more) -> None:
    """Writes {env, config, samples, medians} and whatever else as JSON."""
    result = {"env": environment(), "config": config, "samples": samples, "medians": medians(samples), **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
