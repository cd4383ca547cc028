import unittest

from rows import split_row


class SplitRowTest(unittest.TestCase):
    def test_plain(self):
        self.assertEqual(split_row("a,b,,c"), ["a", "b", "", "c"])

    def test_a_comma_in_quotes(self):
        self.assertEqual(split_row('a,"b,c"'), ["a", "b,c"])

    def test_two_quotes_are_one(self):
        self.assertEqual(split_row('"say ""hi""",x'), ['say "hi"', "x"])

    def test_an_empty_field_in_quotes(self):
        self.assertEqual(split_row('"",x'), ["", "x"])
