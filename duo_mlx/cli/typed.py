"""The command as it was typed, for a result that says how it was made."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


def typed(arguments: Sequence[str] | None = None) -> str:
    """The command line of ``arguments``, of this process's where there are none.

    The home directory, which shells write out and which names its user, is ~ again.
    """
    home = re.escape(str(Path.home()))
    line = shlex.join(["duo-mlx", *(sys.argv[1:] if arguments is None else arguments)])
    return re.sub(rf"(?<![\w./-]){home}(?![\w.-])", "~", line)
