#!/usr/bin/env bash
# Try a federation of three organisations on one machine: each has its own identity, rows and process, and
# they communicate over TLS only. Three machines need the same three configurations: see
# docs/organisations.md. Arguments go to all three launch.py.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -x .venv/bin/python ]; then
    python3 -m venv .venv ||
        { echo "organisations: python3 -m venv failed; on Debian: apt-get install python3-venv" >&2; exit 1; }
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
python=.venv/bin/python
here=runs/organisations
mkdir -p "$here"

# All organisations use the same base model. Each makes an identity and has rows of its own kind.
"$python" -m fedspeed pretrain-base runs/quickstart-base
port=24301
for name in north east south; do
    [ -e "$here/keys/$name.key" ] || "$python" -m fedspeed keys new "$name" --address "127.0.0.1:$port" \
        --out "$here/keys"
    port=$((port + 1))
done
"$python" - "$here" <<'END'
import json, sys
from fedspeed.data.builtin import builtin_rows

rows = builtin_rows(7, 900)
kinds = sorted({row.category for row in rows})
for i, name in enumerate(("north", "east", "south")):
    own = [row for row in rows if kinds.index(row.category) % 3 == i]
    with open(f"{sys.argv[1]}/{name}.jsonl", "w") as file:
        for row in own:
            values = {"instruction": row.instruction, "input": row.input, "output": row.output}
            file.write(json.dumps(values) + "\n")
END
# The operator of the federation signs the roster of members; every site has pinned the operator's key.
[ -e "$here/keys/operator.key" ] || "$python" -m fedspeed keys new operator --address 127.0.0.1:24300 \
    --out "$here/keys"
"$python" -m fedspeed keys roster "$here"/keys/{north,east,south}.json --signer "$here/keys/operator.key" \
    --out "$here/roster.json"

# Each site runs in its own session, so a Ctrl-C reaches this script alone. It asks every site to finish its
# round (a second Ctrl-C: to end at once) and waits for them. Their output is prefixed with their names, and
# the filters that do so ignore the signal.
sites=()
filters=()
trap 'kill -TERM "${sites[@]}" 2>/dev/null || true' EXIT HUP INT TERM
for i in 1 2 3; do
    exec {said}> >(trap '' HUP INT TERM; exec sed -u "s/^/client$i  /")
    filters+=("$!")
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} setsid "$python" launch.py \
        --config "ds_configs/organisations/client$i.yaml" "$@" >&"$said" 2>&1 &
    sites+=("$!")
    exec {said}>&-
done
code=0
for site in "${sites[@]}"; do
    while kill -0 "$site" 2>/dev/null; do wait "$site" || true; done  # a signal ends a wait, not the site
    wait "$site" || code=$?
done
trap - EXIT
for filter in "${filters[@]}"; do
    while kill -0 "$filter" 2>/dev/null; do sleep 0.05; done
done
exit "$code"
