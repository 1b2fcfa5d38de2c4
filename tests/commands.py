"""The command line, run inside the test's own process."""

import pytest

from tutelage.cli.app import main


def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object, code: int
) -> str:
    """What `tutelage WORDS` prints when it ends with `code`; unless that is 0, its one error line.

    A second error line, a traceback or another exit code fails the test.
    """
    monkeypatch.setattr("sys.argv", ["tutelage", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert stop.value.code == code, said.err
    assert "Traceback" not in said.err
    if not code:
        return said.out
    errors = [line for line in said.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, said.err
    return errors[0]
