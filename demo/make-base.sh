#!/usr/bin/env bash
# Make demo/rwkv7-reverse.pth: train RWKV-7 from scratch on strings of letters.
# It takes about four minutes on 2 CPU cores.
set -euo pipefail
source "$(dirname "$0")/../scripts/setup.sh" ""

proj_dir="out/demo-base"
data_file="$proj_dir/reverse.jsonl"
heldout_file="$proj_dir/reverse-heldout.jsonl"

export OMP_NUM_THREADS=1  # the model is so small that a second thread would mostly wait
mkdir -p "$proj_dir"
[ -f "$data_file" ] || python -m demo.task reverse --rows 60000 --out "$data_file" --heldout 500 --heldout_out "$heldout_file"

set -x
python train.py --peft none --version x070 --n_layer 3 --n_embd 96 --head_size 32 --tokenizer bytes \
    --data_file "$data_file" --proj_dir "$proj_dir" --packing 0 --micro_bsz 64 --ctx_len 128 --epoch_steps 1500 --save_steps 500 \
    --lr_init 2e-3 --warmup_steps 100 --weight_decay 0.01 --resume auto
python -m scripts.evaluate --model "$proj_dir/model.pth" --questions "$heldout_file"
echo "to ship it: cp $proj_dir/model.pth demo/rwkv7-reverse.pth"
