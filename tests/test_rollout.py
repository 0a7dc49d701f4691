"""Decoding against `generate`, the rows of a rollout, and log-probabilities and values against slow references."""

import copy

import pytest
import torch
from conftest import left_padded, logprobs_of, number_tokenizer, start_backend, tiny_model, values_of
from conftest import policy_of as policy_around

import common
import dpo

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 1, 13]]  # an EOS id (1) inside a prompt is just a token
MANY_EOS = [1, *range(20, 32)]  # so that rows end at different lengths
NUMBERS = number_tokenizer()


def decode(model, rows=PROMPTS, num_samples=1, greedy=True, length=12, temperature=1.0, eos_ids=(1,)):
    """`generate` as the rollout calls it -> tokens_RT."""
    prompts_BP, mask_BP = left_padded(rows)
    sampling = common.Sampling(64, length, temperature, batch_size=1)
    return common.generate(model.eval(), prompts_BP, mask_BP, list(eos_ids), sampling, num_samples, greedy)


def policy_of(model, temperature=1.0, response_length=12, rollout_batch_size=100) -> common.Policy:
    sampling = common.Sampling(64, response_length, temperature, rollout_batch_size)
    return policy_around(model, NUMBERS, sampling)


def prompts_of(rows) -> list[common.Prompt]:
    return [common.Prompt(str(i), row, {}) for i, row in enumerate(rows)]


# ---------------------------------------------------------------- Decoding


@pytest.mark.parametrize("eos_ids", [[1], MANY_EOS])
def test_greedy_rows_are_those_of_generate_whatever_is_decoded_beside_them(model, eos_ids):
    torch.manual_seed(0)
    prompts, mask = left_padded(PROMPTS)
    settings = dict(attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=eos_ids, pad_token_id=1)
    expected = model.eval().generate(prompts, **settings)[:, prompts.shape[1] :]
    expected = torch.nn.functional.pad(expected, (0, 12 - expected.shape[1]), value=1)
    mask_BT = common.response_mask(expected, eos_ids)
    assert eos_ids == [1] or len(set(mask_BT.sum(1).tolist())) > 1
    for num_samples in (0, 1, 4):
        found = decode(model, num_samples=num_samples, eos_ids=eos_ids)[num_samples * len(PROMPTS) :]
        assert found.shape == (3, 12) and torch.equal(found * mask_BT, expected * mask_BT)


def test_each_prompt_is_answered_as_it_would_be_alone(model):
    together = decode(model, num_samples=0)
    for i, prompt in enumerate(PROMPTS):
        assert torch.equal(together[i], decode(model, [prompt], num_samples=0)[0])


def assert_follows(model, prompt, tokens_N2, temperature, eos_ids):
    """Responses of two tokens have the probabilities that the model's logits over the temperature give them."""
    vocabulary = model.config.vocab_size
    with torch.no_grad():
        first = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        rows = torch.tensor([[*prompt, token] for token in range(vocabulary)])
        second = (model(rows).logits[:, -1] / temperature).softmax(-1)
    second[eos_ids] = torch.eye(vocabulary)[eos_ids]  # a row that has ended repeats its EOS
    expected = len(tokens_N2) * (first[:, None] * second).flatten()
    counts = torch.bincount(tokens_N2[:, 0] * vocabulary + tokens_N2[:, 1], minlength=vocabulary**2)
    likely = expected >= 5
    cells = [(counts[likely], expected[likely]), (counts[~likely].sum()[None], expected[~likely].sum()[None] + 1)]
    chi_square = sum(((count - mean) ** 2 / mean).sum().item() for count, mean in cells)
    freedom = int(likely.sum())
    assert freedom > 6
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3  # 0.999 quantile


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax_of_the_logits_over_the_temperature(temperature):
    model, rows, n = tiny_model("gpt2", vocab_size=8, initializer_range=0.2), [[2, 3], [4]], 20_000
    torch.manual_seed(0)
    tokens = decode(model, rows, n, greedy=False, length=2, temperature=temperature, eos_ids=[1, 6])
    for prompt, tokens_N2 in zip(rows, tokens.view(2, n, 2), strict=True):
        assert_follows(model, prompt, tokens_N2, temperature, [1, 6])


