import unittest

from slug import slug


class SlugTest(unittest.TestCase):
    def test_words(self):
        self.assertEqual(slug("  Two  Words! "), "two-words")

    def test_accents_are_dropped_and_letters_are_kept(self):
        self.assertEqual(slug("Crème brûlée"), "creme-brulee")

    def test_nothing_to_keep(self):
        self.assertEqual(slug("!!!"), "")
