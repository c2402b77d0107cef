#!/usr/bin/env bash
# prepare.sh FOLDER [PYTHON_VERSION [CUDA_VERSION]]: unpacks into FOLDER the packages that a machine with
# PyTorch, transformers, PEFT and mpi4py lacks for the campaign, so that nothing has to be installed there.
# Run it where the project's requirements are installed; then copy FOLDER beside the project and put it on
# PYTHONPATH (benchmarks/gpu/README.md).
set -euo pipefail
[ "$#" -ge 1 ] ||
    { echo "usage: prepare.sh FOLDER [PYTHON_VERSION, as 3.12 [CUDA_VERSION, as 130]]" >&2; exit 2; }
folder=$1
version=${2:-3.12}
cuda=${3:-130}
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
mkdir -p "$folder"

platforms=()
for glibc in 2_34 2_28 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64)
pinned() { grep -hE "^$1==" "$root"/requirements*.txt; }  # one place says which version
fetch() {
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version "$version" \
        --implementation cp "${platforms[@]}" --dest "$wheels" "$@"
}
# DeepSpeed's own requirements, and what `cryptography` and RoundPipe need.
"$python" -m pip list --format=freeze |
    grep -iE '^(hjson|pydantic|pydantic[_-]core|annotated[_-]types|typing[_-]inspection|cffi|pycparser)==' \
        >"$wheels/needed.txt"
fetch --requirement "$wheels/needed.txt" "$(pinned cryptography)" "$(pinned bitsandbytes)"
fetch roundpipe==0.1.1 beartype py-cpuinfo ninja
# DeepSpeed comes as source; no operator is built, and none is needed on a card.
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps \
    --no-build-isolation \
    --wheel-dir "$wheels" "$(pinned deepspeed)"
for wheel in "$wheels"/*.whl; do "$python" -m zipfile -e "$wheel" "$folder"; done
for data in "$folder"/*.data/purelib; do [ -d "$data" ] && cp -r "$data/." "$folder/"; done
# bitsandbytes brings a library for each CUDA version.
find "$folder/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name "*cuda$cuda.so" ! -name '*cpu.so' -delete
[ -f "$root/runs/quickstart-base/config.json" ] ||
    (cd "$root" && "$python" -m fedspeed pretrain-base runs/quickstart-base)
du -sh "$folder"
