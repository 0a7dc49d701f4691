#!/usr/bin/env bash
# Measures all that we ask of one GPU, in under ten minutes -> benchmark/results/gpu.jsonl and a table.
#
#     PYTHON=.venv/bin/python TRL_PYTHON=trl/bin/python bash benchmark/gpu.sh
#
# TRL_PYTHON is an environment with trl==1.16.0 (see trl_step.py); without it there are no rows of TRL. With TINY=1 the
# same commands run on a tiny model, also on a CPU, to test this file.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
results=${RESULTS:-benchmark/results/gpu.jsonl}
small=G1 large=G2 huge=G3 size=8192 micro=32 steps=3
if [ -n "${TINY:-}" ]; then small=tiny large=tiny huge=tiny size=256 micro=2 steps=1; fi

step() { # seconds at most, then flags of step.py
    local limit=$1
    shift
    timeout "$limit" "$python" benchmark/step.py --no-floor --steps "$steps" --results "$results" "$@" ||
        echo "failed or out of memory or time: $*"
}

for workload in $small $large; do
    flags="--dtype bfloat16 --micro-batch-size $micro"
    [ "$workload" = "$large" ] && flags="$flags --gradient-checkpointing"
    for script in remax reinforce ppo; do
        step 75 --script $script --workload $workload --ppo-epochs 1 --flags="$flags"
    done
    [ -n "${TRL_PYTHON:-}" ] && timeout 75 "$TRL_PYTHON" benchmark/trl_step.py rloo $workload --bf16 \
        --micro-batch-size $micro --steps "$steps" --results "$results"
done

# Seven billion parameters on one device: ReMax, and PPO, whose second trained model is expected not to fit.
steps=1
flags="--dtype bfloat16 --micro-batch-size 4 --gradient-checkpointing --zero-stage 2 --offload"
for script in remax ppo; do
    step 150 --script $script --workload $huge --ppo-epochs 1 --batch-size 4 --flags="$flags"
done
"$python" benchmark/gpu.py "$results" --size $size
