#!/usr/bin/env bash
# Train and judge UniCompress on shapes, from scratch: data, image tokenizer, codes, a plug-in for 4 and one for 16 times fewer tokens, the same small
# model on dense, 4x and 16x codes, its evaluation, and a figure. A second start resumes. One core; see docs/compress.md.
# Arguments are settings of the three trainings (remove runs/compress first if they are done):  bash tools/compress.sh --optimizer.num_steps=4000
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

DATA=data/compress RUNS=runs/compress
INSIDE="{kind: vq, path: $DATA/vq, height: 8, width: 8}"
[ -e $DATA/text.model ] || { rm -rf $DATA && megavlm data shapes $DATA --pixels=32 --num_train=8000 --num_test=400; }
[ -e $DATA/vq/metrics.json ] || {
    rm -rf $DATA/vq
    megavlm data image-tokenizer "$DATA/images-train-{0000..0007}.tar" $DATA/vq --pixels=32 --height=8 --width=8 --channels=32
}
for shards in "{understanding,generation}-train-{0000..0007}" "{understanding,generation}-{seen,test}-0000" "images-train-{0000..0007}"; do
    megavlm data encode "$DATA/$shards.tar" $DATA/codes --tokenizer=$DATA/vq --height=8 --width=8 --processes=1
done
for factor in 2 4; do
    [ -e $DATA/plug_in_$factor/metrics.json ] || {
        rm -rf $DATA/plug_in_$factor
        megavlm data compressor compress "$DATA/codes/images-train-{0000..0007}.tar" $DATA/plug_in_$factor --factor=$factor \
            --hidden_width=96 --num_layers=2 --batch_images=32 --steps=1000 --learning_rate=4e-3
    }
done

# an image is 64, 21 or 9 tokens; packs are smaller by as much, so that every training sees as many samples per step
arm() {
    local name=$1 pack_tokens=$2 tokenizer=$3
    shift 3
    local settings=(--run_dir=$RUNS/$name --data.pack_tokens=$pack_tokens --vocabulary.image_tokenizer="$tokenizer" "$@")
    [ "$(cat $RUNS/$name/exit_code 2>/dev/null)" = 0 ] || megavlm train compress "${settings[@]}"
    [ -e $RUNS/$name/evaluation.json ] || megavlm evaluate $RUNS/$name >/dev/null
}
arm dense 2560 "$INSIDE" "$@"
arm 4x 1184 "{kind: compressed, path: $DATA/plug_in_2, around: $INSIDE}" "$@"
arm 16x 800 "{kind: compressed, path: $DATA/plug_in_4, around: $INSIDE}" "$@"
python tools/bench_compress.py $RUNS/{dense,4x,16x} --raw "$DATA/generation-seen-0000.tar" --out docs/results/compress
