#!/usr/bin/env bash
# Everything that only a GPU can prove, in under nine minutes: tests without the interpreter, sanitizer, timings, tables.
#   bench/gpu_day.sh OUT     OUT: a folder for logs, kernels.json and the table of tiles
# Needs torch with CUDA, triton, transformers, pytest and hypothesis; the package is used from this checkout.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu_day.sh OUT}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET
failed=0

step() { # step NAME SECONDS COMMAND...: its log goes to OUT/NAME.log; a failure is counted, and the next step still runs
  local name=$1 seconds=$2
  shift 2
  local began=$SECONDS
  timeout "$seconds" "$@" > "$out/$name.log" 2>&1
  local code=$?
  [ $code = 0 ] || failed=$((failed + 1))
  echo "$name: exit $code after $((SECONDS - began)) s: $(tail -n 1 "$out/$name.log" | cut -c1-200)"
}

python - << 'P' || exit 1
import torch, triton
assert torch.cuda.is_available(), "no GPU: torch.cuda.is_available() is False"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
P
step tests 120 python -m pytest -q -x tests/test_triton.py tests/test_seam.py
step graph 40 python bench/cuda_graph.py
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null | head -n 1)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    step "$tool" 60 "$sanitizer" --tool "$tool" --error-exitcode 9 python bench/cuda_graph.py --small
  done
else
  echo "compute-sanitizer: not found, not run"
fi
step tune 100 python -m coterie bench kernels --quick --tune "$out/tiles.json"
step kernels 200 sh -c "python -m coterie bench kernels --json > '$out/kernels.json'"
echo "$failed steps failed; logs in $out"
exit $((failed > 0))
