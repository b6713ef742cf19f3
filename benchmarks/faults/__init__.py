"""The bench of faults: small real programs, faults planted in them, and who finds which; ``make faults``."""
