"""What `plumbline curate` finds of bad rows planted into good data, and how long it takes.

Planted, each 5% of the good rows: exact duplicates (other case, blanks, punctuation), paraphrased duplicates (other words,
another frame around the request, sentences of the answer in another order), rows in other languages, garbage of five kinds.
A planted row is found when it is dropped, or when the row that it repeats is. Good rows that are dropped are false drops,
unless they repeat another good row word for word.

    python benchmarks/rewards/bench_curate.py --data FILE [FILE ...]           # instruction/input/output or prompt/answer
    python benchmarks/rewards/bench_curate.py --data FILE --rows 100000        # speed: rows made from those by changing words

Ends with a line of JSON.
"""

import argparse
import json
import random
import re
import resource
import sys
import time
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from plumbline.align.data.curation import CurationRules, Row, curate
from plumbline.apps.commands.curate import read
from plumbline.paths import STARTER
from plumbline.safety.embedder.embedding import Embedder

SHARE = 0.05
SYNONYMS = dict(
    pair.split(":")
    for pair in (
        "big:large small:little quick:fast fast:quick begin:start start:begin make:create create:make give:provide "
        "provide:give show:present help:assist use:employ need:require want:wish important:essential different:distinct "
        "many:numerous several:various good:fine bad:poor easy:simple simple:easy hard:difficult difficult:hard "
        "explain:describe describe:explain list:name name:list write:compose find:locate tell:inform buy:purchase "
        "get:obtain keep:retain change:alter improve:enhance increase:raise decrease:lower reduce:lessen choose:pick "
        "often:frequently usually:normally also:additionally because:since while:whereas about:regarding people:persons "
        "way:manner kind:type type:kind part:portion place:location city:town house:home job:position work:labour "
        "child:kid children:kids common:widespread main:principal best:finest famous:well-known happy:glad beautiful:lovely "
        "large:big little:small include:contain includes:contains contain:include allow:permit allows:permits ensure:guarantee "
        "consider:weigh following:below example:instance examples:instances method:approach idea:notion ideas:notions "
        "answer:reply question:query sentence:phrase summary:overview summarize:condense identify:recognise compare:contrast "
        "first:initially finally:lastly however:still therefore:thus very:really currently:presently popular:well-liked "
        "company:firm country:nation world:globe year:twelvemonth typically:generally mostly:largely"
    ).split()
)
FRAMES = [
    "Could you {0}?",
    "Please {0}.",
    "I would like you to {0}.",
    "{1} Thanks in advance.",
    "I have a question: {1}",
    "Tell me this: {1}",
]
FOREIGN = {  # written for this benchmark
    "de": (
        [
            "Wie koche ich Reis, ohne dass er klebt?",
            "Warum ist der Himmel am Abend rot?",
            "Nenne mir drei Flüsse in Europa.",
        ],
        [
            "Wasche ihn vorher gründlich und lass ihn danach zugedeckt ruhen.",
            "Das Licht legt abends einen längeren Weg durch die Luft zurück.",
            "Der Rhein, die Donau und die Elbe gehören zu den bekanntesten.",
        ],
    ),
    "fr": (
        [
            "Comment faire pousser des tomates sur un balcon ?",
            "Pourquoi la mer est-elle salée ?",
            "Donne-moi une idée de repas pour ce soir.",
        ],
        [
            "Choisissez un grand pot, beaucoup de soleil et arrosez chaque matin.",
            "Les rivières y apportent des sels depuis des millions d'années.",
            "Une soupe de légumes avec du pain grillé et un peu de fromage.",
        ],
    ),
    "es": (
        [
            "¿Cómo puedo dormir mejor por la noche?",
            "¿Qué animales viven en el desierto?",
            "Escribe un saludo para mi abuela.",
        ],
        [
            "Apaga las pantallas una hora antes y acuéstate siempre a la misma hora.",
            "Hay camellos, serpientes, escorpiones y muchas aves pequeñas.",
            "Querida abuela, espero que estés muy bien y que nos veamos pronto.",
        ],
    ),
    "it": (
        [
            "Come si prepara un buon caffè a casa?",
            "Perché gli uccelli migrano in autunno?",
            "Consigliami un libro da leggere al mare.",
        ],
        [
            "Usa acqua fresca, caffè macinato da poco e una fiamma molto bassa.",
            "Cercano cibo e temperature più miti durante i mesi freddi.",
            "Prova un romanzo breve, leggero, con personaggi simpatici e un bel finale.",
        ],
    ),
    "pl": (
        [
            "Jak nauczyć psa siadać na komendę?",
            "Dlaczego liście zmieniają kolor jesienią?",
            "Podaj przepis na zupę pomidorową.",
        ],
        [
            "Nagradzaj go smakołykiem za każdym razem, gdy sam usiądzie.",
            "Drzewa przestają wytwarzać zielony barwnik, więc widać inne kolory.",
            "Ugotuj bulion, dodaj przecier z pomidorów i trochę śmietany.",
        ],
    ),
    "ru": (
        [
            "Как правильно поливать комнатные растения?",
            "Почему зимой дни короче?",
            "Посоветуй тёплую страну для отпуска.",
        ],
        [
            "Поливайте их, когда верхний слой земли станет сухим.",
            "Зимой северное полушарие наклонено в сторону от солнца.",
            "Осенью хорошо поехать в Грецию или на Кипр, там ещё тепло.",
        ],
    ),
    "ja": (
        ["部屋を早く片付ける方法を教えてください。", "虹はどうして見えるのですか。", "朝ごはんのおすすめは何ですか。"],
        [
            "まず床の物を箱に入れて、それから棚を整理しましょう。",
            "光が水の粒の中で曲がって、色に分かれるからです。",
            "ご飯と味噌汁、それに焼き魚がおすすめです。",
        ],
    ),
    "ar": (
        ["كيف أتعلم السباحة في وقت قصير؟", "لماذا ينام الإنسان كل ليلة؟", "اقترح لي هدية مناسبة لصديقي."],
        [
            "ابدأ في مكان ضحل مع مدرب وتدرب كل يوم.",
            "يحتاج الجسم إلى الراحة وإصلاح نفسه في الليل.",
            "كتاب جميل أو قلم جيد سيكون هدية مناسبة.",
        ],
    ),
}


