"""A machine for results that tests make up."""

from cobra_edge.bench.machine import Machine

MACHINE = Machine("A Processor", 2, 25.0, "3.11.0", {}, "abc")
