"""The test runner: every folder and file once, groups against budgets."""

import pytest

from tests import run


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Tiers with a passing and a failing folder, a file, and a folder without tests."""
    for name, body in {
        "unit/good/test_it.py": "def test(): pass",
        "unit/good/deep/test_more.py": "def test(): pass",
        "integration/bad/test_it.py": "def test(): assert False",
        "e2e/test_speed.py": "import time\ndef test(): time.sleep(0.1)",
        "e2e/empty/data.json": "{}",
        "release/README.md": "",
    }.items():
        file = tmp_path / "tests" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(body)
    (tmp_path / "tests/budgets.toml").write_text("[test]\nhouse = 5\n[test-all]\nspeed = 0.0001\n")
    monkeypatch.setattr(run, "TESTS", tmp_path / "tests")
    return tmp_path / "tests"


def test_entries_are_folders_with_tests_and_files(tree):
    found = run.entries(tree, ("unit", "integration", "e2e", "release"))
    assert [str(entry.relative_to(tree)) for entry in found] == ["e2e/test_speed.py", "unit/good", "integration/bad"]


def test_a_failing_folder_fails_the_target_after_all_have_run(tree, capfd):
    assert run.main(["test", "-q", "-p", "no:cacheprovider"]) == 1
    said = capfd.readouterr().out
    assert "2 passed" in said
    assert said.splitlines()[-1] == "FAILED: tests/integration/bad"
    assert said.splitlines()[-2].split()[::2] == ["house", "300"]


def test_options_reach_pytest(tree):
    assert run.main(["test", "-q", "-p", "no:cacheprovider", "-k", "nothing_of_that_name"]) == 0


def test_far_over_budget_fails(tree, capfd):
    assert run.main(["test-all", "-q", "-p", "no:cacheprovider"]) == 1
    assert "OVER BUDGET" in capfd.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("took", "words", "failed"), [(60, "", False), (61, "OVER BUDGET", False), (91, "fails the run", True)]
)
def test_a_budget_may_be_exceeded_by_half(took, words, failed):
    (_, line), over = run.table({"house": took}, {"house": 1})
    assert over == failed
    assert words in line
    assert ("OVER" in line) == (took > 60)


def test_a_group_without_a_budget_is_listed():
    (_, line), over = run.table({"house": 1e5}, {})
    assert (line.split(), over) == (["house", "100000", "-"], False)


@pytest.mark.parametrize("target", ["tset", ""])
def test_an_unknown_target_is_an_error(target, capsys):
    assert run.main([target]) == 2
    assert "test, test-all, test-release" in capsys.readouterr().err
