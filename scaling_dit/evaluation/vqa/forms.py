"""The surface forms that count as one answer, whose first tokens GenEval 2 sums over (arXiv 2512.16853)."""

_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
YES = ("Yes", "yes", " yes", " Yes")


def accepted_forms(answer: str) -> tuple[str, ...]:
    """The forms of an answer: as it is, capitalised, each after a blank; of a number also its digits and its word.

    >>> accepted_forms("yes")
    ('yes', 'Yes', ' yes', ' Yes')
    >>> accepted_forms("4")
    ('four', 'Four', ' four', ' Four', '4', ' 4')
    """
    plain = answer.strip()
    word = plain.lower()
    if word.isdigit() and int(word) < len(_NUMBERS):
        word = _NUMBERS[int(word)]
    forms = [word, word.capitalize()] if word in _NUMBERS else [plain, word, plain[:1].upper() + plain[1:]]
    forms = list(dict.fromkeys(forms))
    found = [*forms, *(f" {form}" for form in forms)]
    if word in _NUMBERS:
        digits = str(_NUMBERS.index(word))
        found += [digits, f" {digits}"]
    return tuple(found)