def paraphrase(row: Row, rng: random.Random) -> Row:
    """The same request and answer in other words."""
    bare = row.prompt.strip().rstrip(".?!")
    frame = rng.choice(FRAMES if "\n" not in bare and len(bare) < 300 else FRAMES[3:5])
    question = row.prompt.strip().endswith("?")
    frame = rng.choice(FRAMES[3:]) if question else frame
    sentences = re.split(r"(?<=[.!?])\s+", row.answer.strip())
    if len(sentences) > 2:
        sentences = [*sentences[1:], sentences[0]]
    prompt = frame.format(_reworded(bare[:1].lower() + bare[1:], rng), _reworded(row.prompt.strip(), rng))
    return Row(prompt, _reworded(" ".join(sentences), rng))


def _reworded(text: str, rng: random.Random) -> str:
    def other(match: re.Match[str]) -> str:
        word = match.group()
        new = SYNONYMS.get(word.lower(), word)
        return new.capitalize() if word[:1].isupper() else new

    return re.sub(r"\w+", other, text)


def exact(row: Row, rng: random.Random) -> Row:
    """The same words; case, blanks and marks differ."""
    change = rng.choice(
        [str.upper, str.lower, lambda t: t + "  ", lambda t: " " + t.replace(" ", "  "), lambda t: t + "!"]
    )
    return Row(change(row.prompt), row.answer + rng.choice(["", " ", "\n", "."]))


def foreign(rng: random.Random) -> Row:
    prompts, answers = FOREIGN[rng.choice(list(FOREIGN))]
    said = rng.sample(answers, rng.choice([1, 2, 3]))
    return Row(" ".join(rng.sample(prompts, rng.choice([1, 2]))), " ".join(said))


def garbage(row: Row, rng: random.Random) -> Row:
    """Random letters, signs, one word for ever, shuffled letters, markup."""
    letters = lambda: "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(4, 11)))  # noqa: E731
    kinds = [
        lambda: " ".join(letters() for _ in range(rng.randint(12, 40))),
        lambda: "".join(rng.choice("!@#$%^&*()_+-=[]{}|;:,.<>/? ") for _ in range(rng.randint(40, 200))),
        lambda: " ".join([rng.choice(row.answer.split())] * rng.randint(25, 80)),
        lambda: " ".join("".join(rng.sample(w, len(w))) for w in (row.answer.split() * 10)[:40]),
        lambda: "".join(f"<div class='x{i}'><br/>&nbsp;</div>" for i in range(rng.randint(6, 20))),
    ]
    return Row(row.prompt, rng.choice(kinds)()) if rng.random() < 0.5 else Row(rng.choice(kinds)(), rng.choice(kinds)())


