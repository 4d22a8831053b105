"""Model directories of a few thousand weights, made on the spot: random, but the same for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

END = "<|endoftext|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte of UTF-8, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={END: 0} | {sign: i for i, sign in enumerate(alphabet, 1)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)


def llama(seed: int = 0, *, tied: bool = True, width: int = 64, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = _llama_shape(width) | {"tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**shape | config)).eval()


def causal_lm(model_type: str, seed: int = 0) -> Any:
    """A model of any type that is shaped like Llama."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **_llama_shape(64), num_key_value_heads=1)
    return AutoModelForCausalLM.from_config(config).eval()


def llama_classifier(seed: int = 0, labels: int = 3) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    config = LlamaConfig(**_llama_shape(64), tie_word_embeddings=False, num_labels=labels, pad_token_id=0)
    return LlamaForSequenceClassification(config).eval()


def gpt2(seed: int = 0, width: int = 64) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(_gpt2_config(width)).eval()


def gpt2_classifier(seed: int = 0, width: int = 64, labels: int = 3) -> GPT2ForSequenceClassification:
    torch.manual_seed(seed)
    return GPT2ForSequenceClassification(_gpt2_config(width, num_labels=labels, pad_token_id=0)).eval()


def bert_classifier(seed: int = 0, width: int = 64, labels: int = 3) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=257,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=3 * width,
        max_position_embeddings=256,
        num_labels=labels,
        pad_token_id=0,
    )
    return BertForSequenceClassification(config).eval()


def _gpt2_config(width: int, **config: Any) -> GPT2Config:
    return GPT2Config(
        vocab_size=257,
        n_embd=width,
        n_layer=2,
        n_head=2,
        n_positions=256,
        bos_token_id=0,
        eos_token_id=0,
        **config,
    )


def taught(model: Any, texts: list[str], steps: int = 60) -> Any:
    """The model after some steps on whole texts: one that knows something, and can lose it."""
    tokenizer = byte_tokenizer()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


def save(model: Any, directory: Path) -> Path:
    """Write model and tokenizer as a Hugging Face directory."""
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def _llama_shape(width: int) -> dict[str, Any]:
    return {
        "vocab_size": 257,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
