"""Metrics in mm and paired comparisons. Loads no torch."""
