import unittest

from stats import median


class MedianTest(unittest.TestCase):
    def test_an_odd_number(self):
        self.assertEqual(median([9, 1, 5]), 5)

    def test_an_even_number(self):
        self.assertEqual(median([4, 1, 3, 2]), 2.5)

    def test_none(self):
        with self.assertRaises(ValueError):
            median([])
