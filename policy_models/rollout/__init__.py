"""The rollout engine: decoding many answers at once, streaming one, running frozen layers once."""
