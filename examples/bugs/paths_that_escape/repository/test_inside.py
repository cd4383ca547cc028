import unittest

from inside import is_inside


class InsideTest(unittest.TestCase):
    def test_below(self):
        self.assertTrue(is_inside("/srv/data", "a/b"))
        self.assertTrue(is_inside("/srv/data", "a/../b"))

    def test_above(self):
        self.assertFalse(is_inside("/srv/data", "../other"))
        self.assertFalse(is_inside("/srv/data", "/etc/passwd"))

    def test_a_neighbour_whose_name_begins_alike(self):
        self.assertFalse(is_inside("/srv/data", "../data-old/x"))
