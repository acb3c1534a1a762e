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

# one process per GPU, or two on CPU. Fewer, longer packs and fewer steps than the recipe's, at a higher learning rate: as good in half the time
processes=$(python -c 'import torch; print(min(torch.cuda.device_count() or 2, 2))')
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
torchrun --standalone --nproc-per-node "$processes" -m megavlm train digits --run_dir="$RUN" \
    --data.num_lanes=2 --data.pack_tokens=2560 --optimizer.num_steps=600 --optimizer.warmup_steps=60 --optimizer.learning_rate=3e-3 \
    --monitor.sample_every_steps=200 "${ROUTE[@]}"
OMP_NUM_THREADS=$cores megavlm evaluate "$RUN" >/dev/null
if [ "$RUN" = runs/digits ]; then
    python tools/compare_with_dense.py "$RUN" --num_packs=4
    python tools/page.py "$RUN" "${BESIDE[@]}"
fi
echo "took $(((SECONDS - begin) / 60)) min $(((SECONDS - begin) % 60)) s, the installation not counted"
