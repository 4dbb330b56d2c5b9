# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gd2po-trl",
#     "torch==2.13.0",
#     "trl==1.16.0",
#     "transformers==5.23.0",
#     "peft==0.21.2",
#     "accelerate==1.15.0",
#     "datasets==5.2.0",
# ]
#
# [tool.uv.sources]
# gd2po-trl = { path = "..", editable = true }
# ///
"""
What a training step costs on your GPU, ours against TRL's, and whether the quickstart's task learns there.

In a clone of this repository, with one GPU and under ten minutes, beside the installation:

    uv run examples/gpu_benchmark.py

It runs `benchmarks/gpu.py`, whose options it takes, prints the result as JSON and writes it to
`benchmarks/results/gpu-cuda.json`. Please send it in: New issue, "A result". Without a GPU it runs at a reduced size.
"""

import runpy
import sys
from pathlib import Path


if __name__ == "__main__":
    benchmarks = Path(__file__).resolve().parents[1] / "benchmarks"
    sys.path.insert(0, str(benchmarks))
    runpy.run_path(str(benchmarks / "gpu.py"), run_name="__main__")
