import unittest

from graph import reachable


class ReachableTest(unittest.TestCase):
    def test_a_line(self):
        self.assertEqual(reachable({"a": ["b"], "b": ["c"]}, "a"), ["a", "b", "c"])

    def test_a_loop(self):
        self.assertEqual(reachable({"a": ["b"], "b": ["a"]}, "a"), ["a", "b"])

    def test_two_ways_to_one_node(self):
        self.assertEqual(reachable({"a": ["b", "c"], "b": ["d"], "c": ["d"]}, "a"), ["a", "b", "c", "d"])
