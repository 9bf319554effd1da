#!/usr/bin/env bash
# Pack what a GPU machine without a network needs in addition to this checkout, in a folder of less than 60 MiB.
#
#     DSMR_MAESTRO=maestro-v3.0.0-midi.zip experiments/gpu/pack.sh runs/gpu_pack [PYTHON_VERSION]
#
# The tokenized MAESTRO (not to be published: CC BY-NC-SA), and wheels of packages that a machine with torch, lightning
# and torchmetrics may lack, for PYTHON_VERSION (3.12) on x86-64 Linux. Then, on the machine, in the checkout:
#
#     python3 experiments/gpu/run.py --pack runs/gpu_pack --out RESULTS        # repeat until it says: to do: nothing
set -euo pipefail
cd "$(dirname "$0")/../.."
pack=${1:?name a folder for the pack}
version=${2:-3.12}
bin=.venv/bin
mkdir -p "$pack/wheels"
store=$($bin/dsmr prepare --json | tail -1 | $bin/python -c 'import json, sys; print(json.load(sys.stdin)["store"])')
tar -C "$(dirname "$store")" --transform "s/^$(basename "$store")/store/" -cJf "$pack/store.tar.xz" "$(basename "$store")"
wheels=(miditok symusic pebble pooch safetensors platformdirs pySmartDL jsonargparse docstring_parser typeshed_client importlib_resources pytest-xdist execnet
  x-transformers einx frozendict loguru torch-einops-utils perceiver-ar-pytorch)
pinned=()
for name in "${wheels[@]}"; do
  found=$($bin/pip list --format freeze 2>/dev/null | grep -i "^${name//[-_]/[-_]}==" || true)
  pinned+=("${found:-$name}")
done
platforms=()
for glibc in 1 2010 2014 _2_17 _2_24 _2_27 _2_28 _2_31 _2_34; do platforms+=(--platform "manylinux${glibc}_x86_64"); done
$bin/pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
  "${platforms[@]}" --dest "$pack/wheels" "${pinned[@]}"
git describe --always --dirty > "$pack/commit"
du -sh "$pack"
[ "$(du -sk "$pack" | cut -f 1)" -lt 61440 ] || { echo "$pack has more than 60 MiB" >&2; exit 1; }
