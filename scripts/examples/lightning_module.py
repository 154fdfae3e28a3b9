"""The loss inside a Lightning module, on our model or on a causal LM with attached heads.

python scripts/examples/lightning_module.py --model llama --steps 200

Needs `pip install -e ".[examples]"`.
"""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mtp import mtp_loss
from scripts.examples.setting import read


class MultiTokenModule(pl.LightningModule):
    """Batches are rows of T + n ids, (B, T + n)."""

    def __init__(
        self, model: nn.Module, n_future_tokens: int, steps: int, lr: float = 1e-3
    ) -> None:
        super().__init__()
        self.model, self.n_future_tokens = model, n_future_tokens
        self.steps, self.lr = steps, lr

    def training_step(self, row: Tensor, index: int) -> Tensor:
        loss, loss_per_head = mtp_loss(self.model, row, n_future_tokens=self.n_future_tokens)
        self.log_dict({f"loss_{i}": x for i, x in enumerate(loss_per_head, 1)}, prog_bar=True)
        return loss

    def validation_step(self, row: Tensor, index: int) -> None:
        loss, _ = mtp_loss(self.model, row, n_future_tokens=self.n_future_tokens)
        self.log("val_loss", loss, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]


def main(words: Sequence[str] | None = None) -> None:
    setting = read(words)
    trainer = pl.Trainer(
        max_steps=setting.steps,
        gradient_clip_val=1.0,
        val_check_interval=min(50, setting.steps),
        limit_val_batches=8,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(
        MultiTokenModule(setting.model, setting.n_future_tokens, setting.steps),
        # A tensor has a length and items: all that a data set needs.
        DataLoader(setting.rows, batch_size=8, shuffle=True),  # type: ignore[arg-type]
        DataLoader(setting.held_out, batch_size=8),  # type: ignore[arg-type]
    )


if __name__ == "__main__":
    main()
