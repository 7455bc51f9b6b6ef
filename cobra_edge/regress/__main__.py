"""`python -m cobra_edge.regress`."""

from ..terminal import main_of
from .verbs import command

main_of(command)()
