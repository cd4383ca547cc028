import unittest

from intervals import union


class UnionTest(unittest.TestCase):
    def test_those_that_overlap(self):
        self.assertEqual(union([(5, 9), (1, 6)]), [(1, 9)])

    def test_neighbours_are_one(self):
        self.assertEqual(union([(1, 2), (3, 4)]), [(1, 4)])

    def test_a_gap_stays(self):
        self.assertEqual(union([(1, 2), (4, 5)]), [(1, 2), (4, 5)])

    def test_one_inside_another(self):
        self.assertEqual(union([(1, 9), (2, 3)]), [(1, 9)])
