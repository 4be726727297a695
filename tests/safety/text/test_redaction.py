"""Redaction: merged once, against a slow reference; the vault gives back what it took."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plumbline.safety.findings import Span
from plumbline.safety.text.redaction import Cut, Vault, cuts_of, merge, redact


def test_by_hand():
    text = "Ann ann@x.org or +44 20 7946 0958"
    cuts = [Cut(start=4, end=13, category="pii.email", how="vault"), Cut(start=17, end=33, category="pii.phone")]
    vault = Vault()
    assert redact(text, cuts, vault) == "Ann [E_MAIL_ADDRESS_1] or [TELEPHONE_NUMBER]"
    assert (
        vault.restore("Write to [E_MAIL_ADDRESS_1], not [E_MAIL_ADDRESS_2]")
        == "Write to ann@x.org, not [E_MAIL_ADDRESS_2]"
    )


def test_equal_values_share_a_placeholder_and_hashes_do_not_leave_the_vault():
    vault = Vault()
    cuts = [
        Cut(start=0, end=1, category="pii.email", how="vault"),
        Cut(start=2, end=3, category="pii.email", how="vault"),
    ]
    assert redact("a a", cuts, vault) == "[E_MAIL_ADDRESS_1] [E_MAIL_ADDRESS_1]"
    assert redact("a b", cuts, vault) == "[E_MAIL_ADDRESS_1] [E_MAIL_ADDRESS_2]"
    hashed = [Cut(start=0, end=1, category="sec.key", how="hash")]
    assert redact("a", hashed, vault) == redact("a", hashed, vault) != redact("a", hashed, Vault())


def test_what_overlaps_becomes_one_cut_named_after_the_longest():
    cuts = [
        Cut(start=0, end=4, category="pii.url"),
        Cut(start=3, end=9, category="pii.email"),
        Cut(start=9, end=10, category="tox"),
    ]
    (one, two) = merge(cuts)
    assert (one.start, one.end, one.category) == (0, 9, "pii.email") and (two.start, two.end) == (9, 10)


def test_a_finding_without_spans_takes_everything():
    assert redact("all of it", cuts_of((), "tox", "placeholder", 9)) == "[TOXIC_TONE]"
    assert redact("ab", cuts_of((Span(start=0, end=1, replacement="X"),), "tox", "placeholder", 2)) == "Xb"


CUTS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=8)


@given(st.text(max_size=40), CUTS)
def test_a_character_that_any_cut_wants_out_is_out_and_no_other(text, pairs):
    cuts = [
        Cut(start=a, end=min(a + n, len(text)), category="pii.email", how="vault") for a, n in pairs if a <= len(text)
    ]
    out = {i for cut in cuts for i in range(cut.start, cut.end)}
    merged = merge(cuts)
    assert {i for cut in merged for i in range(cut.start, cut.end)} == out
    assert all(a.end <= b.start for a, b in zip(merged, merged[1:], strict=False))
    gone = redact(text, [Cut(start=c.start, end=c.end, category="x", replacement="") for c in merged])
    assert gone == "".join(ch for i, ch in enumerate(text) if i not in out)


@given(st.text(alphabet=st.characters(exclude_characters="[]"), max_size=40), CUTS)
def test_the_vault_gives_the_text_back(text, pairs):
    cuts = [
        Cut(start=a, end=min(a + n, len(text)), category="pii.email", how="vault") for a, n in pairs if a <= len(text)
    ]
    vault = Vault()
    assert vault.restore(redact(text, cuts, vault)) == text


MAIL = "[E_MAIL_ADDRESS_1]"
SPELLINGS = [  # of one placeholder, and what the vault gives back
    (MAIL, "ann@x.org"),
    ("[e_mail_address_1]", "ann@x.org"),
    ("[E-Mail_Address_1]", "ann@x.org"),
    (r"\[E\_MAIL\_ADDRESS\_1\]", "ann@x.org"),
    ("[ E_MAIL_ADDRESS_1 ]", "ann@x.org"),
    (f"```\nto = '{MAIL}'\n```", "```\nto = 'ann@x.org'\n```"),
    ("`[E_MAIL_ADDRESS_1]`", "`ann@x.org`"),
    ("mailto:%5BE_MAIL_ADDRESS_1%5D", "mailto:ann%40x.org"),
    ("&#91;E_MAIL_ADDRESS_1&#93;", "ann@x.org"),
    ("[E_MAIL_ADDRESS_10]", "[E_MAIL_ADDRESS_10]"),
    ("E_MAIL_ADDRESS_1", "E_MAIL_ADDRESS_1"),
]


@pytest.mark.parametrize("spelt, want", SPELLINGS)
def test_a_placeholder_is_given_back_however_it_is_spelt(spelt, want):
    vault = Vault()
    assert vault.hide("ann@x.org", "pii.email") == MAIL
    assert vault.restore(spelt) == want


@pytest.mark.parametrize("spelt", [spelt for spelt, want in SPELLINGS if "ann" in want])
def test_a_typed_placeholder_stays_what_was_typed(spelt):
    vault = Vault()
    text = f"ann@x.org and {spelt}"
    cut = Cut(start=0, end=9, category="pii.email", how="vault")
    masked = redact(text, [cut], vault)  # both in one text: the address takes another number
    assert "ann@" not in masked and vault.restore(masked) == text
    later = redact(f"what is {spelt}?", (), vault)
    assert vault.restore(later) == f"what is {spelt}?"
    known = Vault()
    known.hide("ann@x.org", "pii.email")  # the number is taken already
    assert known.restore(redact(f"what is {spelt}?", (), known)) == f"what is {spelt}?"


def test_only_what_the_user_wrote_is_given_back():
    vault = Vault()
    assert vault.hide("bob@y.org", "pii.email", own=False) == MAIL
    assert vault.restore(MAIL) == MAIL
    vault.hide("bob@y.org", "pii.email")  # now the user wrote it too
    assert vault.restore(MAIL) == "bob@y.org"


def test_a_value_is_masked_where_it_stands_by_itself():
    vault = Vault()
    vault.hide("+44 20 7946 0958", "pii.phone")
    vault.hide("123456", "pii.driver_licence")
    assert vault.mask("Ring +44 20 7946 0958.") == "Ring [TELEPHONE_NUMBER_1]."
    assert "1234567" in vault.mask("1234567 and 123456")
