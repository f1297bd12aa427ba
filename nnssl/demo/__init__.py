"""The self-contained demonstration: invented scans, the whole chain on them, a report."""