def test_decoding_stops_when_all_have_ended_and_any_eos_id_ends_a_row(model):
    steps = []
    model.register_forward_hook(lambda module, inputs, output: steps.append(len(output.logits)))
    torch.manual_seed(0)
    tokens = decode(model, num_samples=4, length=40, eos_ids=range(1, 25))
    assert tokens.shape == (15, 40) and len(steps) < 40
    assert steps == [3, *sorted(steps[1:], reverse=True)] and steps[-1] < 15  # rows that have ended take no part
    mask = common.response_mask(tokens, list(range(1, 25)))
    for row, n in zip(tokens.tolist(), mask.sum(1).tolist(), strict=True):
        assert all(t not in range(1, 25) for t in row[: n - 1])
        assert set(row[n - 1 :]) == {row[n - 1]} < set(range(1, 25))


@pytest.mark.parametrize("first_step", [1, 3])
def test_logits_that_are_not_finite_end_the_run_with_a_line(model, capsys, first_step):
    steps = []

    def hook(module, inputs, logits):
        steps.append(logits)
        logits[-1, -1, 3] = float("nan") if len(steps) >= first_step else 0.0

    model.get_output_embeddings().register_forward_hook(hook)
    with pytest.raises(SystemExit) as error:
        decode(model)
    assert error.value.code == 1 and "logits are not finite" in capsys.readouterr().err


def test_response_mask_is_one_up_to_the_first_eos():
    tokens = torch.tensor([[5, 1, 1, 1], [1, 1, 1, 1], [5, 6, 7, 8], [5, 2, 1, 9], [0, 0, 0, 1]])
    mask = common.response_mask(tokens, [1, 2])
    assert mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]


def test_padding():
    ids, mask = common.pad([[8], [6, 7]], "left", CPU)
    assert ids[:, 1].tolist() == [8, 7] and mask.tolist() == [[0, 1], [1, 1]]
    ids, mask = common.pad([[8], [6, 7]], "right", CPU)
    assert ids[:, 0].tolist() == [8, 6] and mask.tolist() == [[1, 0], [1, 1]]


# ---------------------------------------------------------------- The rows of a rollout

MORE_PROMPTS = [*PROMPTS, [14], [15, 16, 17], [18, 19], [2, 3, 4, 5]]


@pytest.mark.parametrize("rollout_batch_size", [1, 3, 7, 100])
def test_rows_are_in_their_order_and_are_the_same_however_many_are_decoded_at_once(
    model, monkeypatch, rollout_batch_size
):
    sizes, generate = [], common.generate
    monkeypatch.setattr(common, "generate", lambda *args: sizes.append(len(tokens := generate(*args))) or tokens)
    model.generation_config.eos_token_id = MANY_EOS
    prompts, settings = prompts_of(MORE_PROMPTS), dict(temperature=1e-4)  # so cold that samples are greedy, too
    expected = common.rollout(policy_of(model, **settings), prompts, num_samples=0, greedy=True)
    assert [prompt.text for prompt in expected.prompts] == list("0123456") and sizes == [7]
    assert len({tuple(row) for row in expected.tokens_BT.tolist()}) == 7  # so that a row in the wrong place shows

    sizes.clear()
    policy = policy_of(model, rollout_batch_size=rollout_batch_size, **settings)
    found = common.rollout(policy, prompts, num_samples=2, greedy=True)
    assert max(sizes) <= max(rollout_batch_size, 3) and sum(sizes) == 21
    order = [i for i in range(7) for _ in range(2)] + list(range(7))  # samples of a prompt are adjacent, greedy last
    assert found.prompts == [prompts[i] for i in order] and found.texts == [expected.texts[i] for i in order]
    for name in ("prompts_BP", "prompt_mask_BP", "tokens_BT", "mask_BT", "ended_B"):
        assert torch.equal(getattr(found, name), getattr(expected, name)[order]), name


