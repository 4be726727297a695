"""Streams: the same text however the answer is cut into pieces, in scripts without blanks and in code, and nothing unread leaves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbline.safety.pipeline import Guard, StreamCheck
from plumbline.safety.text.redaction import Vault

MAIL, PHONE, CARD, KEY = "ada.lund@example.org", "+442079460958", "4111 1111 1111 1111", "AKIA" + "Q3EGRIWZ7NXT5YUB"
CHINESE = "谢谢您的来信我们会尽快回复您的问题并且给出详细的答案希望您满意"
THAI = "ขอบคุณที่ติดต่อเรามาเราจะตอบกลับโดยเร็วที่สุด"
KOREAN = "문의해주셔서감사합니다빠른시간안에답변드리겠습니다"
PARTS = [MAIL, PHONE, CARD, CHINESE, THAI, "[E_MAIL_ADDRESS_1]", " ", "\n", ". "]
GUARD = Guard("rules_only", hold_back=40, every=24)
TEXTS = {
    "mail": f"You can write to {MAIL} whenever you like, and she will answer within a day or two, as she always does.",
    "key": f"The key is {KEY} and the rest of this sentence is quite ordinary text about the weather in spring.",
    "Chinese": f"请写信到{MAIL}或者致电{PHONE}{CHINESE}" * 3,
    "Thai": f"{THAI}{MAIL}{THAI}โทร081-234-5678{THAI}",
    "Korean": f"{KOREAN}{CARD}{KOREAN}이메일은{MAIL}입니다",
    "emoji": "Family 👩‍👩‍👧‍👦 flag 🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f e\u0301 done. " * 4,
    "code": "```python\nfor i in range(3):\n    print('a  b')  # version 120.0.6099.109\n```\n\n| a | b |\n|---|---|\n"
    * 2,
    "blanks": "a  b   c \n\n  d\t e " * 6,
    "half a character": "ok \ud83d and \ud83d\ude00 and \udc00 " * 5,
    "placeholders": "To [E_MAIL_ADDRESS_1], `[ e_mail_address_1 ]` and [TELEPHONE_NUMBER_7] as you said " * 3,
}


def streamed(pieces, vault=None):
    check = StreamCheck(GUARD, vault or Vault())
    return "".join([*map(check.feed, pieces), check.close()]), [verdict.action for verdict in check.verdicts]


def vault_of_ann():
    vault = Vault()
    vault.hide("ann@x.org", "pii.email")
    return vault


@pytest.mark.parametrize("name", TEXTS)
def test_a_stream_gives_what_the_whole_answer_would(name):
    text = TEXTS[name]
    whole = Guard("rules_only", model=lambda messages: text).chat([{"role": "user", "content": "I am ann@x.org"}]).text
    for size in (1, 2, 7, 50):
        said, _ = streamed((text[at : at + size] for at in range(0, len(text), size)), vault_of_ann())
        assert said == whole
    assert not any(data in whole for data in (MAIL, PHONE, CARD, KEY, "081-234"))


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=30)), max_size=12),
    st.lists(st.integers(0, 60), max_size=30),
)  # fmt: skip
def test_any_cut_into_pieces_gives_the_same_text_and_the_same_verdicts(parts, cuts):
    text = "".join(parts)
    places = sorted({0, len(text), *(cut * len(text) // 60 for cut in cuts)})
    pieces = [text[a:b] for a, b in zip(places, places[1:], strict=False)]
    one = streamed([text], vault_of_ann())
    assert streamed(pieces, vault_of_ann()) == one == streamed(list(text), vault_of_ann())


@pytest.mark.parametrize("filler", [CHINESE, THAI, KOREAN, "word " * 9, "号"])
@pytest.mark.parametrize("data", [MAIL, PHONE, CARD, KEY, "DE89370400440532013000", "203.0.113.77", "219-09-9999"])
def test_no_piece_of_personal_data_leaves_wherever_it_stands(filler, data):
    for before in (0, 1, 23, 24, 47, 71):
        lead, blank = (filler * 80)[:before], " " if " " in filler else ""
        said, _ = streamed(f"{lead}{blank}{data}{blank}{filler * 3}")
        assert not any(data[at : at + 8] in said for at in range(len(data) - 7))


def test_text_without_blanks_leaves_long_before_the_answer_ends():
    for filler in (CHINESE, THAI):
        check = StreamCheck(GUARD, Vault())
        assert any(check.feed(letter) for letter in filler * 4)
