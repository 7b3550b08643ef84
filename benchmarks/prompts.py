"""The prompts of every measurement, as token ids, the same for every engine; new ones each round, so no cache helps.

prompts = Prompts(tokenizer)
prompts.questions(16, 50, salt=3)       # sixteen chat prompts of exactly fifty tokens
"""

from __future__ import annotations

import random

from bimo.tokenizer.chat import encode_chat
from bimo.tokenizer.load import Tokenizer

__all__ = ["QUESTIONS", "REPEATS", "Prompts"]

QUESTIONS = (
    "Why is the sky blue at noon but red in the evening? Explain it to a child of ten.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "What are the main differences between a democracy and a monarchy?",
    "How does a refrigerator keep food cold, and why does it get warm at the back?",
    "Give me five tips for learning a new language when I have little time.",
    "Describe the life of a medieval blacksmith from morning to night.",
    "What should a beginner know before adopting a dog from a shelter?",
    "Explain how a bill becomes a law, step by step, in simple words.",
    "Write a polite email asking a landlord to repair a leaking tap.",
    "Why do leaves change colour in autumn, and why do they fall?",
    "Compare travelling by train and by plane for a journey of a day.",
    "What is inflation, and how does it change what people buy?",
    "Tell me how bread is made, from the field to the table.",
    "Which planets could be seen without a telescope, and how were they named?",
    "Write a dialogue between a river and a mountain about time.",
    "How do vaccines teach the body to fight a disease it has never met?",
)

# Answers to these repeat most of the prompt: an edit of code, a letter repaired, an answer quoted from a document, a
# summary. Each comes with the first words of its answer, since so small a model does not always begin as it is told.
_CODE = """class Account:
    def __init__(self, owner, balance):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        self.balance = self.balance + amount

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance = self.balance - amount

    def report(self):
        print(self.owner, "has", self.balance)
"""
_LETTER = """Dear Ms. Alvarez,
thank you for your letter of the 3rd of March. We have recieved the parts that you sent, and our workshop has checked \
them. Two of the five valves were damaged on the way, so we will send them back on Monday. Please tell us whether you \
would like a refund or new valves. The other parts are working well, and we are very happy with there quality. We hope \
to order again in the summer, when the new building will be ready. My colleague Ms. Okafor will visit your factory in \
April, and she would be glad to see the new machines.
Kind regards,
Tom Becker"""
_HANDBOOK = """The Harwick library opens at nine on weekdays and at ten on Saturdays; it is closed on Sundays and on \
public holidays. Members may borrow up to eight books for three weeks. A loan can be renewed twice, at the desk, by \
telephone or on the web page, unless another reader has asked for the book. Late books cost ten pence a day, and no \
more than four pounds in all. Lost books must be replaced or paid for. Children under twelve pay no fines, but they \
need a parent's signature to join. The reading room on the first floor is open to everybody, and its newspapers may be \
read there but not borrowed. Bags must be left in the lockers at the door, which need a coin of one pound."""
_REPORT = """The bridge over the Tarn was closed on Tuesday after engineers found cracks in two of its steel beams. \
The cracks were seen during a routine inspection that takes place every five years. The town council said that the \
repair will take about six weeks and will cost around two million euros. Until then, cars must use the old bridge at \
Lormont, nine kilometres to the north. Buses will run every twenty minutes, and pupils of the Saint Martin school will \
travel free of charge. The mayor asked drivers to be patient and to leave early in the morning."""
REPEATS = (
    (f"Write this class again with the name BankAccount.\n\n```python\n{_CODE}```", "```python\nclass BankAccount:"),
    (
        f"Correct the two spelling mistakes in this letter:\n\n{_LETTER}",
        "Dear Ms. Alvarez,\nthank you for your letter of the 3rd of March. We have received",
    ),
    (
        f"Document: {_HANDBOOK}\n\nQuestion: Which rules does the document give for borrowing? Quote the document.",
        "The Harwick library opens at nine on weekdays and at ten on Saturdays;",
    ),
    (
        f"Summarise this report by keeping its most important sentences as they are:\n\n{_REPORT}",
        "The bridge over the Tarn was closed",
    ),
)
_SUBJECTS = ("the captain", "an old clock", "her neighbour", "a grey heron", "the committee", "somebody", "the river")
_VERBS = ("forgot", "carried", "described", "counted", "painted", "waited for", "believed in", "wrote about")
_OBJECTS = ("a basket of pears", "the northern road", "seven letters", "the price of salt", "a broken window", "snow")
_TIMES = ("before dawn", "in the third winter", "without a word", "near the harbour", "while it rained", "at noon")


class Prompts:
    """Makes prompts for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        first, second = (self.chat(word) for word in ("one", "two two"))
        same = 0
        while first[-1 - same] == second[-1 - same]:
            same += 1
        self._ending = first[len(first) - same :]  # what the chat template puts after the user's words

    def chat(self, text: str) -> list[int]:
        """A user's words in the model's chat template, ready to be answered."""
        return encode_chat(self.tokenizer, [{"role": "user", "content": text}])

    def questions(self, count: int, length: int, salt: int) -> list[list[int]]:
        """Ordinary questions, different ones, cut or filled to exactly `length` tokens, the template's ending whole."""
        prompts = []
        for number in range(count):
            question = QUESTIONS[(salt + number) % len(QUESTIONS)]
            ids = self.chat(f"{question} {self.prose(length, salt * 1000 + number)}")
            prompts.append(ids[: length - len(self._ending)] + self._ending)
        return prompts

    def repeats(self, salt: int) -> list[list[int]]:
        """`REPEATS`, with a system message that has the round's number."""
        prompts = []
        for question, beginning in REPEATS:
            system = {"role": "system", "content": f"You are a helpful AI assistant. This is request {salt}."}
            ids = encode_chat(self.tokenizer, [system, {"role": "user", "content": question}])
            prompts.append(ids + self.tokenizer.encode(beginning, add_special_tokens=False))
        return prompts

    def texts(self, count: int, length: int, salt: int) -> list[list[int]]:
        """Plain texts of exactly `length` tokens, different from their first words on."""
        return [self.tokenizer.encode(self.prose(length, salt * 1000 + n))[:length] for n in range(count)]

    def prose(self, words: int, seed: int) -> str:
        """At least `words` words of sentences that hardly repeat."""
        draw = random.Random(seed)
        sentences, made = [], 0
        while made < words:
            parts = (draw.choice(_SUBJECTS), draw.choice(_VERBS), draw.choice(_OBJECTS), draw.choice(_TIMES))
            sentences.append(f"{draw.randrange(10_000)}: {' '.join(parts)}.")
            made += 4
        return " ".join(sentences)
