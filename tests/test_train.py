"""Training: resumed bit for bit, independent of how a batch is split, honest in its figures."""

import json
import math

import pytest
import torch
from conftest import tiny
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mtp import checkpoint
from mtp.data import Batches, Corpus
from mtp.hooks import JsonlLog
from mtp.loss import Batch, MultiTokenLoss, future_targets
from mtp.optim import OptimConfig, Optimizer, schedule
from mtp.records import Document
from mtp.train import Progress, TrainConfig, train, validate

N, SEQ_LEN = 4, 12
TIMES = ("tokens_per_second", "step_seconds", "data_wait")  # metrics that differ from run to run


class Letters:
    """a..l are the ids 0..11, 12 ends a document: small enough for `tiny` models."""

    vocab_size, end_id, fingerprint = 13, 12, "letters"

    def encode(self, text):
        return [ord(letter) - 97 for letter in text]


def batches(batch_size=2, *, epochs=None, lengths=(3, 30, 7, 50, 1, 22), repetitive=False):
    generator = torch.Generator().manual_seed(0)

    def text(length):
        random = torch.randint(12, (length,), generator=generator)
        ids = torch.arange(length) % 5 if repetitive else random
        return "".join(chr(97 + i) for i in ids.tolist())

    documents = [Document(((text(length), True),)) for length in lengths]
    corpus = Corpus.from_documents(documents, Letters())
    return Batches(corpus, SEQ_LEN, N, batch_size, seed=3, epochs=epochs)


def config(steps=6, **overrides):
    optim = OptimConfig(lr=1e-2, warmup_steps=2)
    return TrainConfig(**({"steps": steps, "log_every": 1, "optim": optim} | overrides))


def fit(model, source, configuration, *, loss=None, **more):
    """Train; -> what hooks saw, one (step, metrics) per step."""
    seen = []

    def note(progress):
        metrics = {k: v for k, v in progress.metrics.items() if k not in TIMES}
        seen.append((progress.step, metrics))

    loss = loss or MultiTokenLoss(N)
    hooks = [note, *more.pop("hooks", ())]
    train(model, source, loss, configuration, hooks=hooks, **more)
    return seen


