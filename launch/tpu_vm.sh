#!/usr/bin/env bash
# Trains on a Cloud TPU VM slice of any size. Run it where gcloud is logged in:
#   launch/tpu_vm.sh NAME ZONE BUCKET --config=configs/pretrain.py [flags of jaxvp.main]
# NAME is the TPU, BUCKET a gs:// folder for the workdir, which all hosts must reach. It copies
# this checkout to every host, installs it there, and starts the same command on all of them;
# jax.distributed finds the other hosts by itself. Repeat the command after a preemption:
# the run continues from its last checkpoint.
set -euo pipefail
if [ $# -lt 4 ] || [[ "$3" != gs://* ]]; then
    sed -n '2,7s/^# //p' "$0" >&2
    exit 1
fi
cd "$(dirname "$0")/.."
name=$1 zone=$2 workdir=$3
shift 3

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git ls-files -z --cached --others --exclude-standard | tar --null -czf "$archive" -T -

gcloud compute tpus tpu-vm scp "$archive" "$name:jaxvp.tar.gz" --zone="$zone" --worker=all
printf -v flags '%q ' "$@" "--workdir=$workdir"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
    set -e
    mkdir -p jaxvp
    tar -xzf jaxvp.tar.gz -C jaxvp
    cd jaxvp
    launch/install.sh tpu
    .venv/bin/python -m jaxvp.main $flags"
