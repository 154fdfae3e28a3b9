#!/usr/bin/env bash
# Training and decoding at the paper's shapes in bf16 on one data-centre GPU, each in less than ten
# minutes, and a longer run that is not among them unless it is asked for:
#
#     benchmarks/gpu.sh            # both
#     benchmarks/gpu.sh train      # memory and time of a training step: 300M, 1.3B, 6.7B
#     benchmarks/gpu.sh decode     # every way to decode: 1.3B, random weights, for what it costs
#     RUN=runs/bytes8 benchmarks/gpu.sh decode   # a trained model too, for what is accepted
#     benchmarks/gpu.sh joint      # joint and exact decoding, with joules (pip install nvidia-ml-py): 1.3B,
#                                  # random weights, for what a pass costs: no guess stands
#     RUN=runs/sql DRAFT=runs/small benchmarks/gpu.sh joint   # trained models too, for what a token costs
#     RUN=runs/sql DRAFT=runs/small CONSISTENCY=runs/consistency TASK=sql benchmarks/gpu.sh decoders
#                                  # every decoder in one table; all but RUN may be left out
#     SQL=runs/sql benchmarks/gpu.sh consistency   # a run of text to SQL, of any size: an hour
#     benchmarks/gpu.sh studies    # grids of training runs, wider than a CPU's: hours; the same command
#                                  # goes on where it was stopped
#     benchmarks/gpu.sh retrofit   # heads from the start and attached afterwards, 50M parameters: most of an
#                                  # hour, and goes on where it was (needs the extra cli)
#     benchmarks/gpu.sh choose_n   # n by rule, judged against the grid of n: hours, and goes on where it was
#     QUICK=1 RESULTS=/tmp benchmarks/gpu.sh     # toy sizes, anywhere, to try the script
#
# It needs this checkout and a Python (PYTHON, by default python3) with torch and what ships beside
# it. Every part writes its own file, named after the GPU, into benchmarks/results/ (or RESULTS). A
# part that fails or takes too long does not stop the next; the exit status says whether all went well.
set -uo pipefail
prefix=${RESULTS:+$(realpath -m "$RESULTS")/}
[[ -z $prefix ]] || mkdir -p "$prefix"
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
gpu=$("$python" -c '
import torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
print("_".join(name.lower().removeprefix("nvidia ").split()))') || exit 1
[[ $gpu != cpu || -n ${QUICK:-} ]] || { echo "error: torch sees no CUDA device here" >&2; exit 1; }
failed=0
summary=""

# part FILE SECONDS MODULE WORDS...: one benchmark under a time limit, its last line for the summary.
part() {
    local file=$1 limit=$2 started=$SECONDS status line
    shift 2
    printf '\n== %s: %s\n' "$file" "$*" >&2
    line=$(timeout -k 10 "$limit" "$python" -m "$@" "name=$prefix$file" | tee /dev/stderr | tail -n 1)
    status=$?
    if ((status)); then
        failed=1
        line="failed with status $status"
        ((status != 124)) || line="was stopped after $limit seconds"
    fi
    summary+=$'\n'"$file ($((SECONDS - started)) s): $line"
}

for what in ${@:-train decode}; do
    case "${QUICK:+quick }$what" in
        train)
            speed="benchmarks.train_speed device=cuda seq_len=2048"
            part "train_memory_$gpu" 200 benchmarks.train_memory shapes=300m,1.3b,6.7b dtypes=bfloat16
            part "train_speed_${gpu}_300m" 100 $speed shape=300m batch_size=8 precision=bfloat16 pairs=15
            part "train_speed_${gpu}_1.3b" 120 $speed shape=1.3b batch_size=4 precision=bfloat16 pairs=11
            part "train_speed_${gpu}_6.7b" 160 $speed shape=6.7b batch_size=2 precision=pure_bfloat16 pairs=7
            ;;
        decode)
            decode="benchmarks.decode device=cuda precision=bfloat16 batch=1,8,64 new_tokens=128 queue=1"
            part "decode_${gpu}_1.3b" 300 $decode model=1.3b prompts=1
            [[ -z ${RUN:-} ]] || part "decode_${gpu}_$(basename "$RUN")" 280 $decode "model=$RUN" prompts=4
            ;;
        joint)
            joint="benchmarks.joint device=cuda precision=bfloat16"
            part "joint_${gpu}_1.3b" 540 $joint model=1.3b draft=30m prompts=2 new_tokens=64 rounds=2 \
                'temperatures=[0.0,1.0]' 'widths=[1,4]' 'thresholds=[0.5]' 'depths=[4]'
            [[ -z ${RUN:-} ]] || part "joint_${gpu}_$(basename "$RUN")" 3600 $joint "model=$RUN" \
                "draft=${DRAFT:-}" prompts=16 rounds=2 'temperatures=[0.0,0.5,1.0]' 'widths=[1,4]' \
                'thresholds=[0.1,0.5,0.9]' 'depths=[4]'
            ;;
        decoders)
            part "decoders_${gpu}_$(basename "${RUN:?names a run}")" 3600 benchmarks.decoders device=cuda \
                precision=bfloat16 "model=$RUN" "draft=${DRAFT:-}" "consistency=${CONSISTENCY:-}" \
                "heads=${HEADS:-}" "task=${TASK:-text}"
            ;;
        consistency)
            part "consistency_${gpu}_$(basename "${SQL:?names a run of text to SQL}")" 3600 benchmarks.consistency \
                device=cuda "base=$SQL" "out=${SQL}_consistency_gpu" precision=bfloat16 prompts=20000 steps=3000 \
                batch_size=32 lr=${LR:-5e-4}
            ;;
        studies)
            for study in sizes bytes vocabulary epochs finetune weights objectives; do
                part "science_${study}_$gpu" 36000 benchmarks.science "study=$study" \
                    'words=["device=cuda","train.compile=true","train.batch_size=64"]'
            done
            ;;
        retrofit)
            part "retrofit_$gpu" 3600 benchmarks.retrofit device=cuda dim=512 blocks=12 seq_len=512 batch_size=16 \
                steps=1000 own_texts=2000 prompts=128 "out=runs/retrofit_$gpu"
            ;;
        choose_n)
            part "choose_n_$gpu" 36000 benchmarks.choose_n "out=runs/choose_n_$gpu" \
                'words=["device=cuda","train.compile=true","model.dim=256","train.batch_size=64"]'
            ;;
        "quick train")
            part "train_memory_$gpu" 60 benchmarks.train_memory shapes=small dtypes=float32
            part "train_speed_${gpu}_1m" 60 benchmarks.train_speed shape=1m seq_len=16 pairs=2
            ;;
        "quick decode")
            part "decode_${gpu}_1m" 60 benchmarks.decode model=1m batch=1 prompts=1 prompt_tokens=8 \
                new_tokens=8 rounds=1 pairs=1
            ;;
        "quick joint")
            part "joint_${gpu}_1m" 120 benchmarks.joint model=1m draft=1m prompts=1 prompt_tokens=8 \
                new_tokens=8 rounds=1 'temperatures=[0.0,1.0]' 'widths=[1,2]' 'thresholds=[0.5]' 'depths=[2]'
            ;;
        "quick decoders")
            part "decoders_${gpu}_1m" 120 benchmarks.decoders model=1m draft=1m consistency=1m prompts=2 \
                prompt_tokens=8 new_tokens=8 rounds=1 batch=2
            ;;
        "quick studies")
            part "science_sizes_$gpu" 600 benchmarks.science study=sizes quick=true \
                'words=["train.steps=2","train.eval_every=0","train.eval_batches=1"]'
            ;;
        "quick retrofit")
            part "retrofit_$gpu" 400 benchmarks.retrofit dim=32 blocks=2 seq_len=32 batch_size=2 steps=8 seeds=2 \
                'attach_lrs=[0.002]' own_texts=8 prompt_tokens=8 prompts=2 eval_batches=2 "out=$(mktemp -d)"
            ;;
        "quick choose_n")
            part "choose_n_$gpu" 600 benchmarks.choose_n settings=quick "out=$(mktemp -d)" \
                'words=["train.steps=4","train.eval_batches=1","train.batch_size=2"]'
            ;;
        *)
            echo "error: $what is unknown: allowed are train, decode, joint, decoders, consistency, studies, retrofit, choose_n" >&2
            exit 1
            ;;
    esac
done
cat <<END

Summary ($gpu, $SECONDS s). Every training step is forward, loss and backward; no part keeps optimizer
state. Its speed: autocast over fp32 parameters, but for 6.7B, whose parameters and gradients are
bf16: in fp32 and with AdamW's two moments they would take 108 GB.
$summary
END
exit "$failed"
