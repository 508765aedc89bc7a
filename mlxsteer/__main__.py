"""`python -m mlxsteer` is the command `mlxsteer`."""

from mlxsteer.cli import main

main()
