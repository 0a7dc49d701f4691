"""What the benchmarks compute: random weights, random prompts of one length, one character per token.

Needs torch and transformers only, so that other libraries can be measured in an environment of their own. W1, W2 and
M1 (for memory) fit a CPU; G1 to G4 are for a GPU (gpu.py has prompts of unequal length). `tiny` is for tests.
"""

from pathlib import Path

import tokenizers
import torch
import transformers

EOS, PAD = 0, 1

GPT2 = dict(n_positions=1024, vocab_size=50257, n_embd=768, n_layer=12, n_head=12)  # 124 million weights
SMALL = dict(n_positions=256, vocab_size=1000, n_embd=128, n_layer=4, n_head=4)
TINY = dict(n_positions=64, vocab_size=100, n_embd=16, n_layer=2, n_head=2)
QWEN = dict(vocab_size=128_000, max_position_embeddings=32768, num_key_value_heads=2, tie_word_embeddings=True)
HALF_A_BILLION = QWEN | dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14)
THREE_BILLION = QWEN | dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16)
LLAMA = dict(vocab_size=32000, max_position_embeddings=4096, hidden_size=4096, intermediate_size=11008)
LLAMA |= dict(num_hidden_layers=32, num_attention_heads=32)  # 6.7 billion

# name: (kind of model, its shape, prompts per update, prompt tokens, response tokens)
WORKLOADS = {
    "W1": ("gpt2", SMALL, 64, 16, 48),
    "W2": ("gpt2", GPT2, 8, 32, 32),
    "M1": ("gpt2", GPT2, 16, 64, 64),
    "G1": ("gpt2", GPT2, 256, 64, 128),
    "G2": ("qwen2", HALF_A_BILLION, 256, 64, 128),
    "G3": ("qwen2", THREE_BILLION, 128, 64, 128),
    "G4": ("llama", LLAMA, 64, 64, 128),
    "tiny": ("gpt2", TINY, 4, 5, 6),
}


def character_tokenizer(vocab_size: int, positions: int):
    """One Unicode character per id, so that decoded ids encode to the same ids again."""
    vocabulary = {"<eos>": EOS, "<pad>": PAD} | {chr(0xF0000 + i): i for i in range(2, vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    words.decoder = tokenizers.decoders.Fuse()
    special = dict(eos_token="<eos>", bos_token="<eos>", pad_token="<pad>")
    kwargs = dict(padding_side="left", model_max_length=positions) | special
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **kwargs)


def save_policy(folder: Path, kind: str, dtype: str = "float32", **shape) -> None:
    """A language model with random weights, without dropout, and its tokenizer."""
    ids = dict(bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD)
    drop = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) if kind == "gpt2" else {}
    if kind == "gpt2":
        shape["activation_function"] = "gelu_pytorch_tanh"  # one kernel in place of the eight of GPT-2's gelu_new
    config = transformers.AutoConfig.for_model(kind, **shape, **ids, **drop)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # 7 billion take minutes on a CPU
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    character_tokenizer(config.vocab_size, config.max_position_embeddings).save_pretrained(folder)


def save_reward_model(folder: Path, policy: str, dtype: str = "float32") -> None:
    """A scalar head with random weights on the policy's architecture."""
    config = transformers.AutoConfig.from_pretrained(policy, num_labels=1)
    torch.manual_seed(1)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(policy).save_pretrained(folder)


def random_prompts(vocab_size: int, number: int, length: int) -> torch.Tensor:
    return torch.randint(2, vocab_size, (number, length), generator=torch.Generator().manual_seed(0))
