"""Multi-token prediction in PyTorch. The public names; import anything else from its module."""

from mtp.checkpoint import load, load_tokenizer, save
from mtp.decode.contract import Completion, Request, stop_at
from mtp.decode.drafters import OwnHeads
from mtp.decode.loop import generate
from mtp.decode.sampling import Sampling
from mtp.loss import MultiTokenLoss, mtp_loss
from mtp.model import ModelConfig, Transformer

__version__ = "0.1.0"
__all__ = [
    "Completion",
    "ModelConfig",
    "MultiTokenLoss",
    "OwnHeads",
    "Request",
    "Sampling",
    "Transformer",
    "generate",
    "load",
    "load_tokenizer",
    "mtp_loss",
    "save",
    "stop_at",
]
