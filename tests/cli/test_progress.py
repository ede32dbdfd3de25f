"""Progress of a long command without a terminal; `test_encode` has one with a terminal."""

import pytest

from tvmatch.cli import progress


@pytest.mark.parametrize(("shown", "seconds"), [(True, -1), (True, 60), (False, -1)])
def test_lines_without_a_terminal(
    shown: bool, seconds: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after `seconds` without a line; here each report takes less than a minute."""
    monkeypatch.setattr(progress, "_SECONDS_PER_LINE", seconds)
    with progress.progress_bar("reading", shown=shown) as report:
        report(700, 1400)
        report(1400, 1400)
    lines = ["reading: 700 of 1,400", "reading: 1,400 of 1,400"] if shown and seconds < 0 else []
    assert capsys.readouterr().err.splitlines() == lines
