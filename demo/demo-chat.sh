#!/usr/bin/env bash
# Chat with a merged file, or with a base and its adapter unmerged. Ctrl-D ends the chat, /help lists its commands.
set -euo pipefail
source "$(dirname "$0")/../scripts/setup.sh" ""

model="out/demo/merged.pth"     # a merged file or a base
adapter=""                      # an adapter of that base; empty: none
temperature=1.0                 # 0 is greedy; lower is more predictable
top_p=0.7                       # keep the likeliest tokens up to this probability

set -x
python -m demo.chat --model "$model" ${adapter:+--adapter "$adapter"} --temperature "$temperature" --top_p "$top_p" "$@"
