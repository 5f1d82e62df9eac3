"""Fixtures that every room's tests may use."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("kvfold", deadline=None, max_examples=60)  # a shared core makes any deadline flaky
settings.load_profile("kvfold")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

TINY_TEXT = (
    "A page belongs to one sequence, one layer and one head. The scheduler admits a request when its pages "
    "fit. Keys and values are held as codes; attention reads the codes and never the dense rows. What leaves "
    "the window is sealed, and what is sealed stays as it is. Two requests with the same "
    "beginning share its pages.\n"
)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random Llama: 2 layers, 4 heads, 2 KV heads, head_dim 16, 512 positions, float32.

    It holds config.json, model.safetensors and a byte-level BPE tokenizer with a chat template; its
    end of sequence is `<|end|>`.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny-llama")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TINY_TEXT], trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", additional_special_tokens=["<|start|>"]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            # Large weights: otherwise all logits are nearly equal and no comparison means anything.
            initializer_range=0.2,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UTF-8 text file of about 4,000 tokens of `tiny_llama`."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{number}. {TINY_TEXT}" for number in range(60)), encoding="utf-8")
    return path
