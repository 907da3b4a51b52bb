"""Matching pursuit: `search` plans it, `atoms` finds atoms, `select` codes, `pursue` goes back."""
