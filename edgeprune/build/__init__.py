"""Building: obeying the plan, byte for byte."""
