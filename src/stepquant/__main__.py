"""`python -m stepquant` is the command `stepquant`."""

from stepquant.cli import main

main()
