#!/usr/bin/env bash
# All that we ask of one GPU, in steps of at most two minutes -> benchmark/results/gpu.jsonl and a table.
#
#     PYTHON=.venv/bin/python TRL_PYTHON=trl/bin/python bash benchmark/gpu.sh [speed smoke small half three seven]
#
# Without words all parts run, in this order. A machine that allows ten minutes a command takes two parts at a time. A
# step that takes longer is killed, and its row says so; rows that it had written stay. TRL_PYTHON is an environment
# with trl==1.16.0 (see trl_step.py); without it there are no rows of TRL.
#
# On a machine that has torch and transformers but no network, bring the rest as wheels from one that has a network:
#     pip download --only-binary :all: --no-deps --dest wheels deepspeed==… tyro==… (the other lines of requirements.txt,
#     but not torch; deepspeed comes as source: `pip wheel --no-deps deepspeed==… --wheel-dir wheels`)
#     pip install --no-index --no-deps wheels/*.whl       # on the machine
#
# It needs 15 GB of disk in WORK (the weights of one size at a time) and 40 GB of host memory. TINY=1 runs the same
# commands on a tiny model, also on a CPU, to test this file.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
results=${RESULTS:-benchmark/results/gpu.jsonl}
work=${WORK:-$(mktemp -d)}
limit=${LIMIT:-110} # seconds of a step; ten more until it is killed
size=8192 repeats=3 updates=3 G1=G1 G2=G2 G3=G3 G4=G4
if [ -n "${TINY:-}" ]; then
    size=256 repeats=1 updates=1 G1=tiny G2=tiny G3=tiny G4=tiny
fi
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

step() { # flags of gpu.py
    echo "== $*"
    local start=$SECONDS
    # Scripts take the first signal as "stop after this update", so the second one, KILL, has to follow.
    timeout --kill-after=10 "$limit" "$python" benchmark/gpu.py "$@" --results "$results" 2>"$work/errors" || {
        local status=$?
        tail -n 3 "$work/errors"
        "$python" benchmark/gpu.py failed --name "$*" --status $status --flags="$*" --results "$results"
    }
    echo "   $((SECONDS - start)) s"
}

weights() { # workload, and more flags: of the only size on the disk
    rm -rf "$work/model"
    mkdir -p "$work/model"
    step weights --workload "$@" --folder "$work/model"
}

update() { # script, workload, name, flags
    step update --script "$1" --workload "$2" --name "$3" --flags="$4" --updates $updates --folder "$work/model"
}

trl() { # workload, micro-batch size
    if [ -n "${TRL_PYTHON:-}" ]; then
        echo "== TRL's RLOO, $1"
        timeout --kill-after=10 "$limit" "$TRL_PYTHON" benchmark/trl_step.py rloo "$1" --bf16 --micro-batch-size "$2" \
            --steps $updates --results "$work/peers" && "$python" - "$work/peers" "$results" <<'END'
import json, sys
row = json.loads(open(sys.argv[1]).read().splitlines()[-1])
open(sys.argv[2], "a").write(json.dumps(row | {"step": "trl"}) + "\n")
END
    fi
}

speed() {
    step speed --size $size
}

smoke() { # every script and stage, with prompts of unequal length, to its end
    weights smoke
    local script stage
    for script in remax reinforce ppo grpo spr spr_token reward_model dpo; do
        step smoke --script $script --folder "$work/model" --name "smoke $script" --updates 1 --flags="--micro-batch-size 8"
    done
    for stage in 2 3; do
        step smoke --folder "$work/model" --name "smoke remax, ZeRO-$stage, offload" --updates 1 \
            --flags="--micro-batch-size 8 --zero-stage $stage --offload --gradient-checkpointing"
    done
    step smoke --folder "$work/model" --name "smoke remax, LoRA" --updates 1 --flags="--micro-batch-size 8 --lora-rank 8"
    if "$python" -c "import flash_attn" 2>/dev/null; then
        step smoke --folder "$work/model" --name "smoke remax, flash attention" --updates 1 \
            --flags="--micro-batch-size 8 --attention flash_attention_2"
    fi
}

pair() { # workload, flags: decoding, then ReMax beside PPO
    step decode --workload "$1" --folder "$work/model" --repeats $repeats
    update remax "$1" remax "$2"
    update ppo "$1" "ppo, 1 epoch" "$2"
}

small() {
    weights $G1
    pair $G1 "--micro-batch-size 64"
    trl $G1 64
}

half() {
    weights $G2
    pair $G2 "--micro-batch-size 32 --gradient-checkpointing"
    trl $G2 32
}

three() { # with a reward function; PPO's second model may not fit, and its row then says so
    weights $G3 --reward-function
    pair $G3 "--micro-batch-size 8 --gradient-checkpointing"
}

seven() { # adapters on 7 billion weights, with a reward function
    weights $G4 --reward-function
    step decode --workload $G4 --folder "$work/model" --repeats 1
    update remax $G4 "remax, LoRA" "--micro-batch-size 8 --gradient-checkpointing --lora-rank 16"
}

for part in ${*:-speed smoke small half three seven}; do
    $part
done
"$python" benchmark/gpu.py table --results "$results"
rm -rf "$work/model"
