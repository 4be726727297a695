"""A guard around a model, in three layers: input filter, constrained generation, verifier.

    from plumbline.safety import Guard

    guard = Guard("default", model=my_function)
    print(guard.chat("How do I whittle a spoon?").text)

Usable without any training code: safety/training is imported by no other room.
"""

from plumbline.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "Action": "findings",
        "Category": "findings",
        "FactChecker": "verifier.facts",
        "Finding": "findings",
        "Guard": "pipeline",
        "GuardedAnswer": "findings",
        "KnowledgeBase": "verifier.knowledge",
        "Policy": "policy",
        "Scanner": "findings",
        "Verdict": "findings",
        "index_folder": "verifier.knowledge",
        "load_policy": "policy",
        "openai_endpoint": "backends",
    },
)
