"""What the guard does to a text grows with its length alone: four times the text may take at most some ten times as long."""

import time

import pytest

from plumbline.safety.findings import ScanItem, Stage
from plumbline.safety.input_filter.hidden_text import HiddenText
from plumbline.safety.input_filter.injection import InjectionRules
from plumbline.safety.input_filter.pii import Pii
from plumbline.safety.input_filter.secrets import Secrets
from plumbline.safety.text.normalise import views
from plumbline.safety.text.redaction import Vault, redact
from plumbline.safety.text.worst_piece import sentences
from plumbline.safety.verifier.claims import split_claims
from plumbline.safety.verifier.vetoes import name_clashes, vetoes

SCANNERS = [Pii(), Secrets(), HiddenText(), InjectionRules()]
PASSAGE = "In 1990 the Oak Hill bridge had 5 beds."


def scanned(scanner):
    return lambda text: scanner.scan([ScanItem(text=text, stage=Stage.INPUT)])


def judged(text):
    for claim in split_claims(text):
        vetoes(claim.reading, PASSAGE)
        name_clashes(claim.reading, PASSAGE)


WORK = {
    "views": views,
    "sentences": sentences,
    "claims": split_claims,
    "vetoes": judged,
    "placeholders": lambda text: redact(text, (), Vault(values={"[A_1]": "x"})),
    **{scanner.name: scanned(scanner) for scanner in SCANNERS},
}
# One accented word behind a long word; address-like repeats; full stops; blanks; marks on one letter; numbers; brackets ...
UNITS = [
    "a",
    "a@b.",
    "@",
    ".",
    "a.",
    "e.g. ",
    " ",
    "\n",
    "; ",
    "\u0301\u0316",
    "1. ",
    "1 ",
    "12 345 ",
    "020 7946 ",
    "[E_",
    "[",
    "号1",
    "A1",
    "The ",
    "not ",
]


@pytest.mark.parametrize("name", WORK)
def test_time_grows_with_the_length(name):
    def seconds(unit, length):
        text = (unit * length)[: length - 2] + " é"
        if unit == "a":
            text = text.replace(" ", "")
        started = time.process_time()
        WORK[name](text)
        return time.process_time() - started

    WORK[name]("A first text, é, which loads what is loaded once: 020 7946 0958.")
    for unit in UNITS:
        for _ in range(3):  # a busy machine may be slow once
            short, long = seconds(unit, 2000), seconds(unit, 8000)
            if long < 0.1 or long < 10 * short:  # quadratic would be 16 times
                break
        else:
            pytest.fail(f"{name}: {unit!r} takes {short:.3f} s for 2000 characters and {long:.3f} s for 8000")
