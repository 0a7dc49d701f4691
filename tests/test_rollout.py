"""Decoding against `generate`, masks, and log-probabilities against slow references."""

import pytest
import torch
from conftest import left_padded, tiny_model

import common

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 1, 13]]  # an EOS id (1) inside a prompt is just a token
SAMPLED_ONCE = dict(num_samples=1, greedy=True, length=12, temperature=1.0)


def test_greedy_rows_are_those_of_generate_whatever_is_decoded_beside_them(model):
    prompts, mask = left_padded(PROMPTS)
    model.eval()
    wanted = model.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=1)
    wanted = wanted[:, prompts.shape[1] :]
    mixed = common.generate(model, prompts, mask, eos_ids=[1], **SAMPLED_ONCE)[len(PROMPTS) :]
    alone = common.generate(model, prompts, mask, eos_ids=[1], **SAMPLED_ONCE | dict(num_samples=0))
    for tokens in (mixed, alone):
        width = min(tokens.shape[1], wanted.shape[1])
        real, _ = common.response_mask(tokens, [1])
        assert torch.equal((tokens * real)[:, :width], (wanted * real[:, :width])[:, :width])
        assert (tokens[:, width:] == 1).all()


def test_each_prompt_is_answered_as_it_would_be_alone(model):
    prompts, mask = left_padded(PROMPTS)
    model.eval()
    together = common.generate(model, prompts, mask, eos_ids=[1], **SAMPLED_ONCE | dict(num_samples=0))
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        alone = common.generate(model, ids, torch.ones_like(ids), eos_ids=[1], **SAMPLED_ONCE | dict(num_samples=0))
        assert torch.equal(together[i, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax_of_the_logits_over_the_temperature(temperature):
    model = tiny_model("gpt2", vocab_size=8).eval()
    prompts, mask = left_padded([[2, 3], [4]])
    torch.manual_seed(0)
    n = 20_000
    settings = dict(num_samples=n, greedy=False, length=1, temperature=temperature, eos_ids=[1])
    tokens = common.generate(model, prompts, mask, **settings).view(2, n)
    for i, prompt in enumerate([[2, 3], [4]]):
        wanted = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        counts = torch.bincount(tokens[i], minlength=8)
        likely = wanted * n >= 5
        chi_square = ((counts - wanted * n) ** 2 / (wanted * n))[likely].sum()
        assert chi_square < 24.3  # 0.999 quantile of 7 degrees of freedom; only some tokens are likely


def test_rows_of_a_prompt_are_adjacent_and_greedy_rows_come_last():
    model = tiny_model("gpt2").eval()
    prompts, mask = left_padded(PROMPTS)
    settings = dict(length=6, temperature=1e-4, eos_ids=[])  # so cold that samples are greedy, too
    tokens = common.generate(model, prompts, mask, num_samples=2, greedy=True, **settings)
    assert tokens.shape == (9, 6)
    greedy = tokens[6:]
    assert torch.equal(tokens[:6], greedy.repeat_interleave(2, 0)) and len(greedy.unique(dim=0)) == 3


def test_decoding_stops_when_all_have_ended_and_any_eos_id_ends_a_row(model):
    prompts, mask = left_padded(PROMPTS)
    settings = SAMPLED_ONCE | dict(num_samples=4, length=40)
    torch.manual_seed(0)
    tokens = common.generate(model.eval(), prompts, mask, eos_ids=list(range(1, 25)), **settings)
    assert tokens.shape[1] < 40
    real, ended = common.response_mask(tokens, list(range(1, 25)))
    assert ended.all()
    for row, n in zip(tokens.tolist(), real.sum(1).tolist(), strict=True):
        assert all(t not in range(1, 25) for t in row[: n - 1]) and set(row[n - 1 :]) == {row[n - 1]}


def test_response_mask_is_one_up_to_the_first_eos():
    tokens = torch.tensor([[5, 1, 1, 1], [1, 1, 1, 1], [5, 6, 7, 8], [5, 2, 1, 9], [0, 0, 0, 1]])
    mask, ended = common.response_mask(tokens, [1, 2])
    assert mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert ended.tolist() == [True, True, False, True, True]


RESPONSES = torch.tensor([[20, 21, 22, 1], [23, 24, 25, 26], [27, 1, 1, 1]])


def slow_logprobs(model, temperature):
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES.tolist(), strict=True):
        row = []
        for t, token in enumerate(response):
            logits = model(torch.tensor([prompt + response[:t]])).logits[0, -1].double()
            row.append((logits / temperature).log_softmax(-1)[token])
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("pad", [0, 1, 7])
@pytest.mark.parametrize("extra", [0, 3])
def test_logprobs_match_a_slow_reference_whatever_the_padding(model, temperature, pad, extra):
    prompts, mask = left_padded(PROMPTS, pad)
    prompts = torch.cat([torch.full((3, extra), pad), prompts], 1)
    mask = torch.cat([torch.zeros(3, extra, dtype=torch.long), mask], 1)
    found = common.ResponseLogprobs(model)(prompts, mask, RESPONSES, temperature)
    torch.testing.assert_close(found.double(), slow_logprobs(model, temperature), atol=1e-4, rtol=1e-4)


def test_what_follows_the_eos_changes_nothing_before_it(model):
    prompts, mask = left_padded(PROMPTS)
    module, real = common.ResponseLogprobs(model), common.response_mask(RESPONSES, [1])[0]
    other = torch.where(real == 1, RESPONSES, 33)
    found, again = module(prompts, mask, RESPONSES, 1.0), module(prompts, mask, other, 1.0)
    assert torch.equal(found * real, again * real)


def test_chunks_of_the_vocabulary_projection_change_neither_values_nor_gradients(model):
    prompts, mask = left_padded(PROMPTS)
    module = common.ResponseLogprobs(model)
    results = []
    for claimed in (50, 2**25 // 5):  # the size decides how many positions share a chunk: all of them, then five
        model.config.vocab_size = claimed
        model.zero_grad()
        logprobs = module(prompts, mask, RESPONSES, 0.7)
        logprobs.pow(2).sum().backward()
        results.append((logprobs.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-3)
    assert all(torch.isfinite(g).all() for g in results[0][1])  # left padding must not make NaN gradients


def test_only_response_positions_reach_the_vocabulary_projection(model):
    prompts, mask = left_padded(PROMPTS)
    rows = []
    module = common.ResponseLogprobs(model)
    model.get_output_embeddings().register_forward_hook(lambda m, inputs, out: rows.append(len(inputs[0])))
    module(prompts, mask, RESPONSES, 1.0)
    assert sum(rows) == RESPONSES.numel()


def test_a_model_that_changes_its_logits_afterwards_is_refused(capsys):
    model = tiny_model("llama")
    forward = model.forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 2 * (output.logits / 2).tanh()
        return output

    model.__class__ = type("Capped", (type(model),), dict(forward=lambda self, *a, **k: capped(*a, **k)))
    with pytest.raises(SystemExit) as error:
        common.ResponseLogprobs(model)
    assert error.value.code == 2 and "after the output embedding" in capsys.readouterr().err


def test_the_decoding_view_shares_weights_but_not_checkpointing(model):
    module = common.ResponseLogprobs(model)
    model.activation_checkpointing_enable()
    assert all(a is b for a, b in zip(model.parameters(), module.whole.parameters(), strict=True))
    assert len(list(module.named_parameters())) == len(list(model.named_parameters()))
    assert not module.whole.training and not any(
        getattr(m, "gradient_checkpointing", False) for m in module.whole.modules()
    )
