"""A model is trained right or refused in one line at load, and what is scored is the text as it stands.

Models are tiny and random, made from configs, with weights so large that mistakes show.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from conftest import (
    EXAMPLE,
    EXAMPLE_DATA,
    PAIRS,
    ROOT,
    SCRIPTS,
    logprobs_of,
    one_error,
    read_metrics,
    run_here,
    script_environment,
    start_backend,
    values_of,
)
from tokenizers import Tokenizer, decoders, models, normalizers

import common

SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
IDS = dict(vocab_size=800, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=1)
IDS |= dict(initializer_range=0.2)
HEAD = dict(head_dim=8)
WINDOW = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
VISION = dict(SHAPE, hidden_size=16, num_attention_heads=2, image_size=28, patch_size=14)

# An architecture of transformers -> fields of its config.
WORKING = dict(
    gpt2={},
    llama={},
    mistral=dict(sliding_window=8),
    qwen2=dict(use_sliding_window=True, sliding_window=8, max_window_layers=1),
    qwen3=HEAD,
    gemma=HEAD,
    gemma3_text=HEAD | WINDOW,
    gemma3=dict(text_config=SHAPE | IDS | HEAD | WINDOW, vision_config=VISION, mm_tokens_per_image=4),
    phi3={},
    opt=dict(ffn_dim=48, word_embed_proj_dim=32),
    gpt_neox=dict(hidden_dropout=0.2, attention_dropout=0.2),
    falcon={},
    mixtral=dict(EXPERTS, router_jitter_noise=0.3),
    olmo2={},
    qwen3_5_text=dict(HEAD, **LINEAR, layer_types=["linear_attention", "full_attention"]),
    lfm2=dict(layer_types=["conv", "full_attention"]),
    nanochat=dict(final_logit_softcapping=3.0),
    cohere=dict(logit_scale=0.25),
    cohere2=dict(logit_scale=0.25, sliding_window=8),
    granite=dict(logits_scaling=8.0),
)
NEEDS_EAGER = dict(
    bloom={},
    gptj=dict(rotary_dim=4),
    gpt_neo=dict(num_layers=2, attention_types=[[["global", "local"], 1]], window_size=8),
    gpt_oss=dict(HEAD, **EXPERTS, sliding_window=8),
    gemma2=dict(HEAD, sliding_window=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8),  # logits are capped
)
REFUSED = dict(
    mamba=dict(state_size=8),
    mamba2=dict(num_heads=8, head_dim=8, state_size=8, n_groups=1),
    rwkv=dict(attention_hidden_size=32),
    recurrent_gemma=dict(lru_width=32, attention_window_size=8, block_types=["recurrent", "attention"]),
    falcon=dict(hidden_dropout=0.1),
    llama4_text=dict(intermediate_size_mlp=48, num_local_experts=4),
    hyperclovax=dict(logits_scaling=3.0),  # multiplies by what Granite divides by
    bert=dict(is_decoder=True),
    t5=dict(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8),
)


def make_model(kind, fields, folder):
    """A random model in a folder, with the example's tokenizer -> the folder."""
    torch.manual_seed(0)
    fields = fields if "text_config" in fields else SHAPE | IDS | fields  # a multimodal class has no shape of its own
    config = transformers.AutoConfig.for_model(kind, **fields)
    auto_class = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    model = auto_class.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.abs().max() < 0.15:
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    for file in EXAMPLE.glob("policy/tokenizer*"):
        shutil.copy(file, folder)
    return folder


def check(folder, attention="sdpa"):
    """Log-probabilities and greedy tokens of left-padded prompts are those of plain transformers."""
    backend = start_backend(attention=attention)
    sampling = common.Sampling(max_prompt_length=64, response_length=12, temperature=1.0, batch_size=8)
    policy = common.load_policy(str(folder), common.load_tokenizer(str(folder)), sampling, backend)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 800, (length,), generator=generator).tolist() for length in (3, 17, 6)]
    responses_BT = torch.randint(2, 800, (3, 12), generator=generator)
    prompts_BP, mask_BP = common.pad(prompts, "left", backend.device)

    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logprobs_BT = logprobs_of(policy.engine, prompts_BP, mask_BP, responses_BT)
        for prompt, response_T, logprobs_T in zip(prompts, responses_BT, logprobs_BT):
            logits_TV = plain(torch.tensor([prompt + response_T.tolist()])).logits[0, len(prompt) - 1 : -1]
            expected_T = logits_TV.log_softmax(-1)[range(12), response_T]
            torch.testing.assert_close(logprobs_T, expected_T, atol=1e-4, rtol=0)
    tokens_BT = common.generate(policy.decoder, prompts_BP, mask_BP, [0], sampling, num_samples=0, greedy=True)
    settings = dict(do_sample=False, max_new_tokens=12, eos_token_id=0, pad_token_id=0)
    expected_BT = plain.generate(prompts_BP, attention_mask=mask_BP, **settings)[:, prompts_BP.shape[1] :]
    assert tokens_BT[:, : expected_BT.shape[1]].tolist() == expected_BT.tolist()


