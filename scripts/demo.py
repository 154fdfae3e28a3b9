"""The main job in one command (`make demo`): train, save, load, decode with the model's own heads.

Trains what configs/experiment/demo.yaml says, then completes held-out prompts autoregressively and
self-speculatively and leaves in run_dir: checkpoints/, metrics.jsonl, loss.png, heads.html and
summary.json. Words like train.steps=100 override the configuration.
"""

import functools
import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import OmegaConf

import mtp
from benchmarks.demo_decode import DecodeConfig, Decoded, held_out_prompts, measure
from benchmarks.pictures import heads_page, loss_curve
from benchmarks.record import circumstances
from benchmarks.timing import seconds
from mtp.documents import load_documents
from mtp.hooks import read_jsonl
from mtp.overlap import ngram_overlap
from mtp.run import RunConfig, run
from mtp.train import PRECISIONS, Progress
from scripts.cli import CONFIGS, register

BUDGET = 480  # seconds for everything, installation included
AFTER_TRAINING = 110  # of these, kept for loading, validation and decoding
log = logging.getLogger("mtp")


def compose(words: list[str]) -> RunConfig:
    register("train", RunConfig)
    with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
        config = OmegaConf.to_object(hydra.compose("train", overrides=["experiment=demo", *words]))
    assert isinstance(config, RunConfig)
    return config


def main(words: list[str]) -> None:
    """started=EPOCH, when the command began, lets the time of the installation count."""
    if {"-h", "--help"} & set(words):
        sys.exit(__doc__)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr, force=True)
    started = next((float(w.split("=")[1]) for w in words if w.startswith("started=")), time.time())
    config = compose([word for word in words if not word.startswith("started=")])
    folder = Path(config.run_dir)
    if folder == Path("runs/demo") and folder.exists():
        shutil.rmtree(folder)  # an earlier demo's own folder: this one starts anew
    training, held_out = load_documents(config.data)
    overlap = ngram_overlap([d.text for d in training], [d.text for d in held_out])
    log.info("%d files to train on, %d held out", len(training), len(held_out))
    log.info("%.1f %% of the held-out 13-grams occur in the training part", 100 * overlap)
    left = BUDGET - AFTER_TRAINING - (time.time() - started)
    config.train.max_seconds = max(60.0, min(config.train.max_seconds or left, left))
    if not any(word.startswith("train.precision=") for word in words):
        config.train.precision = faster_precision()
    progress = run(config, hooks=[BestThreads()])
    assert progress is not None
    if progress.stopped:
        raise KeyboardInterrupt
    model, tokenizer = mtp.load(folder), mtp.load_tokenizer(folder)
    decoding = DecodeConfig()
    prompts = held_out_prompts(held_out, tokenizer, decoding.prompts, decoding.prompt_tokens)
    log.info("%d held-out prompts: plainly, with heads, and the plainest loop", len(prompts))
    figures, done = measure(model.packed(), prompts, decoding, report=said)
    summary = {
        "params": sum(p.numel() for p in model.parameters()),
        "train_tokens": progress.tokens,
        "train_seconds": progress.seconds,
        "train_precision": config.train.precision,
        "val_bits_per_byte": [v for k, v in progress.metrics.items() if "bits_per_byte" in k],
        "acceptance_length_text": progress.metrics["val_acceptance_length"],
        "held_out_13gram_overlap": overlap,
        **figures,
        **circumstances(),
    }
    pictures(folder, in_words(summary), [(tokenizer.decode(d.prompt), d.drafted) for d in done])
    summary["total_seconds"] = time.time() - started
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(table(summary), in_words(summary), sep="\n\n")
    print(f"\nLook at {folder}/heads.html and {folder}/loss.png.")


