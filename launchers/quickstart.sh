#!/usr/bin/env bash
# Run the quickstart from a fresh clone: make a virtual environment, install the requirements, pretrain a tiny
# base, train four clients. Arguments go to launch.py, for instance: bash launchers/quickstart.sh
# federation.rounds=20
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -x .venv/bin/python ]; then
    python3 -m venv .venv ||
        { echo "quickstart: python3 -m venv failed; on Debian: apt-get install python3-venv" >&2; exit 1; }
fi
if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt; then
    echo "quickstart: installing requirements.txt failed; it needs Python 3.11 or newer and a package index" \
        >&2
    exit 1
fi
.venv/bin/python -m fedspeed pretrain-base runs/quickstart-base
exec .venv/bin/python launch.py --config ds_configs/quickstart.yaml "$@"
