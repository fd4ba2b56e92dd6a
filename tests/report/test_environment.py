import json
import subprocess

import torch

from memtl import backends
from memtl.report import environment
from memtl.report.environment import commit


def git(path, *arguments):
    identity = ("-c", "user.name=t", "-c", "user.email=t@t")
    run = ["git", "-C", str(path), *identity, *arguments]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()


def test_says_what_computed_where():
    record = json.loads(json.dumps(environment()))
    assert record["versions"]["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["backends"]["topk_pack"] == backends.owner("topk_pack", "cpu")
    assert record["device"] and record["platform"] and record["cores"] >= 1


def test_commit(tmp_path):
    package = tmp_path / "memtl"
    package.mkdir()
    source = package / "__init__.py"
    source.write_text("one = 1\n")
    assert commit(package) is None, "no repository"
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "without the package")
    assert commit(package) is None, "another project's repository"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "with it")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit(package) == head
    source.write_text("two = 2\n")
    assert commit(package) == f"{head}-dirty"
