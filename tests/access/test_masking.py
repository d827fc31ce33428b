"""Masking: of 200 secrets made here at least 95 % are masked, and ordinary text stays as it is."""

from __future__ import annotations

import base64
import json
import random
import string
import uuid

import pytest
from stdnum import iban, luhn

from fastserve.access.key import new_key
from fastserve.access.masking import MAX_CHARACTERS, mask

Secrets = dict[str, list[str]]


def synthetic_secrets(seed: int = 7) -> Secrets:
    """200 of ten kinds, of nobody."""
    draw = random.Random(seed)

    def text(length: int, alphabet: str = string.ascii_letters + string.digits) -> str:
        return "".join(draw.choices(alphabet, k=length))

    def word() -> str:
        return text(draw.randint(3, 9), string.ascii_lowercase)

    def card() -> str:
        number = draw.choice(["4", "51", "37", "6011"])
        number += text((14 if number == "37" else 15) - len(number), string.digits)
        number += luhn.calc_check_digit(number)
        return number if draw.random() < 0.5 else " ".join(number[i : i + 4] for i in range(0, 16, 4))

    def account() -> str:
        country, length = draw.choice([("DE", 18), ("ES", 20), ("NL", 0)])
        bban = text(length, string.digits) if length else "INGB" + text(10, string.digits)
        check = iban.calc_check_digits(f"{country}00{bban}")
        compact = f"{country}{check}{bban}"
        if not iban.is_valid(compact):  # national check digits too
            return account()
        return compact if draw.random() < 0.5 else iban.format(compact)

    def phone() -> str:
        return draw.choice(
            [
                f"+1 212 555 {draw.randint(1000, 9999)}",
                f"+4930{draw.randint(1000000, 9999999)}",
                f"({draw.randint(201, 209)}) 555-{draw.randint(1000, 9999)}",
                f"+44 20 7946 {draw.randint(1000, 9999)}",
                f"+33 1 42 68 {draw.randint(10, 99)} {draw.randint(10, 99)}",
            ]
        )

    def jwt() -> str:
        parts = [json.dumps({"alg": "HS256"}), json.dumps({"sub": uuid.UUID(int=draw.getrandbits(128)).hex})]
        encoded = [base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in parts]
        return ".".join([*encoded, text(43)])

    makers = {
        "e-mail": lambda: (
            f"{word()}.{word()}{draw.randint(1, 99)}@{word()}.{draw.choice(['com', 'co.uk', 'de'])}"
        ),
        "phone": phone,
        "card": card,
        "IBAN": account,
        "AWS": lambda: "AKIA" + text(16, string.ascii_uppercase + string.digits),
        "GitHub": lambda: f"ghp_{text(36)}",
        "API key": lambda: f"sk-proj-{text(40)}",
        "JWT": jwt,
        "own key": lambda: new_key("a")[0],
        "password": lambda: f"password: {text(12)}",
    }
    return {kind: [make() for _ in range(20)] for kind, make in makers.items()}


SENTENCES = [
    "Please write to {} before noon.",
    "{}",
    "I said: '{}', and she wrote it down.",
    "The value ({}) is wrong;\nwhat now?",
    "Use {} for the rest of it, and thanks",
]


def left_over(secret: str, text: str) -> bool:
    """Whether a half of it can still be read."""
    secret = secret.removeprefix("password: ")
    half = max(6, len(secret) // 2)
    return any(secret[i : i + half] in text for i in range(len(secret) - half + 1))


def test_of_200_secrets_at_least_95_in_100_are_masked() -> None:
    secrets = synthetic_secrets()
    assert sum(map(len, secrets.values())) == 200
    missed = [
        (kind, sentence, masked)
        for kind, values in secrets.items()
        for number, secret in enumerate(values)
        for sentence in [SENTENCES[number % len(SENTENCES)].format(secret)]
        for masked in [mask(sentence)]
        if left_over(secret, masked)
    ]
    assert len(missed) <= 10, missed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The quick brown fox jumps over the lazy dog; it was 42 years old in 2024.",
        "def main(argument: int) -> None:\n    print(argument + 1000000)\n",
        "See https://example.com/a/long-path/to_something and well-established-facts-about-words.",
        "π is 3.14159 and e is 2.71828; version 2.51.0 of 2026-12-01 12:30:00",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert mask(text) == text


def test_what_is_around_a_secret_stays() -> None:
    text = "Bill bob@a.com, card 4111 1111 1111 1111, DE89 3704 0044 0532 0130 00 then call +1 212 555 0187!"
    assert mask(text) == "Bill [EMAIL], card [CARD], [IBAN] then call [PHONE]!"


def test_of_two_words_that_announce_a_password_the_last_does() -> None:
    assert mask("my secret is password: hunter2x!") == "my secret is password: [KEY]"
    assert mask("token='abcdef' and api_key => 12345") == "token='[KEY]' and api_key => [KEY]"


def test_a_private_key_is_masked_whole_and_when_it_is_cut_off() -> None:
    begin, end = "-----BEGIN RSA PRIVATE KEY-----", "-----END RSA PRIVATE KEY-----"
    assert mask(f"a {begin}\nabc\n{end} b") == "a [KEY] b"
    assert mask(f"a {begin}\nabc") == "a [KEY]"


def test_a_long_text_is_cut_at_a_space() -> None:
    text = "word " * (MAX_CHARACTERS // 5) + "bob@example.com"
    assert len(mask(text)) <= MAX_CHARACTERS
    assert "bob" not in mask(text)
