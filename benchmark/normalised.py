"""reinforce.py with advantages that are normalised over the batch, as REINFORCE++ does (arXiv 2501.03262).

    python benchmark/normalised.py …

The flags are those of reinforce.py. An update must be one micro-batch (--micro-batch-size at least as large as
--batch-size times --num-samples) on one rank, since mean and standard deviation are of all tokens of the batch.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import reinforce  # noqa: E402


def normalised(advantages_BT, mask_BT) -> torch.Tensor:
    """Mean 0 and standard deviation 1 over the real tokens of all rows; 0 where masked."""
    real_N = advantages_BT[mask_BT == 1]
    scaled_BT = (advantages_BT - real_N.mean()) / (real_N.std(correction=0) + 1e-8)
    return scaled_BT * mask_BT.to(scaled_BT)


def main() -> None:
    parse_args, plain_advantages = common.parse_args, reinforce.advantages

    def checked_args(Args):
        args = parse_args(Args)
        if args.micro_batch_size < args.batch_size * args.num_samples or os.environ.get("WORLD_SIZE", "1") != "1":
            common.fail("normalised.py needs one rank and a --micro-batch-size that holds all rows of an update")
        return args

    def normalised_advantages(rewards_B, logprobs_BT, ref_logprobs_BT, mask_BT, kl_coef, gamma):
        advantages_BT = plain_advantages(rewards_B, logprobs_BT, ref_logprobs_BT, mask_BT, kl_coef, gamma)
        return normalised(advantages_BT, mask_BT)

    common.parse_args, reinforce.advantages = checked_args, normalised_advantages
    reinforce.main()


if __name__ == "__main__":
    main()
