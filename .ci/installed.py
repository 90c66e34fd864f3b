"""Checks that the distribution duo-mlx, as installed beside this Python, owns the one package duo_mlx."""

import sys
from importlib.metadata import files

paths = [str(file) for file in files("duo-mlx") or []]
top = {path.partition("/")[0] for path in paths if not path.startswith("..")}  # ../../../bin/duo-mlx is no package
if {name for name in top if not name.endswith(".dist-info")} != {"duo_mlx"}:
    sys.exit(f"duo-mlx must install the package duo_mlx and nothing else, but it installs {', '.join(sorted(top))}")
for needed in ("duo_mlx/convert/__init__.py", "duo_mlx/bench/__init__.py", "duo_mlx/py.typed"):
    if needed not in paths:
        sys.exit(f"duo-mlx installs no {needed}")
print(f"{len(paths)} files, all in duo_mlx and its dist-info")
