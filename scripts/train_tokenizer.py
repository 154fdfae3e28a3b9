"""Train a SentencePiece tokenizer on a data set's training part.

python scripts/train_tokenizer.py out=code.model vocab_size=4096 data.source=stdlib
python scripts/train.py data=stdlib data.tokenizer=code.model
"""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from mtp.documents import DataConfig, iter_documents
from mtp.tokenizer import train_sentencepiece
from scripts.cli import launch


@dataclass
class TokenizerConfig:
    out: str = MISSING  # a new .model file
    vocab_size: int = 4096
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        if Path(self.out).suffix != ".model" or not Path(self.out).parent.is_dir():
            raise ValueError(f"out={self.out!r}: give a .model file in a folder that exists")
        if Path(self.out).exists():
            raise ValueError(f"out={self.out!r}: exists already and is not overwritten")


def train_tokenizer(config: TokenizerConfig) -> None:
    texts = (document.text for document in iter_documents(config.data, held_out=False))
    tokenizer = train_sentencepiece(texts, Path(config.out), config.vocab_size)
    print(f"written: {config.out}, {tokenizer.vocab_size} pieces")


if __name__ == "__main__":
    launch("train_tokenizer", TokenizerConfig, train_tokenizer)