def test_a_rollout_s_rows_fit_together(model):
    torch.manual_seed(0)
    model.generation_config.eos_token_id = MANY_EOS
    responses = common.rollout(policy_of(model), prompts_of(MORE_PROMPTS), num_samples=5, greedy=True)
    lengths_R = responses.mask_BT.sum(1)
    assert responses.tokens_BT.shape == (42, lengths_R.max())  # cut to the longest response
    assert 0 < responses.ended_B.sum() < 42
    for i, prompt in enumerate(responses.prompts):
        assert responses.prompts_BP[i][responses.prompt_mask_BP[i] == 1].tolist() == prompt.ids
        tokens = responses.tokens_BT[i][responses.mask_BT[i] == 1].tolist()
        assert not set(tokens[:-1]) & set(MANY_EOS)
        assert responses.ended_B[i] == (tokens[-1] in MANY_EOS) and (responses.ended_B[i] or len(tokens) == 12)
        assert responses.texts[i] == "".join(f" {token}" for token in tokens if token not in MANY_EOS)


@pytest.mark.parametrize("rollout_batch_size", [1, 120, 100_000])
def test_samples_follow_the_policy_however_many_are_decoded_at_once(rollout_batch_size):
    model, rows = tiny_model("gpt2", vocab_size=8, initializer_range=0.2), [[2, 3], [4]]
    policy = policy_of(model, temperature=0.7, response_length=2, rollout_batch_size=rollout_batch_size)
    torch.manual_seed(0)
    responses = common.rollout(policy, prompts_of(rows * 100), num_samples=50, greedy=True)
    tokens = responses.tokens_BT[:10_000].view(100, 2, 50, 2)
    tokens = torch.where(responses.mask_BT[:10_000].view_as(tokens) == 1, tokens, 1)  # a row that has ended is padded
    for i, prompt in enumerate(rows):
        assert_follows(model, prompt, tokens[:, i].reshape(-1, 2), 0.7, [1])
    greedy = responses.tokens_BT[10_000:].view(100, 2, 2)
    assert (greedy == greedy[0]).all()


@pytest.mark.parametrize("num_samples, greedy", [(2, True), (2, False), (0, False)])
def test_a_demonstration_follows_the_samples_of_its_prompt(model, num_samples, greedy):
    prompts, policy = prompts_of(PROMPTS), policy_of(model, temperature=1e-4)
    answers = common.rollout(policy, prompts, num_samples=0, greedy=True)
    for prompt, demonstration in zip(prompts, ([40, 1], [41, 42, 43, 1], [1])):
        prompt.demonstration = demonstration
    found = common.rollout(policy, prompts, num_samples, greedy)
    rows = [row[mask == 1].tolist() for row, mask in zip(found.tokens_BT, found.mask_BT)]
    expected, order = [], []
    for i, prompt in enumerate(prompts):
        expected += num_samples * [answers.tokens_BT[i][answers.mask_BT[i] == 1].tolist()] + [prompt.demonstration]
        order += (num_samples + 1) * [prompt]
    if greedy:
        expected += [row[mask == 1].tolist() for row, mask in zip(answers.tokens_BT, answers.mask_BT)]
        order += prompts
    assert rows == expected and found.prompts == order
    assert found.ended_B[num_samples] and found.texts[num_samples] == " 40"


