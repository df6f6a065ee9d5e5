"""`python -m dmd2.cli`, which torchrun wants."""

from dmd2.cli import main

main()
