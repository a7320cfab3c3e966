"""Checks that tell a real number from one that only looks like it. Each takes the text of a match."""

import re
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from typing import Final

_NO_SEPARATOR: Final = re.compile(r"[^0-9A-Za-z]")
# Lengths by country as the IBAN registry has them.
_IBAN_LENGTHS: Final[Mapping[str, int]] = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24,
    "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24,
    "XK": 20,
}  # fmt: skip


def luhn(text: str) -> bool:
    """Payment cards (ISO/IEC 7812), without runs of one digit such as 0000 0000 0000 0000."""
    digits = [int(letter) for letter in text if letter.isdecimal()]
    if len(set(digits)) < 2:
        return False
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def iban(text: str) -> bool:
    """ISO 13616: the country's length, and the remainder 1 modulo 97."""
    number = _NO_SEPARATOR.sub("", text).upper()
    if _IBAN_LENGTHS.get(number[:2]) != len(number):
        return False
    return int("".join(str(int(letter, 36)) for letter in number[4:] + number[:4])) % 97 == 1


def us_ssn(text: str) -> bool:
    """Areas, groups and serials that the Social Security Administration never gives out are none."""
    digits = _NO_SEPARATOR.sub("", text)
    return digits[:3] not in ("000", "666") and digits[0] != "9" and digits[3:5] != "00" and digits[5:] != "0000"


def phone(text: str) -> bool:
    """E.164: at most 15 digits, at least 8, and not one digit over and over."""
    digits = [letter for letter in text if letter.isdecimal()]
    return 8 <= len(digits) <= 15 and len(set(digits)) > 2


def public_ip(text: str) -> bool:
    """An address that is somebody's: not private, not loopback, not for documentation."""
    try:
        return ip_address(text).is_global
    except ValueError:
        return False


def mixed(text: str) -> bool:
    """A token drawn at random has letters of both cases and digits; a word in capitals or a number has not."""
    return any(c.isdigit() for c in text) and any(c.islower() for c in text) and any(c.isupper() for c in text)


CHECKS: Final[Mapping[str, Callable[[str], bool]]] = {
    "luhn": luhn,
    "iban": iban,
    "us_ssn": us_ssn,
    "phone": phone,
    "public_ip": public_ip,
    "mixed": mixed,
}
