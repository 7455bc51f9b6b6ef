"""How far a quantized build is from the float model: suites, measures, budgets, reports."""
