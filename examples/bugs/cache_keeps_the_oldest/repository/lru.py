"""A small cache that forgets what was used least recently."""

from collections import OrderedDict


class LRU:
    def __init__(self, size):
        self.size = size
        self._items = OrderedDict()

    def get(self, key, default=None):
        if key not in self._items:
            return default
        return self._items[key]

    def put(self, key, value):
        self._items[key] = value
        self._items.move_to_end(key)
        if len(self._items) > self.size:
            self._items.popitem(last=False)