UPDATES = "--total-episodes 8 --batch-size 4 --response-length 8 --eval-every 2 --eval-size 3 --learning-rate 1e-3"


@pytest.mark.parametrize("kind", WORKING)
def test_a_model_computes_what_transformers_computes(kind, tmp_path):
    check(make_model(kind, WORKING[kind], tmp_path))


@pytest.mark.parametrize("kind", NEEDS_EAGER)
def test_a_model_without_sdpa_computes_what_transformers_computes(kind, tmp_path):
    check(make_model(kind, NEEDS_EAGER[kind], tmp_path), "eager")


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mixtral"])
def test_two_updates_and_a_saved_model(kind, tmp_path):
    """M5 and M7: Mixtral's router jitter is switched off; Gemma 3's multimodal class is trained and saved."""
    folder = make_model(kind, WORKING[kind], tmp_path / kind)
    assert run_here("remax", *UPDATES.split(), "--model", folder, *EXAMPLE_DATA, "--output-dir", tmp_path / "r") == 0
    row = read_metrics(tmp_path / "r")[2]
    assert row["grad_norm"] > 0 and row["skipped_updates"] == 0
    assert "eval_log_ratio" in row and "eval_kl" not in row  # M11: greedy responses have a log-ratio, not a KL
    check(tmp_path / "r" / "policy")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*WORKING, *NEEDS_EAGER])
def test_two_updates_with_adapters_and_a_saved_model(kind, tmp_path):
    fields = (WORKING | NEEDS_EAGER)[kind]
    folder = make_model(kind, fields, tmp_path / kind)
    attention = "eager" if kind in NEEDS_EAGER else "sdpa"
    flags = [*UPDATES.split(), "--lora-rank", 4, "--attention", attention, "--learning-rate", 0.01]
    assert run_here("remax", *flags, "--model", folder, *EXAMPLE_DATA, "--output-dir", tmp_path / "r") == 0
    rows = read_metrics(tmp_path / "r")
    assert rows[2]["grad_norm"] > 0 and rows[0]["eval_log_ratio"] == pytest.approx(0, abs=1e-5)
    assert abs(rows[2]["eval_log_ratio"]) > 1e-4
    check(tmp_path / "r" / "policy", attention)


@pytest.mark.parametrize("kind", ["bloom", "gptj"])
def test_eager_attention_to_the_end(kind, tmp_path, capsys):
    """M2: the final check reads the model with the attention that it was trained with."""
    folder = make_model(kind, NEEDS_EAGER[kind], tmp_path / kind)
    flags = [*UPDATES.split(), "--model", folder, *EXAMPLE_DATA, "--output-dir"]
    assert run_here("remax", *flags, tmp_path / "eager", "--attention", "eager") == 0
    assert "(checked;" in capsys.readouterr().out
    assert run_here("remax", *flags, tmp_path / "sdpa") == 2 and "scaled_dot_product_attention" in one_error(capsys)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_would_be_trained_wrong_is_refused_at_load(kind, tmp_path, capsys):
    """M3, M5 and M7."""
    folder = make_model(kind, REFUSED[kind], tmp_path)
    flags = [*UPDATES.split(), "--model", folder, *EXAMPLE_DATA, "--attention", "eager", "--output-dir", tmp_path / "r"]
    assert run_here("remax", *flags) == 2 and str(folder) in one_error(capsys)
    assert not (tmp_path / "r").exists()


LONG_ROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4)
LONG_ROPE |= dict(original_max_position_embeddings=16)
KNOWN = dict(
    phimoe=dict(EXPERTS, router_jitter_noise=0.3),  # its router is sampled, and reads the jitter in evaluation, too
    phi3=dict(rope_parameters=LONG_ROPE, original_max_position_embeddings=16),  # factors change with a text's length
)


