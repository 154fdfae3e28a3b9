"""A real Llama (stories260K; skipped where it is absent) writes its known story here too."""

import hashlib

import pytest
from conftest import DATA

from mtp import OwnHeads, Request, Transformer, generate
from mtp.interop.llama import load_llama

FOLDER = DATA / "stories260K" / "hf"
# Published with the model: sha256 of its 257 greedy ids from the id 1, joined by spaces.
STORY = "f21413726c22bdd07653e9fd959eb0ee4ddc03a2e4f5badd7412ab79cde1b190"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="MTP_TEST_DATA has no stories260K")


@pytest.fixture(scope="module")
def model() -> Transformer:
    """The other heads stay random: drafts, not text."""
    return load_llama(FOLDER, n_future_tokens=4)


@pytest.mark.parametrize("drafter", [None, OwnHeads()], ids=["plain", "heads"])
def test_greedy_story_is_the_published_one(model: Transformer, drafter: OwnHeads | None) -> None:
    new = generate(model, [Request([1], max_new_tokens=256)], drafter)[0].tokens
    text = " ".join(map(str, [1, *new]))
    assert hashlib.sha256(text.encode()).hexdigest() == STORY
