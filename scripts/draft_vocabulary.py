"""Write down the tokens that heads are to guess, the most frequent ones of a corpus:

python scripts/draft_vocabulary.py checkpoint=FOLDER out=runs/frequent.json count=8192 data=stdlib
python scripts/generate.py checkpoint=FOLDER drafter=heads vocabulary=runs/frequent.json ...

`out` is a JSON list of ids. Heads that score fewer tokens draft faster, and miss the others.
"""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from mtp.data import frequent_tokens, load_corpus, write_vocabulary
from mtp.documents import DataConfig
from mtp.interop.folder import find_model
from scripts.cli import launch


@dataclass
class VocabularyConfig:
    """data.tokenizer is the model's own, and stays unsaid."""

    checkpoint: str = MISSING  # a run, a checkpoint or a Hugging Face folder: for its tokenizer
    out: str = MISSING
    count: int = 8192
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count={self.count} must be at least 1")


def draft_vocabulary(config: VocabularyConfig) -> None:
    tokenizer = find_model(config.checkpoint, special=False).tokenizer
    ids = frequent_tokens(load_corpus(config.data, tokenizer, held_out=False), config.count)
    write_vocabulary(Path(config.out), ids)
    print(f"written: {config.out}, {len(ids)} of {tokenizer.vocab_size} tokens")


if __name__ == "__main__":
    launch("draft_vocabulary", VocabularyConfig, draft_vocabulary)
