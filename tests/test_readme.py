"""The README's Python example runs as printed."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert blocks, "the README has no Python example"
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    expected = re.findall(r"^print\(.*\)  # (.*)$", "".join(blocks), flags=re.M)
    assert expected, "the example prints nothing that can be checked"
    assert capsys.readouterr().out.splitlines() == expected
