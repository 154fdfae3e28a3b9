"""Multi-token prediction in PyTorch. The public names; import anything else from its module."""

from mtp.checkpoint import load, load_tokenizer, save
from mtp.decode.contract import Completion, Request, cut_at, stop_at, stop_at_text
from mtp.decode.depth import AdaptiveDepth
from mtp.decode.drafters import BeamHeads, BeamModel, DraftModel, OwnHeads, PromptLookup
from mtp.decode.jacobi import Jacobi
from mtp.decode.loop import Decoding, generate
from mtp.decode.sampling import Sampling
from mtp.loss import MultiTokenLoss, mtp_loss
from mtp.model import ModelConfig, Transformer
from mtp.tokenizer import TextStream

__version__ = "0.1.0"
__all__ = [
    "AdaptiveDepth",
    "BeamHeads",
    "BeamModel",
    "Completion",
    "Decoding",
    "DraftModel",
    "Jacobi",
    "ModelConfig",
    "MultiTokenLoss",
    "OwnHeads",
    "PromptLookup",
    "Request",
    "Sampling",
    "TextStream",
    "Transformer",
    "cut_at",
    "generate",
    "load",
    "load_tokenizer",
    "mtp_loss",
    "save",
    "stop_at",
    "stop_at_text",
]
