"""`python -m continual`, and so `torchrun -m continual`, is the command line."""

from continual.cli.main import main

main()
