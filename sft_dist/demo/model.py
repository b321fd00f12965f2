"""A BPE tokenizer and a Qwen2-architecture model, from scratch. torch is loaded when a builder is called."""

from collections.abc import Iterable
from pathlib import Path

from sft_dist.errors import ConfigError

NUM_TOKENIZER_EXAMPLES = 3_000
VOCAB_SIZE = 1_024

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer(texts: Iterable[str], directory: Path, *, vocab_size: int = VOCAB_SIZE) -> Path:
    """Train a byte-level BPE tokenizer with ChatML markers and save it as `AutoTokenizer.from_pretrained` reads it.

    Every digit is its own token, so that numbers are spelt alike wherever they occur.
    Raises ConfigError when vocab_size cannot hold the 256 bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size={vocab_size} cannot hold 256 bytes and {len(SPECIAL_TOKENS)} special tokens; "
            f"use {MIN_VOCAB_SIZE} or more"
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return Path(directory)


def build_model(
    tokenizer_dir: Path,
    directory: Path,
    *,
    hidden_size: int = 128,
    intermediate_size: int = 256,
    num_layers: int = 2,
    num_heads: int = 8,
    num_kv_heads: int = 8,
    max_tokens: int = 512,
    initializer_range: float = 0.08,
    seed: int = 0,
) -> Path:
    """Save a randomly initialised Qwen2 model in fp32 for this tokenizer, with tied embeddings.

    Raises ConfigError when the heads do not divide the hidden size.
    """
    if hidden_size % num_heads or num_heads % num_kv_heads:
        raise ConfigError(
            f"hidden_size={hidden_size}, num_heads={num_heads}, num_kv_heads={num_kv_heads}: "
            "heads must divide the hidden size, and key-value heads the heads"
        )
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_tokens,
        initializer_range=initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(directory)
    # safetensors writes 0600 whatever the umask; the weights get the permissions of the other files.
    weights = Path(directory, "model.safetensors")
    weights.chmod(Path(directory, "config.json").stat().st_mode)
    if Path(directory).resolve() != Path(tokenizer_dir).resolve():
        tokenizer.save_pretrained(directory)
    return Path(directory)
