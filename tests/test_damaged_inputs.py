"""What damaged inputs lead to: one line that names the file. The cases are in `damaged.py`, the table in docs/reliability.md."""

from pathlib import Path

import pytest
from damaged import CASES, Damaged, documented, row, said


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_line_names_the_file_as_documented(case: Damaged, tmp_path: Path):
    message = said(case, tmp_path)
    assert "\n" not in message and len(message) < 300
    assert f"{case.named}'" in message or f"{case.named}:" in message or f"{case.named}." in message
    assert row(case, message) in documented().splitlines(), "`python -m tests.damaged` writes the table anew"


def test_the_document_has_no_other_rows():
    assert len(documented().splitlines()) == len(CASES) + 2 and len(CASES) >= 50


def test_nothing_in_a_pickle_runs(tmp_path: Path, capfd):
    (case,) = [case for case in CASES if case.what == "a pickle that runs a program"]
    assert "posix.system" in said(case, tmp_path)
    assert "this must not run" not in capfd.readouterr().out
