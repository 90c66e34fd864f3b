"""Writes docs/architectures.md from tests/architectures.py; with ``--check``, fails when the file is another."""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "architectures.md"
HEAD = """# Architectures

A Duo can be made of every model type in the first table. `python .ci/architectures.py` writes this file from
[tests/architectures.py](../tests/architectures.py), and [one test](../tests/test_architectures.py) checks every row:

- A Duo that uses only big FFNs gives the logits of mlx-lm's model bit for bit: whole, with a cache, and quantised.
- Every strategy gives the same logits for the same routes.
- The saved directory loads in stock mlx-lm.
"""
TABLE = """
## Supported

"Verified" means that transformers' own model gives the same logits. "Oracle and graft" need layers that can run one by
one; without them a Duo still converts, trains and generates.

| model_type | models | verified | oracle and graft |
|---|---|---|---|
"""
REFUSED = """
## Not supported

| model_type | models | reason |
|---|---|---|
"""
HOW = """
## How to add an architecture

First try it with a model directory that has a tokenizer, and a text. The error names what is missing, if anything is.

<!-- ci: skip, MODEL stands for a directory -->
```bash
duo-mlx convert MODEL MODEL-duo --graft --calibrate examples/chats.txt
```

**mlx-lm has the architecture, and it works.** Add a row to `ARCHITECTURES` in tests/architectures.py: the `model_type`,
a tiny config.json (hidden size 64, three layers, a vocabulary of 96) and the models that people know. Then run

<!-- ci: skip, MODEL_TYPE stands for a name -->
```bash
pytest tests/test_architectures.py -k MODEL_TYPE
python .ci/architectures.py
```

Where a test fails, the row must say more. `opens=False`: the layers do not run one by one. `caches=False`: mlx-lm's
model gives other logits with a cache than without one. `both=True` promises that transformers agrees;
tests/convert/test_torch_names.py compares the two. `hosts=False`: `--verify` cannot replace the FFNs of transformers'
model.

**"a layer has no FFN that this package knows".** The error lists the modules of a layer. If one of them is the FFN, add
its name to `FFN_NAMES` in duo_mlx/hosting.py. The FFN must take hidden states and return hidden states of the same
shape. A layer without an FFN cannot be routed: give the row a `refused` reason, and in `raises` the beginning of the
error.

**"does not say how many experts a token goes to".** Add the name of that attribute to `CHOSEN` in duo_mlx/cost.py.

**"config.json lacks hidden_size".** The config.json has another name for the width, the number of layers or the
number of heads. Add it to `HIDDEN`, `LAYERS` or `HEADS` in duo_mlx/config.py.

**mlx-lm lacks the architecture.** Write duo_mlx/bases/MODEL_TYPE.py with the classes `Model` and `ModelArgs`, as mlx-lm
would have them; duo_mlx/bases/opt.py is an example. Test it against transformers (tests/bases/test_opt.py), and add a
row to the table and the name to the last set in `test_every_module_of_mlx_lm_has_a_row`.
A module there takes precedence over mlx-lm's of the same name, so delete it when mlx-lm has its own.

**A new mlx-lm has more architectures.** `test_every_module_of_mlx_lm_has_a_row` names them. Give each a row. A module
that is only a part of architectures belongs in `INSIDE`.
"""


def rows(table: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each supported architecture."""
    for kind, row in sorted(table.items(), key=lambda each: each[0].lower()):
        if not row.refused:
            yield f"| {kind} | {row.known} | {'yes' if row.both else ''} | {'yes' if row.opens else 'no'} |\n"


def refusals(table: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each architecture that is not supported."""
    for kind, row in sorted(table.items()):
        if row.refused:
            yield f"| {kind} | {row.known} | {row.refused} |\n"


def reference() -> str:
    """Return the text of docs/architectures.md."""
    table = runpy.run_path(str(ROOT / "tests" / "architectures.py"))["ARCHITECTURES"]
    return HEAD + TABLE + "".join(rows(table)) + REFUSED + "".join(refusals(table)) + HOW


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if not FILE.is_file() or FILE.read_text(encoding="utf-8") != reference():
            sys.exit("docs/architectures.md is stale; run python .ci/architectures.py and commit the file")
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        FILE.write_text(reference(), encoding="utf-8")
