"""What the benchmark commands share: timing, results, tables, the models that are compared, FLOP formulas."""
