#!/usr/bin/env bash
# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
# What only a GPU can tell, most valuable first, on a machine with a GPU and without internet:
#
#   benchmarks/on_gpu.sh BUNDLE OUT [STEP[=SECONDS] ...]
#
# BUNDLE is what `make gpu-bundle` makes. Without a STEP all run; `ratios` stands for all of its steps. OUT gets
# NAME.log (that of `ratios.crp` is ratios.log), summary.txt, ratios_cuda.json (benchmarks/ratios_cuda.json with what was
# measured put in) and table.md. A step that fails, or is cut at its limit, stops no other. One whose limit is more than
# what is left of TOTAL seconds (570 if unset) is not begun: name it in the next call. DRY=1 only prints the steps.
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
total=${TOTAL:-570}

all_steps() { # calls "$1" with the name of each step, its limit in seconds, and the words after `python`
    local write=(--write --file "$out/ratios_cuda.json")
    "$1" tests 70 -m pytest -v -n 8 -p no:cacheprovider tests/test_on_gpu.py tests/test_triton_pooling.py \
        tests/test_crp_loss.py tests/test_shared_losses.py tests/test_losses_over_ranks.py
    "$1" throughput.bf16 85 -W ignore -m benchmarks throughput --precisions bf16 "${write[@]}"
    "$1" throughput.fp16 85 -W ignore -m benchmarks throughput --precisions fp16 "${write[@]}"
    "$1" ratios.step 45 -W ignore -m benchmarks step "${write[@]}"
    "$1" ratios.crp 50 -W ignore -m benchmarks crp "${write[@]}"
    "$1" ratios.backbone 80 -W ignore -m benchmarks backbone "${write[@]}"
    "$1" ratios.many_classes 45 -W ignore -m benchmarks many_classes "${write[@]}"
    "$1" ratios.stages 75 -W ignore -m benchmarks stages "${write[@]}"
    "$1" train 170 -m benchmarks.killed_run configs/sats/segformer_b0_voc_mini_15-1.py --work-dir "$scratch/run" --amp \
        --cfg-options optim_wrapper.dtype=bfloat16 "data_root=$bundle/voc_mini" "pretrained=$bundle/mit_b0.pth"
}

name() { echo "$1"; }
show() { echo "$*"; }
note() { echo "$*" | tee -a "$out/summary.txt"; }

run() {
    local step=$1 seconds=$2 wanted=$((${#chosen[@]} == 0)) one start status how
    shift 2
    for one in ${chosen[@]+"${chosen[@]}"}; do
        [[ $step == "${one%%=*}" || $step == "${one%%=*}".* ]] || continue
        wanted=1
        [[ $one != *=* ]] || seconds=${one#*=}
    done
    ((wanted)) || return 0
    if ((SECONDS + seconds > total)); then
        note "$step: not begun, $((total - SECONDS)) s left of $total and its limit is $seconds s"
        return
    fi
    start=$SECONDS
    echo "== $step : python $*" >>"$out/${step%%.*}.log"
    # Into the file, not through a pipe: a process that is left over would keep a pipe open, and the script waiting.
    timeout -k 5 "$seconds" "$python" "$@" >>"$out/${step%%.*}.log" 2>&1 </dev/null
    status=$?
    case $status in
        0) how=passed ;;
        124 | 137) how="cut at $seconds s" ;;
        *) how="failed ($status)" ;;
    esac
    ((status == 0)) || bad=1
    note "$step: $how, $((SECONDS - start)) s"
    table >"$out/table.md"
}

table() { # every Markdown table of the logs, under its step and the machine; not those in boxes, as a run prints them
    awk '/^== / { print "### " $2 "\n" } / threads, torch / { print $0 "\n" }
        /^\+/ { boxed = 1 } !/^[|+]/ { boxed = 0 }
        /^\|/ && !boxed { print; inside = 1; next } inside { print ""; inside = 0 }' "$out"/*.log
}

if (($# < 2)); then
    sed -n '3,/^set/{/^#/s/^# \?//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
bundle=$(realpath -m "$1") out=$(realpath -m "$2") scratch='SCRATCH' bad=0
chosen=("${@:3}")
if [[ ${DRY:-} ]]; then
    all_steps show
    exit
fi
for one in ${chosen[@]+"${chosen[@]}"}; do
    if ! all_steps name | grep -qE "^${one%%=*}(\.|\$)" || [[ $one == *=* && ! ${one#*=} =~ ^[1-9][0-9]*$ ]]; then
        echo "on_gpu.sh: $one: expected STEP or STEP=SECONDS, of" $(all_steps name) >&2
        exit 2
    fi
done
if [[ ! -d $bundle/wheels ]]; then
    echo "on_gpu.sh: $bundle has no wheels: make it by \`make gpu-bundle\`" >&2
    exit 2
fi
mkdir -p "$out"
[[ -e $out/ratios_cuda.json ]] || cp "$root/benchmarks/ratios_cuda.json" "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$root" || exit
install=(-m pip install -q --no-index --no-deps --no-compile --target "$scratch/site")
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
timeout 90 "$python" "${install[@]}" "$bundle"/wheels/*.whl >"$out/start.log" 2>&1 &&
    export PYTHONPATH="$scratch/site:$root" &&
    timeout 90 "$python" -W ignore -c \
        'import torch, mmseg_sats; torch.cuda.is_available() or exit("torch finds no GPU")' >>"$out/start.log" 2>&1 ||
    { note 'start: failed'; cat "$out/start.log"; exit 1; }
rm "$out/start.log"
all_steps run
exit $bad
