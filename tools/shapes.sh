#!/usr/bin/env bash
# The benchmark `shapes` from scratch: scenes as shards, an image tokenizer trained on them, codes, one model for both tasks, its evaluation.
# A second start resumes. Arguments are settings of the recipe:  bash tools/shapes.sh --optimizer.num_steps=4000
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh

DATA=data/shapes RUN=runs/shapes
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
begin=$SECONDS
[ -e $DATA/text.model ] || { rm -rf $DATA && megavlm data shapes $DATA --pixels=32 --num_train=20000 --num_test=1000; }
[ -e $DATA/vq/metrics.json ] || {
    rm -rf $DATA/vq
    OMP_NUM_THREADS=$cores megavlm data image-tokenizer "$DATA/images-train-{0000..0019}.tar" $DATA/vq --pixels=32 --height=8 --width=8
}
megavlm data encode "$DATA/{understanding,generation}-train-{0000..0019}.tar" $DATA/codes --tokenizer=$DATA/vq
megavlm data encode "$DATA/{understanding,generation}-{seen,test}-0000.tar" $DATA/codes --tokenizer=$DATA/vq

# one process per GPU, or two on CPU; the recipe's 4 lanes can be shared by 1, 2 or 4
processes=$(python -c 'import torch; n = torch.cuda.device_count() or 2; print(max(w for w in (1, 2, 4) if w <= n))')
export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
torchrun --standalone --nproc-per-node "$processes" -m megavlm train shapes "$@"
OMP_NUM_THREADS=$cores megavlm evaluate "$RUN"
echo "took $(((SECONDS - begin) / 60)) min $(((SECONDS - begin) % 60)) s, the installation not counted"