def test_rows_are_taken_by_slices_and_by_numbers(model):
    responses = common.rollout(policy_of(model), prompts_of(PROMPTS), num_samples=1, greedy=True)
    for rows, numbers in ((slice(2, 5), [2, 3, 4]), ([5, 0], [5, 0])):
        part = responses[rows]
        assert part.texts == [responses.texts[i] for i in numbers]
        assert part.prompts == [responses.prompts[i] for i in numbers]
        for name in ("prompts_BP", "prompt_mask_BP", "tokens_BT", "mask_BT", "ended_B"):
            assert torch.equal(getattr(part, name), getattr(responses, name)[numbers])
    rows = responses[:2].rows(reward=torch.tensor([0.5, 1.5]))
    assert rows[1] == dict(prompt="1", response=responses.texts[1], reward=1.5) and len(rows) == 2


# ---------------------------------------------------------------- Texts


def words_tokenizer():
    """Like Llama's: a word begins with its space, which decoding leaves out where a text begins."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["</s>", "<unk>", "▁a", "▁The", "▁plot", "▁was", "▁great", "was", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    spaces = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    tokenizer.num_embeddings = len(words)
    tokenizer.eos_ids = [tokenizer.eos_token_id]
    return tokenizer


def test_texts_are_decoded_as_they_stand_after_a_prompt(tokenizer):
    words = words_tokenizer()
    rows = [[5, 6, 8, 0], [7, 6], [0], []]
    assert words.decode(rows[0], skip_special_tokens=True) == "was great."  # the space is lost
    assert common.decode(words, rows, [0]) == [" was great.", "was great", "", ""]
    texts = [" was a treat.", "was a treat.", " ", "", "\n\nNo.", "🎬"]
    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    assert common.decode(tokenizer, rows, [0]) == texts


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_texts_are_decoded_whole_where_the_tokenizer_knows_no_letters(unknown):
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["</s>", "<unk>", *"0123456789+= "]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token=unknown)
    rows = [[words.index(letter) for letter in text] + [0] for text in ("12 + 7=19", "3")]
    assert common.decode(tokenizer, rows, [0]) == ["12 + 7=19", "3"]


def test_demonstrations_are_encoded_as_they_stand_after_a_prompt(tokenizer):
    words = words_tokenizer()
    assert common.encode_response(words, " was great.") == [5, 6, 8, words.eos_token_id]
    for text in (" was a treat.", "was a treat.", "\nNo.", "", " "):
        for end in ("", tokenizer.eos_token):  # some data have it
            assert common.encode_response(tokenizer, text + end) == tokenizer(text)["input_ids"] + [0]
    words.eos_token = None
    with pytest.raises(SystemExit):
        common.encode_response(words, " was great.")


# ---------------------------------------------------------------- Log-probabilities

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
    found = logprobs_of(policy_of(model, temperature).engine, prompts, mask, RESPONSES)
    torch.testing.assert_close(found.double(), slow_logprobs(model, temperature), atol=1e-4, rtol=1e-4)


def test_padding_in_bfloat16(model):
    """Its ids change no bit, of gradients neither. Its width and the type change log-probabilities by rounding alone.

    Some 40 operations lie between the ids and the logits. Each rounds by 2^-9, and two logits make a log-probability.
    """
    for p in model.parameters():  # not buffers, such as rotary frequencies
        p.data = p.data.bfloat16()
    found = {}
    for width in (5, 8):
        for pad in (0, 1, 7):
            prompts = torch.full((3, width), pad)
            mask = torch.zeros(3, width, dtype=torch.long)
            for i, prompt in enumerate(PROMPTS):
                prompts[i, -len(prompt) :] = torch.tensor(prompt)
                mask[i, -len(prompt) :] = 1
            model.zero_grad()
            logprobs = logprobs_of(policy_of(model, 0.7).engine, prompts, mask, RESPONSES)
            logprobs.sum().backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            found[width, pad] = [logprobs.detach(), *gradients]
            assert all(torch.equal(x, y) for x, y in zip(found[width, pad], found[width, 0], strict=True))
    model = model.float()
    with torch.no_grad():
        expected = slow_logprobs(model, 0.7).float()
        largest = max(model(torch.tensor([prompt])).logits.abs().max() for prompt in PROMPTS).item()
    bound = 2 * 40 * 2**-9 * largest / 0.7
    for width in (5, 8):
        assert (found[width, 0][0] - expected).abs().max() < bound
    assert (expected - expected[[1, 2, 0]]).abs().max() > 2 * bound  # else this shows nothing


def test_log_ratios_of_pairs_are_those_of_transformers_whatever_the_padding(model):
    """Prompts are padded on the left and responses on the right, to the longest of the pairs that come together."""
    start_backend()
    reference = copy.deepcopy(model)
    for parameter in reference.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    responses = [([20, 21, 1], [22, 1]), ([23, 1], [24, 25, 26, 27, 1]), ([28, 29, 30, 1], [1])]
    pairs = [dpo.Pair(prompt, ("", ""), ids) for prompt, ids in zip(prompts_of(PROMPTS), responses)]
    for pair, ref_logprobs in zip(pairs, dpo.scores_of_all(policy_of(reference), pairs, 2)):
        pair.ref_logprobs = ref_logprobs
    found_2B = dpo.scores(policy_of(model), pairs)
    for i, (prompt, two) in enumerate(zip(PROMPTS, responses)):
        alone_21 = dpo.scores(policy_of(model), pairs[i : i + 1])
        for j, response in enumerate(two):
            labels = torch.tensor([len(prompt) * [-100] + response])
            losses = [m(torch.tensor([prompt + response]), labels=labels).loss for m in (reference, model)]
            expected = (losses[0] - losses[1]) * len(response)
            assert expected.abs() > 0.01
            torch.testing.assert_close(found_2B[j, i], expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(alone_21[j, 0], expected, atol=1e-4, rtol=1e-4)


def test_what_follows_the_eos_changes_nothing_before_it(model):
    prompts, mask = left_padded(PROMPTS)
    policy, real = policy_of(model), common.response_mask(RESPONSES, [1])
    other = torch.where(real == 1, RESPONSES, 33)
    found, again = (logprobs_of(policy.engine, prompts, mask, tokens) for tokens in (RESPONSES, other))
    assert torch.equal(found * real, again * real)


def test_chunks_of_the_vocabulary_projection_change_neither_values_nor_gradients(model):
    prompts, mask = left_padded(PROMPTS)
    policy, results = policy_of(model, temperature=0.7), []
    for claimed in (50, 2**25 // 5):  # the size decides how many positions share a chunk: all of them, then five
        model.config.vocab_size = claimed
        model.zero_grad()
        logprobs = logprobs_of(policy.engine, prompts, mask, RESPONSES)
        logprobs.pow(2).sum().backward()
        results.append((logprobs.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-3)
    assert all(torch.isfinite(g).all() for g in results[0][1])  # left padding must not make NaN gradients


def test_only_response_positions_reach_the_vocabulary_projection(model):
    prompts, mask = left_padded(PROMPTS)
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda m, inputs, out: rows.append(len(inputs[0])))
    logprobs_of(policy_of(model).engine, prompts, mask, RESPONSES)
    assert sum(rows) == RESPONSES.numel()


def test_the_decoding_view_shares_weights_but_not_checkpointing(model):
    policy = policy_of(model)
    model.activation_checkpointing_enable()
    assert all(a is b for a, b in zip(model.parameters(), policy.decoder.parameters(), strict=True))
    assert len(list(policy.engine.named_parameters())) == len(list(model.named_parameters()))
    assert not policy.decoder.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in policy.decoder.modules())


def with_dropout(kind):
    """As modules, and as numbers that the forward reads."""
    import transformers

    ids = dict(vocab_size=20, bos_token_id=1, eos_token_id=1, pad_token_id=1)
    if kind == "modules":
        shape = dict(n_embd=16, n_layer=2, n_head=2, n_positions=32, attn_pdrop=0.5, resid_pdrop=0.5)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **ids))
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=16)
    return transformers.OPTForCausalLM(transformers.OPTConfig(**shape, **ids, max_position_embeddings=32, dropout=0.5))


@pytest.mark.parametrize("kind", ["modules", "numbers"])
def test_dropout_is_off_in_training(tmp_path, kind):
    with_dropout(kind).save_pretrained(tmp_path)
    policy = common.load_policy(str(tmp_path), number_tokenizer(20), common.Sampling(16, 16, 1.0, 8), start_backend())
    ids, ones = torch.arange(6)[None], torch.ones(1, 3, dtype=torch.long)
    once, again = (logprobs_of(policy.engine, ids[:, :3], ones, ids[:, 3:]) for _ in range(2))
    assert policy.engine.training and torch.equal(once, again)


def responses_to_prompts(policy) -> common.Responses:
    lengths = common.response_mask(RESPONSES, [1]).sum(1).tolist()
    prompts = prompts_of(PROMPTS)
    for prompt, row, n in zip(prompts, RESPONSES.tolist(), lengths, strict=True):
        prompt.demonstration = row[:n]
    return common.rollout(policy, prompts, num_samples=0, greedy=False)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 100])
def test_micro_batches_change_neither_values_nor_the_order_of_rows(model, micro_batch_size):
    start_backend()
    policy = policy_of(model, temperature=0.7)
    responses = responses_to_prompts(policy)[[2, 0, 1]]  # lengths 2, 4, 4
    with torch.no_grad():
        expected = (slow_logprobs(model, 0.7)[[2, 0, 1]] * responses.mask_BT).float()
    found = common.all_logprobs(policy, responses, micro_batch_size)
    torch.testing.assert_close(found * responses.mask_BT, expected, atol=1e-4, rtol=1e-4)
    assert not found.requires_grad


def test_padding_is_not_computed(model):
    start_backend()
    policy, widths = policy_of(model), []
    responses = responses_to_prompts(policy)
    policy.engine.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[2]))
    short = common.logprobs(policy, responses[[2]])
    assert widths == [2] and short.shape == (1, 4) and (short[0, 2:] == 0).all()
    assert short.requires_grad
    with torch.no_grad():
        whole = logprobs_of(policy.engine, responses.prompts_BP, responses.prompt_mask_BP, responses.tokens_BT)
    torch.testing.assert_close(short[0, :2], whole[2, :2])


def test_micro_batches_begin_with_the_longest_rows():
    lengths_B = torch.tensor([3, 9, 1, 9, 5, 2, 7])
    assert list(common.micro_batches(lengths_B, 3)) == [([1, 3, 6], False), ([4, 0, 5], False), ([2], True)]
    assert list(common.micro_batches(lengths_B, 7)) == [([1, 3, 6, 4, 0, 5, 2], True)]


# ---------------------------------------------------------------- Values


@pytest.mark.parametrize("extra", [0, 3])
def test_values_are_read_where_a_token_is_predicted(extra):
    import transformers

    torch.manual_seed(0)
    shape = dict(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=1, initializer_range=0.3)
    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**shape)).eval()
    model.score = common.ScalarHead(model.score.weight)
    prompts, mask = left_padded(PROMPTS)
    prompts = torch.cat([torch.full((3, extra), 4), prompts], 1)
    mask = torch.cat([torch.zeros(3, extra, dtype=torch.long), mask], 1)
    with torch.no_grad():
        found = values_of(common.ScalarOutputs(model, zero=0.75).eval(), prompts, mask, RESPONSES)
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES.tolist(), strict=True)):
            for t in range(len(response)):  # the value of token t has seen what comes before it
                hidden = model.transformer(torch.tensor([prompt + response[:t]])).last_hidden_state
                expected = (model.score.weight @ hidden[0, -1])[0] - 0.75
                torch.testing.assert_close(found[i, t], expected, atol=1e-5, rtol=1e-4)
