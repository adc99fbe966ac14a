#!/usr/bin/env bash
# How fast the simulator's fixed-answer mode is, by wrk (Debian: apt-get install wrk): the server on
# one core, wrk on another. Requests/s of whole answers; then separately written chunks/s of streams
# (101 in each). Medians of RUNS runs, with the lowest and the highest.
#
#     benchmarks/simulator.sh
set -euo pipefail
cd "$(dirname "$0")/wrk"
runs=${RUNS:-5} seconds=${SECONDS_EACH:-4} port=18600
command -v wrk >/dev/null || { echo "wrk is not installed"; exit 1; }

taskset -c 0 ../../.venv/bin/vllm-unified simulate --port $port -o fixed_answer=true >/dev/null &
server=$!
trap 'kill $server 2>/dev/null' EXIT
until (exec 3<>/dev/tcp/127.0.0.1/$port) 2>/dev/null; do sleep 0.1; done

rate() {  # script, connections
  taskset -c 1 wrk -t1 -c"$2" -d"$seconds" -s "$1" "http://127.0.0.1:$port/v1/completions" |
    awk '/Requests\/sec/ { print $2 }'
}
report() {  # label, factor; reads rates
  sort -n | awk -v label="$1" -v factor="$2" '{ r[NR] = $1 * factor }
    END { printf "%-28s %8.0f/s  (%.0f-%.0f)\n", label, r[int((NR + 1) / 2)], r[1], r[NR] }'
}
for connections in 16 64; do
  for _ in $(seq "$runs"); do rate post.lua $connections; done |
    report "requests, $connections connections" 1
done
for connections in 4 8 16 64; do
  for _ in $(seq "$runs"); do rate stream.lua $connections; done |
    report "chunks, $connections streams" 101
done
