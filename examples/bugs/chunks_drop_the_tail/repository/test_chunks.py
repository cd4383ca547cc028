import unittest

from chunks import chunks


class ChunksTest(unittest.TestCase):
    def test_whole_pieces(self):
        self.assertEqual(chunks([1, 2, 3, 4], 2), [[1, 2], [3, 4]])

    def test_a_shorter_last_piece(self):
        self.assertEqual(chunks([1, 2, 3, 4, 5], 2), [[1, 2], [3, 4], [5]])

    def test_nothing(self):
        self.assertEqual(chunks([], 3), [])

    def test_a_size_of_nothing_is_refused(self):
        with self.assertRaises(ValueError):
            chunks([1], 0)
