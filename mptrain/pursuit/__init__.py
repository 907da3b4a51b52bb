"""Matching pursuit: `select` chooses atoms and values, `pursue` adds the backward pass."""
