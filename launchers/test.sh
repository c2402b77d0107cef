#!/usr/bin/env bash
# All tests on a fresh Debian machine: installs the packages and the virtual environment they need, then runs
# pytest. Arguments go to pytest: bash launchers/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."

# Of the languages of code tasks, Java and Go are not installed (250 MB): default-jdk-headless, golang-go.
packages=(python3-venv python3-dev g++ libaio-dev iproute2 openssh-server openssh-client pdsh munge \
    slurmctld slurmd slurm-client bubblewrap nodejs libboost-dev libssl-dev)
missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' ||
        missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        apt-get update -q >/dev/null
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" \
            >/dev/null
    else
        echo "test: not installed, so the tests that need them are skipped: ${missing[*]}" >&2
    fi
fi

unset PYTHONDONTWRITEBYTECODE  # every process would compile whatever it imports anew
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-test.txt
# Beside the others, so that all tests but its own run as for most users: without it.
[ -d .venv/optional/bitsandbytes ] ||
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
        --target .venv/optional -r requirements-quantised.txt

# Once, 93 MB; the tests that need this model are skipped without it.
[ -f runs/smollm2-135m/model.safetensors ] || bash launchers/fetch-smollm2.sh >/dev/null ||
    echo "test: SmolLM2-135M is not there, so the tests that need it are skipped" >&2

rm -f .venv/torch_extensions/*/lock  # of a build that was killed
export DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 PATH="$PWD/.venv/bin:$PATH"
.venv/bin/python -m ruff check --quiet .
.venv/bin/python -m ruff format --quiet --check .
.venv/bin/python -m mypy --no-error-summary
# Two workers, which take a file each, in the order of tests/conftest.py; `-n 0` for one after another.
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
