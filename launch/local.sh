#!/usr/bin/env bash
# The whole way on one machine, no GPU needed: launch/local.sh [DIR]
# Installs jaxvp into .venv, builds the embedded dataset, trains a policy on all of its tasks,
# exports the bundle to DIR/bundle and evaluates it into DIR/evaluation. What is there already is
# used again. DIR is runs/local unless given.
set -euo pipefail
out=$(realpath -m "${1:-runs/local}")
cd "$(dirname "$0")/.."
SECONDS=0
step() { echo; echo "== $1 (after $((SECONDS / 60)) min $((SECONDS % 60)) s)"; }
python=.venv/bin/python
# Huge pages for what XLA allocates anew in every step: the kernel hands out fewer of them.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1

step "Install"
launch/install.sh

step "Build the embedded dataset, data/tabletop, and train the policy"
$python -m jaxvp.main --config=configs/pretrain.py --workdir="$out/pretrain"

step "Export"
if [ ! "$out/bundle/policy.json" -nt "$out/pretrain/checkpoints" ]; then
    rm -rf "$out/bundle"
    $python -m jaxvp.export --workdir="$out/pretrain" --out="$out/bundle"
fi

evaluate() {  # evaluate FOLDER FLAGS...
    local folder=$1
    shift
    if [ ! "$folder/results.json" -nt "$out/bundle/policy.json" ]; then
        rm -rf "$folder"  # Of an older bundle.
        $python -m jaxvp.evaluate --suite=tabletop --trials=20 --videos=3 --out="$folder" "$@"
    fi
}
step "Evaluate the policy, and random actions to compare with"
evaluate "$out/evaluation" --bundle="$out/bundle"
evaluate "$out/evaluation_random" --policy=random

step "Done"
$python - "$out" "$SECONDS" <<'PYTHON'
import json
import os
import pathlib
import sys

import rich
from rich.table import Table

out = pathlib.Path(sys.argv[1])
policy, random = (json.loads((out / name / "results.json").read_text())["tasks"]
                  for name in ("evaluation", "evaluation_random"))
table = Table("task", "policy", "random actions", title="Success rates")
for ours, other in zip(policy, random, strict=True):
    table.add_row(ours["name"], *(f"{t['successes']}/{t['trials']}" for t in (ours, other)))
table.add_section()
table.add_row("all", *(f"{sum(t['successes'] for t in ts) / sum(t['trials'] for t in ts):.1%}"
                       for ts in (policy, random)))
rich.print(table)
(out / "local.json").write_text(json.dumps({
    "benchmark": "launch/local.sh", "seconds": int(sys.argv[2]), "cores": os.cpu_count(),
    "successes": sum(task["successes"] for task in policy),
    "trials": sum(task["trials"] for task in policy)}, indent=2) + "\n")
print(f"Pictures of what the model imagines: {out}/pretrain/samples\n"
      f"Policy bundle:                       {out}/bundle\n"
      f"Videos of the policy:                {out}/evaluation/report.html")
PYTHON
