"""`python -m dmd2`, which torchrun wants: `torchrun --nproc-per-node 2 -m dmd2 train NAME`."""

from dmd2.cli import main

main()
