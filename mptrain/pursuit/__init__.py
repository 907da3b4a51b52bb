"""Matching pursuit. `backend` chooses a back end, `finders` find atoms with it, `forward` codes
rows, `autograd` adds the backward pass; `refit` fits all values again at every step."""