@pytest.mark.parametrize("kind", KNOWN)
def test_a_model_that_no_comparison_finds_wrong_is_refused_at_load(kind, tmp_path, capsys):
    """M5, and a rotary embedding that depends on the batch."""
    folder = make_model(kind, KNOWN[kind], tmp_path)
    flags = [*UPDATES.split(), "--model", folder, *EXAMPLE_DATA, "--output-dir", tmp_path / "r"]
    assert run_here("remax", *flags) == 2 and str(folder) in one_error(capsys)


# ---------------------------------------------------------------- M1: the space after the prompt


@pytest.fixture
def llama_tokenizer():
    """A tokenizer of the Llama 2 family: its decoder strips a text's first space."""
    words = ["▁", "▁a", "▁was", "▁great", "▁movie", "▁The", "great", "was", *"athemoviwsgrT", "▁wa", "gr", "ea"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    scores = [(piece, -1.0 - 5 * (len(piece) == 1)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture
def llama_folders(llama_tokenizer, tmp_path):
    """-> (a policy, a reward model), both with that tokenizer."""
    torch.manual_seed(0)
    ids = dict(vocab_size=len(llama_tokenizer), max_position_embeddings=128, bos_token_id=1, eos_token_id=2)
    config = transformers.LlamaConfig(**SHAPE | ids, pad_token_id=2, num_labels=1)
    classes = (transformers.LlamaForCausalLM, transformers.LlamaForSequenceClassification)
    folders = [tmp_path / "policy", tmp_path / "reward_model"]
    for model_class, folder in zip(classes, folders):
        model_class(config).save_pretrained(folder)
        llama_tokenizer.save_pretrained(folder)
    return folders


def ids_after_prompt(tokenizer, response) -> list[int]:
    prompt = tokenizer("The movie")["input_ids"]
    whole = tokenizer("The movie" + response)["input_ids"]
    assert whole[: len(prompt)] == prompt
    return whole[len(prompt) :]


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("script", ["remax", "spr"])
def test_responses_are_scored_and_written_as_they_stand_after_the_prompt(
    script, llama_tokenizer, llama_folders, tmp_path
):
    """M1: the policy says the tokens of "The movie was great" after those of "The movie"."""
    response = [*ids_after_prompt(llama_tokenizer, " was great"), llama_tokenizer.eos_token_id]
    assert llama_tokenizer.decode(response, skip_special_tokens=True) == "was great"  # which begins with the space
    scored, functions_saw = [], tmp_path / "texts.txt"
    reward_model_ids = common.reward_model_ids

    def watched_ids(tokenizer, prompt, response, max_length):
        scored.append(prompt.text + response)
        ids = reward_model_ids(tokenizer, prompt, response, max_length)
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt.text + response
        return ids

    def generate(model, prompts_BP, prompt_mask_BP, eos_ids, sampling, num_samples, greedy):
        return torch.tensor([response]).repeat(len(prompts_BP) * (num_samples + greedy), 1)

    (tmp_path / "gold.py").write_text(f"""
def reward(prompts, responses, **columns):
    with open({str(functions_saw)!r}, "a") as file:
        file.writelines(prompt + response + "|" for prompt, response in zip(prompts, responses))
    return [float(len(response)) for response in responses]
""")
    data = write_lines(tmp_path / "data.jsonl", *[dict(prompt="The movie")] * 8)
    flags = ["--model", llama_folders[0], "--reward-model", llama_folders[1], "--dataset", data, "--eval-dataset", data]
    flags += ["--gold-reward-function", f"{tmp_path}/gold.py:reward", "--output-dir", tmp_path / "r"]
    flags += "--total-episodes 4 --batch-size 4 --eval-every 1".split()
    with patch.object(common, "generate", generate), patch.object(common, "reward_model_ids", watched_ids):
        # The load check decodes, too.
        with patch.object(common, "check_policy", lambda policy: None):
            assert run_here(script, *flags) == 0
    assert set(scored) == {"The movie was great"} == set(functions_saw.read_text().split("|")) - {"", "The movie"}
    files = [tmp_path / "r" / "samples.jsonl"] + [tmp_path / "r" / "iteration-1.jsonl"] * (script == "spr")
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert {row["prompt"] + row["response"] for row in rows} == {"The movie was great"}


@pytest.mark.parametrize("text", [" was great", "great", " a ", "\nwas"])
def test_demonstrations_decode_to_themselves_after_a_prompt(
    text, llama_tokenizer, llama_folders, tmp_path, tokenizer, monkeypatch
):
    """M1"""
    rollout = common.rollout
    found = []

    def recorded(*args, **kwargs):
        responses = rollout(*args, **kwargs)
        found.extend(responses.texts)
        return responses

    monkeypatch.setattr(common, "rollout", recorded)
    for each in (llama_tokenizer, tokenizer):
        each.num_embeddings = len(each)
        each.eos_ids = [each.eos_token_id]
        ids = common.encode_response(each, text)
        assert each.decode(each("The movie")["input_ids"] + ids, skip_special_tokens=True) == "The movie" + text
    data = write_lines(tmp_path / "data.jsonl", *[dict(prompt="The movie", completion=text)] * 8)
    flags = ["--model", llama_folders[0], "--dataset", data, "--output-dir", tmp_path / "r", "--eval-every", 0]
    flags += "--weighting uniform --num-samples 0 --total-episodes 8 --batch-size 8".split()
    assert run_here("spr", *flags) == 0
    assert found == [text] * 8


# ---------------------------------------------------------------- M4: nodes


def test_bad_input_is_told_once_per_node(monkeypatch, capsys):
    """M4: rank 8 is the first of the second node."""
    for rank, local_rank, told in ((0, 0, True), (1, 1, False), (8, 0, True), (9, 1, False)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        with pytest.raises(SystemExit):
            common.fail("no such file")
        assert ("error: no such file" in capsys.readouterr().err) is told


def run_on_two_nodes(folder, script, flags) -> list[subprocess.CompletedProcess]:
    """Two launchers with a rank each, which meet on the loopback interface and have no folder in common."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        end_point = f"127.0.0.1:{free.getsockname()[1]}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", end_point, "--local_addr", "127.0.0.1"]
    processes = []
    for node in (folder / "node-0", folder / "node-1"):
        shutil.copytree(ROOT / "examples", node / "project" / "examples")
        for path in ROOT.glob("*.py"):
            shutil.copy(path, node / "project")
        (node / "tmp").mkdir()
        (node / "gold.py").write_text("def reward(prompts, responses, **columns):\n    return [0.5 for _ in prompts]\n")
        environment = script_environment() | dict(TMPDIR=str(node / "tmp"), HF_HOME=str(node / "hub"))
        command = [*launcher, str(node / "project" / script), *map(str, flags)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(subprocess.Popen(command, cwd=node, env=environment, start_new_session=True, **pipes))
    try:
        texts = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return [subprocess.CompletedProcess(p.args, p.returncode, *text) for p, text in zip(processes, texts)]


@pytest.mark.slow
def test_bad_input_of_the_second_node_is_told_there_and_the_first_ends(tmp_path):
    """M4: only the first node has the model."""
    shutil.copytree(EXAMPLE / "policy", tmp_path / "node-0" / "policy")
    flags = [*UPDATES.split(), "--model", "policy", *EXAMPLE_DATA, "--output-dir", tmp_path / "r"]
    first, second = run_on_two_nodes(tmp_path, "remax.py", flags)
    assert first.returncode != 0 and second.returncode != 0
    told = [node.stderr.count("error: no folder policy here") for node in (first, second)]
    assert told == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_nodes_share_the_output_folder_only(script, tmp_path):
    """Each node has a working directory, a copy of the project and a folder for temporary files of its own."""
    flags = [] if script in PAIRS else ["--response-length", 8, "--gold-reward-function", "gold.py:reward"]
    flags += "--total-episodes 16 --batch-size 8 --eval-every 1 --eval-size 5 --save-every 1 --zero-stage 2".split()
    results = run_on_two_nodes(tmp_path, f"{script}.py", [*flags, "--output-dir", tmp_path / "r"])
    for result in results:
        assert result.returncode == 0, result.stderr[-3000:]
    assert [("Saved:" in result.stdout) for result in results] == [True, False]  # rank 0 alone speaks
    assert [row["update"] for row in read_metrics(tmp_path / "r")] == [0, 1, 2]
    for node in ("node-0", "node-1"):
        assert not (tmp_path / node / "runs").exists()


# ---------------------------------------------------------------- M6 to M13


@pytest.fixture
def user_token_folder(tmp_path):
    """The example's policy, whose tokenizer has a token without an embedding."""
    shutil.copytree(EXAMPLE / "policy", tmp_path / "policy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "policy")
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"])
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_token_without_an_embedding_is_told(script, user_token_folder, tmp_path, capsys):
    """M6"""
    row = dict(prompt="<|user|>The plot", chosen=" was good.", rejected=" was bad.")
    good = dict(row, prompt="The plot")
    flags = ["--model", user_token_folder, "--output-dir", tmp_path / "r", "--dataset"]
    flags += [write_lines(tmp_path / "data.jsonl", good, row, good, row)]
    assert run_here(script, *flags) == 2
    line = one_error(capsys)
    assert "'<|user|>'" in line and str(user_token_folder) in line


def test_a_demonstration_with_a_token_without_an_embedding_is_told(user_token_folder, tmp_path, capsys):
    """M6"""
    row = dict(prompt="The plot", completion=" was <|assistant|>")
    flags = ["--dataset", write_lines(tmp_path / "data.jsonl", row, row), "--model", user_token_folder]
    assert run_here("spr", *flags, "--output-dir", tmp_path / "r") == 2
    assert "'<|assistant|>'" in one_error(capsys)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_stop_being_finite_while_decoding(bad, tmp_path, capsys):
    """M8"""
    folder = make_model("llama", {}, tmp_path)
    backend = start_backend()
    sampling = common.Sampling(max_prompt_length=8, response_length=8, temperature=1.0, batch_size=8)
    policy = common.load_policy(str(folder), common.load_tokenizer(str(folder)), sampling, backend)
    calls, head = [], policy.decoder.lm_head.forward

    def head_that_breaks(hidden_BTD):
        calls.append(0)
        return head(hidden_BTD) + (bad if len(calls) == 4 else 0)

    prompts_BP, mask_BP = common.pad([[5, 6, 7], [8]], "left", backend.device)
    for num_samples, greedy in ((1, False), (0, True), (2, True)):
        calls.clear()
        with patch.object(policy.decoder.lm_head, "forward", head_that_breaks), pytest.raises(SystemExit) as end:
            common.generate(policy.decoder, prompts_BP, mask_BP, [], sampling, num_samples, greedy)
        assert end.value.code == 1 and "not finite" in one_error(capsys)
        assert len(calls) == 4


def test_scores_in_bfloat16_are_finer_than_the_type():
    """M9: bfloat16 has steps of 1/32 between 4 and 8."""
    backend = start_backend(dtype="bfloat16")
    reward = common.Reward(str(EXAMPLE / "reward_model"), backend=backend, micro_batch_size=8)
    texts = ["The acting", "The plot", "I saw this film and it", "The music of the film", "My friends said it"] * 2
    prompts = [common.Prompt(text, [], {}) for text in texts]
    responses = [" was a disaster."] * 5 + [" was a joy, and I loved it."] * 5
    with patch.object(reward.scorer, "zero", 0.0):
        scores = reward.score(prompts, responses)
    exact = common.Reward(str(EXAMPLE / "reward_model"), backend=start_backend()).score(prompts, responses)
    large = scores[scores.abs() > 4]
    assert len(large) > 3 and ((large * 32) % 1 != 0).all()
    assert (scores - scores.mean() - exact + exact.mean()).abs().max() < 0.3

    value = common.load_value_model(str(EXAMPLE / "reward_model"), str(EXAMPLE / "policy"), sampling_of(16), backend)
    ids_BT = torch.arange(5, 21)[None]
    with torch.no_grad():
        values_BT = values_of(value, ids_BT, torch.ones_like(ids_BT), ids_BT)
    assert values_BT.dtype == torch.float32 and not torch.equal(values_BT, values_BT.bfloat16().float())


def sampling_of(length):
    return common.Sampling(length, length, temperature=1.0, batch_size=8)


def test_two_runs_of_one_seed_in_one_second(tmp_path, monkeypatch, capsys):
    """M12"""
    monkeypatch.chdir(tmp_path)
    flags = "--total-episodes 4 --batch-size 4 --response-length 4 --eval-every 0".split()
    with patch.object(time, "strftime", lambda form: "20260101-000000"):
        assert [run_here("remax", *flags) for _ in range(2)] == [0, 2]
    assert "already holds a run: choose another folder" in capsys.readouterr().err
    (folder,) = Path("runs").iterdir()
    assert len(read_metrics(folder)) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_flash_attention_in_float32_is_refused(script, capsys):
    """M13"""
    assert run_here(script, "--attention", "flash_attention_2") == 2
    assert "--dtype bfloat16" in one_error(capsys)
