"""Version and commit of the project, as the commands say them."""

import importlib.util
import re
import shutil
import subprocess

import pytest

from rwkv_miss import version
from rwkv_miss.__main__ import main

from .conftest import ROOT


def git(folder, *words):
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def copied_to(folder):
    """The module as it would be in another checkout or environment."""
    (folder / "rwkv_miss").mkdir(parents=True)
    path = shutil.copy(ROOT / "rwkv_miss/version.py", folder / "rwkv_miss/version.py")
    spec = importlib.util.spec_from_file_location("copied_version", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_says_it(capsys, monkeypatch):
    monkeypatch.setattr("rwkv_miss.version.commit", lambda: "4ad1e2f")
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"rwkv-miss {version.VERSION}, commit 4ad1e2f\n"


def test_a_checkout_knows_its_commit_and_an_installed_package_no_other_projects(tmp_path):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "another project's")
    installed = copied_to(tmp_path / "site-packages")
    assert installed.commit() == "" and installed.version_line() == version.VERSION
    checkout = tmp_path / "checkout"
    module = copied_to(checkout)
    git(checkout, "init", "-q")
    git(checkout, "add", "rwkv_miss/version.py")
    git(checkout, "commit", "-q", "-m", "first")
    assert re.fullmatch("[0-9a-f]{7,}", module.commit())
    assert git(checkout, "rev-parse", "HEAD").startswith(module.commit())
    (checkout / "rwkv_miss/version.py").write_text("changed")
    assert not module.commit().endswith("-dirty"), "that of the process' start"
    module.commit.cache_clear()
    assert module.commit().endswith("-dirty")
