"""Heads for future tokens on a Hugging Face causal language model, behind the contract of
`mtp.Transformer`: the same `mtp_loss(model, row, n_future_tokens=n)` trains both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mtp.heads import HEADS
from mtp.loss import Score


class AttachedHeads(nn.Module):
    """`causal_lm` keeps its trunk and its unembedding, which all heads share. Fresh heads predict
    what the model does: residual head 1 is the model itself, the others start as copies of it.

    Nothing but the unembedding's matrix may stand between trunk and logits, as in Llama, Mistral
    or Qwen: no bias, scaling or capping. Under FSDP2 the unembedding belongs to the outermost unit.
    """

    def __init__(self, causal_lm: Any, n_future_tokens: int, head: str = "residual") -> None:
        super().__init__()
        if head not in ("linear", "residual"):
            raise ValueError(f"head={head!r} cannot be attached: allowed are linear, residual")
        self.causal_lm, self.n_future_tokens = causal_lm, n_future_tokens
        weight_VD = causal_lm.get_output_embeddings().weight
        heads = HEADS[head].build(n_future_tokens, weight_VD.shape[1], nn.Identity, nn.Identity)
        for module in heads.modules():
            if isinstance(module, nn.Linear):
                zero = getattr(module, "starts_at_zero", False)
                (nn.init.zeros_ if zero else nn.init.eye_)(module.weight)
        self.heads = heads.to(weight_VD)

    def forward(self, row: Tensor, score: Score, cut: str = "auto") -> Any:
        """Rows (B, T + n) -> what score(fns, inputs, weights, params) returns for the first T
        positions. The cut is at the latents, whatever `cut` says: before so small heads it would
        save nothing.
        """
        n = self.n_future_tokens
        z = self.causal_lm.base_model(input_ids=row[:, :-n], use_cache=False).last_hidden_state
        embedding = self.causal_lm.get_input_embeddings()
        first, memo = self.heads.next(z, None, None, ())
        rest = self.heads.rest(memo, lambda j: embedding(row[:, j : j - n]), None, None, (), n)
        latents = [first, *rest]
        weight_VD = self.causal_lm.get_output_embeddings().weight
        return score([lambda latent: latent] * n, latents, [weight_VD], ())
