"""Five updates on fixed data through the engine, for test_engine.py: in its process, or under torchrun with two ranks.

python -m torch.distributed.run --nproc_per_node 2 tests/engine_worker.py OUT.pt STAGE MICRO_BATCH_SIZE ...
"""

import sys

import torch
from conftest import tiny_model

import common
import remax

ROWS, TEMPERATURE, LEARNING_RATE, MAX_GRAD_NORM = 8, 0.8, 1e-3, 1.0


# Infinity in the loss leaves its gradients finite; the root of 0 is 0 and its gradient is not finite.
POISONS = dict(loss=lambda loss: loss + float("inf"), gradient=lambda loss: loss + (0 * loss).sqrt())


def data():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 50, (ROWS, 14), generator=generator)
    prompt_mask = (torch.arange(5) >= torch.randint(0, 5, (ROWS, 1), generator=generator)).long()
    lengths = torch.randint(1, 10, (ROWS, 1), generator=generator)
    mask = (torch.arange(9) < lengths).long()
    rewards, baselines = torch.randn(2, ROWS, generator=generator)
    ref_logprobs = -3 * torch.rand(ROWS, 9, generator=generator)
    return ids[:, :5] * prompt_mask, prompt_mask, ids[:, 5:], mask, rewards, baselines, ref_logprobs


def losses(module, rows, batch):
    prompts, prompt_mask, responses, mask, rewards, baselines, ref_logprobs = (x[rows] for x in batch)
    logprobs = module(prompts, prompt_mask, responses, TEMPERATURE)
    advantages = remax.advantages(rewards, baselines, logprobs, ref_logprobs, mask, 0.05, 1.0)
    return remax.policy_loss(logprobs, advantages, mask, ROWS)


def with_plain_torch(model, updates=5):
    """-> (gradient norms, weights): the reference."""
    module = common.ResponseLogprobs(model)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    norms = []
    for _ in range(updates):
        losses(module, slice(None), data()).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, {name: p.detach().clone() for name, p in model.named_parameters()}


def with_the_engine(
    model, zero_stage, micro_batch_size, dtype="float32", updates=5, poison=None, checkpointing=False, offload=False
):
    """-> (gradient norms, weights, skipped steps after each update); `poison`: in the second, on the last rank."""
    rank, world_size, device = common.start_processes()
    rows = ROWS // world_size
    placement = common.Placement(device, dtype, "sdpa", zero_stage, offload, micro_batch_size)
    module = common.ResponseLogprobs(model)
    engine = common.train_engine(module, placement, rows, MAX_GRAD_NORM, checkpointing)
    batch = [x[rank::world_size] for x in data()]
    norms, skips = [], []
    for update in range(updates):
        with common.whole_model(engine, device) as whole:  # as a rollout does, a different number of times on each rank
            for _ in range(1 + rank):
                whole(torch.arange(4)[None])
        for chunk, last in common.micro_batches(rows, micro_batch_size):
            loss = losses(engine, chunk, batch) * world_size
            if poison and update == 1 and rank == world_size - 1:
                loss = POISONS[poison](loss)
            common.backward(engine, loss, last)
        norm, skipped = common.optimizer_step(engine, LEARNING_RATE)
        norms.append(norm)
        skips.append(skipped)
    with common.whole_model(engine, device) as whole:
        return norms, {name: p.detach().clone() for name, p in whole.named_parameters()}, skips


def rollout_and_train(model) -> list:
    """ZeRO-3 with sharded embeddings, ranks whose responses end at different lengths, and several chunks of logits."""
    rank, _, device = common.start_processes()
    placement = common.Placement(device, "float32", "sdpa", 3, False, 4)
    engine = common.train_engine(common.ResponseLogprobs(model), placement, 4, 1.0, False)
    model.config.vocab_size = 2**25 // 4  # claimed, so that a chunk is four positions
    prompts = [common.Prompt("", [5, 6, 7], {}) for _ in range(4)]
    eos = list(range(2, 4000)) if rank else [1]  # rank 1 ends at once, rank 0 goes on
    settings = dict(num_samples=1, greedy=False, length=12, temperature=1.0)
    tokenizer = type("NoText", (), dict(batch_decode=lambda self, rows, **kwargs: [""] * len(rows)))()
    widths = []
    for _ in range(2):
        common.set_seed(0, rank)
        responses = common.rollout(engine, prompts, device, tokenizer, eos, **settings)
        widths.append((responses.tokens_BT.shape[1], int(responses.mask_BT.sum(1).max())))
        logprobs = common.per_token(engine, responses, temperature=1.0)
        common.backward(engine, (logprobs * responses.mask_BT).sum(), True)
        common.optimizer_step(engine, 1e-3)
    return common.gather_rows(widths)


if __name__ == "__main__":
    out, *cases = sys.argv[1:]
    kinds = [("gpt2", "float32"), ("llama", "float32")]
    results = {
        (kind, int(stage), int(micro)): with_the_engine(tiny_model(kind), int(stage), int(micro), dtype)
        for stage, micro in zip(cases[::2], cases[1::2], strict=True)
        for kind, dtype in kinds
    }
    for stage in range(4):
        for poison in POISONS:
            model = tiny_model("llama")
            results["poisoned", stage, poison] = with_the_engine(model, stage, 2, updates=3, poison=poison)
    results["widths"] = rollout_and_train(tiny_model("llama", vocab_size=4000))
    if torch.distributed.get_rank() == 0:
        torch.save(results, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
