"""Performance measured side by side, as ratios: python -m nnssl.benchmark."""
