"""Matching pursuit. `search` chooses a back end, `atoms` finds atoms with it, `select` codes rows,
`pursue` adds the backward pass; `refit` fits all values again at every step."""
