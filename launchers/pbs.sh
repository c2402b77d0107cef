#!/usr/bin/env bash
# A FedSpeed run as a PBS job (PBS Professional, OpenPBS). Submit it from the project's folder; what follows
# `launch.py` goes into ARGS:
#
#     qsub launchers/pbs.sh
#     qsub -v CONFIG=ds_configs/quickstart.yaml,ARGS="federation.rounds=20 train.lr=1e-3" launchers/pbs.sh
#
# Edit these lines: nodes and their GPUs (one mpiproc for each GPU), and the time.
#PBS -l select=3:ncpus=16:ngpus=2:mpiprocs=2
#PBS -l walltime=24:00:00
#
#PBS -N fedspeed
#PBS -j oe
#PBS -r y

set -uo pipefail

CONFIG=${CONFIG:-ds_configs/gsm8k.yaml}
read -ra arguments <<<"${ARGS:-}"

cd "${PBS_O_WORKDIR:?this is a batch script: start it with qsub}" || exit 2
if [[ ! -f launch.py ]]; then
    echo "pbs.sh: no launch.py in $PWD; submit from the project's folder" >&2
    exit 2
fi
if [[ -f .venv/bin/activate ]]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi

# PBS names a node once for each of its mpiprocs, in a file that only the first node has. Every rank needs it,
# to learn who its neighbours are, so it is copied to where all nodes see it. mpirun takes repeated names for
# slots.
nodefile=$PWD/pbs-nodes.${PBS_JOBID:-$$}
trap 'rm -f "$nodefile"' EXIT
awk 'NF' "${PBS_NODEFILE:?PBS has not set it}" >"$nodefile" || exit 2
ranks_total=$(wc -l <"$nodefile")
if ((ranks_total == 0)); then
    echo "pbs.sh: $PBS_NODEFILE names no node" >&2
    exit 2
fi
export PBS_NODEFILE=$nodefile

# mpirun starts the ranks on other nodes without this shell's variables, except those named to it.
exports=()
while IFS= read -r name; do
    case $name in
        PATH | LD_LIBRARY_PATH | VIRTUAL_ENV | PBS_JOBID | PBS_NODEFILE | DS_* | FEDSPEED_* | GLOO_* | \
            HF_* | NCCL_* | OMP_* | PYTHON* | TORCH_* | UCX_*) exports+=(-x "$name") ;;
    esac
done < <(compgen -e)

# How a SIGTERM (qdel, the end of the walltime) reaches the ranks, and nobody is killed before the round is
# done. mpirun itself would kill every rank one second after a SIGTERM, so it is started with that signal
# blocked and gets SIGUSR1 instead, which it hands to the ranks on all nodes; they take it for the same
# request, and ignore it until they can. PBS signals every process of its session, so the connections to the
# other nodes are shielded as well.
readonly shield=(env --block-signal=TERM)
export PRTE_MCA_plm_ssh_agent="${shield[*]} ${PRTE_MCA_plm_ssh_agent:-ssh}"

# shellcheck disable=SC2317 # called by the trap
forward() {
    echo "pbs.sh: SIGTERM; the ranks finish their round" >&2
    kill -USR1 "$mpi"
}

echo "pbs.sh: $ranks_total ranks on $(uniq "$nodefile" | paste -sd,)"
# Ranks of one client are neighbours: slots are filled host by host. Not bound to single cores, for offloaded
# optimizers use many.
"${shield[@]}" mpirun -n "$ranks_total" --hostfile "$nodefile" --map-by slot --bind-to none "${exports[@]}" \
    env --ignore-signal=USR1 "$(command -v python3)" -u launch.py --config "$CONFIG" "${arguments[@]}" "$@" &
mpi=$!
trap forward TERM
# a signal interrupts wait, and `wait` then tells of the signal
while [[ -n $(jobs -rp) ]]; do wait "$mpi"; done
wait "$mpi"
exit "$?"
