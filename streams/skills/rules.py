"""The embedded skills: what each one asks about a list of words, in several phrasings, and the rule
that answers.

All skills read lists of one and the same make: one or two number words among nouns of three kinds,
in any order. Only the instruction tells them apart, so a skill learned later competes with the
earlier ones for the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

NOUNS = {
    "animal": ("cat", "dog", "horse", "lion", "rabbit", "whale"),
    "fruit": ("apple", "banana", "fig", "kiwi", "mango", "plum"),
    "tool": ("axe", "drill", "hammer", "knife", "needle", "saw"),
}
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip
INPUT_NUMBERS = NUMBERS[1:10]  # the numbers that stand in inputs
WORD_KIND = {word: kind for kind, words in NOUNS.items() for word in words}

Words = Sequence[str]


@dataclass(frozen=True)
class Skill:
    """One instruction type: the phrasings of its instruction, and the answer to an input.

    `fits` says which inputs have an answer at all.
    """

    name: str
    category: str
    phrasings: tuple[str, ...]
    solve: Callable[[Words], str]
    accepts: Callable[[Words], bool] = lambda words: True


def number_values(words: Words) -> list[int]:
    """The numbers among the words."""
    return [NUMBERS.index(w) for w in words if w in NUMBERS]


def has_two_numbers(words: Words) -> bool:
    """Whether the words hold two numbers."""
    return len(number_values(words)) == 2


def nouns(words: Words) -> list[str]:
    """The words that are not numbers."""
    return [w for w in words if w in WORD_KIND]


def count_kind(kind: str) -> Callable[[Words], str]:
    """The rule that counts the words of one kind."""
    return lambda words: NUMBERS[sum(WORD_KIND.get(w) == kind for w in words)]


def most_common_kinds(words: Words) -> list[str]:
    """The kinds that most nouns have: several on a tie."""
    kinds = [WORD_KIND[w] for w in nouns(words)]
    most = max(map(kinds.count, kinds))
    return sorted({k for k in kinds if kinds.count(k) == most})


def join_words(*words: str) -> str:
    """Words as an answer."""
    return " ".join(words)


SKILLS = (
    Skill("reverse", "transformation", (
        "write the words in reverse order",
        "say the list backwards",
        "turn the list around from its end to its start",
        "give the words from right to left",
    ), lambda w: join_words(*w[::-1])),
    Skill("swap_ends", "transformation", (
        "swap the ends of the list",
        "let the first and the last word change places",
        "write the words with both end words exchanged",
        "put the last word in front and the first word behind",
    ), lambda w: join_words(w[-1], *w[1:-1], w[0])),
    Skill("nouns_only", "transformation", (
        "write the words without the numbers",
        "leave out all numbers",
        "remove each number from the list",
        "give the words that are not numbers",
    ), lambda w: join_words(*nouns(w))),
    Skill("first_and_third", "selection", (
        "write the first and the third word",
        "give word one and word three",
        "pick the words in places one and three",
        "say the word at the start , then word three",
    ), lambda w: join_words(w[0], w[2])),
    Skill("third", "selection", (
        "write the third word",
        "give word three",
        "pick the word in place three",
        "say only the third word of the list",
    ), lambda w: w[2]),
    Skill("count_animals", "counting", (
        "count the animals",
        "how many of the words are animals ?",
        "give the number of animals in the list",
        "say how many animals there are",
    ), count_kind("animal")),
    Skill("count_fruits", "counting", (
        "count the fruits",
        "how many of the words are fruits ?",
        "give the number of fruits in the list",
        "say how many fruits there are",
    ), count_kind("fruit")),
    Skill("add", "arithmetic", (
        "add the numbers",
        "what is the sum of the numbers ?",
        "give the total of both numbers",
        "say what the numbers make together",
    ), lambda w: NUMBERS[sum(number_values(w))], has_two_numbers),
    Skill("subtract", "arithmetic", (
        "subtract the numbers",
        "what is the difference of the numbers ?",
        "give the larger number less the smaller",
        "say how far apart both numbers are",
    ), lambda w: NUMBERS[max(number_values(w)) - min(number_values(w))], has_two_numbers),
    Skill("majority", "classification", (
        "which kind do most nouns have ?",
        "classify the list by the kind of most nouns",
        "give the most common kind of noun",
        "say what most of the nouns are",
    ), lambda w: most_common_kinds(w)[0], lambda w: len(most_common_kinds(w)) == 1),
    Skill("alphabetical_last", "order", (
        "which word is last in the alphabet ?",
        "give the word that a dictionary has last",
        "pick the alphabetical maximum",
        "say which word comes after all others in alphabetical order",
    ), lambda w: max(w)),
)  # fmt: skip

BASIC_SKILLS = (
    Skill("copy", "transformation", ("copy the list", "write the words again", "repeat all words "
                                                                               "as they are"),
          lambda w: join_words(*w)),
    Skill("rotate", "transformation", ("rotate the list", "move the first word to the end",
                                       "write the list from its second word on , then the first"),
          lambda w: join_words(*w[1:], w[0])),
    Skill("drop_first", "transformation", ("drop the first word", "write all but the first word",
                                           "leave out the word at the start"), lambda w: join_words(*w[1:])),
    Skill("swap_first_two", "transformation", ("swap the first two words",
                                               "let the first and the second word change places",
                                               "write the list with the second word in front"),
          lambda w: join_words(w[1], w[0], *w[2:])),
    Skill("numbers_only", "transformation", ("write the numbers only", "keep just the numbers",
                                             "leave out all words that are not numbers"),
          lambda w: join_words(*[x for x in w if x in NUMBERS])),
    Skill("last", "selection", ("write the last word", "give the word at the end", "pick the final word"),
          lambda w: w[-1]),
    Skill("second_and_fourth", "selection", ("write the second and the fourth word", "give word "
                                                                                     "two and "
                                                                                     "word four",
                                             "pick the words in places two and four"), lambda w: join_words(w[1], w[3])),
    Skill("third_and_second", "selection", ("write the third and then the second word",
                                           "give word three and word two",
                                           "pick the words in places three and two"), lambda w: join_words(w[2], w[1])),
    Skill("last_three_backwards", "transformation", ("write the last three words backwards",
                                                     "say the last three words in reverse order",
                                                     "give three words from right to left"),
          lambda w: join_words(*w[-1:-4:-1])),
    Skill("alphabetical_first", "order", ("which word is first in the alphabet ?",
                                          "give the word that a dictionary has first",
                                          "pick the alphabetical minimum"), lambda w: min(w)),
    Skill("kinds", "classification", ("name the kind of each word", "classify every word",
                                      "say what each of the words is"),
          lambda w: join_words(*[WORD_KIND.get(x, "number") for x in w])),
    Skill("count_tools", "counting", ("count the tools", "how many of the words are tools ?",
                                      "give the number of tools in the list"), count_kind("tool")),
    Skill("one_more", "arithmetic", ("add one to each number", "raise all numbers by one",
                                     "write the number after each number in the list"),
          lambda w: join_words(*[NUMBERS[v + 1] for v in number_values(w)])),
)  # fmt: skip
