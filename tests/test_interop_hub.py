"""Models go to the hub with a card that is true, and come back as they were."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny

hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import metadata_load  # noqa: E402
from huggingface_hub.utils import filter_repo_objects  # noqa: E402

from mtp import checkpoint  # noqa: E402
from mtp.interop.fetch import WANTED  # noqa: E402
from mtp.interop.hub import Card, from_pretrained, push_to_hub, save_pretrained  # noqa: E402
from mtp.interop.llama import load_llama, save_llama  # noqa: E402
from mtp.tokenizer import ByteTokenizer  # noqa: E402

CARD = Card(
    data="Books: all of them.",
    acceptance={"held-out books": 2.456},
    license="apache-2.0",
    language=["en"],
    datasets=["me/books"],
)


def small(**shape):
    return tiny(vocab_size=257, max_seq_len=200, **shape).float()


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture
def remote(monkeypatch, tmp_path):
    """A folder that stands for the hub: what is pushed lies there under its name."""
    root = tmp_path / "hub"

    class Api:
        def create_repo(self, name, private, exist_ok):
            assert exist_ok
            (root / name).mkdir(parents=True)

        def upload_folder(self, repo_id, folder_path):
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def fetch(name, revision, allow_patterns, ignore_patterns):
        files = [file.name for file in (root / name).iterdir()]
        target = tmp_path / "cache"
        target.mkdir()
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            shutil.copy(root / name / file, target)
        return str(target)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    return root


def test_a_pushed_model_comes_back(remote, tmp_path):
    model = small()
    assert push_to_hub(model, "me/model", ByteTokenizer(), CARD).endswith("me/model/commit/1")
    (remote / "me/model/pytorch_model.bin").write_bytes(b"a pickle")
    back, tokenizer = from_pretrained("me/model")
    assert same(model, back) and back.config == model.config
    assert tokenizer.fingerprint == ByteTokenizer.fingerprint
    names = {file.name for file in (tmp_path / "cache").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    assert 'from_pretrained("me/model")' in (remote / "me/model/README.md").read_text()


def test_what_came_damaged_is_refused(tmp_path):
    folder = save_pretrained(small(), tmp_path / "out", ByteTokenizer(), CARD)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        from_pretrained(folder)


def test_the_card_says_what_the_model_is(tmp_path):
    folder = save_pretrained(small(), tmp_path / "out", ByteTokenizer(), CARD, "me/model")
    text = (folder / "README.md").read_text()
    assert metadata_load(folder / "README.md") == {
        "library_name": "mtp",
        "pipeline_tag": "text-generation",
        "tags": ["multi-token-prediction", "speculative-decoding"],
        "license": "apache-2.0",
        "language": ["en"],
        "datasets": ["me/books"],
    }
    for words in (
        "# me/model\n",
        "Books: all of them.",
        "4 heads of kind transformer, shared unembedding; vocabulary 257, context 200.",
        "- held-out books: 2.46",
    ):
        assert words in text


@pytest.mark.parametrize("n_future_tokens", [1, 3])
def test_the_code_on_the_card_runs(n_future_tokens, tmp_path, capsys):
    model = small(n_future_tokens=n_future_tokens)
    folder = save_pretrained(model, tmp_path / "out", ByteTokenizer(), Card("Nothing."))
    text = (folder / "README.md").read_text()
    assert "Not measured." in text and ("OwnHeads()" in text) == (n_future_tokens > 1)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out


def test_a_card_waits_for_a_model_that_is_whole(tmp_path):
    taken = Path(tmp_path, "out")
    taken.mkdir()
    with pytest.raises(FileExistsError):
        save_pretrained(small(), taken, ByteTokenizer(), CARD)
    assert not [*taken.iterdir()]


# Names of the hub, without a network: what it gave before lies in a cache.


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A repository me/llama in the layout of the hub's cache, and the folder of its snapshot."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit, repository = "0" * 40, tmp_path / "cache/models--me--llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    return repository / "snapshots" / commit


def test_a_llama_is_opened_by_its_name_on_the_hub(cached, tmp_path):
    model = small(n_future_tokens=1)
    save_llama(model, cached)
    assert same(load_llama("me/llama"), model)
    scripts = pytest.importorskip("scripts.convert")
    scripts.convert(scripts.ConvertConfig("llama", "me/llama", "mtp", str(tmp_path / "out")))
    assert same(checkpoint.load(tmp_path / "out"), model)


@pytest.mark.parametrize("name", ["me/absent", "/no/such/folder"])
@pytest.mark.parametrize("open_", [load_llama, from_pretrained])
def test_what_is_neither_a_folder_nor_a_repository_is_told(open_, name, cached):
    with pytest.raises(FileNotFoundError, match=f"{name} is no folder, and the hub gives no repos"):
        open_(name)


def test_nothing_that_can_run_is_fetched():
    names = ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja"]
    others = ["pytorch_model.bin", "modeling.py", "consolidated.pth", "model.gguf"]
    assert [*filter_repo_objects([*names, *others], allow_patterns=[*WANTED])] == names


def test_a_tokenizer_of_another_vocabulary_is_refused_both_ways(tmp_path):
    says = "{}: the tokenizer has 257 tokens, the model vocab_size=100"
    with pytest.raises(ValueError, match=says.format("out")):
        save_pretrained(tiny(vocab_size=100), tmp_path / "out", ByteTokenizer(), CARD)
    assert not [*tmp_path.iterdir()]
    checkpoint.save(tiny(vocab_size=100), tmp_path / "in", ByteTokenizer())
    with pytest.raises(ValueError, match=says.format("in")):
        from_pretrained(tmp_path / "in")


def test_a_full_disk_leaves_no_card_without_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="cannot write the checkpoint .*out: .* MiB are free"):
        save_pretrained(small(), tmp_path / "out", ByteTokenizer(), CARD)
    assert not [*tmp_path.iterdir()]
