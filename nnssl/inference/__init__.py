"""Prediction on folders of scans."""
