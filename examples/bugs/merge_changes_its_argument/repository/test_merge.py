import unittest

from merge import merge


class MergeTest(unittest.TestCase):
    def test_inner_values_are_laid_over(self):
        self.assertEqual(merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}), {"a": {"x": 1, "y": 3}})

    def test_the_base_stays_as_it_was(self):
        base = {"a": {"x": 1}, "b": 0}
        merge(base, {"a": {"x": 2}, "b": 1})
        self.assertEqual(base, {"a": {"x": 1}, "b": 0})
