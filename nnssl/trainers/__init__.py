"""Trainers: the base and one file per method."""
