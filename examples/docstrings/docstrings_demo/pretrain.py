"""The base model: byte-level BPE and a small Llama-shaped model, trained on public docstrings alone.

Runs as a Job in the hub's namespace, in a pod of the worker image: `python -m docstrings_demo.pretrain`.
Pushes the model as a bundle and prints its reference as the last line. The same image gives the same model.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from docstrings_demo import corpus
from docstrings_demo.podtasks import PretrainTask, read_task, say
from tributary_store import bundle
from tributary_store.objectstore import ObjectStore

SEED = 20240229
VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
STEPS = 240
"""A pass and a quarter over the corpus, about 3 minutes on two cores."""
BATCH_WINDOWS = 16
WINDOW_TOKENS = 128
WARMUP_STEPS = 30
LEARNING_RATE_MAX = 3e-3
LEARNING_RATE_MIN = 3e-4
PROGRESS_EVERY_STEPS = 20


def main() -> None:
    task = read_task(PretrainTask)
    torch.manual_seed(SEED)
    texts = corpus.standard_library()
    tokenizer = trained_tokenizer(texts)
    model = trained_model(tokenizer, texts)
    with tempfile.TemporaryDirectory() as folder:
        save(model, tokenizer, Path(folder))
        ref = bundle.push(
            ObjectStore.open(task.store), Path(folder), task.models_uri, description="docstrings"
        )
    say(model=ref.to_json_object())


def trained_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text can be spelled, so there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def small_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """5.07 M parameters, a fifth of them in the embedding, which is also the output layer."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def trained_model(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> LlamaForCausalLM:
    """AdamW over random windows of the corpus, warm-up and cosine decay."""
    model = small_llama(tokenizer)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    started = time.monotonic()
    for step, batch in enumerate(windows(corpus_tokens(tokenizer, texts), STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % PROGRESS_EVERY_STEPS == 0:
            say(
                step=step + 1,
                steps=STEPS,
                loss=round(loss.item(), 3),
                seconds=round(time.monotonic() - started),
            )
    return model.eval()


def corpus_tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All documents in one row, (tokens,), each followed by the end-of-text token."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in encoded for token in (*row, tokenizer.eos_token_id)])


def windows(tokens: Tensor, steps: int) -> Iterator[Tensor]:
    """Batches (BATCH_WINDOWS, WINDOW_TOKENS) at random places."""
    for _ in range(steps):
        starts = torch.randint(len(tokens) - WINDOW_TOKENS, (BATCH_WINDOWS, 1))
        yield tokens[starts + torch.arange(WINDOW_TOKENS)]


def learning_rate(step: int) -> float:
    if step < WARMUP_STEPS:
        return LEARNING_RATE_MAX * (step + 1) / WARMUP_STEPS
    turn = math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    return LEARNING_RATE_MIN + (LEARNING_RATE_MAX - LEARNING_RATE_MIN) * (1 + math.cos(turn)) / 2


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
