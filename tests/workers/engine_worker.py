"""Five updates on fixed data: by plain torch, and through the engine on one rank or on several."""

import torch
from conftest import logprobs_of, policy_of, start_backend, tiny_model
from deepspeed.utils import safe_get_full_grad

import common
import remax

ROWS, LEARNING_RATE, MAX_GRAD_NORM = 8, 1e-3, 1.0
SAMPLING = common.Sampling(max_prompt_length=5, response_length=9, temperature=0.8, batch_size=8)
# Infinity in the loss leaves its gradients finite; the root of 0 is 0 and its gradient is not finite.
POISONS = dict(loss=lambda loss: loss + float("inf"), gradient=lambda loss: loss + (0 * loss).sqrt())


class NoText:
    """A tokenizer for models of random ids."""

    eos_token_id = 1
    eos_ids = [1]
    pad_token_id = 1

    def __call__(self, text, **kwargs):
        return dict(input_ids=[2])

    def decode(self, ids, **kwargs):
        return ""

    def batch_decode(self, rows, **kwargs):
        return [""] * len(rows)


def as_policy(model, sampling=SAMPLING) -> common.Policy:
    return policy_of(model, NoText(), sampling)


def data():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 50, (ROWS, 14), generator=generator)
    prompt_mask = (torch.arange(5) >= torch.randint(0, 5, (ROWS, 1), generator=generator)).long()
    lengths = torch.randint(1, 10, (ROWS, 1), generator=generator)
    mask = (torch.arange(9) < lengths).long()
    rewards, baselines = torch.randn(2, ROWS, generator=generator)
    ref_logprobs = -3 * torch.rand(ROWS, 9, generator=generator)
    return ids[:, :5] * prompt_mask, prompt_mask, ids[:, 5:], mask, rewards, baselines, ref_logprobs


def loss_of(module, rows, batch, denominator=ROWS):
    prompts, prompt_mask, responses, mask, rewards, baselines, ref_logprobs = (x[rows] for x in batch)
    logprobs = logprobs_of(module, prompts, prompt_mask, responses)
    advantages = remax.advantages(rewards, baselines, logprobs, ref_logprobs, mask, 0.05, 1.0)
    return remax.policy_loss(logprobs, advantages, mask, denominator)


class PlainWeights:
    """Float32 copies of a model's weights, trained by plain torch on the gradients that it is given."""

    def __init__(self, model):
        self.named = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        self.restart()

    def restart(self):
        adamw = dict(betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
        self.optimizer = torch.optim.AdamW(self.named.values(), LEARNING_RATE, **adamw)

    def step(self, gradients) -> float:
        """gradients: {name: tensor} -> their norm before clipping."""
        for name, weights in self.named.items():
            weights.grad = gradients[name].float()
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), MAX_GRAD_NORM)
        self.optimizer.step()
        return norm.item()


@torch.no_grad()
def copy_weights(model, named) -> None:
    for name, p in model.named_parameters():
        p.copy_(named[name])


def with_plain_torch(model, updates=5, restart=None):
    """-> (gradient norms, weights): the reference; `restart`: after that many updates the optimizer is a new one."""
    module = as_policy(model).engine
    weights = PlainWeights(model)
    norms = []
    for update in range(updates):
        if update == restart:
            weights.restart()
        model.zero_grad()
        loss_of(module, slice(None), data()).backward()
        norms.append(weights.step({name: p.grad for name, p in model.named_parameters()}))
        copy_weights(model, weights.named)
    return norms, weights.named


