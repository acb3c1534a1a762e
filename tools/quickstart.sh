#!/usr/bin/env bash
# Install, write real handwritten digits as shards, train one model to read and draw them, judge it, show it on a page.
# A second start resumes.   bash tools/quickstart.sh dense     trains the same without a route, for comparison
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh

RUN=runs/digits
ROUTE=() BESIDE=()
[ -e runs/digits-dense/evaluation.json ] && BESIDE=(--beside=runs/digits-dense)
if [ "${1:-}" = dense ]; then
    RUN=runs/digits-dense
    ROUTE=(--routing.understanding='{policy: dense}' --routing.generation='{policy: dense}')
fi
begin=$SECONDS
[ -e data/digits/text.model ] || { rm -rf data/digits && megavlm data digits data/digits; }

# one process per GPU, or two on CPU; the recipe's 4 lanes can be shared by 1, 2 or 4
processes=$(python -c 'import torch; n = torch.cuda.device_count() or 2; print(max(w for w in (1, 2, 4) if w <= n))')
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
torchrun --standalone --nproc-per-node "$processes" -m megavlm train digits --run_dir="$RUN" "${ROUTE[@]}"
OMP_NUM_THREADS=$cores megavlm evaluate "$RUN" >/dev/null
if [ "$RUN" = runs/digits ]; then
    python tools/compare_with_dense.py "$RUN" --num_packs=4
    python tools/page.py "$RUN" "${BESIDE[@]}"
fi
echo "took $(((SECONDS - begin) / 60)) min $(((SECONDS - begin) % 60)) s, the installation not counted"
