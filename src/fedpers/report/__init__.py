"""Pages about finished runs: one self-contained HTML file, made from stored results alone."""
