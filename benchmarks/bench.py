"""Compare ours with what people would use instead: time, ratio, and agreement.

    python benchmarks/bench.py [target hd95 tracing ...] [--repeats 5] [--out FILE]

``pip install -c constraints.txt -e .[bench]`` installs the peers; the table names missing ones.
Each time is the median of the repeats, after one untimed call. Ours and the peer take turns, so
that other work on the machine affects both. A ratio says how many times better ours is.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import time
import warnings
from pathlib import Path

import networks
import pipeline
import psutil
import torch
import trees
import volumes
from measure import FULL, TINY, Scale, installed

from neurolib.course.runs import table
from neurolib.files import write_text

PACKAGES = ("numpy", "scipy", "scikit-image", "tifffile", "torch", "timm")
PEERS = (
    "edt", "kimimaro", "medpy", "monai", "morphio", "pandas", "patchify", "pyneval",
    "surface-distance",
)  # fmt: skip
TASKS = {
    "target": volumes.bench_target,
    "hd95": volumes.bench_hd95,
    "tracing": trees.bench_tracing,
    "distance": trees.bench_distance,
    "stitching": networks.bench_stitching,
    "depth": networks.bench_depth,
    "skipping": networks.bench_skipping,
    "pipeline": pipeline.bench_pipeline,
    "memory": pipeline.bench_memory,
    "blocks": volumes.bench_blocks,
    "swc": trees.bench_swc,
    "tiff": volumes.bench_tiff,
    "training": networks.bench_training,
    "inference": networks.bench_inference,
}


def machine() -> dict:
    """Hardware and software of the measurements."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    packages = (*PACKAGES, *(peer for peer in PEERS if installed(peer.replace("-", "_"))))
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "load before": round(psutil.getloadavg()[0], 2),
        "memory GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def measure(names: list[str], scale: Scale, repeats: int) -> dict:
    """Run benchmarks; return machine, date, descriptions, and all rows."""
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "repeats": repeats,
        "about": {name: TASKS[name].__doc__.partition("\n")[0] for name in names},
        "rows": [],
    }
    begun = time.perf_counter()
    for name in names:
        start = time.perf_counter()
        record["rows"] += [{"benchmark": name} | row for row in TASKS[name](scale, repeats)]
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    record["minutes"] = round((time.perf_counter() - begun) / 60, 1)
    return record


def main(arguments: list[str] | None = None) -> None:
    """Run the chosen benchmarks, or all, and print the table."""
    parser = argparse.ArgumentParser(description="Ours beside what people would use instead.")
    parser.add_argument("tasks", nargs="*", help=f"some of {', '.join(TASKS)}; default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write machine, date and rows as JSON")
    parser.add_argument("--tiny", action="store_true", help="only check that everything runs")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.tasks) - set(TASKS):
        parser.error(f"unknown task {', '.join(sorted(unknown))}; choose from {', '.join(TASKS)}")
    if chosen.repeats < 1:
        parser.error(f"--repeats {chosen.repeats}: expected at least 1")
    # Hide deprecation warnings of the peers.
    warnings.simplefilter("ignore")
    record = measure(chosen.tasks or list(TASKS), TINY if chosen.tiny else FULL, chosen.repeats)
    about = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"\n{about['cpu']}, {about['cores']} cores, GPU: {about['gpu']}; load before: ", end="")
    print(f"{about['load before']}; Python {about['python']}, {versions}")
    print(f"{record['date']}, {record['minutes']} minutes; median of up to {chosen.repeats}\n")
    print(table(record["rows"]))
    if chosen.out:
        write_text(chosen.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
