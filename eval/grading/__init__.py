"""From a reply to a score: graders, rules, judges and what judges' errors do to a rate, the sandbox for code."""
