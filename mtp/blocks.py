"""What is done to a model's blocks from outside, one by one: compiled, or run again in backward.

Both change a block in place and keep the names of its parameters. Before `mtp.distributed.shard`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

log = logging.getLogger("mtp")


def recompute_blocks(blocks: Iterable[nn.Module]) -> None:
    """Keep a block's input only and run it again in backward (activation checkpointing, Chen et al.
    2016): a block's activations at a time, for one more forward of each.
    """
    for block in blocks:
        # Blocks draw no random numbers, so there is no state to keep.
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def compile_blocks(blocks: Iterable[nn.Module], device: torch.device) -> bool:
    """torch.compile; warn and go on without (False) where no compiler works."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # whatever a missing or broken tool chain raises
        log.warning(
            "torch.compile does not work here, training goes on without it (%s)",
            (str(error) or repr(error)).splitlines()[0],
        )
        torch._dynamo.reset()
        return False
    for block in blocks:
        block.compile()
    return True
