"""`plumbline serve`: an OpenAI-compatible server of an aligned model behind its guard."""
