"""Walks over graphs."""


def reachable(graph, start):
    """All nodes that can be reached from `start`, with itself, in the order of the walk."""
    seen = []
    todo = [start]
    while todo:
        node = todo.pop(0)
        seen.append(node)
        todo += [following for following in graph.get(node, []) if following not in seen]
    return seen
