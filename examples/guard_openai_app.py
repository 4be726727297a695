"""Put the guard between your users and a model behind an OpenAI-compatible endpoint.

    python examples/guard_openai_app.py --url http://localhost:8000/v1 --model my-model "How do I whittle a spoon?"

A question is checked before the model sees it, and the answer before the user does. Without a question on the command
line the example reads one a line from standard input and streams the answers. The API key, if the endpoint wants one, is
read from OPENAI_API_KEY. Every verdict goes into verdicts.jsonl, as hashes and categories and never as text.
"""

import argparse
import sys

from plumbline.safety import Guard, openai_endpoint


def show(guard: Guard, question: str) -> None:
    """One guarded answer, with the rule behind every action that was taken."""
    answer = guard.chat(question)
    print(f"user    {question}")
    for layer, verdict in answer.verdicts.items():
        for fired in verdict.fired:
            print(f"{layer:<7} {fired.action.name.lower()} by the rule {fired.rule!r}")
    print(f"answer  {answer.text}\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="*", help="questions to ask; none: read them from standard input")
    parser.add_argument("--url", required=True, help="such as http://localhost:8000/v1")
    parser.add_argument("--model", required=True, help="the model's name at the endpoint")
    parser.add_argument("--policy", default="default", help="default, rules_only, or the path of a YAML file of yours")
    parser.add_argument("--log", default="verdicts.jsonl", help="file to which a line a verdict is appended")
    options = parser.parse_args()

    model = openai_endpoint(options.url, options.model, temperature=0.7, max_tokens=300)
    guard = Guard(options.policy, model=model, log=options.log)
    for question in options.question:
        show(guard, question)
    if not options.question:
        for line in sys.stdin:
            for piece in guard.stream(line.strip()):  # a piece is printed only after it was checked
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    main()
