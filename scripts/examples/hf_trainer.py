"""The loss inside a Hugging Face `Trainer`, on our model or on a causal LM with attached heads.

python scripts/examples/hf_trainer.py --model llama --steps 200

Needs `pip install -e ".[examples]"`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from mtp import mtp_loss
from scripts.examples.setting import read


class MultiTokenTrainer(Trainer):
    """Its data sets are rows of T + n ids. TrainingArguments(label_names=["row"]) tells it that
    there is a loss to evaluate.
    """

    # A mean over a micro-batch: the Trainer divides it by the number of micro-batches.
    loss_is_scaled_for_ga = False

    def __init__(self, n_future_tokens: int, **words: Any) -> None:
        super().__init__(data_collator=lambda rows: {"row": torch.stack(rows)}, **words)
        self.n_future_tokens = n_future_tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        loss, loss_per_head = mtp_loss(model, inputs["row"], n_future_tokens=self.n_future_tokens)
        return (loss, {"loss_per_head": loss_per_head}) if return_outputs else loss


def main(words: Sequence[str] | None = None) -> None:
    setting = read(words)
    arguments = TrainingArguments(
        "runs/hf_trainer",
        max_steps=setting.steps,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=min(50, setting.steps),
        label_names=["row"],
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = MultiTokenTrainer(
        setting.n_future_tokens,
        model=setting.model,
        args=arguments,
        train_dataset=setting.rows,
        eval_dataset=setting.held_out[:64],
    )
    trainer.train()


if __name__ == "__main__":
    main()
