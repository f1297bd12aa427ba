"""Noise schedules and the forward process, dimension-agnostic and in fp32."""
