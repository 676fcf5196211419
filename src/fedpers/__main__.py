"""`python -m fedpers` is the command line."""

from fedpers.cli import main

main()
