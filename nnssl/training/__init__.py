"""Reusable state of methods: EMA, ramps, memory bank, label space."""
