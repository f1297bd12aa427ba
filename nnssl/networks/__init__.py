"""Layers and networks, in 2D and 3D."""
