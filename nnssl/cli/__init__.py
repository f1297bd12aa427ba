"""Command line: one module per command, each parses and then calls the package."""