def faster_precision() -> str:
    """bfloat16 where the processor multiplies it in hardware, half as fast again as float32;
    elsewhere it is emulated, and many times slower. Weights and decoding stay float32.
    """
    taken = {}
    for name, dtype in PRECISIONS.items():
        x, w = torch.ones(1024, 96, dtype=dtype), torch.ones(512, 96, dtype=dtype)
        multiply = functools.partial(torch.nn.functional.linear, x, w)
        taken[name] = min(seconds(multiply, times=10) for _ in range(5))
    return min(taken, key=lambda name: taken[name])


class BestThreads:
    """A hook: on a busy machine all threads can be far slower than one, so keep trying both."""

    def __init__(self, every: int = 50) -> None:
        self.choices = (1, torch.get_num_threads())
        self.seconds: dict[int, float] = {}
        self.every, self.before = every, 0.0

    def __call__(self, progress: Progress) -> None:
        threads = torch.get_num_threads()
        self.seconds[threads] = progress.seconds - self.before
        self.before = progress.seconds
        others = [choice for choice in self.choices if choice != threads]
        if progress.step % self.every == 0 and others:
            torch.set_num_threads(others[0])
        else:
            torch.set_num_threads(min(self.seconds, key=lambda choice: self.seconds[choice]))


def said(done: Decoded) -> None:
    log.info(
        "   plainly %.2f s, drafted %.2f s, accepted %.2f per step",
        done.plain_seconds,
        done.drafted_seconds,
        done.drafted.mean_acceptance_length,
    )


def pictures(folder: Path, sentence: str, shown: list[tuple[str, mtp.Completion]]) -> None:
    def visible(token: int) -> str:
        return chr(token) if 32 <= token < 127 or token == 10 else "·"

    loss_curve(list(read_jsonl(folder / "metrics.jsonl")), folder / "loss.png")
    title = "Who guessed what: self-speculative decoding"
    heads_page(title, sentence, shown, visible, folder / "heads.html")


def in_words(f: dict[str, Any]) -> str:
    tokens, accepted = len(f["acceptance"]) + 1, f["mean_acceptance_length"]
    verdict = f"{f['speedup']:.2f} times " + ("faster" if f["speedup"] > 1 else "as fast: no gain")
    same = "the same text" if f["identical"] else "OTHER TEXT, which is a bug"
    return (
        f"Verifying {tokens} tokens costs {f['verify_cost']:.2f} plain steps here and "
        f"{accepted:.2f} are accepted per step, so decoding with the model's own heads is "
        f"{verdict} and gives {same}."
    )


def table(s: dict[str, Any]) -> str:
    low, high = s["speedup_of_prompts_iqr"]
    rows = {
        "parameters": f"{s['params'] / 1e6:.2f} M",
        "trained on": f"{s['train_tokens'] / 1e6:.2f} MB in {s['train_seconds']:.0f} s",
        "bits per byte, held out, heads 1..n": " ".join(f"{b:.2f}" for b in s["val_bits_per_byte"]),
        "acceptance length, teacher-forced": f"{s['acceptance_length_text']:.2f}",
        f"acceptance length, temperature {s['temperature']}": f"{s['mean_acceptance_length']:.2f}",
        "repeated 16-grams in that text": f"{s['repetition']:.0%}",
        "the same two for greedy text": "{mean_acceptance_length:.2f} and {repetition:.0%}".format(
            **s["greedy"]
        ),
        "accepted at each depth": " ".join(f"{a:.2f}" for a in s["acceptance"]),
        "cost of a verifying step, in plain steps": f"{s['verify_cost']:.2f}",
        "speedup": f"{s['speedup']:.2f} (quartiles of prompts {low:.2f}, {high:.2f})",
        "our plain decoding / the plainest loop": f"{s['ar_over_bare_loop']:.2f}",
        "text identical": str(s["identical"]),
        "all in all": f"{s['total_seconds']:.0f} s",
    }
    return "\n".join(f"{name:<42} {value}" for name, value in rows.items())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("the demo was stopped; `make demo` starts it anew")
