"""Make ``tests/assets/tiny_olmo``: a one-million-parameter OLMo, trained from scratch, in the Hugging Face layout.

    python tests/assets/make_tiny_olmo.py [--steps 1200] [--out tests/assets/tiny_olmo]

It is trained with plain ``transformers`` and ``torch``, without the package under test, so that what the tests compare
with does not come from the code that they test. The text is the ``pretrain`` split of the Python standard library
(:mod:`flame_ext.data.python_stdlib`), read from the interpreter that runs this script; the tokenizer is byte-level. The
vocabulary is padded beyond the tokenizer's, as in the real OLMo-1B, whose input and output embeddings are tied as well.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import OlmoConfig, OlmoForCausalLM, PreTrainedTokenizerFast

from flame_ext.data.python_stdlib import read_stdlib

EOS, PAD = "<|endoftext|>", "<|padding|>"
SEQ_LEN, BATCH, PEAK_LR, WARMUP = 256, 32, 3e-3, 50


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte, an end-of-text and a padding token; no merges, no BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([EOS, PAD, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, model_max_length=512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny_olmo")
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = OlmoForCausalLM(
        OlmoConfig(
            vocab_size=264,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.02,
        )
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

    documents = tokenizer([text + EOS for text in read_stdlib("pretrain")])["input_ids"]
    stream = torch.tensor([token for document in documents for token in document])
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)
    begin = time.monotonic()
    for step in range(args.steps):
        warm, progress = min(1.0, (step + 1) / WARMUP), step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        starts = torch.randint(len(stream) - SEQ_LEN, (BATCH,))
        input_ids = torch.stack([stream[s : s + SEQ_LEN] for s in starts])
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step} loss {loss.item():.4f} ({time.monotonic() - begin:.0f} s)", flush=True)

    # bfloat16, like most published checkpoints: half the size, and every reader has a cast to get right.
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
