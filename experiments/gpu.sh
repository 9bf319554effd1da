#!/usr/bin/env bash
# What only a GPU can show, unattended: the tests marked so, then the benchmark at base.yaml's size.
#
#     experiments/gpu.sh FOLDER        # with dsmr[bench,dev] installed; results go to FOLDER
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?name a folder for the results}
mkdir -p "$out"
nvidia-smi > "$out/nvidia-smi.txt"
python -m pytest -m gpu -n 0 2>&1 | tee "$out/tests.txt"
dsmr benchmark --config benchmark_gpu --output "$out/compiled.json" | tee "$out/compiled.md"
dsmr benchmark --config benchmark_gpu --compile_blocks false --output "$out/flex.json" | tee "$out/flex.md"
dsmr benchmark --config benchmark_gpu --precision fp16-mixed --peers false --output "$out/fp16.json" | tee "$out/fp16.md"
