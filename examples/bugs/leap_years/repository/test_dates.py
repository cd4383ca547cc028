import unittest

from dates import day_of_year


class DayOfYearTest(unittest.TestCase):
    def test_an_ordinary_year(self):
        self.assertEqual(day_of_year(2023, 12, 31), 365)

    def test_a_leap_year(self):
        self.assertEqual(day_of_year(2024, 3, 1), 61)

    def test_a_century_that_is_none(self):
        self.assertEqual(day_of_year(1900, 3, 1), 60)

    def test_a_century_that_is_one(self):
        self.assertEqual(day_of_year(2000, 12, 31), 366)
