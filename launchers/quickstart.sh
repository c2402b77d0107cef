#!/usr/bin/env bash
# Run the quickstart from a fresh clone: make a virtual environment, install the requirements, pretrain a tiny
# base, train four clients. Arguments go to launch.py, for instance: bash launchers/quickstart.sh
# federation.rounds=20
#
# With `smol` as its first argument it does so with a real language model: it fetches SmolLM2-135M (93 MB),
# asks it a question, trains three clients (nine minutes of processor time), and asks again.
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
if [ "${1:-}" != smol ]; then
    .venv/bin/python -m fedspeed pretrain-base runs/quickstart-base
    exec .venv/bin/python launch.py --config ds_configs/quickstart.yaml "$@"
fi

shift
question="What is the capital of Colombia?"
ask() { .venv/bin/python -m fedspeed chat "$1" "$question" --max-new-tokens 32; }

bash launchers/fetch-smollm2.sh
before=$(ask runs/smollm2-135m)
echo "before training, \"$question\" is answered: $before"
.venv/bin/python launch.py --config ds_configs/quickstart_smol.yaml "$@"
after=$(ask quickstart_smol)
cat <<ANSWERS

"$question"
  before training: $before
  after training:  $after

Ask more: .venv/bin/python -m fedspeed chat quickstart_smol "What is a young dog called?"
The report: runs/quickstart_smol/report.md
ANSWERS
