"""Matching pursuit. `search` chooses a back end, `atoms` finds atoms with it, `select` codes rows,
`pursue` adds the way back; `refit` is for pursuits that fit all values anew at every step."""
