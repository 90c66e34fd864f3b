"""``python -m duo_mlx``: the same as ``duo-mlx``."""

from duo_mlx.cli import main

main(prog_name="duo-mlx")
