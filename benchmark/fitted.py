"""remax.py with another baseline: the greedy reward as a control variate whose coefficient is fitted to the batch.

    python benchmark/fitted.py …

The flags are those of remax.py (one sampled response per prompt, one rank).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def mean_of_others(x_B):
    return (x_B.sum() - x_B) / (len(x_B) - 1)


def fitted_baselines(rewards_B, greedy_B):
    """c_i r̄_i + the mean over the other rows j of (r_j − c_i r̄_j) -> baselines_B.

    c_i is the least-squares slope of the other rows' rewards r on their greedy rewards r̄, clipped to 0 … 1. Only r̄_i
    belongs to row i, and it does not depend on the row's sample, so the gradient stays unbiased.
    """
    dtype = rewards_B.dtype
    rewards_B, greedy_B = rewards_B.double(), greedy_B.double()
    mean_B, greedy_mean_B = mean_of_others(rewards_B), mean_of_others(greedy_B)
    covariance_B = mean_of_others(rewards_B * greedy_B) - mean_B * greedy_mean_B
    variance_B = mean_of_others(greedy_B.square()) - greedy_mean_B.square()
    c_B = (covariance_B / variance_B.clamp(min=1e-9)).clamp(0, 1)
    return (mean_B + c_B * (greedy_B - greedy_mean_B)).to(dtype)


def main() -> None:
    source = (ROOT / "remax.py").read_text(encoding="utf-8")
    old = "baselines_B = rewards_R[B:].repeat_interleave(args.num_samples)"
    assert source.count(old) == 1
    source = source.replace(old, "baselines_B = fitted_baselines(rewards_B, rewards_R[B:])")
    sys.path.insert(0, str(ROOT))
    exec(compile(source, str(ROOT / "remax.py"), "exec"), globals() | dict(__file__=str(ROOT / "remax.py")))


if __name__ == "__main__":
    main()
