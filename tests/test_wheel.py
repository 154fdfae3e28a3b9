"""What is published: an sdist that builds the wheel, and a wheel of the package alone."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import mtp

ROOT = Path(__file__).resolve().parent.parent
META = f"multi_token_prediction-{mtp.__version__}.dist-info/"


def build(what, source, out):
    call = f"import sys; from setuptools import build_meta as b; b.build_{what}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", call, str(out)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Of a checkout with a test, a result and a run in it; unpacked."""
    checkout = tmp_path_factory.mktemp("checkout")
    papers = ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff")
    for name in ("pyproject.toml", "MANIFEST.in", *papers):
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    copytree(ROOT / "mtp", checkout / "mtp", ignore=ignore_patterns("__pycache__"))
    for name in ("tests/test_x.py", "benchmarks/results/x.json", "runs/x.py", "scripts/x.py"):
        (checkout / name).parent.mkdir(parents=True)
        (checkout / name).touch()
    (file,) = build("sdist", checkout, tmp_path_factory.mktemp("sdist")).glob("*.tar.gz")
    with tarfile.open(file) as archive:
        archive.extractall(file.parent, filter="data")
    return file.with_suffix("").with_suffix("")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """File name -> content."""
    (file,) = build("wheel", sdist, tmp_path_factory.mktemp("wheel")).glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_source_release_holds_the_package_and_its_papers(sdist):
    made = {"PKG-INFO", "setup.cfg", "multi_token_prediction.egg-info"}
    papers = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}
    build_files = {"pyproject.toml", "MANIFEST.in", "mtp"}
    assert {file.name for file in sdist.iterdir()} - made == papers | build_files


def test_the_wheel_built_from_it_holds_every_file_of_the_package_and_no_other(wheel):
    files = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "mtp").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert "mtp/py.typed" in files
    assert {name for name in wheel if not name.startswith(META)} == files
    assert wheel[META + "licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_a_plain_install_needs_three_packages(wheel):
    said = message_from_bytes(wheel[META + "METADATA"])
    plain = [line for line in said.get_all("Requires-Dist", []) if "extra ==" not in line]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert plain == project["dependencies"]
    assert [line.split(">")[0] for line in plain] == ["torch", "numpy", "safetensors"]


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    _, newest, *_ = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")
    number, day = newest.splitlines()[0].split(" ")
    assert project["version"] == mtp.__version__ == number
    assert f"version: {number}" in cited and f'date-released: "{day[1:-1]}"' in cited