class Gradients:
    """A context that keeps a copy of every gradient that an optimizer is about to apply."""

    def __enter__(self):
        self.steps = []
        self.handle = register_optimizer_step_pre_hook(self.keep)
        return self

    def keep(self, optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.steps.append([p.grad.clone() for p in parameters])

    def __exit__(self, *_):
        self.handle.remove()


class Recorded:
    """A source that remembers every row it gave."""

    def __init__(self, source):
        self.source, self.rows = source, []
        self.state_dict, self.load_state_dict = source.state_dict, source.load_state_dict

    def __next__(self):
        batch = next(self.source)
        self.rows.append(batch.row.tolist())
        return batch


class Run:
    """One run that saves real checkpoints and ends in `model`, `optimizer`, `seen`, `rows`."""

    def __init__(self, folder, configuration, seed=0, resume_from=None):
        self.model, self.folder = tiny(seed=seed).float(), folder
        self.source = Recorded(batches())
        state = None
        if resume_from is not None:
            checkpoint.load_weights(self.model, resume_from)
            state = checkpoint.load_training(resume_from)
        held_out = [batches(lengths=(40, 9)).__next__()]
        self.seen = fit(
            self.model,
            self.source,
            configuration,
            evaluate=lambda model: validate(model, held_out, N, 1.5),
            save=self.save,
            resume=state,
        )
        self.rows = self.source.rows

    def save(self, progress, optimizer):
        self.optimizer = optimizer.state_dict()
        counters = progress.counters() | {"data": self.source.state_dict()}
        state = checkpoint.TrainingState(counters, self.optimizer)
        checkpoint.save(self.model, self.folder / f"step-{progress.step}", training=state)


def resumable(precision):
    return config(
        accumulation=2, precision=precision, log_every=2, save_every=1, eval_every=3, batch_size=2
    )


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def whole(request, tmp_path_factory):
    """An uninterrupted run with a checkpoint after every step."""
    return Run(tmp_path_factory.mktemp("whole"), resumable(request.param)), request.param


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_resumed_run_ends_like_an_uninterrupted_one_bit_for_bit(whole, cut, tmp_path):
    run, precision = whole
    start = run.folder / f"step-{cut}"
    resumed = Run(tmp_path, resumable(precision), seed=9, resume_from=start)
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert run.optimizer.keys() == resumed.optimizer.keys()
    for name, moment in run.optimizer.items():
        assert torch.equal(moment, resumed.optimizer[name]), name
    assert resumed.seen == run.seen[cut:]
    assert resumed.rows == run.rows[2 * cut :]


def test_metrics_of_a_resumed_run_are_those_of_the_uninterrupted_one_where_logs_are_rarer(tmp_path):
    sparse = config(save_every=3, log_every=2)
    run = Run(tmp_path / "whole", sparse)
    resumed = Run(tmp_path / "half", sparse, seed=9, resume_from=tmp_path / "whole" / "step-3")
    assert [step for step, metrics in run.seen if metrics] == [1, 2, 3, 4, 6]
    assert resumed.seen == run.seen[3:]


# Gradients.


class Given:
    """Batches from a list."""

    def __init__(self, *given):
        self.given = list(given)

    def __next__(self):
        if not self.given:
            raise StopIteration
        return self.given.pop(0)


def gradients(given, accumulation, clip=1e9):
    configuration = config(steps=1, accumulation=accumulation, optim=OptimConfig(clip=clip))
    with Gradients() as gradients:
        seen = fit(tiny(), Given(*given), configuration)
    return gradients.steps[0], seen[0][1]


def uneven_batch():
    """Four packed rows that differ in how many targets are valid."""
    batch = next(batches(batch_size=4))
    keep = batch.keep.clone()
    keep[1, 4:] = keep[3, 8:] = False
    batch = batch._replace(keep=keep)
    counts = future_targets(batch, N)[1].sum((0, 2)).tolist()
    assert len(set(counts)) == 4, "the rows are to differ"
    return batch


@pytest.mark.parametrize("parts", [[1, 1, 1, 1], [3, 1]])
def test_gradients_and_losses_do_not_depend_on_how_a_batch_is_split(parts):
    batch = uneven_batch()
    pieces = zip(*(x.split(parts) for x in batch), strict=True)
    whole, metrics = gradients([batch], 1)
    split, split_metrics = gradients([Batch(*piece) for piece in pieces], len(parts))
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert split_metrics == pytest.approx(metrics, rel=1e-12)


def test_gradients_are_clipped_to_the_norm_and_the_log_has_the_norm_before():
    free, metrics = gradients([uneven_batch()], 1)
    clipped, clipped_metrics = gradients([uneven_batch()], 1, clip=0.01)
    norm = torch.cat([g.flatten() for g in free]).norm()
    assert torch.cat([g.flatten() for g in clipped]).norm() == pytest.approx(0.01, rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(float(norm)) == clipped_metrics["grad_norm"]


# The optimizer.


def test_frozen_parameters_stay_put_and_the_others_move():
    model = tiny()
    model.trunk.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, batches(), config(steps=2))
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {name for name in before if name.startswith("trunk.")}


def test_logged_rates_follow_warm_up_and_cosine():
    seen = fit(tiny(), batches(), config(steps=5))
    optim = config().optim
    expected = [optim.lr * schedule(step, step / 5, optim) for step in range(5)]
    assert [metrics["lr"] for _, metrics in seen] == pytest.approx(expected)


def test_the_logged_rate_is_the_rate_that_moves_weights():
    model = tiny()
    before = model.embedding.weight.detach().clone()
    optim = OptimConfig(lr=0.25, warmup_steps=2, weight_decay=0.0)
    fit(model, batches(), config(steps=1, optim=optim))
    # AdamW's first step is lr in every entry that has a gradient.
    assert (model.embedding.weight.detach() - before).abs().max() == pytest.approx(
        0.25 / 2, rel=1e-3
    )


class Clock:
    """A fake time.perf_counter that only moves when told."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def slow(self, callable_, seconds):
        def call(*args, **kwargs):
            self.now += seconds
            return callable_(*args, **kwargs)

        return call


class Slow:
    """A source that takes a second of the clock per batch."""

    def __init__(self, clock, source):
        self.next = clock.slow(source.__next__, 1.0)

    def __next__(self):
        return self.next()


def test_max_seconds_ends_the_run_and_shortens_the_schedule_to_fit(monkeypatch):
    source = Slow(Clock(monkeypatch), batches())
    seen = fit(tiny(), source, config(steps=1000, max_seconds=5.0))
    optim = config().optim
    expected = [optim.lr * schedule(step, step / 5, optim) for step in range(5)]
    assert [metrics["lr"] for _, metrics in seen] == pytest.approx(expected)


def test_time_spent_before_resuming_counts(monkeypatch):
    source, model = Slow(Clock(monkeypatch), batches()), tiny()
    source.load_state_dict = lambda state: None
    optimizer = Optimizer(model, OptimConfig())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(lr=0.0)
    progress = {"step": 3, "tokens": 0, "seconds": 3.0, "data": {}}
    state = checkpoint.TrainingState(progress, optimizer.state_dict())
    seen = fit(model, source, config(steps=1000, max_seconds=5.0), resume=state)
    assert [step for step, _ in seen] == [4, 5]


def test_seconds_left_are_told_from_the_share_done():
    assert Progress(tiny(), seconds=30.0, done=0.25).seconds_left == pytest.approx(90)
    assert Progress(tiny()).seconds_left == math.inf


# Figures.


def test_loss_of_every_head_falls_on_repetitive_text():
    seen = fit(tiny().float(), batches(repetitive=True), config(steps=40))
    first, last = seen[0][1], seen[-1][1]
    for i in range(1, N + 1):
        assert last[f"loss_{i}"] < 0.5 * first[f"loss_{i}"]


def test_bfloat16_is_of_the_forward_pass_and_weights_stay_fp32():
    models = [tiny().float(), tiny().float()]
    exact, rough = (
        fit(model, batches(), config(steps=2, precision=precision))[0][1]
        for model, precision in zip(models, ("float32", "bfloat16"), strict=True)
    )
    assert exact["loss_1"] != rough["loss_1"] == pytest.approx(exact["loss_1"], rel=0.02)
    assert {p.dtype for p in models[1].parameters()} == {torch.float32}


def test_tokens_are_counted_without_the_overlap():
    progress = train(tiny(), batches(2), MultiTokenLoss(N), config(steps=3, accumulation=2))
    assert progress.tokens == 3 * 2 * 2 * SEQ_LEN


def test_logged_losses_are_means_over_the_steps_since_the_last():
    """lr 0 is refused, but a rate this small moves no weight of fp64 by more than 1e-9."""
    still = OptimConfig(lr=1e-12, warmup_steps=0, weight_decay=0.0)
    each = fit(tiny(), batches(), config(steps=5, optim=still))
    seen = fit(tiny(), batches(), config(steps=5, log_every=3, optim=still))
    assert [step for step, metrics in seen if metrics] == [1, 3, 5]
    counts = []
    source = batches()
    for _ in range(5):
        counts.append(MultiTokenLoss(N).count(next(source)).tolist())
    for i in range(N):
        total = sum(each[step][1][f"loss_{i + 1}"] * counts[step][i] for step in (1, 2))
        mean = total / (counts[1][i] + counts[2][i])
        assert seen[2][1][f"loss_{i + 1}"] == pytest.approx(mean, rel=1e-8)


def test_data_wait_is_the_share_of_time_spent_on_data(monkeypatch):
    clock, metrics = Clock(monkeypatch), []
    loss = MultiTokenLoss(N)
    loss.count = clock.slow(loss.count, 3.0)
    hooks = [lambda progress: metrics.append(progress.metrics)]
    train(tiny(), Slow(clock, batches()), loss, config(steps=2), hooks=hooks)
    assert [m["data_wait"] for m in metrics] == [0.25, 0.25]
    assert [m["tokens_per_second"] for m in metrics] == [2 * SEQ_LEN / 4] * 2


def brute_force(model, given, bytes_per_token):
    """What `validate` promises, position by position from full logits."""
    nll, count = [0.0] * N, [0] * N
    agreed, lengths = [0] * N, []
    for row, doc, keep in given:
        logits = model(row, return_all_heads=True)[:, :-N].detach()
        best, logp = logits.argmax(-1), logits.log_softmax(-1)
        for b in range(len(row)):
            length = row.shape[1] - N
            for t in range(length):
                at = [t + i for i in range(1, N + 1)]
                valid = [bool(keep[b, j] and doc[b, j] == doc[b, t] >= 0) for j in at]
                for i in range(N):
                    nll[i] -= valid[i] * float(logp[b, t, i, row[b, at[i]]])
                    count[i] += valid[i]
                if t + N > length or not valid[-1]:
                    continue  # head 1's own choice for the last guess is not in this row
                agree = [bool(best[b, t, i] == best[b, t + i, 0]) for i in range(N)]
                agreed = [a + b for a, b in zip(agreed, agree, strict=True)]
                lengths.append((agree + [False]).index(False))
    expected = {"val_acceptance_length": sum(lengths) / len(lengths)}
    for i in range(N):
        loss = nll[i] / count[i]
        expected[f"val_loss_{i + 1}"] = loss
        expected[f"val_bits_per_byte_{i + 1}"] = loss / math.log(2) / bytes_per_token
        if i:
            expected[f"val_agreement_{i + 1}"] = agreed[i] / len(lengths)
            accepted = sum(length > i for length in lengths)
            expected[f"val_accepted_{i + 1}"] = accepted / len(lengths)
    return expected


@pytest.mark.parametrize("overrides", [{}, {"kind": "causal"}, {"unembedding": "replicated"}])
def test_validation_equals_brute_force_from_full_logits(overrides):
    model = tiny(gain=2.0, **overrides)
    fit(model, batches(repetitive=True), config(steps=15))  # so that heads agree now and then
    source = batches(3, epochs=1)
    given = [next(source), uneven_batch()]
    expected = brute_force(model, given, 2.5)
    assert validate(model, given, N, 2.5) == pytest.approx(expected, rel=1e-5)
    assert 1.05 < expected["val_acceptance_length"] < 3.9


def test_a_model_without_extra_heads_validates_to_acceptance_length_one():
    metrics = validate(tiny(n_future_tokens=1), [next(batches())], 1, 1.0)
    assert metrics.keys() == {"val_loss_1", "val_bits_per_byte_1", "val_acceptance_length"}
    assert metrics["val_acceptance_length"] == 1


def test_evaluation_comes_every_so_often_and_at_the_end():
    seen = fit(tiny(), batches(), config(steps=5, eval_every=2), evaluate=lambda model: {"x": 1.0})
    assert [step for step, metrics in seen if "x" in metrics] == [2, 4, 5]


@pytest.mark.parametrize(("every", "steps"), [(0, [5]), (2, [2, 4, 5])])
def test_saving_comes_every_so_often_and_at_the_end(every, steps):
    saved = []
    fit(
        tiny(),
        batches(),
        config(steps=5, save_every=every, log_every=5),
        save=lambda progress, optimizer: saved.append(progress.step),
    )
    assert saved == steps


# Hooks.


def test_hooks_are_called_every_step_and_see_metrics_on_logged_ones():
    seen = fit(tiny(), batches(), config(steps=5, log_every=2))
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5]
    assert [bool(metrics) for _, metrics in seen] == [True, True, False, True, True]


def test_metrics_file_holds_one_object_per_logged_step(tmp_path):
    file = tmp_path / "run" / "metrics.jsonl"
    fit(tiny(), batches(), config(steps=4, log_every=2), hooks=[JsonlLog(file)])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert [line["tokens"] for line in lines] == [2 * SEQ_LEN * step for step in (1, 2, 4)]
    heads = {f"loss_{i}" for i in range(1, N + 1)}
    assert lines[-1].keys() == heads | {"step", "tokens", "seconds", "grad_norm", "lr", *TIMES}


# What goes wrong.


@pytest.mark.parametrize(
    ("place", "what"), [("weight", "loss of micro-batch 1"), ("gradient", "gradient")]
)
def test_a_loss_that_is_not_finite_stops_the_run_with_the_step(place, what):
    def spoil(progress):
        if progress.step == 2 and place == "weight":
            progress.model.embedding.weight.data[:] = math.nan
        if progress.step == 2 and place == "gradient":
            progress.model.embedding.weight.register_hook(lambda g: g * math.inf)

    with pytest.raises(ValueError, match=f"step 3: the {what} is not finite on rank 0"):
        fit(tiny(), batches(), config(), hooks=[spoil])


def test_a_model_that_is_not_finite_is_never_saved():
    def spoil(progress):
        progress.model.embedding.weight.data[:] = math.nan

    saved = []
    with pytest.raises(ValueError, match="step 2"):
        fit(
            tiny(),
            batches(),
            config(log_every=5, save_every=2),
            hooks=[spoil],
            save=lambda progress, optimizer: saved.append(progress.step),
        )
    assert not saved


def test_data_that_ends_is_one_clear_message():
    source = batches(epochs=1)
    steps = len(list(batches(epochs=1)))
    with pytest.raises(ValueError, match=f"the data ended after {steps} steps of 100") as caught:
        fit(tiny(), source, config(steps=100))
    assert "train.steps" in str(caught.value)
    assert caught.value.__suppress_context__
