"""Writes one small file of every format that a release promises to read again:

    python tests/files/make.py FOLDER

Run it at a release whose formats changed and keep the folder as it comes; `test_formats.py` reads
all of them. `expected.json` says what was written, in plain numbers.
"""

import json
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.record import record
from mtp import ModelConfig, Request, Transformer
from mtp.checkpoint import TrainingState, fingerprint, save
from mtp.consistency.files import Origin, collect_shards, read_trajectories
from mtp.consistency.filters import FilterConfig
from mtp.data import Batches, load_corpus
from mtp.documents import DataConfig
from mtp.evaluate.samples import Sample, SampleFile
from mtp.interop.attach import attach_heads, save_heads
from mtp.loss import MultiTokenLoss
from mtp.shards import prepare_shards
from mtp.tokenizer import ByteTokenizer
from mtp.train import TrainConfig, train

TOKENS = [list(b"one two")]
SIZES = {"dim": 4, "n_layers": 3, "n_heads": 1, "n_future_tokens": 2, "multiple_of": 4}


def tell(tensor):
    return [round(x, 6) for x in tensor.detach().flatten().tolist()]


def main(out):
    tokenizer, expected = ByteTokenizer(), {}
    with TemporaryDirectory() as raw:
        rng = random.Random(0)
        texts = [" ".join(rng.choices(["one", "two", "three"], k=8)) for _ in range(12)]
        (Path(raw) / "text.txt").write_text("\n".join(texts))
        config = DataConfig("lines", path=raw + "/text.txt", val_fraction=0.25)
        prepare_shards(config, out / "shards", shard_tokens=200)
    shards = DataConfig("shards", path=str(out / "shards"))
    corpora = [load_corpus(shards, tokenizer, held_out) for held_out in (False, True)]
    expected["shards"] = [[len(c.tokens), len(c.ends), c.n_bytes, c.fingerprint] for c in corpora]

    sizes = ModelConfig(**SIZES, tie_embeddings=True, max_seq_len=64)
    model = Transformer(sizes, torch.Generator().manual_seed(0))
    batches = Batches(corpora[0], 16, 2, 2)

    def keep(progress, optimizer):
        counters = progress.counters() | {"data": batches.state_dict()}
        training = TrainingState(counters, optimizer.state_dict())
        save(model, out / "checkpoint", tokenizer, training, {"made": "by make.py"})

    train(model, batches, MultiTokenLoss(2), TrainConfig(steps=2, log_every=1), save=keep)
    logits = model(torch.tensor(TOKENS), return_all_heads=True)[0, -1, :, :8]
    expected["logits"] = tell(logits)
    expected["tokens_read"] = 2 * 2 * 16

    attached = attach_heads(model, 3, "residual")
    with torch.no_grad():
        for parameter in attached.heads.parameters():
            parameter.fill_(0.5)
    save_heads(attached, out / "heads")

    requests = [Request(tokenizer.encode(text), 6) for text in ("one", "two t")]
    origin = Origin(tokenizer.fingerprint, fingerprint(out / "checkpoint"), 3, {"by": "make.py"})
    collect_shards(out / "trajectories", model, requests, origin, tokenizer, FilterConfig())
    read = read_trajectories(out / "trajectories", tokenizer.fingerprint, 3, out / "checkpoint")
    expected["responses"] = [t.response for t in read]

    sample = Sample("task/1", 0, 7, "ab12", "return x\n", "passed", {"steps": 3})
    SampleFile(out / "samples.jsonl", {"model": "m"}).append(sample)
    expected["run"], expected["sample"] = {"model": "m"}, vars(sample)

    record("record", {"speedup": 1.5}, folder=out)
    expected["values"] = {"speedup": 1.5}
    (out / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
