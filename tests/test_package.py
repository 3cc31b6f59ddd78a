"""What the package says of itself agrees with itself."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import textgen

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_version_has_one_source(monkeypatch):
    monkeypatch.setattr(metadata, "version", {"textgen": PROJECT["version"]}.__getitem__)
    assert textgen.__version__ == PROJECT["version"]
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {PROJECT['version']}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_version_of_a_clone_that_is_not_installed(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert textgen.__version__ == "0+uninstalled"


def test_license_is_the_one_declared():
    assert re.search(r"Apache License\s+Version 2\.0", (ROOT / "LICENSE").read_text())
    assert PROJECT["license"] == "Apache-2.0"
    assert "\nlicense: Apache-2.0\n" in (ROOT / "CITATION.cff").read_text()
    assert (ROOT / "textgen" / "py.typed").exists()
