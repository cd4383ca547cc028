import unittest

from retrying import retry


def failing(times):
    left = [ValueError("no")] * times

    def call():
        if left:
            raise left.pop()
        return "yes"

    return call


class RetryTest(unittest.TestCase):
    def test_it_is_tried_so_many_more_times(self):
        self.assertEqual(retry(failing(2), 2), "yes")

    def test_the_last_error_is_raised(self):
        with self.assertRaises(ValueError):
            retry(failing(3), 2)

    def test_no_retry_is_one_call(self):
        self.assertEqual(retry(failing(0), 0), "yes")