def with_the_engine(model, zero_stage=0, micro_batch_size=ROWS, updates=5, poison=None, restart=None, **flags):
    """-> (gradient norms, weights, skipped steps after each update); `poison`: in the second, on the last rank."""
    backend = start_backend(zero_stage=zero_stage, **flags)
    rank, world_size = backend.rank, backend.world_size
    rows = ROWS // world_size
    policy = as_policy(model)
    engine = common.train_engine(policy.engine, backend, MAX_GRAD_NORM)
    batch = [x[rank::world_size] for x in data()]
    norms, skips = [], []
    for update in range(updates):
        if update == restart:
            common.reset_optimizer(engine)
        with common.gathered(engine):  # as a rollout does, a different number of times on each rank
            for _ in range(1 + rank):
                policy.decoder(torch.arange(4)[None])
        for chunk, is_last in common.micro_batches(batch[3].sum(1), micro_batch_size):
            loss = loss_of(engine, chunk, batch, rows)
            if poison and update == 1 and rank == world_size - 1:
                loss = POISONS[poison](loss)
            common.backward(engine, loss, is_last)
        norm, skipped = common.optimizer_step(engine, LEARNING_RATE)
        norms.append(norm)
        skips.append(skipped)
    with common.gathered(engine):
        return norms, {name: p.detach().clone() for name, p in model.named_parameters()}, skips


def bfloat16_gradients(kind, zero_stage, micro_batch_sizes, **flags) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The engine's gradients over all ranks -> (those of each row alone, those of all rows by micro-batch size)."""
    backend = start_backend(zero_stage=zero_stage, dtype="bfloat16", **flags)
    rank, world_size = backend.rank, backend.world_size
    engine = common.train_engine(as_policy(tiny_model(kind)).engine, backend, MAX_GRAD_NORM)
    batch = [x[rank::world_size] for x in data()]

    def gradient_of(chunks, weight=1.0):
        for i, chunk in enumerate(chunks, start=1):
            loss = weight * loss_of(engine, chunk, batch, ROWS // world_size)
            common.backward(engine, loss, i == len(chunks))
        gradient = torch.cat([safe_get_full_grad(p).flatten().double() for p in engine.module.parameters()])
        common.optimizer_step(engine, learning_rate=0.0)  # the weights stay
        return gradient

    alone = []
    for row in range(ROWS):
        alone.append(gradient_of([[row // world_size]], weight=float(row % world_size == rank)))
    together = []
    for size in micro_batch_sizes:
        together.append(gradient_of([chunk for chunk, _ in common.micro_batches(batch[3].sum(1), size)]))
    return torch.stack(alone), together


def rollout_and_train(model) -> list:
    """ZeRO-3 with sharded embeddings, ranks whose responses end at different lengths, and several chunks of logits."""
    backend = start_backend(zero_stage=3)
    policy = as_policy(model, common.Sampling(max_prompt_length=3, response_length=12, temperature=1.0, batch_size=4))
    policy.eos_ids = list(range(2, 4000)) if backend.rank else [1]  # rank 1 ends at once, rank 0 goes on
    engine = policy.engine = common.train_engine(policy.engine, backend, 1.0)
    model.config.vocab_size = 2**25 // 4  # claimed, so that a chunk is four positions
    prompts = [common.Prompt("", [5, 6, 7], {}) for _ in range(4)]
    widths = []
    for _ in range(2):
        common.set_seed(0, backend.rank)
        responses = common.rollout(policy, prompts, num_samples=1, greedy=False)
        logprobs = common.logprobs(policy, responses)
        widths.append((logprobs.shape[1], int(responses.mask_BT.sum(1).max())))
        common.backward(engine, (logprobs * responses.mask_BT).sum(), True)
        common.optimizer_step(engine, 1e-3)
    return common.gather_rows(widths)


def on_this_rank(cases: list[dict]) -> dict:
    """For `forked`, with several ranks: what test_engine.py compares with plain torch."""
    found = []
    for case in cases:
        kinds = ["llama"] if case.get("offload") else ["gpt2", "llama"]
        found.append({kind: with_the_engine(tiny_model(kind), **case) for kind in kinds})
    return dict(
        cases=found,
        poisoned=[
            with_the_engine(tiny_model("llama"), zero_stage, 2, updates=3, poison=poison)
            for zero_stage in range(4)
            for poison in POISONS
        ],
        bfloat16=[bfloat16_gradients("llama", zero_stage, [1]) for zero_stage in (0, 2)],
        widths=rollout_and_train(tiny_model("llama", vocab_size=4000)),
    )
