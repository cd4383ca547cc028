import unittest

from roman import from_roman


class RomanTest(unittest.TestCase):
    def test_what_is_added(self):
        self.assertEqual(from_roman("III"), 3)
        self.assertEqual(from_roman("MDCLXVI"), 1666)

    def test_what_is_taken_away(self):
        self.assertEqual([from_roman(text) for text in ("IV", "IX", "XL", "MCMXCIV")], [4, 9, 40, 1994])
