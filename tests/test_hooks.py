"""What happens beside training: logs that can be trusted, samples on time, figures in units."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny

from mtp.hooks import (
    JsonlLog,
    Samples,
    TensorBoard,
    Utilisation,
    WeightsAndBiases,
    console,
    peak_flops,
    read_jsonl,
)
from mtp.tokenizer import ByteTokenizer
from mtp.train import Progress


def test_metrics_past_the_resumed_step_and_half_lines_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    JsonlLog(file, resumed_at=2)(Progress(tiny(), step=3, metrics={"new": 1.0}))
    assert [line["step"] for line in read_jsonl(file)] == [1, 2, 3]
    assert list(read_jsonl(file))[-1]["new"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_of_an_earlier_run_are_dropped_by_a_new_one(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n')
    JsonlLog(file)
    assert file.read_text() == ""


def test_console_shows_losses_time_left_and_validation(caplog):
    caplog.set_level(logging.INFO)
    heads = {"loss_1": 1.25, "loss_2": 2.5, "tokens_per_second": 1234.0}
    held_out = {"val_loss_1": 1.0, "val_bits_per_byte_1": 3.25, "val_acceptance_length": 2.75}
    console(Progress(tiny(), step=7, seconds=60.0, done=0.5, metrics=heads | held_out))
    console(Progress(tiny(), step=8))
    first, second = caplog.messages
    assert all(word in first for word in ("7", "50%", "1.25 2.50", "1,234 tokens/s", "1:00 left"))
    assert "3.25" in second and "2.75" in second


def test_console_calls_terms_that_are_no_heads_by_their_names(caplog):
    caplog.set_level(logging.INFO)
    terms = {"loss_consistency": 0.0125, "loss_autoregressive": 1.5, "tokens_per_second": 1.0}
    console(Progress(tiny(), step=7, seconds=60.0, done=0.5, metrics=terms))
    assert "  loss consistency 0.013, autoregressive 1.500  " in caplog.messages[0]


def test_tensorboard_gets_every_metric(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    hook = TensorBoard(tmp_path)
    hook(Progress(tiny(), step=3, metrics={"loss_1": 2.5, "lr": 0.5}))
    hook.writer.close()
    (file,) = tmp_path.iterdir()
    events = [event for event in EventFileLoader(str(file)).Load() if event.summary.value]
    assert [(event.step, event.summary.value[0].tag) for event in events] == [
        (3, "loss_1"),
        (3, "lr"),
    ]


def sampled(caplog, prompt="ab", seconds=(0.0,), context=96, **timing):
    caplog.set_level(logging.INFO)
    model = tiny(vocab_size=257, max_seq_len=context)
    hook = Samples(ByteTokenizer(), prompt, **({"every": 30.0, "new_tokens": 5} | timing))
    for now in seconds:
        hook(Progress(model, seconds=now))
    return caplog.messages


def test_samples_come_when_they_are_due(caplog):
    times = (0.0, 9.9, 10.0, 39.9, 40.5, 70.0, 71.0)
    assert len(sampled(caplog, seconds=times, every=30.0)) == 3  # at 10, 40.5 and 71


@pytest.mark.parametrize(("prompt", "context"), [("ab", 6), ("a" * 50, 8), ("", 8)])
def test_samples_fit_any_context(caplog, prompt, context):
    messages = sampled(caplog, prompt, context=context, first=0.0, new_tokens=120)
    assert len(messages) == 1 and f"{prompt}⟶" in messages[0]


def used(monkeypatch, device_name=None, precision="bfloat16"):
    """Metrics that a step of 1,000 tokens/s of 2 MFLOP leaves, on a CPU or a GPU of this name."""
    progress = Progress(tiny(), step=3, metrics={"tokens_per_second": 1000.0})
    if device_name:
        weight = SimpleNamespace(device=torch.device("cuda:0"))
        progress.model = SimpleNamespace(parameters=lambda: iter([weight]))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: device_name)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    Utilisation(2e6, precision)(progress)
    return progress.metrics


def test_utilisation_is_model_operations_over_the_devices_peak(monkeypatch):
    found = used(monkeypatch, "NVIDIA H100 80GB HBM3")
    assert found["model_tflops"] == pytest.approx(2e-3)
    assert found["mfu"] == pytest.approx(2e9 / 989e12)
    assert found["memory_gib"] == 3


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA T4", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name, peak, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "precision"), [(None, "bfloat16"), ("Unheard", "bfloat16"), ("H100", "float32")]
)
def test_no_share_of_a_peak_that_is_not_known(name, precision, monkeypatch):
    found = used(monkeypatch, name, precision)
    assert "mfu" not in found and found["memory_gib"] > 0.01


def test_steps_that_log_nothing_stay_empty():
    progress = Progress(tiny(), step=3)
    Utilisation(2e6, "float32")(progress)
    assert progress.metrics == {}


def test_weights_and_biases_gets_every_metric(monkeypatch, tmp_path):
    said = []
    run = SimpleNamespace(log=lambda metrics, step: said.append((step, metrics)))
    fake = SimpleNamespace(init=lambda **kwargs: said.append(kwargs) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    hook = WeightsAndBiases("project", tmp_path, {"a": 1})
    hook(Progress(tiny(), step=3, metrics={"loss_1": 2.5}))
    hook(Progress(tiny(), step=4))
    assert said[0]["project"] == "project" and said[0]["config"] == {"a": 1}
    assert said[1:] == [(3, {"loss_1": 2.5})]


def test_what_is_not_installed_is_one_message(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="wandb=PROJECT needs: pip install wandb"):
        WeightsAndBiases("project", tmp_path, {})
