#!/usr/bin/env bash
# Everything that only a GPU can prove: tests without the interpreter, sanitizer, timings, tables.
#   bench/gpu_day.sh OUT [STEP...]   steps: warm tests graph memcheck racecheck kernels peers offload tune (all by default, in this
# order, as far as the time goes; `warm` compiles what the others need, models side by side, into Triton's cache)
# Where a call may take nine minutes, two of them on the same machine:
#   bench/gpu_day.sh OUT warm tests graph memcheck racecheck kernels
#   DAY=400 bench/gpu_day.sh OUT peers offload tune
# OUT: a folder; day.log has what every step said, kernels.jsonl the figures, a line a model, peers.jsonl two models beside vLLM's
# and SGLang's kernels, tiles.json the table of tiles, offload.jsonl experts in host memory.
# PEERS=DIR: a folder with vllm-*.whl and sglang-*.whl, where those are not installed (docs/kernels.md; bench/slim_wheels.py).
# DAY: seconds for all steps together, 530 by default; a step that would begin later is not run, and counts as failed.
# Needs torch with CUDA, triton, transformers, pytest and hypothesis; the package is used from this checkout.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu_day.sh OUT [STEP...]}
shift
steps=${*:-warm tests graph memcheck racecheck kernels peers offload tune}
models="Qwen3 Mixtral DeepSeek gpt-oss OLMoE"
day=${DAY:-530}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
python=$(command -v python3 || command -v python) || { echo "no python3" && exit 1; }
unset TRITON_INTERPRET
failed=0

step() { # step NAME SECONDS COMMAND...: a failure is counted, and the next step still runs
  local name=$1 seconds=$2 began=$SECONDS code left=$((day - SECONDS))
  shift 2
  if [ $left -lt 10 ]; then
    failed=$((failed + 1))
    echo "$name: not run, the $day s are over"
    return
  fi
  [ "$seconds" -le $left ] || seconds=$left
  echo "== $name" >> "$out/day.log"
  timeout -s "${signal:-INT}" -k 10 "$seconds" "$@" >> "$out/day.log" 2>&1 # interrupted, a benchmark writes what it has measured
  code=$?
  [ $code = 0 ] || failed=$((failed + 1))
  echo "$name: exit $code after $((SECONDS - began)) s: $(tail -n 1 "$out/day.log" | cut -c1-200)"
}

measured() { # measured FILE [PEER...]: a layer of ours without a figure, but for its size, or a peer without any, is a failure
  [ -s "$1" ] || return 0 # its step has failed, and was counted
  "$python" - "$@" << 'EOF' || failed=$((failed + 1))
import json, sys
file, *peers = sys.argv[1:]
rows = [row for line in open(file) if line.startswith("{") for row in json.loads(line)["rows"]]
lost = [row for row in rows if row["value"] is None and row["why"] != "its weights do not fit"]
for row in lost:
    print(f"{row['case']}: {row['metric']}: not measured: {row['why']}")
never = [p for p in peers if not any(v for row in rows for name, v in row["peers"].items() if name.startswith(p))]
for peer in never:
    print(f"{peer}: no figure: {next((row['why'] for row in rows if peer in row['why']), 'no reason given')}")
sys.exit(bool(lost or never) or not rows)
EOF
}

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null | head -n 1)
"$python" - << 'P' || exit 1
import torch, triton
assert torch.cuda.is_available(), "no GPU: torch.cuda.is_available() is False"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
P
for name in $steps; do
  case $name in
    warm)
      { # the longest first
        for model in $models; do echo "$python bench/warm_kernels.py $model"; done
        echo "$python bench/cuda_graph.py --only model"
      } > "$out/warm.txt"
      signal=TERM step warm 90 xargs -a "$out/warm.txt" -P "$(nproc)" -I COMMAND sh -c "COMMAND"
      ;;
    tests)
      at_once=$("$python" -c 'import os, xdist; print("-n", min(8, os.cpu_count()))' 2> /dev/null)
      # shellcheck disable=SC2086
      step tests 110 "$python" -m pytest -q $at_once tests/test_triton.py tests/test_kernel_peers.py tests/test_seam.py tests/test_tiers.py
      ;;
    graph) step graph 90 "$python" bench/cuda_graph.py ;;
    memcheck | racecheck)
      if [ -z "$sanitizer" ]; then
        failed=$((failed + 1))
        echo "$name: compute-sanitizer not found, not run"
      else
        # without torch's cache every tensor is an allocation of its own, so that what lies beside one is out of bounds
        quiet=()
        [ "$name" = racecheck ] || quiet=(--report-api-errors no) # torch asks the driver what it may answer no to
        step "$name" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
          "$sanitizer" --tool "$name" "${quiet[@]}" --error-exitcode 9 "$python" bench/cuda_graph.py --small
      fi
      ;;
    offload)
      step offload 120 sh -c "'$python' bench/gpu_offload.py '$out/model' --layers 4 > '$out/offload.jsonl'"
      rm -rf "$out/model"
      ;;
    tune) step tune 120 "$python" -m coterie bench kernels --quick --tune "$out/tiles.json" ;;
    peers)
      step peers 70 sh -c "'$python' -m coterie bench kernels --quick ${PEERS:+--peers '$PEERS'} --json > '$out/peers.jsonl'"
      # shellcheck disable=SC2086
      measured "$out/peers.jsonl" ${PEERS:+vLLM SGLang}
      ;;
    kernels)
      for model in $models; do
        step "kernels $model" 60 sh -c "'$python' -m coterie bench kernels --only $model --json >> '$out/kernels.jsonl'"
      done
      measured "$out/kernels.jsonl"
      ;;
    *) echo "$name: no such step" && exit 2 ;;
  esac
done
echo "$failed steps failed; the log is $out/day.log"
exit $((failed > 0))
