"""Judges of tests: `table_judges:first` and `table_judges:second` are the first two of a list."""

import sys
import types


class Table:
    """Answers from a table by question; notes what it was asked."""

    template = "Answer the multiple-choice question. Question: {question} Choices: {choices} Answer:"

    def __init__(self, answers):
        self._answers, self.asked = answers, []

    def answer(self, image, question, choices):
        self.asked.append(question)
        inner = question.partition("Question: ")[2].rpartition(" Choices: ")[0] or question
        return self._answers[inner]

    def probability(self, image, question, accepted):
        self.asked.append(question)
        return self._answers[question]


def named(monkeypatch):
    """An empty list whose judges `table_judges` names."""
    judges = []
    module = types.SimpleNamespace(first=lambda: judges[0], second=lambda: judges[1])
    monkeypatch.setitem(sys.modules, "table_judges", module)
    return judges
