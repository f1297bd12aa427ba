"""Folders and public data sets -> nnU-Net raw data sets. Loads no torch."""
