"""`plumbline guard`: check, explain, chat, index, measure, watch for drift."""
