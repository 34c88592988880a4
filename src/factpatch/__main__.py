"""`python -m factpatch`: the command line."""

from factpatch.cli import main

main()
