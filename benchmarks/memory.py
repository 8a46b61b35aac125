"""Memory of one step in its own process.

    python benchmarks/memory.py STEP SCALE

prepares the step, prints "ready", waits for a line, and runs the step.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from measure import FULL, TINY, Scale, scene

SCALES = {"full": FULL, "tiny": TINY}
PERIOD = 0.005  # seconds between two measurements


def prepare(step: str, scale: Scale) -> Callable:
    """Make the input of a step; return the call that runs it."""
    from neurolib import blocking, evaluation, tracing

    if step in ("target", "hd95", "tracing"):
        tree, mask = scene(scale.shape)
        other = np.roll(mask, 2, axis=2)
        return {
            "target": lambda: blocking.make_target(tree, scale.shape),
            "hd95": lambda: evaluation.hd95(mask, other),
            "tracing": lambda: tracing.trace(mask),
        }[step]
    import networks

    image = np.random.default_rng(0).random(scale.stitched, np.float32)
    if step == "training":
        from dataclasses import replace

        on_cpu = replace(scale, device="cpu", batch=networks.BATCH, steps=1)
        return networks.training_steps(on_cpu, fast=False)
    if step == "prediction":
        network = networks.random_network(scale.network)
        return lambda: networks.predict(network, image[:1, :300, :300], 0.25, "cpu")
    identity = networks.Identity("center")
    if step == "MONAI":
        return lambda: networks.monai_slices(identity, image, 0.25)
    return lambda: networks.predict(identity, image, 0.25, "cpu")


def resident(step: str, scale: Scale) -> tuple[float, float]:
    """Resident MB of a process before a step, and the peak during it."""
    name = next(name for name, known in SCALES.items() if known == scale)
    command = [sys.executable, __file__, step, name]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parent
    ) as child:
        child.stdout.readline()
        process = psutil.Process(child.pid)
        before = peak = process.memory_info().rss
        child.stdin.write(b"\n")
        child.stdin.flush()
        while child.poll() is None:
            with contextlib.suppress(psutil.Error):
                peak = max(peak, process.memory_info().rss)
            time.sleep(PERIOD)
    if child.returncode:
        raise RuntimeError(f"{step}: the process ended with status {child.returncode}")
    return before / 1e6, peak / 1e6


if __name__ == "__main__":
    run = prepare(sys.argv[1], SCALES[sys.argv[2]])
    print("ready", flush=True)
    sys.stdin.readline()
    run()
