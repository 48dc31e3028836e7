"""Which installed packages are input of a corpus, and what `provenance.json` says of them."""

import importlib.metadata
import json

import pytest

from helpers.corpora import make_tokenizer, texts
from megatron_twotower.common.errors import UserError
from megatron_twotower.data.documents import find_inputs
from megatron_twotower.data.installed_packages import HELD_OUT, installed_packages, is_permissive
from megatron_twotower.data.prepare import prepare


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("MIT", True),
        ("The MIT License (MIT)", True),
        ("3-Clause BSD License", True),
        ("Apache Software License", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("(MIT OR Apache-2.0) AND BSD-3-Clause", True),
        ("GPL-3.0-only OR MIT", True),
        ("BSL-1.0", True),
        ("ISC License (ISCL)", True),
        ("PSFL", True),
        ("MPL-2.0 AND MIT", False),
        ("MIT AND GPL-3.0-only", False),
        ("GNU Lesser General Public License v2 or later (LGPLv2+)", False),
        ("BUSL-1.1", False),
        ("Business Source License 1.1", False),
        ("Mitre", False),
        ("Proprietary", False),
        ("", False),
    ],
)
def test_permissive_licences(licence, expected):
    assert is_permissive(licence) is expected


def install(site, name, *, files, metadata):
    """Write a package as an installer does."""
    info = site / f"{name}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.5\n{metadata}")
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(f"# the module {file}\n" * 20)
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in (*files, f"{info.name}/METADATA", "gone.py")))


def use(monkeypatch, folder):
    """Make the packages in a folder those of this environment."""
    found = importlib.metadata.Distribution.discover
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found(path=[str(folder)]))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An environment of a few packages."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    files = [
        "Good_One/__init__.py",
        "Good_One/deep/module.py",
        "Good_One/data.json",
        "Good_One/_vendor/rich/text.py",
        "Good_One/third_party/other.py",
        "single.py",
        "../bin/tool.py",
    ]
    install(folder, "Good_One", files=files, metadata="License-Expression: MIT\n")
    classifiers = (
        "Classifier: License :: OSI Approved :: BSD License\nClassifier: Topic :: Text\nLicense: see the file\n"
    )
    install(folder, "classified", files=["classified.py"], metadata=classifiers)
    install(folder, "copyleft", files=["copyleft.py"], metadata="License: GPL\n")
    both = "Classifier: License :: OSI Approved :: MIT License\nClassifier: License :: OSI Approved :: GPL\n"
    install(folder, "both", files=["both.py"], metadata=both)
    install(folder, "silent", files=["silent.py"], metadata="")
    install(folder, "megatron-twotower", files=["own.py"], metadata="License: Apache-2.0\n")
    install(folder, "hydra-core", files=[f"{name}/__init__.py" for name in HELD_OUT], metadata="License: MIT\n")
    (folder / "cut_off-1.5.dist-info").mkdir()  # what a removal that was cut off leaves
    use(monkeypatch, folder)
    return folder


def test_packages_with_permissive_licences_without_copies_and_what_is_held_out(site):
    found = {package.name: package for package in installed_packages()}
    assert list(found) == ["classified", "good-one"]
    assert list(found["good-one"].files) == ["Good_One/__init__.py", "Good_One/deep/module.py", "single.py"]
    assert found["good-one"].files["single.py"] == site / "single.py"
    assert found["classified"].description() == {
        "name": "classified",
        "version": "1.5",
        "licence": "BSD License",
        "files": 1,
    }


def test_their_modules_are_documents_and_their_licences_are_kept(site, tmp_path):
    found = find_inputs(["python-packages"])
    names = ["classified.py", "Good_One/__init__.py", "Good_One/deep/module.py", "single.py"]
    assert [document.name for document in found.documents] == names
    tokenizer = make_tokenizer(tmp_path / "tokenizer", texts())
    prepare(["python-packages"], tokenizer=tokenizer, output=tmp_path / "data", holdout_fraction=0.0)
    provenance = json.loads((tmp_path / "data" / "provenance.json").read_text())
    assert provenance["packages"] == [package.description() for package in installed_packages()]
    assert provenance["text_files"]["files"] == 4


def test_an_environment_without_such_packages_is_one_line(tmp_path, monkeypatch):
    use(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"^python-packages: no files found there"):
        find_inputs(["python-packages"])
