"""The commit that a manifest names is the project's own, or "unknown"."""

import subprocess

from pte_trl.runtime.manifest import commit


def git(folder, *args: str) -> str:
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", str(folder), *name, *args], check=True, capture_output=True, text=True).stdout


def test_the_commit_is_that_of_a_repository_that_has_the_file(tmp_path):
    package = tmp_path / "site-packages"
    package.mkdir()
    (tmp_path / "own.txt").write_text("a user's own file")
    (package / "manifest.py").write_text("x = 1\n")
    assert commit(package / "manifest.py") == "unknown"  # no repository
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "own.txt")
    git(tmp_path, "commit", "-qm", "first")
    assert commit(package / "manifest.py") == "unknown"  # a repository that does not track it
    git(tmp_path, "add", "site-packages")
    git(tmp_path, "commit", "-qm", "second")
    head = git(tmp_path, "rev-parse", "--short", "HEAD").strip()
    assert commit(package / "manifest.py") == head
    (package / "manifest.py").write_text("x = 2\n")
    assert commit(package / "manifest.py") == f"{head} (changed)"
