"""`plumbline chat`: a guarded chat in the browser."""
