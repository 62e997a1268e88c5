#!/usr/bin/env bash
# Run a command as if on two machines: in two network namespaces, with a cable and no other network.
# Needs root and iproute2.
#
#     bash scripts/two_machines.sh python train.py --num_nodes 2 --strategy deepspeed_stage_2 ...
#     bash scripts/two_machines.sh bash -c 'torchrun --nnodes 2 --node_rank $NODE_RANK --master_addr $MASTER_ADDR --nproc_per_node 1 train.py ...'
#
# The command finds MASTER_ADDR, MASTER_PORT and NODE_RANK (0 or 1) in its environment.
# The exit code is the first one that is not 0.
set -euo pipefail

first="rwkv-$$-0" second="rwkv-$$-1"
remove() {
    for machine in "$first" "$second"; do
        # end the processes that the command left behind in a namespace
        ip netns pids "$machine" 2> /dev/null | xargs --no-run-if-empty kill -KILL 2> /dev/null || true
        ip netns delete "$machine" 2> /dev/null || true
    done
}
trap remove EXIT
trap 'exit 143' INT TERM HUP

ip netns add "$first"
ip netns add "$second"
ip -netns "$first" link add cable type veth peer name cable netns "$second"
ip -netns "$first" address add 10.77.0.1/24 dev cable
ip -netns "$second" address add 10.77.0.2/24 dev cable
for machine in "$first" "$second"; do
    ip -netns "$machine" link set lo up
    ip -netns "$machine" link set cable up
done

export MASTER_ADDR=10.77.0.1 MASTER_PORT=29500
NODE_RANK=0 ip netns exec "$first" "$@" &
processes=($!)
NODE_RANK=1 ip netns exec "$second" "$@" &
processes+=($!)
code=0
for process in "${processes[@]}"; do
    wait "$process" || { status=$?; [ "$code" != 0 ] || code=$status; }
done
exit "$code"
