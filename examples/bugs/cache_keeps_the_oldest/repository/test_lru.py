import unittest

from lru import LRU


class LRUTest(unittest.TestCase):
    def test_it_forgets_what_was_put_first(self):
        cache = LRU(2)
        for key in "abc":
            cache.put(key, key.upper())
        self.assertIsNone(cache.get("a"))
        self.assertEqual(cache.get("c"), "C")

    def test_what_was_just_read_is_kept(self):
        cache = LRU(2)
        cache.put("a", 1)
        cache.put("b", 2)
        cache.get("a")
        cache.put("c", 3)
        self.assertEqual(cache.get("a"), 1)
        self.assertIsNone(cache.get("b"))
