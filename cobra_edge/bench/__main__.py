"""`python -m cobra_edge.bench`."""

from ..terminal.output import main_of
from .command import command

main_of(command)()
