"""`python -m cobra_edge.regress`."""

from ..terminal.output import main_of
from .command import command

main_of(command)()
