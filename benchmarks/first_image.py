"""What a user waits for and pays: seconds to the first image, seconds of the next, memory and disk, by engine.

    python benchmarks/first_image.py CHECKPOINT [--engines full-precision,simulated,openvino,...]
                                     [--threads 1] [--json FILE]

Every engine runs in a process of its own, which imports, loads and samples one image twice, of the checkpoint's own
number of steps. `first` is from the start of the process; `next` the second image alone; `peak_megabytes` the largest
resident memory of the process. Graphs are made anew: `openvino` runs twice, the second time with what the first one has
left in the cache (`cached`). `full-precision` is the checkpoint's base model. For models that need no arguments.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ENGINES = ("full-precision", "simulated", "reference", "onednn", "openvino", "openvino-bf16")


def main() -> None:
    arguments = _arguments()
    if arguments.one is not None:
        print(json.dumps(_one(arguments)))
        return
    from engines import machine

    results = []
    with tempfile.TemporaryDirectory(prefix="stepquant-") as cache:
        for engine in arguments.engines:
            results.append({"engine": engine, **_in_a_process(arguments, engine, cache)})
            if engine.startswith("openvino"):
                results.append({"engine": engine, "cached": True, **_in_a_process(arguments, engine, cache)})
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    document = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "openvino")},
        "threads": arguments.threads,
        "checkpoint_bytes": sum(file.stat().st_size for file in arguments.checkpoint.rglob("*") if file.is_file()),
        "results": results,
    }
    text = json.dumps(document, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--engines", default=list(ENGINES), type=lambda text: text.split(","))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_a_process(arguments: argparse.Namespace, engine: str, cache: str) -> dict[str, Any]:
    words = [sys.executable, __file__, str(arguments.checkpoint), "--one", engine, "--threads", str(arguments.threads)]
    threads = {"OMP_NUM_THREADS": str(arguments.threads), "XDG_CACHE_HOME": cache}
    done = subprocess.run(
        [*words, "--began", str(time.time())], env={**os.environ, **threads}, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _one(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from stepquant.allocator import tune_allocator
    from stepquant.api import load, open_model, sample
    from stepquant.engines.openvino import OpenVINOEngine
    from stepquant.inspection import inspect_checkpoint

    torch.set_num_threads(arguments.threads)
    tune_allocator()
    held = inspect_checkpoint(arguments.checkpoint)
    if arguments.one == "full-precision":
        pipe = open_model(held["base_model"])
    else:
        bf16 = arguments.one == "openvino-bf16"
        pipe = load(arguments.checkpoint, engine=OpenVINOEngine("bf16") if bf16 else arguments.one)
    steps = held["schedule"]["steps"]
    sample(pipe, seeds=[0], steps=steps)
    first = time.time() - arguments.began
    again = time.perf_counter()
    sample(pipe, seeds=[1], steps=steps)
    return {
        "first_seconds": round(first, 2),
        "next_seconds": round(time.perf_counter() - again, 3),
        # Linux counts in 1024 bytes.
        "peak_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
    }


if __name__ == "__main__":
    main()
