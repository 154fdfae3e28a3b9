"""A training loop in the manner of nanoGPT: a token array, a loop, and a loss over n future tokens.

python scripts/examples/nano_loop.py --steps 500
python scripts/examples/nano_loop.py --source text --path book.txt
"""

import argparse
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mtp import ModelConfig, OwnHeads, Request, Transformer, generate, mtp_loss
from mtp.data import load_corpora
from mtp.documents import DataConfig
from mtp.tokenizer import load_tokenizer


def get_batch(tokens: np.ndarray, rows: int, width: int, device: torch.device) -> Tensor:
    """Rows (B, T + n) from anywhere in an array of ids, in memory or an `np.memmap`."""
    starts = torch.randint(len(tokens) - width + 1, (rows,)).tolist()
    row = np.stack([tokens[i : i + width] for i in starts]).astype(np.int64)
    return torch.from_numpy(row).to(device)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 20) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / warmup) * (0.1 + 0.9 * cosine)


def train(
    model: nn.Module,
    tokens: np.ndarray,
    held_out: np.ndarray,
    width: int,
    steps: int,
    rows: int = 8,
    lr: float = 1e-3,
) -> None:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        loss, _ = mtp_loss(model, get_batch(tokens, rows, width, device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            with torch.no_grad():
                _, loss_per_head = mtp_loss(model, get_batch(held_out, 8 * rows, width, device))
            per_head = " ".join(f"{x:.2f}" for x in loss_per_head.tolist())
            print(f"step {step}: loss {loss:.2f}, held out per head {per_head}")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--n", type=int, default=4, help="future tokens")
    parser.add_argument("--source", default="stdlib", help="stdlib, text, jsonl or parquet")
    parser.add_argument("--path", help="its file or folder")
    args = parser.parse_args(words)
    corpora = load_corpora(DataConfig(args.source, args.path), load_tokenizer("bytes"))
    tokens, held_out = (np.asarray(corpus.tokens) for corpus in corpora)
    model = Transformer(ModelConfig(dim=128, n_layers=6, n_future_tokens=args.n))
    train(model, tokens, held_out, 128 + args.n, args.steps)
    done = generate(model, [Request(list(b"def "), max_new_tokens=80)], OwnHeads())[0]
    print(bytes(i for i in done.tokens if i < 256).decode(errors="replace"))
    print(f"{done.mean_acceptance_length:.2f} tokens per step")


if __name__ == "__main__":
    main()
