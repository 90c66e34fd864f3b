"""The runner of the examples in README and docs: what it runs, what it leaves, and that nothing drops out unseen."""

import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).parent.parent / ".ci" / "examples.py"

GUIDE = """# Guide
```bash
echo one > shared
```
text
  ```python
  import pathlib
  print(pathlib.Path("shared").read_text() + "two")
  ```
```text
not run
```
<!-- ci: skip, needs a Mac -->

```bash
exit 1
```
<!-- ci: install -->
```bash
echo "the one to install"
```
````bash
cat <<'END'
```
three
```
END
````
"""


@pytest.fixture
def examples(tmp_path):
    """``examples(text, *command)``: the runner's result for a Markdown file of that text."""

    def run(text: str, *command: str) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "guide.md"
        file.write_text(text, encoding="utf-8")
        command = [
            sys.executable,
            RUNNER,
            *(str(file) if word == "FILE" else word for word in command or ("run", "FILE")),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    return run


def test_blocks_run_in_order_in_one_directory(examples):
    done = examples(GUIDE)
    assert (done.returncode, done.stderr) == (0, "")
    said = [line for line in done.stdout.splitlines() if not line.startswith("   ")]
    assert [line.partition("guide.md")[2] or line for line in said] == [
        ":2 (bash)",
        ":6 (python)",
        "one",
        "two",
        ":15 (bash): not run here: needs a Mac",
        ":19 (bash): not run here: install",
        ":22 (bash)",
        "```",
        "three",
        "```",
        "3 examples ran",
    ]


def test_a_named_block_is_shown_as_it_stands(examples):
    assert examples(GUIDE, "show", "FILE", "install").stdout == 'echo "the one to install"\n'
    absent = examples(GUIDE, "show", "FILE", "test")
    assert absent.returncode == 1
    assert "there must be one block after <!-- ci: test -->, not 0" in absent.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\nfalse\necho no\n```\n", "guide.md:1 (bash): the example failed with exit code 1"),
        ("```bash\nfalse | true\n```\n", "guide.md:1 (bash): the example failed with exit code 1"),
        ("\n```python\nraise KeyError\n```\n", "guide.md:2 (python): the example failed with exit code 1"),
        ("```console\n$ true\n```\n", "guide.md:1: say bash or python, not console"),
        ("<!-- ci: skip -->\n```bash\ntrue\n```\n", "guide.md:2: write <!-- ci: skip, REASON -->"),
        ("<!-- ci: skip, slow -->\ntext\n", "guide.md:2: the comment before this line belongs to no block"),
        ("```bash\ntrue\n", "guide.md:1: the block is not closed"),
    ],
)
def test_failures_and_blocks_that_would_never_run(examples, text, message):
    done = examples(text)
    assert done.returncode == 1
    assert message in done.stderr
    assert "\nno\n" not in done.stdout


def test_files_run_side_by_side_and_are_told_one_after_the_other(tmp_path):
    """Each waits for the other; a failure names its block and ends with 1, and what came before it is told."""
    wait = "```bash\ntouch {0}/{1}\nuntil [ -e {0}/{2} ]; do sleep 0.05; done\necho {1} met\n```\n"
    texts = [wait.format(tmp_path, "a", "b"), wait.format(tmp_path, "b", "a"), "```bash\nfalse\n```\n"]
    files = [tmp_path / name for name in ("one.md", "two.md", "three.md")]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, RUNNER, "run", *files], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and done.stdout.index("a met") < done.stdout.index("b met")
    assert "three.md:1 (bash): the example failed with exit code 1" in done.stdout
    assert done.stderr == f"{files[2]}: an example failed, see above\n"


def test_examples_read_no_input_and_meet_this_python_first(examples):
    done = examples("```bash\ncat\ncommand -v python\n```\n")
    assert str(Path(sys.executable).parent / "python") in done.stdout.splitlines()
