"""The loss inside loops of others: each example learns, through every parameter, and runs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from mtp import ModelConfig, Transformer, mtp_loss
from scripts.examples import nano_loop
from scripts.examples.attached_heads import AttachedHeads

N, LENGTH, VOCAB, STEPS = 3, 16, 31, 40
TEXT = torch.arange(2000).square() % VOCAB  # two tokens tell the next
ROWS = TEXT.unfold(0, LENGTH + N, LENGTH)


def transformer():
    shape = {"dim": 32, "n_layers": 4, "n_heads": 2, "multiple_of": 8}
    config = ModelConfig(n_future_tokens=N, vocab_size=VOCAB, **shape)
    return Transformer(config, torch.Generator().manual_seed(0))


def llama(head="residual", **words):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(vocab_size=VOCAB, num_attention_heads=2, **shape, **words)
    return AttachedHeads(transformers.LlamaForCausalLM(config), N, head)


# Lightning asks torch about its trees in a way that torch will drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning:pytorch_lightning")
BOTH = pytest.mark.parametrize("build", [transformer, llama])


def losses(model):
    return mtp_loss(model, ROWS, n_future_tokens=N)[1].tolist()


def learns(model, train):
    """train(model) lowers every head's loss, and gradients reach every parameter."""
    before, reached = losses(model), set()
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(
            lambda p, name=name: reached.add(name) if p.grad.any() else None
        )
    train(model)
    assert all(now < 0.8 * then for now, then in zip(losses(model), before, strict=True))
    assert reached == {name for name, _ in model.named_parameters()}


@pytest.fixture
def book(tmp_path, monkeypatch):
    """Words for a command line; what the command leaves behind goes with the test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("to be, or not to be, that is the question\n" * 500)
    return ["--steps", "2", "--n", "2", "--source", "text", "--path", "book.txt"]


# Heads on a model of another library.


def test_head_1_is_the_model_itself_before_and_after_training():
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        here = ROWS[:, : LENGTH + 1]
        own = model.causal_lm(input_ids=here, labels=here).loss  # shifts labels itself
        loss, loss_per_head = mtp_loss(model, ROWS, n_future_tokens=N)
        assert loss_per_head[0].item() == pytest.approx(own.item(), abs=1e-5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("head", ["residual", "linear"])
@pytest.mark.parametrize("tied", [False, True])
def test_fresh_heads_predict_what_the_model_does(head, tied):
    model = llama(head, tie_word_embeddings=tied)
    with torch.no_grad():
        logits = model.causal_lm(ROWS[:, :LENGTH]).logits
    for i, loss in enumerate(losses(model), 1):
        target = ROWS[:, i : LENGTH + i]
        assert loss == pytest.approx(float(F.cross_entropy(logits.mT, target)), abs=1e-5)


def test_heads_take_the_type_of_the_model_they_are_attached_to():
    causal_lm = llama().causal_lm.to(torch.bfloat16)
    assert {p.dtype for p in AttachedHeads(causal_lm, N).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("head", ["transformer", "medusa"])
def test_heads_of_blocks_are_not_attached(head):
    with pytest.raises(ValueError, match=f"head='{head}' .*: allowed are linear, residual"):
        llama(head)


# A plain loop.


def test_the_plain_loop_learns():
    tokens = TEXT.numpy().astype(np.uint16)
    learns(
        transformer(),
        lambda model: nano_loop.train(model, tokens, tokens, LENGTH + N, STEPS, lr=1e-2),
    )


def test_the_plain_loop_reads_arrays_in_memory_and_on_disk_alike(tmp_path):
    tokens = TEXT.numpy().astype(np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    rows = []
    for array in (tokens, np.memmap(tmp_path / "train.bin", np.uint16, mode="r")):
        torch.manual_seed(0)
        rows.append(nano_loop.get_batch(array, 4, 10, "cpu"))
    assert torch.equal(*rows)
    assert all(row.tolist() in TEXT.unfold(0, 10, 1).tolist() for row in rows[0])


def test_the_plain_loop_runs_from_the_command_line(book, capsys):
    nano_loop.main(book)
    said = capsys.readouterr().out
    assert "step 1: loss" in said and "tokens per step" in said


# Hugging Face's trainer.


def hf_train(model, steps=STEPS, **words):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from scripts.examples.hf_trainer import MultiTokenTrainer

    common = {"label_names": ["row"], "save_strategy": "no", "report_to": "none"}
    quiet = {"disable_tqdm": True, "dataloader_pin_memory": False, "use_cpu": True}
    arguments = transformers.TrainingArguments(
        max_steps=steps, **common, **quiet, **({"learning_rate": 1e-2} | words)
    )
    trainer = MultiTokenTrainer(
        N, model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS
    )
    trainer.train()
    return trainer


@BOTH
def test_the_hugging_face_trainer_learns(build, tmp_path):
    learns(build(), lambda model: hf_train(model, output_dir=str(tmp_path)))


@BOTH
def test_the_hugging_face_trainer_evaluates_the_sum_of_the_heads_losses(build, tmp_path):
    model = build()
    trainer = hf_train(model, 1, output_dir=str(tmp_path), per_device_eval_batch_size=len(ROWS))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses(model)))


@BOTH
@pytest.mark.parametrize("library", ["hugging face", "lightning"])
def test_accumulated_micro_batches_are_one_batch(build, library, tmp_path):
    """Both trainers scale the loss, so gradients must follow: a step on 8 rows is one on 2 x 4."""
    ends = []
    for rows, accumulated in ((8, 1), (4, 2)):
        model = build().double()
        if library == "lightning":
            lightning_train(model, 2, rows, accumulate_grad_batches=accumulated)
        else:
            words = {"optim": "sgd", "output_dir": str(tmp_path), "learning_rate": 0.1}
            words |= {"per_device_train_batch_size": rows}
            hf_train(model, 2, gradient_accumulation_steps=accumulated, **words)
        ends.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-10)


@BOTH
def test_the_hugging_face_trainer_runs_from_the_command_line(build, book, capsys):
    pytest.importorskip("transformers")
    from scripts.examples import hf_trainer

    hf_trainer.main([*book, "--model", build.__name__])
    assert "eval_loss" in capsys.readouterr().out


# Lightning.


def lightning_train(model, steps=STEPS, rows=8, **words):
    pl = pytest.importorskip("pytorch_lightning")
    from scripts.examples.lightning_module import MultiTokenModule

    module = MultiTokenModule(model, N, steps, lr=1e-2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False}
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", **quiet, **words)
    trainer.fit(module, DataLoader(ROWS, rows), DataLoader(ROWS, len(ROWS)))
    return trainer


@BOTH
def test_the_lightning_module_learns(build):
    learns(build(), lightning_train)


@BOTH
def test_the_lightning_module_validates_the_sum_of_the_heads_losses(build):
    model = build()
    said = lightning_train(model, 1, limit_train_batches=1).callback_metrics
    assert float(said["val_loss"]) == pytest.approx(sum(losses(model)))


@BOTH
def test_the_lightning_module_runs_from_the_command_line(build, book, capsys):
    pytest.importorskip("pytorch_lightning")
    from scripts.examples import lightning_module

    lightning_module.main([*book, "--model", build.__name__])
    assert "val_loss" in capsys.readouterr().out
