"""The command line.

Nothing here imports torch until a command runs, so that help and mistakes in usage are answered at once.
"""

from stepquant.cli.main import main

__all__ = ["main"]