def planted(good: list[Row], seed: int) -> tuple[list[Row], list[tuple[str, int | None]]]:
    """(all rows in random order, for each its kind and, of a copy, where its original is)."""
    rng = random.Random(seed)
    count = int(SHARE * len(good))
    long_enough = [row for row in range(len(good)) if len(good[row].answer.split()) >= 8]
    rows: list[tuple[Row, str, int | None]] = [(row, "good", None) for row in good]
    rows += [(exact(good[at], rng), "exact", at) for at in rng.sample(range(len(good)), count)]
    rows += [
        (paraphrase(good[at], rng), "paraphrase", at) for at in rng.sample(long_enough, min(count, len(long_enough)))
    ]
    rows += [(foreign(rng), "language", None) for _ in range(count)]
    rows += [(garbage(good[at], rng), "garbage", None) for at in rng.sample(long_enough, min(count, len(long_enough)))]
    order = list(range(len(rows)))
    rng.shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    kinds = [(rows[old][1], None if rows[old][2] is None else place[rows[old][2]]) for old in order]  # type: ignore[index]
    return [rows[old][0] for old in order], kinds


def grown(good: list[Row], count: int, seed: int) -> list[Row]:
    """`count` rows for the clock: the good ones with a third of their words drawn anew from all words, so none repeat."""
    rng = random.Random(seed)
    words = [word for row in good for word in row.answer.split()]
    change = lambda text: " ".join(rng.choice(words) if rng.random() < 0.33 else w for w in text.split())  # noqa: E731
    return [Row(change(row.prompt), change(row.answer)) for row in (rng.choice(good) for _ in range(count))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[str(STARTER / "sft.jsonl")])
    parser.add_argument("--limit", type=int, help="good rows at most")
    parser.add_argument("--rows", type=int, help="measure the speed on this many rows instead")
    parser.add_argument("--no-semantic", action="store_true", help="level 1 only")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    good = [row for file in args.data for row in read(file)[1]]
    if args.limit and args.limit < len(good):
        good = random.Random(args.seed).sample(good, args.limit)
    embed = None if args.no_semantic else Embedder(cache_size=0).embed
    rows, kinds = planted(good, args.seed) if args.rows is None else (grown(good, args.rows, args.seed), None)
    started = time.perf_counter()
    drops = curate(rows, CurationRules(), embed=embed).drops
    seconds = time.perf_counter() - started
    result: dict[str, float] = {"rows": len(rows), "seconds": seconds, "rows_per_s": len(rows) / seconds}
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if kinds is not None:
        result |= table(rows, kinds, drops)
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


def table(rows: list[Row], kinds: list[tuple[str, int | None]], drops: list) -> dict[str, float]:
    """Prints and returns the share found of each kind, and of good rows dropped for nothing."""
    dropped = [drop is not None for drop in drops]
    result = {}
    print("| planted | rows | found | by rule |\n|---|---|---|---|")
    for kind in ("exact", "paraphrase", "language", "garbage"):
        of = [n for n, (k, _) in enumerate(kinds) if k == kind]
        found = [n for n in of if dropped[n] or (kinds[n][1] is not None and dropped[kinds[n][1]])]
        by: dict[str, int] = {}
        for n in of:
            name = drops[n].rule if dropped[n] else "its original" if n in found else "missed"
            by[name] = by.get(name, 0) + 1
        result[f"found_{kind}"] = len(found) / max(1, len(of))
        print(f"| {kind} | {len(of)} | {result[f'found_{kind}']:.1%} | {by} |")
    copied = {original for _, original in kinds if original is not None}
    good = [n for n, (kind, _) in enumerate(kinds) if kind == "good"]
    # an original that goes while its copy stays is the find of a duplicate; two equal good rows are one too many
    false = [n for n in good if dropped[n] and n not in copied and drops[n].rule != "exact duplicate"]
    by = {}
    for n in false:
        by[drops[n].rule] = by.get(drops[n].rule, 0) + 1
    result["false_drops"] = len(false) / len(good)
    print(f"| good, dropped | {len(good)} | {result['false_drops']:.1%} | {by} |")
    return result


if __name__ == "__main__":
    main()
